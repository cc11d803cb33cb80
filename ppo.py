"""Stage 3: PPO. The SFT policy learns to write what the reward model likes, without moving too far from where it began.

    python ppo.py                                    # the demo: runs every stage that is missing, then PPO
    python ppo.py --sft path/to/sft --rm path/to/rm --prompts prompts.json --demonstrations demos.json --ptx_coef 0.1
    torchrun --nproc_per_node=8 ppo.py ...           # on 8 GPUs, which share one of each model

Four models: the actor (the policy that learns), the critic (predicts the reward that is still to come), the reward model
and the reference (the SFT policy); the last two are frozen. With --lora_rank the reference is the actor with its adapters
off, and the reward model the critic with its adapters off and the head that it began with: two LLaMAs instead of four. Each
update

    1. makes experience: the actor answers a batch of prompts, the reward model scores the answers, actor and reference
       say how likely each token was, the critic what it expected;
    2. turns scores into rewards and rewards into advantages (the section "The maths");
    3. takes a few passes of clipped gradient steps over that experience, actor and critic each with its own optimizer.

Reward of the token at t:   r_t = - kl_coef KL_t  +  [t is the last token] score            (Ziegler et al. 2019, eq. 2)
Actor:    minimize   L_clip - entropy_coef H + ptx_coef L_ptx       (Schulman et al. 2017, eq. 7 and 9; InstructGPT, eq. 2)
Critic:   minimize   L_value                                        (clipped, as in OpenAI's lm-human-preferences)

Writes runs/ppo: the actor as a Hugging Face directory, the critic in runs/ppo/critic, metrics.csv and curves.png.
"""

import argparse
import math
import os
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from model import (Metrics, RANK, ScalarHead, Signals, WORLD, add_lora, autocast, before_lora, clip_gradients, collate, common_options,
                   draw_curves, dry_run, encode_prompts, encode_records, gathered, generate, keep_export, largest, left_pad, load_judge,
                   load_llama, load_scalar_head, load_tokenizer, lora_options, my_parts, open_run, place, positive, read_records, restore,
                   save_checkpoint, save_state, settings, start_processes, stop, total, trainable, wait_for_all)

HERE = os.path.dirname(os.path.abspath(__file__))
DEMO = dict(sft="runs/sft", rm="runs/rm", prompts="data/rlhf_training_data.json", eval_prompts="data/rlhf_training_data_eval.json",
            demonstrations="data/actor_training_data.json", gold=os.path.join(HERE, "data_gen.py"), updates=80, batch_size=64,
            minibatch_size=32, micro_batch_size=32, ppo_epochs=2, lr=2e-4, critic_lr=1e-3, kl_coef=0.1, ptx_coef=0.1,
            max_new_tokens=40, max_prompt_length=128, eval_every=20, eval_number=300)
# For a pretrained LLaMA. kl_coef 0.05, 4 passes, lambda 0.95 and clip 0.2 are those of Stiennon et al. 2020 (appendix B.1);
# the learning rates and batch are of the size that today's small-scale runs use, far below those of a cluster
DEFAULT = dict(sft="runs/sft", rm="runs/rm", updates=1000, batch_size=64, minibatch_size=16, micro_batch_size=4, ppo_epochs=4,
               lr=1e-6, critic_lr=5e-6, kl_coef=0.05, ptx_coef=0.0, max_new_tokens=128, max_prompt_length=384, eval_every=20,
               eval_number=64)


# ---------------------------------------------------------------------------------------------------------------------
# The maths. (B, T) are B responses of up to T tokens; `mask` is 1 on the tokens of the response, up to and including its
# end-of-sequence, and 0 after it. What stands outside the mask, be it inf or nan, never changes a result.

LARGEST_LOG = 20.0  # a log ratio is cut to +-20 before exp: e^20 is far outside every clip range and far from overflow


def inside(x, mask):
    """x in float32 with zeros outside the mask."""
    return torch.where(mask.bool(), x.float(), 0.0)


def tempered_log_softmax(logits, temperature):
    """log softmax(logits / temperature) in float32. Dividing by 1 would be a pass over the largest tensor for nothing."""
    return torch.log_softmax(logits.float() if temperature == 1 else logits.float() / temperature, dim=-1)


def logprobs_from_logits(logits, tokens, temperature=1.0):
    """log pi(token) under softmax(logits / temperature).

    `logits` (..., V), `tokens` (...) -> (...) float32, nats. The temperature must be that of sampling: only then is this
    the log probability with which the token was drawn.
    """
    return tempered_log_softmax(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits, temperature=1.0):
    """H = - sum_v p_v log p_v with p = softmax(logits / temperature). `logits` (..., V) -> (...) float32, nats."""
    logprobs = tempered_log_softmax(logits, temperature)
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)  # a word ruled out, at -inf, adds 0 and not nan


def masked_mean(x, mask):
    """Mean of x (B, T) over the mask of the whole batch -> scalar, float32. (Not a mean of the rows' means, in which a
    token of a short response would weigh more.) 0 for an empty mask."""
    return inside(x, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(variance + 1e-8) over the mask of the whole batch, plus the mean again if not `shift_mean`.

    `x`, `mask` (B, T) -> (B, T), 0 outside the mask. One mean and one deviation over all tokens, so that responses stay
    comparable with each other. All-equal x gives 0.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((inside(x, mask) - mean).square(), mask)
    whitened = (inside(x, mask) - mean) * torch.rsqrt(variance + 1e-8)
    return inside(whitened if shift_mean else whitened + mean, mask)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Per-token estimate of KL(pi || ref), in nats, from tokens sampled from pi (Schulman 2020, "Approximating KL divergence").

    With d = log pi - log ref:   k1 = d (unbiased, may be negative);   k2 = d^2 / 2 (biased, less variance);
    k3 = e^-d - 1 + d (unbiased and never negative). `logprobs`, `ref_logprobs` (B, T) -> (B, T) float32.
    """
    d = logprobs.float() - ref_logprobs.float()
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        return torch.expm1((-d).clamp(-LARGEST_LOG, LARGEST_LOG)) + d
    raise ValueError(f"kind must be k1, k2 or k3, not {kind!r}")


def token_rewards(scores, kl, mask, kl_coef):
    """r_t = -kl_coef KL_t, plus the score at the last token of the response (Ziegler et al. 2019, eq. 2, per token).

    `scores` (B,), `kl`, `mask` (B, T) -> (B, T) float32, 0 outside the mask.
    """
    rewards = -kl_coef * inside(kl, mask)
    last = (mask.sum(1).long() - 1).clamp(min=0)
    return inside(rewards.scatter_add(1, last[:, None], scores.float()[:, None]), mask)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), backwards over the response:

        delta_t = r_t + gamma V_{t+1} - V_t           A_t = delta_t + gamma lam A_{t+1}         V = A = 0 after the end

    `rewards`, `values`, `mask` (B, T) -> advantages, returns G = advantages + values, both (B, T) float32, 0 outside the
    mask. lam = 0 gives the one-step TD error, lam = 1 the discounted sum of rewards minus V_t.
    """
    rewards, values = inside(rewards, mask), inside(values, mask)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros(len(rewards), device=rewards.device)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = next_advantage = (delta + gamma * lam * next_advantage) * mask[:, t]
        next_value = values[:, t]
    return advantages, inside(advantages + values, mask)


def policy_loss(logprobs, old_logprobs, advantages, mask, clip):
    """PPO's clipped surrogate, negated (Schulman et al. 2017, eq. 7): with rho = exp(logprobs - old_logprobs),

        L = - mean  min(rho A, clamp(rho, 1 - clip, 1 + clip) A)

    All (B, T); the gradient flows through `logprobs` only -> loss, and clip_fraction: the share of tokens whose term is
    the clipped one, which push no further.
    """
    log_ratio = inside(logprobs, mask) - inside(old_logprobs, mask).detach()
    ratio = torch.exp(log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG))
    advantages = inside(advantages, mask).detach()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    return -masked_mean(torch.min(unclipped, clipped), mask), masked_mean((clipped < unclipped).float(), mask)


def value_loss(values, old_values, returns, mask, clip):
    """Half the larger of two squared errors: of V, and of V kept within +-clip of what it was at the rollout.

        L = 1/2 mean  max((V - G)^2, (V_old + clamp(V - V_old, -clip, clip) - G)^2)          G: the returns

    As in OpenAI's lm-human-preferences. All (B, T); the gradient flows through `values` only -> loss, clip_fraction.
    """
    values, old_values, returns = inside(values, mask), inside(old_values, mask).detach(), inside(returns, mask).detach()
    clipped = values.clamp(old_values - clip, old_values + clip)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask), masked_mean((clipped_error > error).float(), mask)


def ptx_loss(logits, labels):
    """Next-token cross entropy on demonstration text, the pretraining term of InstructGPT's eq. 2 (PPO-ptx).

    `logits` (B, T, V); `labels` (B, T): the tokens themselves, -100 where none is to be learned. The logits at t predict
    the label at t + 1 -> the mean over all labels that count, nats; 0 if none does.
    """
    targets = labels[:, 1:]
    counts = targets != -100
    return F.cross_entropy(logits[:, :-1][counts].float(), targets[counts], reduction="sum") / counts.sum().clamp(min=1)


class AdaptiveKL:
    """The KL coefficient as a proportional controller (Ziegler et al. 2019, section 2.2):

        e = clamp(KL / target - 1, -0.2, 0.2)          coef <- coef (1 + e n / horizon)

    `target` in nats per response; `n` responses since the last update; `horizon` in responses.
    """

    def __init__(self, coef, target, horizon):
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl, n):
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * n / self.horizon


# ---------------------------------------------------------------------------------------------------------------------
# Experience: what the four models say about a batch of prompts

def response_logits(actor, input_ids, is_completion):
    """The logits (N, V) with which the N response tokens were chosen, row after row, and these tokens (N,).

    `input_ids`, `is_completion` (B, L) from `collate`. The hidden state at t predicts token t + 1, and only those that
    predict a response token go through the vocabulary projection: nothing here has the size (B, L, V).
    """
    hidden = actor.model(input_ids, use_cache=False).last_hidden_state
    return actor.lm_head(hidden[:, :-1][is_completion[:, 1:]]), input_ids[:, 1:][is_completion[:, 1:]]


def to_rows(flat, mask):
    """(N,) values, row after row -> (B, T) with zeros outside the mask."""
    return torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device).masked_scatter(mask.bool(), flat)


def micro_batches(rows, lengths, size):
    """Cut the rows into parts, similar lengths together, so that each is trimmed to its longest -> [(part, 1)]; of many
    processes' parts those of this one (see model.my_parts). A part has at most as many tokens, padding included, as `size`
    rows of the longest of `lengths`: many short responses go through in one pass."""
    rows = sorted(rows, key=lambda i: lengths[i])
    if WORLD > 1:  # all processes need the same number of parts: `size` rows each
        return my_parts(rows, size)
    parts, most = [[]], size * max(lengths)
    for i in rows:
        if (len(parts[-1]) + 1) * lengths[i] > most:
            parts.append([])
        parts[-1].append(i)
    return [(part, 1) for part in parts]


@torch.no_grad()
def answer(actor, prompts, tokenizer, args, temperature, generator=None):
    """The actor's responses to tokenized prompts -> [tokens of each], and `Generation` (see model.generate)."""
    (rows, counts), = my_parts(range(len(prompts)), len(prompts))  # with one process, all
    if WORLD > 1 and generator:  # each samples with a stream of its own, drawn from the common one
        seeds = torch.randint(2 ** 62, (WORLD,), generator=generator, device=args.device)
        generator = torch.Generator(args.device).manual_seed(seeds[RANK].item())
    with autocast(args), gathered(actor, not args.shard_rollout):
        out = generate(actor, *left_pad([prompts[i] for i in rows], tokenizer.pad_token_id, args.device), args.max_new_tokens,
                       tokenizer.eos_token_id, temperature=temperature, generator=generator)
    longest = largest(out.mask.shape[1])  # the rows of another process may have ended later
    for name, own in vars(out).items():  # every process gets the answers of all
        everyones = own.new_zeros(len(prompts), longest)
        everyones[rows, :own.shape[1]] = counts * own
        setattr(out, name, total(everyones))
    return [row[:n].tolist() for row, n in zip(out.tokens, out.mask.sum(1).long())], out


@torch.no_grad()
def score_responses(reward_model, prompts, responses, tokenizer, args):
    """The reward model's score (B,) of each response, read at its last token, whatever that is."""
    lengths, scores = [len(p) + len(r) for p, r in zip(prompts, responses)], torch.zeros(len(prompts), device=args.device)
    for rows, counts in micro_batches(range(len(prompts)), lengths, args.micro_batch_size):
        input_ids, _ = collate([prompts[i] for i in rows], [responses[i] for i in rows], tokenizer.pad_token_id, args.device)
        with autocast(args):
            values = reward_model(input_ids)
        scores[rows] = counts * values[range(len(rows)), [lengths[i] - 1 for i in rows]]
    return total(scores)


@torch.no_grad()
def make_experience(actor, critic, reward_model, ref, prompts, tokenizer, args, kl_coef, generator):
    """Answer the prompts, and turn what the other three models say of the answers into advantages and returns.

    `prompts`: B lists of tokens -> the experience, a dict of `prompts`, `responses` (lists of tokens), `lengths` of both
    together, and `mask`, `old_logprobs`, `old_values`, `advantages`, `returns`, all (B, T); and statistics for the log.
    """
    responses, out = answer(actor, prompts, tokenizer, args, args.temperature, generator)
    mask, old_logprobs = out.mask, out.logprobs  # of the distribution that was sampled from: no second pass needed
    scores = score_responses(reward_model, prompts, responses, tokenizer, args)
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses)]
    ref_logprobs, values = torch.zeros_like(mask), torch.zeros_like(mask)
    for rows, counts in micro_batches(range(len(prompts)), lengths, args.micro_batch_size):
        input_ids, is_completion = collate([prompts[i] for i in rows], [responses[i] for i in rows], tokenizer.pad_token_id, args.device)
        with autocast(args):
            logits, tokens = response_logits(ref, input_ids, is_completion)
            ref_logprobs[rows] = counts * to_rows(logprobs_from_logits(logits, tokens, args.temperature), mask[rows])
            # the value of the state in which a token is chosen stands one position before that token
            values[rows] = counts * to_rows(critic(input_ids)[:, :-1][is_completion[:, 1:]], mask[rows])
    ref_logprobs, values = total(ref_logprobs), total(values)  # from here on every process has the whole batch
    ended = torch.tensor([r[-1] == tokenizer.eos_token_id for r in responses], device=args.device)
    kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_kind)
    # A response that never ended was cut anywhere, which the reward model never saw: it costs a fixed penalty
    # (detail of lm-human-preferences, there a fixed score; missing_eos_penalty in TRL)
    penalized = scores - args.no_eos_penalty * ~ended
    rewards = token_rewards(penalized, kl, mask, kl_coef)
    if args.whiten_rewards:  # scaled about their mean, which stays: shifting it would pay for long or for short responses
        # (lm-human-preferences; Huang et al. 2024)
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    log_ratio = inside(old_logprobs - ref_logprobs, mask)
    unexplained, variance = (x[mask.bool()].var(unbiased=False) for x in (returns - values, returns))
    statistics = dict(
        score=scores.mean().item(), kl=log_ratio.sum(1).mean().item(), kl_coef=kl_coef,
        kl_error=log_ratio.sum(1).var(unbiased=len(prompts) > 1).div(len(prompts)).sqrt().item(),  # standard error of that mean; 0: unknown
        objective=(penalized - kl_coef * inside(kl, mask).sum(1)).mean().item(),
        # 1: the critic knows the return; 0: no better than the mean return; below: worse than it
        explained_variance=1 - (unexplained / variance.clamp(min=1e-8)).item(),
        response_length=mask.sum(1).mean().item(), ended=ended.float().mean().item())
    # whitened over the whole rollout batch (as Huang et al. 2024's code does; lm-human-preferences does it in each mini-batch)
    return dict(prompts=prompts, responses=responses, lengths=lengths, mask=mask, old_logprobs=old_logprobs, old_values=values,
                advantages=advantages if args.no_whiten_advantages else masked_whiten(advantages, mask), returns=returns), statistics


# ---------------------------------------------------------------------------------------------------------------------
# The update: a few passes of gradient steps over the experience

class Deck:
    """Deals indices 0..size-1 in a shuffled order, each once before any comes again."""

    def __init__(self, size, seed):
        self.size, self.generator, self.left = size, torch.Generator().manual_seed(seed), []

    def deal(self, n):
        while len(self.left) < n:
            self.left += torch.randperm(self.size, generator=self.generator).tolist()
        dealt, self.left = self.left[:n], self.left[n:]
        return dealt


def finite(value, name, args):
    """The float, if it is one; otherwise the end of the run, with the last good checkpoint left as it is."""
    value = float(value)
    if not math.isfinite(value):
        stop(f"{name} is {value}; what was saved last in {args.out} stays. Lower --lr or --critic_lr, or look at the score "
             "and the KL in metrics.csv", code=1)
    return value


def train_minibatch(actor, critic, actor_optimizer, critic_optimizer, experience, rows, demonstrations, tokenizer, args):
    """One optimizer step of actor and critic on the given rows of the experience, and on demonstrations if ptx_coef.

    Micro-batches only bound the memory: each loss is weighted by its share of the tokens of the whole mini-batch.
    Returns the statistics of the mini-batch.
    """
    all_tokens = experience["mask"][rows].sum()
    s = dict.fromkeys(["policy_loss", "value_loss", "ptx_loss", "entropy", "clip_fraction", "value_clip_fraction", "approx_kl",
                       "largest_ratio"], 0.0)
    for part, counts in micro_batches(rows, experience["lengths"], args.micro_batch_size):
        input_ids, is_completion = collate([experience["prompts"][i] for i in part], [experience["responses"][i] for i in part],
                                           tokenizer.pad_token_id, args.device)
        mask = experience["mask"][part]
        old_logprobs, advantages, old_values, returns = (
            experience[name][part] for name in ("old_logprobs", "advantages", "old_values", "returns"))
        share = counts * mask.sum() / all_tokens
        with autocast(args):
            logits, tokens = response_logits(actor, input_ids, is_completion)
            logprobs = to_rows(logprobs_from_logits(logits, tokens, args.temperature), mask)
            with torch.set_grad_enabled(args.entropy_coef != 0):  # mostly it is only looked at
                entropy = to_rows(entropy_from_logits(logits, args.temperature), mask)
            del logits  # the largest tensor of the step: what the backward pass needs of it, it holds itself
        loss, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, mask, args.clip)
        entropy = masked_mean(entropy, mask)
        ((loss - args.entropy_coef * entropy) * share).backward()  # a bonus: entropy is to grow (Schulman et al. 2017, eq. 9)
        with autocast(args):
            values = to_rows(critic(input_ids)[:, :-1][is_completion[:, 1:]], mask)
        v_loss, value_clip_fraction = value_loss(values, old_values, returns, mask, args.value_clip)
        (v_loss * share).backward()
        approx_kl = masked_mean(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask)  # KL(old || new): tokens are from the old
        for name, value in dict(policy_loss=loss, value_loss=v_loss, entropy=entropy, clip_fraction=clip_fraction,
                                value_clip_fraction=value_clip_fraction, approx_kl=approx_kl).items():
            s[name] += (value.detach() * share).item()
        largest_log = inside(logprobs.detach() - old_logprobs, mask).max().item()
        s["largest_ratio"] = max(s["largest_ratio"], math.exp(min(largest_log, LARGEST_LOG)))
    if demonstrations:
        # PPO-ptx (InstructGPT eq. 2): keep writing what people wrote. Inputs, labels and mask come from the same records.
        all_targets = sum(len(completion) for _, completion, _ in demonstrations)
        lengths = [len(prompt) + len(completion) for prompt, completion, _ in demonstrations]
        for part, counts in micro_batches(range(len(demonstrations)), lengths, args.micro_batch_size):
            prompts, completions, _ = zip(*(demonstrations[i] for i in part))
            input_ids, is_completion = collate(prompts, completions, tokenizer.pad_token_id, args.device)
            start = min(map(len, prompts)) - 1  # no row has a target before this position
            labels = input_ids.masked_fill(~is_completion, -100)[:, start:]
            with autocast(args):
                logits = actor.lm_head(actor.model(input_ids, use_cache=False).last_hidden_state[:, start:])
            loss = ptx_loss(logits, labels) * (counts * sum(map(len, completions))) / all_targets
            (args.ptx_coef * loss).backward()
            s["ptx_loss"] += loss.item()
    s = {name: (largest if name == "largest_ratio" else total)(value) for name, value in s.items()}  # over all processes
    for name in ("policy_loss", "value_loss", "ptx_loss"):
        finite(s[name], name.replace("_", " "), args)
    # one common length limit for the whole gradient of a model (Huang et al. 2022, global gradient clipping)
    for name, model, optimizer in (("actor", actor, actor_optimizer), ("critic", critic, critic_optimizer)):
        finite(clip_gradients(model, args.max_grad_norm), f"the gradient of the {name}", args)
        optimizer.step()
        optimizer.zero_grad()
    return s


# When a run counts as unhealthy. In brackets the worst that the demo shows, with which all is well; other healthy runs need the
# room between the two.
KL_ERRORS = 5.0        # standard errors below 0 over 10 updates: under 1 run in 50 by chance, even with 2 responses a batch
KL_A_TOKEN = 0.5       # nats [0.21]: every token, on average, 1.6 times as likely as for the SFT model
KL_A_RESPONSE = 5.0    # nats [1.9]: short responses, such as the demo's, may move further a token
CLIPPED = 0.3          # [0.05] only ratios that went too far where the advantage wants them count, about half of those out of range
ENTROPY_LEFT = 0.2     # share of the first entropy [0.8]; a policy that answers better is surer, but not five times
CRITIC_YOUNG = 20      # updates (or half of a shorter run) in which a critic may be worse than the mean [1]
ENDED = 0.5            # share of the responses [1.0]
GOLD_LOST = 0.05       # share of the best gold score; two evaluations in a row, since one may be bad luck


def unhealthy(rows, first, updates):
    """What looks wrong in a run of so many `updates` -> {short name: likely cause, and the knob}.

    `rows`: those of metrics.csv so far, dicts, the newest last; `first`: the SFT model's evaluation, {} if there is none.
    """
    row, wrong = rows[-1], {}

    def recent(name, n=10):  # mean of the last n updates, which says more than one
        values = [r[name] for r in rows[-n:]]
        return sum(values) / len(values)

    kl_error = math.sqrt(sum(r["kl_error"] ** 2 for r in rows[-10:])) / len(rows[-10:])  # 0: batches of 1, or no move yet
    if kl_error and recent("kl") < -KL_ERRORS * kl_error - 1e-3:  # 1e-3: rounding, while the two policies are the same
        wrong["negative KL"] = (f"the KL is {recent('kl'):.3f} +- {kl_error:.3f}, which no true KL is: the log probabilities are not "
                                "those of the distribution that was sampled from; look at --temperature, and at what you changed in "
                                "generation")
    if row["kl"] > max(KL_A_RESPONSE, KL_A_TOKEN * row["response_length"]):
        wrong["KL running away"] = (f"the KL is {row['kl']:.1f} nats per response: the policy leaves the SFT model behind; raise --kl_coef "
                                    "or lower --lr")
    if row["clip_fraction"] > CLIPPED:
        wrong["clipping"] = (f"{row['clip_fraction']:.0%} of the tokens are clipped, so most ratios left the clip range: the steps are "
                             "too large; lower --lr or --ppo_epochs")
    if row["entropy"] < ENTROPY_LEFT * rows[0]["entropy"]:
        wrong["entropy"] = (f"the entropy fell from {rows[0]['entropy']:.3f} to {row['entropy']:.3f} nats per token: the policy hardly "
                            "explores any more; raise --kl_coef or --entropy_coef, or lower --lr")
    if len(rows) > min(CRITIC_YOUNG, updates / 2) and recent("explained_variance") < 0:
        wrong["critic"] = (f"after {len(rows)} updates the critic explains less than the mean return would (explained variance "
                           f"{recent('explained_variance'):.2f}): raise --critic_lr, or --batch_size")
    if len(rows) >= 5 and recent("ended", 5) < ENDED:
        wrong["cut responses"] = (f"{1 - recent('ended', 5):.0%} of the responses are cut at the limit: raise --max_new_tokens, or train "
                                  "the SFT model longer, until it ends its answers")
    judged = [r for r in [first, *rows] if "eval_gold" in r]
    if judged and judged[-1] is row:
        best = max(judged, key=lambda r: r["eval_gold"])
        enough = best["eval_gold"] - GOLD_LOST * max(1.0, abs(best["eval_gold"]))
        if all(r["eval_score"] > best["eval_score"] and r["eval_gold"] < enough for r in judged[-2:]):
            wrong["over-optimization"] = (f"the reward model's score rises while the gold score falls, from {best['eval_gold']:.2f} to "
                                          f"{row['eval_gold']:.2f} (Gao et al. 2023): raise --kl_coef, stop here, or train the reward "
                                          "model on more data")
    return wrong


# ---------------------------------------------------------------------------------------------------------------------
# The run

def parse(argv):
    parser = argparse.ArgumentParser(description="Stage 3: PPO.")
    group = parser.add_argument_group("what goes in and out")
    group.add_argument("--sft", help="the SFT model: actor and reference begin as it (default: runs/sft)")
    group.add_argument("--rm", help="the reward model: the critic begins as it (default: runs/rm)")
    group.add_argument("--critic", choices=["rm", "sft"], default="rm",
                       help="where the critic begins: the reward model, or the SFT model with a new head")
    group.add_argument("--prompts", help="prompts to practise on: user_input")
    group.add_argument("--eval_prompts", help="held-out prompts for the greedy evaluation")
    group.add_argument("--demonstrations", help="for the PTX term: user_input, completion")
    group.add_argument("--gold", help="a Python file with score(user_input, completion) -> float: a judge that PPO never learns from")
    group.add_argument("--out", default="runs/ppo", help="run directory")
    group = parser.add_argument_group("experience")
    group.add_argument("--updates", type=positive, help="rounds of experience and training")
    group.add_argument("--batch_size", type=positive, help="prompts a round")
    group.add_argument("--max_prompt_length", type=positive, help="tokens; a longer prompt loses its beginning")
    group.add_argument("--max_new_tokens", type=positive, help="tokens; a longer response is cut")
    group.add_argument("--temperature", type=float, default=1.0, help="of sampling, and so of all log probabilities")
    group = parser.add_argument_group("reward")
    group.add_argument("--kl_coef", type=float, help="score units a nat of KL to the reference")
    group.add_argument("--kl_kind", choices=["k1", "k2", "k3"], default="k1", help="estimator of the KL in the reward")
    group.add_argument("--kl_target", type=float, help="nats per response: adapt kl_coef to hold the KL there (default: kl_coef stays)")
    group.add_argument("--kl_horizon", type=positive, default=10000, help="responses over which kl_coef adapts")
    group.add_argument("--no_eos_penalty", type=float, default=1.0, help="taken off the score of a response that did not end")
    group.add_argument("--whiten_rewards", action="store_true", help="scale the rewards about their mean to deviation 1 over the batch")
    group.add_argument("--gamma", type=float, default=1.0, help="discount of later rewards; 1: a response counts as a whole")
    group.add_argument("--lam", type=float, default=0.95, help="lambda of GAE: 0 trusts the critic, 1 the sampled rewards")
    group.add_argument("--no_whiten_advantages", action="store_true", help="leave the advantages as they are")
    group = parser.add_argument_group("training")
    group.add_argument("--ppo_epochs", type=positive, help="passes over each round's experience")
    group.add_argument("--minibatch_size", type=positive, help="responses an optimizer step")
    group.add_argument("--micro_batch_size", type=positive,
                       help="responses of the longest kind per forward pass (the decoding has all of the batch): bounds the memory, "
                            "changes nothing else")
    group.add_argument("--lr", type=float, help="learning rate of the actor; falls to 0 in a line over the run")
    group.add_argument("--critic_lr", type=float, help="learning rate of the critic, likewise")
    group.add_argument("--clip", type=float, default=0.2, help="how far the probability ratio may move, as a share")
    group.add_argument("--value_clip", type=float, default=0.2, help="how far the value may move, in score units")
    group.add_argument("--entropy_coef", type=float, default=0.0, help="weight of the entropy bonus")
    group.add_argument("--ptx_coef", type=float, help="weight of the cross entropy on demonstrations; 0: without")
    group.add_argument("--target_kl", type=float, help="nats per token: end an update early when old and new policy are this far apart")
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="longer gradients are scaled down to this")
    group = parser.add_argument_group("looking")
    group.add_argument("--eval_every", type=positive, help="updates between greedy evaluations, at which the models are saved too")
    group.add_argument("--eval_number", type=positive, help="held-out prompts to evaluate on")
    group = parser.add_argument_group("many processes")
    group.add_argument("--shard_rollout", action="store_true",
                       help="gather layer by layer in the rollout too, anew for each token: slow, for an actor that one GPU cannot hold")
    lora_options(parser)
    common_options(parser)
    args = parser.parse_args(argv)
    if args.temperature <= 0:
        parser.error("--temperature must be above 0: PPO learns from samples")
    demo = not args.sft and not args.rm
    if not demo and not args.prompts and not args.dry_run:
        parser.error("--sft and --rm need --prompts: the built-in ones are for the demo")
    return settings(args, DEMO if demo else DEFAULT, "ppo.py, the demo" if demo else "ppo.py"), demo


def run_missing_stages(args):
    """The stages of the demo whose result is not at its default place; one that was interrupted goes on."""
    import data_gen  # only here does one stage know another
    import sft
    import train_rm
    if not os.path.exists("data/tokenizer/tokenizer.model"):
        print("data/ is missing: running data_gen.py", flush=True)
        if RANK == 0:
            data_gen.main(["--seed", str(args.seed)])
    wait_for_all()
    for stage, folder in ((sft, "runs/sft"), (train_rm, "runs/rm")):
        if not os.path.exists(f"{folder}/config.json"):
            print(f"{folder} is missing: running {stage.__name__}.py", flush=True)
            begun = os.path.exists(f"{folder}/last/state.json")
            stage.main(["--seed", str(args.seed), "--device", args.device, "--dtype", args.dtype, "--resume" if begun else "--overwrite"])


def evaluate(actor, reward_model, records, prompts, gold, tokenizer, args):
    """Greedy answers to held-out prompts -> their texts, and mean scores of the reward model and of the gold judge."""
    texts, scores = [], []
    for start in range(0, len(prompts), args.batch_size):
        part = prompts[start:start + args.batch_size]
        responses, _ = answer(actor, part, tokenizer, args, temperature=0)
        scores += score_responses(reward_model, part, responses, tokenizer, args).tolist()
        texts += [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]
    result = dict(eval_score=sum(scores) / len(scores))
    if gold:
        result["eval_gold"] = sum(gold(record["user_input"], text) for record, text in zip(records, texts)) / len(texts)
    return texts, result


def main(argv=None):
    args, demo = parse(argv)
    if args.dry_run:
        dry_run("ppo", args.sft, args)
    start_processes(args)
    state = open_run(args.out, args)
    if demo:  # a path that the user named is never made up
        run_missing_stages(args)
    for path, script in (("runs/sft", "sft.py"), ("runs/rm", "train_rm.py")):
        if path in (args.sft, args.rm) and not os.path.isdir(path):
            stop(f"{path}: missing; run python {script} first")
    torch.manual_seed(args.seed)
    generator = torch.Generator(args.device).manual_seed(args.seed)

    tokenizer = load_tokenizer(args.sft)
    if load_tokenizer(args.rm).get_vocab() != tokenizer.get_vocab():
        stop(f"{args.rm}: its tokenizer is not that of {args.sft}; train the reward model from this SFT model")
    # LLaMA has no dropout, and all four are in eval mode besides: a ratio must differ from 1 by training alone (Huang et al.
    # 2024). The frozen ones run in the same precision as the actor, so that the KL begins at 0.
    lora = args.lora_rank, args.lora_alpha, args.lora_targets, args.base_dtype
    actor = place(add_lora(load_llama(args.sft, tokenizer), *lora), args)
    # the critic begins as the reward model (InstructGPT, appendix C.4), which knows already what is good
    critic = load_scalar_head(args.rm) if args.critic == "rm" else ScalarHead(load_llama(args.sft, tokenizer).model)
    critic = place(add_lora(critic, *lora), args)
    # with LoRA two copies of LLaMA are enough: what is frozen is what learns, with its adapters off
    ref = before_lora(actor) if args.lora_rank else place(load_llama(args.sft, tokenizer).requires_grad_(False), args)
    shared = args.lora_rank and args.critic == "rm"
    reward_model = before_lora(critic) if shared else place(load_scalar_head(args.rm).requires_grad_(False), args)

    room = actor.config.max_position_embeddings - args.max_new_tokens
    if room < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the model's context is "
             f"{actor.config.max_position_embeddings} tokens")
    limit = min(args.max_prompt_length, room)

    def read_prompts(path, number=None):
        records = read_records(path, "user_input")[:number]
        return records, encode_prompts([record["user_input"] for record in records], tokenizer, limit, path)

    _, prompts = read_prompts(args.prompts)
    eval_records, eval_prompts = read_prompts(args.eval_prompts, args.eval_number) if args.eval_prompts else ([], [])
    demonstrations = []
    if args.ptx_coef:
        if not args.demonstrations:
            stop("--ptx_coef needs --demonstrations")
        records = read_records(args.demonstrations, "user_input", "completion")
        demonstrations = encode_records(records, tokenizer, limit + args.max_new_tokens, args.demonstrations)
    elif args.demonstrations:
        print(f"{args.demonstrations} is not used: --ptx_coef is 0")
    gold = load_judge("--gold", args.gold) if args.gold else None
    if gold:
        for number, record in enumerate(eval_records, 1):
            try:
                gold(record["user_input"], "")
            except ValueError as error:
                stop(f"{args.eval_prompts}: record {number}: {args.gold} cannot judge it ({error}); without a judge: --gold ''")

    # Adam's epsilon 1e-5 instead of 1e-8: early second moments are tiny, and steps explode (Huang et al. 2022, "The 37
    # implementation details of PPO"; Huang et al. 2024 for RLHF)
    actor_optimizer = torch.optim.AdamW(trainable(actor), lr=args.lr, eps=1e-5, weight_decay=0.0, fused=WORLD == 1)
    critic_optimizer = torch.optim.AdamW(trainable(critic), lr=args.critic_lr, eps=1e-5, weight_decay=0.0, fused=WORLD == 1)
    kl_control = AdaptiveKL(args.kl_coef, args.kl_target, args.kl_horizon)
    prompt_deck, demonstration_deck = Deck(len(prompts), args.seed), Deck(max(1, len(demonstrations)), args.seed)
    metrics = Metrics(args.out, ["update", "score", "kl", "kl_error", "kl_coef", "objective", "entropy", "policy_loss", "value_loss",
                                 "ptx_loss", "clip_fraction", "value_clip_fraction", "approx_kl", "explained_variance", "largest_ratio",
                                 "response_length", "ended", "lr", "tokens_per_s", "eval_score", "eval_gold"], state)

    saved = dict(models={"actor": actor, "critic": critic}, generators={"sampling": generator, "prompts": prompt_deck.generator,
                                                                         "demonstrations": demonstration_deck.generator},
                 optimizers={"actor_optimizer": actor_optimizer, "critic_optimizer": critic_optimizer})
    if state:
        restore(state, args.out, **saved)
        done, first, first_texts, last, history = (state[name] for name in ("update", "first", "first_texts", "latest", "history"))
        prompt_deck.left, demonstration_deck.left, kl_control.coef = state["prompts_left"], state["demonstrations_left"], state["kl_coef"]
    else:
        done, history = 0, []
        first_texts, first = evaluate(actor, reward_model, eval_records, eval_prompts, gold, tokenizer, args) if eval_prompts else ([], {})
        if first:
            metrics.log(update=0, **first)  # where the curves begin
        last = first
    signals = Signals()
    warned = {name for n in range(1, done + 1) for name in unhealthy(history[:n], first, args.updates)}  # before a --resume
    bar = tqdm(total=args.updates, initial=done, desc="ppo", unit="update", dynamic_ncols=True, disable=RANK > 0)
    for update in range(done + 1, args.updates + 1):
        started = time.perf_counter()
        decay = 1 - (update - 1) / args.updates  # linear, as in lm-human-preferences
        actor_optimizer.param_groups[0]["lr"], critic_optimizer.param_groups[0]["lr"] = args.lr * decay, args.critic_lr * decay
        batch = [prompts[i] for i in prompt_deck.deal(args.batch_size)]
        experience, row = make_experience(actor, critic, reward_model, ref, batch, tokenizer, args, kl_control.coef, generator)
        finite(row["score"], "the reward model's score", args)
        passes = []
        for _ in range(args.ppo_epochs):
            order = torch.randperm(len(batch)).tolist()
            for start in range(0, len(order), args.minibatch_size):
                rows = order[start:start + args.minibatch_size]
                records = [demonstrations[i] for i in demonstration_deck.deal(len(rows))] if demonstrations else []
                passes.append(train_minibatch(actor, critic, actor_optimizer, critic_optimizer, experience, rows, records, tokenizer, args))
                if args.target_kl and passes[-1]["approx_kl"] > args.target_kl:
                    break
            if args.target_kl and passes[-1]["approx_kl"] > args.target_kl:  # (Spinning Up; Huang et al. 2022, early stopping)
                break
        row |= {name: sum(p[name] for p in passes) / len(passes) for name in passes[0]}
        row["largest_ratio"] = max(p["largest_ratio"] for p in passes)
        if args.kl_target:
            kl_control.update(row["kl"], len(batch))
        row |= dict(lr=args.lr * decay, tokens_per_s=sum(experience["lengths"]) / (time.perf_counter() - started))
        if update % args.eval_every == 0 or update == args.updates:
            if eval_prompts:
                texts, last = evaluate(actor, reward_model, eval_records, eval_prompts, gold, tokenizer, args)
                row |= last
                tqdm.write(f"update {update}: " + ", ".join(f"{name.replace('eval_', 'held-out ')} {value:.3f} (SFT {first[name]:.3f})"
                                                            for name, value in last.items()))
                for i in range(min(3, len(texts))):
                    asked = eval_records[i]["user_input"]
                    asked = asked if isinstance(asked, str) else asked[-1]["content"]
                    tqdm.write(f"    prompt  {asked[:100]!r}\n    SFT     {first_texts[i][:100]!r}\n    now     {texts[i][:100]!r}")
            save_checkpoint(actor, tokenizer, args.out)
            save_checkpoint(critic, tokenizer, os.path.join(args.out, "critic"))
        metrics.log(update=update, **row)
        history.append(row)
        for name, text in unhealthy(history, first, args.updates).items():
            if name not in warned:  # each once
                tqdm.write(f"warning: update {update}: {text}")
                warned.add(name)
        bar.set_postfix_str(f"score {row['score']:.2f}, KL {row['kl']:.2f}, length {row['response_length']:.0f}, "
                            f"{row['tokens_per_s']:.0f} tokens/s", refresh=False)
        bar.update()
        signals.agree()
        if update % args.save_every == 0 or update == args.updates or signals.caught:
            save_state(args.out, args, metrics, **saved, update=update, first=first, first_texts=first_texts[:3],
                       latest=last, history=history, prompts_left=prompt_deck.left,
                       demonstrations_left=demonstration_deck.left, kl_coef=kl_control.coef)
            if args.keep:
                keep_export(actor, tokenizer, args.out, update, args.keep)
        if signals.caught:
            signals.leave(args.out)
    bar.close()
    signals.restore()
    draw_curves(args.out, [("score of the reward model", {"samples": "score", "held out, greedy": "eval_score"}),
                           ("gold score, held out", {"gold": "eval_gold"}),
                           ("KL to the SFT policy (nats per response)", {"KL": "kl"}), ("entropy (nats per token)", {"entropy": "entropy"}),
                           ("share of tokens clipped", {"policy": "clip_fraction", "value": "value_clip_fraction"}),
                           ("explained variance of the critic", {"explained variance": "explained_variance"}),
                           ("response length (tokens)", {"length": "response_length"}),
                           ("share of responses that ended", {"ended": "ended"})])
    for name, value in last.items():
        print(f"{name.replace('eval_', 'held-out ')}: SFT {first[name]:.3f} -> PPO {value:.3f}")
    print(f"KL to the SFT policy: {history[-1]['kl']:.2f} nats per response")
    print(f"saved {args.out}")


if __name__ == "__main__":
    main()
