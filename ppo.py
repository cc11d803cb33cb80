"""Stage 3: PPO. The SFT policy learns to write what the reward model likes, without moving too far
from where it began.

    python ppo.py                          # the demo: runs every stage that is missing, then PPO
    python ppo.py --sft path/to/sft --rm path/to/rm --prompts prompts.json
    torchrun --nproc_per_node=8 ppo.py ... # on 8 GPUs, which share one of each model

Four models: the actor (the policy that learns), the critic (predicts the reward still to come), the
reward model and the reference (the SFT policy); the last two are frozen. The algorithm:

    for each update:
        make_experience:                                  # nothing learns here
            answer the prompts with the actor             (answer, model.generate)
            score the answers with the reward model       (score_responses)
            evaluate reference and critic at each token   (response_logprobs, response_values)
            rewards = score at the end - kl_coef KL       (kl_estimate, token_rewards)
            advantages, returns                           (gae, masked_whiten)
        ppo_epochs times, for each minibatch:             (train_minibatch)
            actor:  policy_loss - entropy_coef entropy + ptx_coef ptx_loss -> gradient step
            critic: value_loss -> gradient step

Writes runs/ppo: the actor as a Hugging Face directory, the critic in runs/ppo/critic, metrics.csv,
samples.jsonl (each held-out answer of each evaluation) and curves.png.

To read it for the algorithm, skip the tables SETTINGS and METRICS; read the maths,
make_experience, train_minibatch and the loop of main.
"""

import contextlib
import os
import time
from collections import defaultdict

import torch
import torch.nn.functional as F

from lib import health
from lib.data import collate, deal, encode_inputs, left_pad, on, read_prompts, text_lengths
from lib.distributed import (RANK, WORLD, clip_gradients, from_rank_0, gather_rows, largest,
                             micro_batches, my_parts, own_stream, start_processes, to_device, total,
                             wait_for_all)
from lib.errors import clean_exit, stop
from lib.lora import adapters_off, add_lora, trainable
from lib.memory import PIECE, micro_batch
from lib.rewards import RunningDeviation, TextReward, judges, reward_of_texts, share_of_time
from lib.run import Run
from lib.settings import above_0, finite, finite_above_0, parse, whole
from lib.training import autocast, numbers, set_lr
from model import (Generation, ScalarHead, decoding_copy, generate, last_token, load_llama,
                   load_scalar_head, load_tokenizer, over_vocabulary, save_checkpoint, states_of,
                   tokens_of)

HERE = os.path.dirname(os.path.abspath(__file__))
# The demo's values, and those of a pretrained LLaMA of 100 to 500 million parameters, with which
# bench/real_run.py trains SmolLM2-135M; with one pass over the answers, not two, it gains a quarter
# less (docs/log.md). Larger ones need smaller learning rates: Huang et al. 2024 take 3e-6 from 1B
# on.
# kl_coef, lambda and clip are also those of Stiennon et al. 2020 (B.1).
SETTINGS = [
    # name                demo      real    what it is
    "input and output",
    ("sft",               "runs/sft", "runs/sft", "the SFT model: start of actor and reference"),
    ("rm",                "runs/rm", "runs/rm", "the reward model: ours, or any with one label"),
    ("reward",            None,     None,   "in place of --rm: a Python file with "
                                            "score(user_input, completion) -> float; further "
                                            "parameters are fields of the prompt's record"),
    ("tokenizer",         None,     None,   "where the SFT model's tokenizer is, if not with it"),
    ("critic",            "rm",     "rm",   "the critic begins as the reward model, or as the SFT "
                                            "model with a new head", ["rm", "sft"]),
    ("prompts",           "data/rlhf_training_data.json", None, "prompts to practise on"),
    ("eval_prompts",      "data/rlhf_training_data_eval.json", None, "held out, answered greedily"),
    ("demonstrations",    "data/actor_training_data.json", None, "for the PTX term"),
    ("gold",              os.path.join(HERE, "data_gen.py"), None,
     "a Python file like --reward's: a judge that PPO never learns from"),
    ("out",               "runs/ppo", "runs/ppo", "run directory"),
    "experience",
    ("updates",           80,       1000,   "rounds of experience and training"),
    ("batch_size",        64,       64,     "responses per round"),
    ("max_prompt_length", 128,      384,    "tokens; a longer prompt loses its beginning"),
    ("max_new_tokens",    40,       128,    "tokens; a longer response is cut"),
    ("temperature",       1.0,      1.0,    "of the sampling, and of all log probabilities",
     finite_above_0),
    "reward",
    ("kl_coef",           0.05,     0.05,   "score units per nat of KL to the reference"),
    ("kl_kind",           "k1",     "k1",   "estimator of the KL", ["k1", "k2", "k3"]),
    ("kl_target",         None,     None,   "nats per response: adapt kl_coef to hold the KL there",
     above_0),
    ("kl_horizon",        10000,    10000,  "responses over which kl_coef adapts"),
    ("no_eos_score",      None,     None,   "score of a response that was cut. Not given: -1 with "
                                            "a reward model; with --reward, what it says",
     finite),
    ("normalize_reward",  False,    False,  "divide scores by their running standard deviation"),
    ("whiten_rewards",    False,    False,  "scale rewards to deviation 1, about their mean"),
    ("gamma",             1.0,      1.0,    "discount of later rewards; 1: none"),
    ("lam",               0.95,     0.95,   "lambda of GAE: 0 trusts the critic, 1 the rewards"),
    ("no_whiten_advantages", False, False,  "leave the advantages as they are"),
    "training",
    ("ppo_epochs",        2,        2,      "passes over each round's experience"),
    ("minibatch_size",    32,       32,     "responses per optimizer step"),
    ("micro_batch_size",  32,       0,      "responses per forward pass, more if they are short: "
                                            "only bounds the memory (decoding runs the whole "
                                            "batch). 0: 4 on a CPU, on a GPU as many as fit",
     whole),
    ("lr",                2e-4,     2.5e-5, "learning rate of the actor; decays linearly to 0"),
    ("critic_lr",         1e-3,     5e-5,   "learning rate of the critic, likewise"),
    ("clip",              0.2,      0.2,    "no gain from a probability ratio beyond 1 +- this"),
    ("value_clip",        0.2,      0.2,    "no gain from moving the value further, score units"),
    ("entropy_coef",      0.0,      0.0,    "weight of the entropy bonus"),
    ("ptx_coef",          0.1,      0.0,    "weight of the cross entropy on demonstrations"),
    ("target_kl",         None,     None,   "nats per token: end an update when the policy is this "
                                            "far from the one that sampled (approx_kl)", above_0),
    ("adam_eps",          1e-5,     1e-8,   "epsilon of Adam: entries of the gradient that are "
                                            "smaller hardly move their weight", finite_above_0),
    ("max_grad_norm",     1.0,      1.0,    "longer gradients are scaled down to this; inf: none",
     above_0),
    "evaluation",
    ("eval_every",        20,       20,     "updates between evaluations, each with an export"),
    ("eval_number",       300,      64,     "held-out prompts to evaluate on"),
    ("shard_rollout",     False,    False,  "many processes: gather layer by layer for each token; "
                                            "slow, for an actor that one GPU cannot hold"),
]

# What is logged of an update: the columns of metrics.csv, and the panels and labels of curves.png.
METRICS = [
    # column              what it is                                              panel, label
    ("update",            "counted from 1; 0: the SFT model"),
    ("score",             "of the responses, as it counts", "score of the reward model", "samples"),
    ("score_ended",       "what the reward model says of responses that ended"),
    ("score_cut",         "and of those that were cut, whether it counts or not"),
    ("ended",             "share of the responses", "share of responses that ended", "ended"),
    ("kl",                "to the reference, k1", "KL to the SFT policy (nats per response)", "KL"),
    ("kl_error",          "standard error of that mean; 0: unknown"),
    ("kl_coef",           "score units per nat"),
    ("objective",         "score, scaled under --normalize_reward, minus kl_coef KL (--kl_kind)"),
    ("entropy",           "of the policy", "entropy (nats per token)", "entropy"),
    ("policy_loss",       "the clipped surrogate, negated"),
    ("value_loss",        "half the squared error of the critic, clipped"),
    ("ptx_loss",          "cross entropy on demonstrations, nats per token; empty without PTX"),
    ("clip_fraction",     "no gradient from policy_loss", "share of tokens clipped", "policy"),
    ("value_clip_fraction", "likewise the critic", "share of tokens clipped", "value"),
    ("approx_kl",         "KL(policy that sampled || policy now), nats per token"),
    ("explained_variance", "1: the critic knows the returns; 0: no better than their mean; below: "
     "worse", "explained variance of the critic", "explained variance"),
    ("largest_ratio",     "of the new probability of a token to the old one"),
    ("response_length",   "mean", "response length (tokens)", "length"),
    ("lr",                "learning rate of the actor"),
    ("tokens_per_s",      "of prompts and responses, over the whole update"),
    ("eval_score",        "of greedy answers to the held-out prompts", "score of the reward model",
     "held out, greedy"),
    ("eval_gold",         "of the same answers, by --gold", "gold score, held out", "gold"),
]


# ------------------------------------------------------------------------------------------------
# The maths. (B, T) are B responses of up to T tokens; `mask` is 1 on the tokens of the response, up
# to and including its end-of-sequence, and 0 after it. Values outside the mask, even inf and nan,
# never change the result of a function that takes a mask.

# a log ratio is cut to +-20 before exp: e^20 is far outside every clip range, and far from overflow
LARGEST_LOG = 20.0


def inside(x, mask):
    """x in float32 with zeros outside the mask."""
    return torch.where(mask.bool(), x.float(), 0.0)


def tempered_log_softmax(logits, temperature):
    """log softmax(logits / temperature) in float32. Dividing by 1 would be a pass over the largest
    tensor for nothing."""
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(logits, dim=-1)


def logprobs_from_logits(logits, tokens, temperature=1.0):
    """log pi(token) under softmax(logits / temperature).

    `logits` (..., V), `tokens` (...) -> (...) float32, nats. The temperature must be that of
    sampling: only then is this the log probability with which the token was drawn.
    """
    return tempered_log_softmax(logits, temperature).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits, temperature=1.0):
    """H = - sum_v p_v log p_v with p = softmax(logits / temperature). `logits` (..., V) -> (...)
    float32, nats."""
    logprobs = tempered_log_softmax(logits, temperature)
    # a word ruled out, at -inf, adds 0 and not nan
    return -(logprobs.exp() * logprobs.clamp(min=-1e4)).sum(-1)


def masked_mean(x, mask):
    """Mean of x (B, T) over the mask of the whole batch -> scalar, float32. (Not a mean of the
    rows' means, in which a token of a short response would weigh more.) 0 for an empty mask."""
    return inside(x, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(variance + 1e-8) over the mask of the whole batch, plus the mean again if
    not `shift_mean`.

    `x`, `mask` (B, T) -> (B, T), 0 outside the mask. One mean and one variance over all tokens, so
    that responses stay comparable with each other. All-equal x gives 0, or x if not `shift_mean`.
    """
    mean = masked_mean(x, mask)
    variance = masked_mean((inside(x, mask) - mean).square(), mask)
    whitened = (inside(x, mask) - mean) * torch.rsqrt(variance + 1e-8)
    return inside(whitened if shift_mean else whitened + mean, mask)


def kl_estimate(logprobs, ref_logprobs, kind="k1"):
    """Per-token estimate of KL(pi || ref), in nats, from tokens sampled from pi (Schulman 2020,
    "Approximating KL divergence").

    With d = log pi - log ref:   k1 = d (unbiased, may be negative);   k2 = d^2 / 2 (biased, less
    variance);   k3 = e^-d - 1 + d (unbiased, never negative). All (B, T), the result float32.
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
    """r_t = -kl_coef KL_t, plus the score at the last token of the response (Ziegler et al. 2019,
    eq. 2, per token).

    `scores` (B,), `kl`, `mask` (B, T) -> (B, T) float32, 0 outside the mask.
    """
    rewards = -kl_coef * inside(kl, mask)
    last = (mask.sum(1).long() - 1).clamp(min=0)
    return inside(rewards.scatter_add(1, last[:, None], scores.float()[:, None]), mask)


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation (Schulman et al. 2016, eq. 16), backwards over the response:

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1}        V = A = 0 after the end

    `rewards`, `values`, `mask` (B, T) -> advantages, returns G = advantages + values, both (B, T)
    float32, 0 outside the mask. lam = 0 gives the one-step TD error, lam = 1 the discounted sum of
    rewards minus V_t.
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
    """PPO's clipped surrogate, negated (Schulman et al. 2017, eq. 7): with rho = exp(logprobs -
    old_logprobs),

        L = - mean  min(rho A, clamp(rho, 1 - clip, 1 + clip) A)

    All (B, T); the gradient flows through `logprobs` only -> loss, and clip_fraction: the share of
    clipped tokens, which get no gradient: A > 0 and rho > 1 + clip, or A < 0 and rho < 1 - clip.
    The min is the worse of the two: to go further gains nothing, but a token that moved the wrong
    way keeps its gradient, which brings it back.
    """
    log_ratio = inside(logprobs, mask) - inside(old_logprobs, mask).detach()
    ratio = torch.exp(log_ratio.clamp(-LARGEST_LOG, LARGEST_LOG))
    advantages = inside(advantages, mask).detach()
    unclipped, clipped = ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages
    clip_fraction = masked_mean((clipped < unclipped).float(), mask)
    return -masked_mean(torch.min(unclipped, clipped), mask), clip_fraction


def value_loss(values, old_values, returns, mask, clip):
    """Half the larger of two squared errors: of V, and of V kept within +-clip of what it was at
    the rollout. A value that is further towards G than that gets no gradient, so one update moves
    it little from the values that gave the advantages.

        L = 1/2 mean  max((V - G)^2, (V_old + clamp(V - V_old, -clip, clip) - G)^2)

    As in OpenAI's lm-human-preferences. All (B, T); the gradient flows through `values` only ->
    loss, clip_fraction.
    """
    values, returns = inside(values, mask), inside(returns, mask).detach()
    old_values = inside(old_values, mask).detach()
    clipped = values.clamp(old_values - clip, old_values + clip)
    error, clipped_error = (values - returns).square(), (clipped - returns).square()
    clip_fraction = masked_mean((clipped_error > error).float(), mask)
    return 0.5 * masked_mean(torch.max(error, clipped_error), mask), clip_fraction


def ptx_loss(logits, labels):
    """Next-token cross entropy on demonstrations: the pretraining term of InstructGPT's eq. 2
    (PPO-ptx), which is on pretraining text there.

    `logits` (B, T, V); `labels` (B, T): the tokens themselves, -100 where none is to be learned.
    The logits at t predict the label at t + 1 -> the mean over all labels that count, nats; 0 if
    none does.
    """
    targets = labels[:, 1:]
    counts = targets != -100
    # where nothing counts there may be nan, and its gradient, 0 times nan, would be nan
    logits = logits[:, :-1].float().masked_fill(~counts[..., None], 0.0)
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return loss / counts.sum().clamp(min=1)


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


# ------------------------------------------------------------------------------------------------
# Experience: what the four models say about a batch of prompts. A text is (prompt, response), both
# lists of tokens; T is the length of the longest response of the batch. What a model reads of a
# batch is input_ids (B, L), its texts, padded; places, where the responses' tokens are in it
# (lib.data.Places); and the mask (B, T).

def to_rows(flat, places, mask):
    """(N,) values, one text after the other -> (B, T), with zeros outside the mask."""
    zeros = torch.zeros(mask.shape, dtype=flat.dtype, device=mask.device)
    return zeros.index_put((places.row, places.t), flat)


def response_logprobs(actor, input_ids, places, mask, args, entropy=False):
    """log pi (B, T) of the response tokens; with `entropy` also the entropy (B, T) of the
    actor's distributions there. Only the states in which the tokens were chosen go through the
    vocabulary projection: nothing here has the size (B, L, V)."""
    def look(logits, tokens):
        found = [logprobs_from_logits(logits, tokens, args.temperature)]
        if entropy:
            with torch.set_grad_enabled(args.entropy_coef != 0):  # usually it is only logged
                found.append(entropy_from_logits(logits, args.temperature))
        return torch.stack(found, dim=-1)

    states = states_of(actor(input_ids), places)
    found = over_vocabulary(actor, states, tokens_of(input_ids, places), look)
    rows = [to_rows(x, places, mask) for x in found.unbind(-1)]
    return rows if entropy else rows[0]


def response_values(critic, input_ids, places, mask):
    """V (B, T) of the states in which the response tokens are chosen."""
    return to_rows(states_of(critic(input_ids), places), places, mask)


@torch.no_grad()
def answer(actor, prompts, tokenizer, args, temperature, generator=None):
    """The actor's responses to tokenized prompts -> texts, and a `model.Generation`."""
    generator = own_stream(generator)
    # Decoding reads every weight for each token. So under --dtype bfloat16 it uses a copy in bf16,
    # its adapters merged, and with many processes a copy that each of them holds whole.
    as_it_is = (args.dtype == "float32" and WORLD == 1) or args.shard_rollout
    writer = actor if as_it_is else decoding_copy(actor, getattr(torch, args.dtype))

    def write(rows):
        padded = left_pad([prompts[i] for i in rows], tokenizer.pad_token_id, args.device)
        with autocast(args) if as_it_is else contextlib.nullcontext():
            out = generate(writer, *padded, args.max_new_tokens, tokenizer.end_ids, temperature,
                           generator=generator)
        longest = largest(out.mask.shape[1])  # the rows of another process may end later
        return [F.pad(x, (0, longest - x.shape[1])) for x in (out.tokens, out.logprobs, out.mask)]

    B = len(prompts)
    out = Generation(*gather_rows(write, my_parts(range(B), B), B))
    lengths = out.mask.sum(1).long().tolist()
    return [(prompt, row[:n]) for prompt, row, n in zip(prompts, out.tokens.tolist(), lengths)], out


@torch.no_grad()
def score_responses(reward_model, texts, tokenizer, args):
    """What the reward model says (B,) at the last token of each response, and whether that is
    end-of-sequence (B,). Where it is not, the response was cut; the reward model never saw such
    texts in training, and `counted` puts a fixed score in place of its own."""
    ends = [response[-1] in tokenizer.end_ids for _, response in texts]
    ended = on(args.device, ends)
    if isinstance(reward_model, TextReward):  # it scores strings, decoded
        return on(args.device, reward_model.scores(texts, ends)), ended

    # Where several tokens end a text, the reward model is asked about the one that it knows.
    known = [(prompt, response[:-1] + tokenizer.end_ids[:1] if end else response)
             for (prompt, response), end in zip(texts, ends)]

    def read(rows):
        input_ids, places = collate([known[i] for i in rows], tokenizer.pad_token_id, args.device)
        with autocast(args), adapters_off(reward_model):
            return [last_token(reward_model(input_ids), places)]

    parts = micro_batches(range(len(texts)), text_lengths(texts), args.micro_batch_size)
    return *gather_rows(read, parts, len(texts)), ended


def counted(model_scores, ended, args):
    """The scores (B,) that count: those of `score_responses`, but --no_eos_score, if there is one,
    for a response that was cut (lm-human-preferences; Stiennon et al. 2020)."""
    if args.no_eos_score is None:
        return model_scores
    return torch.where(ended, model_scores, args.no_eos_score)


@torch.no_grad()
def make_experience(actor, critic, reward_model, ref, prompts, minibatches, tokenizer, args,
                    kl_coef, generator, deviation_of=lambda scores: 1.0):
    """Answer the prompts, and turn what the other three models say of the answers into advantages
    and returns.

    `prompts`: B lists of tokens; `minibatches`: the rows of each in the first pass of training, as
    `ask` needs them -> the experience, a dict of `texts`, their `lengths`, `scores` (B,), and
    `mask`, `old_logprobs`, `ref_logprobs`, `kl`, `rewards`, `old_values`, `advantages`, `returns`,
    all (B, T); and statistics for the log.
    """
    texts, out = answer(actor, prompts, tokenizer, args, args.temperature, generator)
    mask, lengths = out.mask, text_lengths(texts)
    model_scores, ended = score_responses(reward_model, texts, tokenizer, args)
    scores = counted(model_scores, ended, args)

    # In float32 the log probabilities of the sampling are as good as those of a training pass. In
    # bf16 or TF32 they are not, nor are they the same in two batches: sums are rounded differently.
    # So actor, reference and critic are asked about the very micro-batches of the first training
    # pass: before its first step all ratios are then 1, and the KL begins at 0.
    sampling_is_exact = args.dtype == args.base_dtype == "float32" and not args.tf32

    def ask(rows):
        at = on(args.device, rows)
        input_ids, places = collate([texts[i] for i in rows], tokenizer.pad_token_id, args.device)
        batch = input_ids, places, mask[at]
        with autocast(args):
            logprobs = out.logprobs[at]
            if not sampling_is_exact:
                logprobs = response_logprobs(actor, *batch, args)
            with adapters_off(ref):  # with LoRA the reference is the actor without its adapters
                ref_logprobs = response_logprobs(ref, *batch, args)
            return logprobs, ref_logprobs, response_values(critic, *batch)

    # gather_rows calls ask(rows) for each (rows, weight), and puts its (b, T) into rows of (B, T)
    parts = [pair for rows in minibatches
             for pair in micro_batches(rows, lengths, args.micro_batch_size)]
    old_logprobs, ref_logprobs, values = gather_rows(ask, parts, len(texts))

    kl = kl_estimate(old_logprobs, ref_logprobs, args.kl_kind)
    deviation = deviation_of(scores)  # 1 without --normalize_reward
    normalized = scores / deviation
    rewards = token_rewards(normalized, kl, mask, kl_coef)
    if args.whiten_rewards:
        # about their mean, which stays (lm-human-preferences; Huang et al. 2024). Even so, the sum
        # of a response's rewards comes to depend on its length
        rewards = masked_whiten(rewards, mask, shift_mean=False)
    advantages, returns = gae(rewards, values, mask, args.gamma, args.lam)
    if not args.no_whiten_advantages:
        # of the whole batch, as Huang et al. 2024's code; lm-human-preferences: per minibatch
        advantages = masked_whiten(advantages, mask)
    experience = dict(texts=texts, lengths=lengths, scores=scores, mask=mask, kl=kl,
                      rewards=rewards, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs,
                      advantages=advantages, old_values=values, returns=returns)

    def variance(x):
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    kl_of_responses = inside(old_logprobs - ref_logprobs, mask).sum(1)  # k1, whatever --kl_kind
    statistics = numbers(dict(
        score=scores.mean(),
        score_ended=masked_mean(model_scores, ended), score_cut=masked_mean(model_scores, ~ended),
        ended=ended.float().mean(), response_length=mask.sum(1).mean(),
        kl=kl_of_responses.mean(),
        kl_error=kl_of_responses.var(unbiased=len(texts) > 1).div(len(texts)).sqrt(),
        explained_variance=1 - variance(returns - values) / variance(returns).clamp(min=1e-8),
        objective=(normalized - kl_coef * inside(kl, mask).sum(1)).mean())) | dict(kl_coef=kl_coef)
    if statistics["ended"] == 0:
        statistics["score_ended"] = None
    if statistics["ended"] == 1:
        statistics["score_cut"] = None
    return experience, statistics


# ------------------------------------------------------------------------------------------------
# The update: gradient steps on the experience. For each minibatch, train_minibatch takes a step of
# the actor on the gradients of policy_backward and ptx_backward, then one of the critic on that of
# value_backward. All three add their statistics to `sums`.

def parts_of(experience, rows, tokenizer, args):
    """The micro-batches of a minibatch, `rows` of the experience -> of each its rows, what the
    models read of it, and its share of the minibatch's tokens.

    Micro-batches only bound the memory: the mean over a minibatch is the sum over its parts of
    mean x share. (A mean of the responses' means needs another share: bench/forks/grpo.diff.)
    `weight` is 1, or 0 for a row that one of many processes repeats (lib.distributed.my_parts).
    """
    all_tokens = experience["mask"][on(args.device, rows)].sum()
    for part, weight in micro_batches(rows, experience["lengths"], args.micro_batch_size):
        at = on(args.device, part)
        input_ids, places = collate([experience["texts"][i] for i in part], tokenizer.pad_token_id,
                                    args.device)
        mask = experience["mask"][at]
        yield at, (input_ids, places, mask), weight * mask.sum() / all_tokens


def policy_backward(actor, parts, experience, sums, args):
    """Add the gradient of the policy loss, less the entropy bonus, on the parts of a minibatch."""
    for at, (input_ids, places, mask), share in parts:
        old_logprobs, advantages = experience["old_logprobs"][at], experience["advantages"][at]
        with autocast(args):
            logprobs, entropy = response_logprobs(actor, input_ids, places, mask, args,
                                                  entropy=True)
        loss, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, mask, args.clip)
        entropy = masked_mean(entropy, mask)
        ((loss - args.entropy_coef * entropy) * share).backward()  # a bonus: entropy is to grow

        # for the log
        log_ratio = inside(logprobs.detach() - old_logprobs, mask)
        # KL(old || new), since the tokens are from the old policy
        approx_kl = masked_mean(kl_estimate(old_logprobs, logprobs.detach(), "k3"), mask)
        sums["policy_loss"] += loss.detach() * share
        sums["entropy"] += entropy.detach() * share
        sums["clip_fraction"] += clip_fraction * share
        sums["approx_kl"] += approx_kl * share
        largest_ratio = log_ratio.max().clamp(max=LARGEST_LOG).exp()
        sums["largest_ratio"] = torch.maximum(sums["largest_ratio"], largest_ratio)


def ptx_backward(actor, demonstrations, sums, tokenizer, args):
    """Add the gradient of PPO-ptx (InstructGPT, eq. 2): keep writing what people wrote.
    `demonstrations`: [(prompt, completion, number of its record)]."""
    def ptx_nats(logits, labels):  # (1,): the sum over some rows; ptx_loss is their mean
        return ptx_loss(logits, labels)[None] * (labels[:, 1:] != -100).sum()

    all_targets = sum(len(completion) for _, completion, _ in demonstrations)
    lengths = text_lengths(demonstrations)
    for part, weight in micro_batches(range(len(lengths)), lengths, args.micro_batch_size):
        examples = [demonstrations[i] for i in part]
        input_ids, places = collate(examples, tokenizer.pad_token_id, args.device)
        start = min(len(prompt) for prompt, _, _ in examples) - 1  # no row has a target before it
        labels = torch.full_like(input_ids, -100)
        labels[places.row, places.column] = tokens_of(input_ids, places)
        labels = labels[:, start:]
        with autocast(args):  # the logits of a few rows at a time
            nats = over_vocabulary(actor, actor(input_ids)[:, start:], labels, ptx_nats,
                                   piece=max(1, PIECE // labels.shape[1]))
        loss = nats.sum() * weight / all_targets
        (args.ptx_coef * loss).backward()
        sums["ptx_loss"] += loss.detach()


def value_backward(critic, parts, experience, sums, args):
    """Add the gradient of the value loss on the parts of a minibatch."""
    for at, (input_ids, places, mask), share in parts:
        old_values, returns = experience["old_values"][at], experience["returns"][at]
        with autocast(args):
            values = response_values(critic, input_ids, places, mask)
        loss, clip_fraction = value_loss(values, old_values, returns, mask, args.value_clip)
        (loss * share).backward()
        sums["value_loss"] += loss.detach() * share
        sums["value_clip_fraction"] += clip_fraction * share


def step(model, optimizer, wanted, args):
    """An optimizer step, if it is `wanted`, the gradient being scaled down as a whole if it is too
    long (Huang et al. 2022, global gradient clipping) -> its length before that."""
    norm = clip_gradients(model, args.max_grad_norm)
    if wanted:
        optimizer.step()
    optimizer.zero_grad()
    return norm


def train_minibatch(trained, experience, rows, demonstrations, tokenizer, args):
    """An optimizer step of the actor, then one of the critic, on these rows of the experience, but
    none beyond --target_kl -> the statistics of the minibatch. (One after the other, so that only
    one of them has gradients in memory.) If there is a ptx_coef, there are as many `demonstrations`
    as rows. `trained`: {name: (model, its optimizer)}.
    """
    # On the device until the end: asking a GPU for a number waits until it is done. To add a
    # statistic: add it to `sums` in a *_backward, and its column to METRICS.
    sums = defaultdict(lambda: torch.zeros((), device=args.device))
    parts = list(parts_of(experience, rows, tokenizer, args))
    policy_backward(trained["actor"][0], parts, experience, sums, args)
    if demonstrations:
        ptx_backward(trained["actor"][0], demonstrations, sums, tokenizer, args)
    # still near the policy that sampled? (With --target_kl this waits once more.)
    near = not args.target_kl or total(sums["approx_kl"].item()) <= args.target_kl
    norms = {"gradient of the actor": step(*trained["actor"], near, args)}
    value_backward(trained["critic"][0], parts, experience, sums, args)
    norms["gradient of the critic"] = step(*trained["critic"], near, args)

    found = numbers(sums | norms)
    statistics = {name: (largest if name == "largest_ratio" else total)(found[name])
                  for name in sums}
    for name, value in (found | statistics).items():
        health.must_be_finite(value, f"the {name.replace('_', ' ')}", args.out)
    return statistics


def averaged(steps):
    """The mean of each statistic over the minibatches of an update; the largest largest_ratio."""
    means = {name: sum(each[name] for each in steps) / len(steps) for name in steps[0]}
    return means | dict(largest_ratio=max(each["largest_ratio"] for each in steps))


# ------------------------------------------------------------------------------------------------
# The run

def run_missing_stages(args):
    """Run each stage of the demo whose result is missing; resume one that was interrupted, if it
    had saved anything."""
    import data_gen  # only here does one stage import another
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
            stage.main(["--seed", str(args.seed), "--device", args.device, "--dtype", args.dtype,
                        "--resume" if begun else "--overwrite"])


def check(args, demo):
    """Settings that do not go together end the program with one line."""
    if not args.prompts:
        stop("--sft, --rm and --reward need --prompts: the built-in ones are for the demo")
    if args.reward and args.rm != "runs/rm":
        stop("--reward takes the place of --rm: give one of them")
    if args.kl_target and not args.kl_coef:
        stop("--kl_target adapts --kl_coef by factors: it must begin above 0")
    if args.kl_target and args.kl_horizon <= 0.2 * args.batch_size:
        stop(f"--kl_horizon {args.kl_horizon} is in responses, and must be above a fifth of "
             f"--batch_size {args.batch_size}: an update could turn the sign of kl_coef")
    if args.gold and not args.eval_prompts and not demo:
        stop("--gold judges held-out prompts: --eval_prompts is missing")
    if args.ptx_coef and not args.demonstrations:
        stop("--ptx_coef needs --demonstrations")
    if args.no_eos_score is None and not args.reward:
        args.no_eos_score = -1.0  # a reward model never saw a text that was cut
    for path, script in ((args.sft, "sft.py"), (not args.reward and args.rm, "train_rm.py")):
        if path in ("runs/sft", "runs/rm") and not demo and not os.path.isdir(path):
            stop(f"{path}: missing; run python {script} first")


def four_models(args, tokenizer, text_reward):
    """Actor, critic, reference and reward model. All are in eval mode: LLaMA has no dropout, and a
    ratio must differ from 1 by training alone (Huang et al. 2024). With LoRA, a frozen model is the
    one that learns, its adapters off: two LLaMAs, if the critic begins as the reward model."""
    def learning(model):
        return to_device(add_lora(model, args), args)

    def frozen(model):
        return to_device(model.requires_grad_(False), args)

    actor = learning(load_llama(args.sft, tokenizer))
    # The critic begins as the reward model (InstructGPT, C.4), which knows already what is good.
    from_rm = args.critic == "rm" and not text_reward
    critic = learning(load_scalar_head(args.rm) if from_rm else
                      ScalarHead(load_llama(args.sft, tokenizer).model))
    ref = actor if args.lora_rank else frozen(load_llama(args.sft, tokenizer))
    shared = critic if args.lora_rank and from_rm else None
    return actor, critic, ref, text_reward or shared or frozen(load_scalar_head(args.rm))


def with_optimizers(args, **models):
    """{name: (model, its optimizer)} of those that learn."""
    # Huang et al. 2022 and 2024 take an epsilon of 1e-5. But the more weights, the smaller each
    # entry of a gradient of length 1: at 135M it takes over half of the first step (docs/log.md).
    options = dict(eps=args.adam_eps, weight_decay=0.0, fused=True)
    return {name: (model, torch.optim.AdamW(trainable(model), **options))
            for name, model in models.items()}


def evaluate(actor, reward_model, records, prompts, gold, tokenizer, args):
    """Greedy answers to held-out prompts -> a dict per answer for samples.jsonl, and the mean
    scores of the reward model and the gold judge."""
    samples = []
    if not prompts:
        return [], {}
    for start in range(0, len(prompts), args.batch_size):
        batch = prompts[start:start + args.batch_size]
        texts, _ = answer(actor, batch, tokenizer, args, temperature=0)
        model_scores, ended = score_responses(reward_model, texts, tokenizer, args)
        scores = counted(model_scores, ended, args).tolist()
        for record, (_, response), score, end in zip(records[start:], texts, scores,
                                                     ended.tolist()):
            text = tokenizer.decode(response, skip_special_tokens=True).strip()
            samples.append(dict(user_input=record["user_input"], completion=text, score=score,
                                gold=None, length=len(response), ended=end))
    result = dict(eval_score=sum(sample["score"] for sample in samples) / len(samples))
    if gold:
        completions, ends = ([sample[key] for sample in samples] for key in ("completion", "ended"))
        judged = from_rank_0(lambda: gold(records, completions, ends), len(samples))
        for sample, score in zip(samples, judged):
            sample["gold"] = score
        result["eval_gold"] = sum(judged) / len(judged)
    return samples, result


@clean_exit
def main(argv=None):
    args, demo = parse("ppo.py", __doc__, SETTINGS, argv, real_if=["sft", "rm", "reward"])
    check(args, demo)
    start_processes(args)
    run = Run(args, "ppo", SETTINGS, METRICS)
    if demo:  # only the default paths: what the user named must exist
        run_missing_stages(args)
    torch.manual_seed(args.seed)
    generator = torch.Generator(args.device).manual_seed(args.seed)
    tokenizer = load_tokenizer(args.tokenizer or args.sft, args.sft)
    records, eval_records = read_prompts(args)
    judge, gold = judges(args, records, eval_records)
    text_reward = reward_of_texts(args, tokenizer, judge, load_scalar_head, last_token)
    actor, critic, ref, reward_model = four_models(args, tokenizer, text_reward)
    prompts, eval_prompts, demonstrations = encode_inputs(
        records, eval_records, [actor, reward_model], tokenizer, args)
    if text_reward:
        text_reward.remember(prompts + eval_prompts, records + eval_records)

    trained = with_optimizers(args, actor=actor, critic=critic)
    args.micro_batch_size = micro_batch("ppo", trained, args, run.state)
    B, B_ptx = args.batch_size, args.ppo_epochs * args.batch_size
    prompt_order = deal(len(prompts), args.updates * B, args.seed)
    ptx_order = deal(len(demonstrations), args.updates * B_ptx, args.seed)
    # What --resume restores beside the models and their optimizers. `first`, `last`: mean scores of
    # the evaluation before training and of the latest; `history`: the rows of metrics.csv;
    # `warned`, `deviation`: see lib.health, lib.rewards
    kept = run.begin(args.updates, trained, {"sampling": generator}, dict(first={}, last={},
        first_texts=[], history=[], warned={}, deviation={}, kl_coef=args.kl_coef))
    kl_control = AdaptiveKL(kept["kl_coef"], args.kl_target, args.kl_horizon)
    deviation_of = RunningDeviation(args.normalize_reward, **kept["deviation"])
    held_out = eval_records, eval_prompts, gold, tokenizer, args
    if run.step == 0:
        samples, kept["first"] = evaluate(actor, reward_model, *held_out)
        kept["first_texts"] = run.log_samples(0, samples)[:3]
        if samples:
            run.log(update=0, **kept["first"])  # where the curves begin

    for update in range(run.step + 1, args.updates + 1):
        started = time.perf_counter()
        lr = set_lr(trained["actor"][1], args.lr, update - 1, args.updates, "linear")
        set_lr(trained["critic"][1], args.critic_lr, update - 1, args.updates, "linear")
        batch = [prompts[i] for i in prompt_order[(update - 1) * B:update * B]]
        next_ptx = iter(ptx_order[(update - 1) * B_ptx:])
        # the rows of each minibatch, in each pass over the experience
        with run.saved_if_it_ends():  # a judge that fails here loses nothing
            passes = [[rows.tolist() for rows in torch.randperm(B).split(args.minibatch_size)]
                      for _ in range(args.ppo_epochs)]
            experience, row = make_experience(actor, critic, reward_model, ref, batch, passes[0],
                                              tokenizer, args, kl_control.coef, generator,
                                              deviation_of)
        health.must_be_finite(row["score"], "the reward model's score", args.out)

        steps = []
        for rows in sum(passes, []):
            ptx = [demonstrations[i] for _, i in zip(rows, next_ptx)]  # rows first: zip ends there
            steps.append(train_minibatch(trained, experience, rows, ptx, tokenizer, args))
            # too far from the policy that sampled: no step was taken (as in Spinning Up)
            if args.target_kl and steps[-1]["approx_kl"] > args.target_kl:
                break
        seconds = time.perf_counter() - started
        row |= averaged(steps) | dict(lr=lr, tokens_per_s=sum(experience["lengths"]) / seconds)
        if args.kl_target:
            kl_control.update(row["kl"], B)

        if update % args.eval_every == 0 or update == args.updates:
            samples, kept["last"] = health.attempt(update, evaluate, actor, reward_model, *held_out)
            row |= kept["last"]
            health.show(update, kept, eval_records, run.log_samples(update, samples))
            save_checkpoint(actor, tokenizer, args.out)
            save_checkpoint(critic, tokenizer, os.path.join(args.out, "critic"))
        run.log(update=update, **row)
        kept["history"].append(row)
        health.warn(kept, args.updates)
        kept |= dict(kl_coef=kl_control.coef, deviation=deviation_of.state())
        run.end_step(health.in_short(row) + share_of_time(reward_model),
                     lambda folder: save_checkpoint(actor, tokenizer, folder))

    health.summary(kept)
    run.finish()


if __name__ == "__main__":
    main()
