"""ppo.py on a tiny LLaMA: experience and gradient steps against slow references in float64 (as in
test_sft.py); the run; what stops it; the demo from an empty directory."""

import copy
import functools
import math
import os
import shutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig,
)

import data_gen
import lib.run
import model
import ppo
import sft
import train_rm
from lib.curves import draw_curves
from lib.data import collate, deal
from lib.dialogue import encode_prompt
from makers import (
    TINY, PlainDescent, assert_same_llama, distance, error_line, examples_of, flat, gradient,
    options, parse, perturbed, plain_scores, read_rows, run_stage, slow_token_logprobs, slow_values,
    without_speed,
)
from model import load_llama, load_scalar_head, random_llama
from waits import waits_of_steps


def steep(x):
    """x, with a gradient that is not finite: the slope of the square root at 0."""
    return x + (x - x.detach()).sqrt()


def test_curves_are_drawn(sft_run, rm_run, ppo_run, ppo_argv, monkeypatch):
    pytest.importorskip("matplotlib")
    for script, run in ((sft, sft_run), (train_rm, rm_run), (ppo, ppo_run)):
        draw_curves(run.folder, script.METRICS)
        assert Path(run.folder, "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = []
    monkeypatch.setattr(lib.run, "draw_curves", lambda *given: drawn.append(given))
    ppo.main(ppo_argv() + ["--resume"])  # it is complete: drawing is all that is left
    assert drawn == [(ppo_run.folder, ppo.METRICS)]


# ------------------------------------------------------------------------------------------------
# On a LLaMA that was not trained: quick enough for the exercises

TEXTS = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9])]  # (prompt, response)


@pytest.fixture
def untrained():
    """A random LLaMA, and what the models read of TEXTS."""
    torch.manual_seed(0)
    llama = random_llama(LlamaConfig(vocab_size=50, **TINY))
    return llama, (*collate(TEXTS, 0), torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))


def test_logprobs_and_entropy_are_at_the_sampling_temperature(untrained):
    """At temperature 0.7, for each response alone, by a loop over its tokens."""
    llama, batch = untrained
    args = SimpleNamespace(temperature=0.7, entropy_coef=0.0)
    found = ppo.response_logprobs(llama, *batch, args, entropy=True)
    for i, (prompt, response) in enumerate(TEXTS):
        slow = slow_token_logprobs(llama, prompt, response, temperature=0.7)
        for ours, reference in zip(found, slow):
            assert ours[i, : len(response)].tolist() == pytest.approx(reference.tolist(), abs=1e-5)


def test_an_entropy_bonus_makes_the_policy_less_sure(untrained):
    """All advantages are 0, so the bonus is the whole loss: a step must raise the entropy."""
    llama, (input_ids, places, mask) = untrained
    args = SimpleNamespace(
        temperature=1.0, entropy_coef=1.0, clip=0.2, micro_batch_size=2, device="cpu", dtype="float32"
    )

    def entropy():
        return ppo.response_logprobs(llama, input_ids, places, mask, args, True)[1].sum().item()

    before = entropy()
    logprobs = ppo.response_logprobs(llama, input_ids, places, mask, args).detach()
    experience = dict(
        texts=TEXTS, lengths=[5, 4], mask=mask, old_logprobs=logprobs, advantages=0 * mask
    )
    sums = defaultdict(lambda: torch.zeros(()))
    parts = list(ppo.parts_of(experience, [0, 1], SimpleNamespace(pad_token_id=0), args))
    ppo.policy_backward(llama, parts, experience, sums, args)
    assert sums["entropy"].item() == pytest.approx(before / 5, rel=1e-5)
    with torch.no_grad():
        for p in llama.parameters():
            p -= 0.01 * p.grad
    assert entropy() > before


def test_actor_and_critic_are_copies_that_learn(hf, reward_model, tokenizer, tmp_path):
    """The actor begins as the reference, the critic as the reward model; those two stay."""
    model.save_checkpoint(reward_model, tokenizer, str(tmp_path / "rm"))
    args = parse(ppo, options(sft=hf, rm=tmp_path / "rm", prompts="-", device="cpu"))
    actor, critic, ref, scores = ppo.four_models(args, tokenizer, None)
    for learns, frozen in ((actor, ref), (critic, scores)):
        pairs = list(zip(learns.parameters(), frozen.parameters(), strict=True))
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
        assert all(a.requires_grad and not b.requires_grad for a, b in pairs)


# ------------------------------------------------------------------------------------------------
# Experience and gradient steps


@pytest.fixture(scope="session")
def ppo_args(ppo_argv):
    """The parsed options of a PPO run, with changes."""
    return lambda **changes: parse(ppo, ppo_argv(**changes))


@pytest.fixture(scope="session")
def four_models(home, sft_run, rm_run):
    """Four models that all differ, and prompts of different lengths."""
    llama, scalar = load_llama(sft_run.folder, home.tokenizer), load_scalar_head(rm_run.folder)
    prompts = [
        encode_prompt(home.tokenizer, record["user_input"])
        for record in home.records["prompts"][:20]
    ]
    assert len(set(map(len, prompts))) > 3
    return SimpleNamespace(
        actor=perturbed(llama, 0.15, 1),
        ref=llama,
        critic=perturbed(scalar, 0.05, 2),
        reward_model=scalar,
        prompts=prompts,
    )


def trained(actor, critic, actor_optimizer, critic_optimizer):
    return {"actor": (actor, actor_optimizer), "critic": (critic, critic_optimizer)}


def make_experience(four, home, args, **options):
    minibatches = [list(range(start, len(four.prompts), 3)) for start in range(3)]
    return ppo.make_experience(
        four.actor,
        four.critic,
        four.reward_model,
        four.ref,
        four.prompts,
        minibatches,
        home.tokenizer,
        args,
        args.kl_coef,
        torch.Generator().manual_seed(3),
        **options,
    )


def every_second_says_nothing(monkeypatch, eos):
    """In the first step of decoding every second row draws the end, with the log probability that
    it has."""
    sample = model.sample

    def ends(logits, temperature, *rest):
        tokens, logprobs = sample(logits, temperature, *rest)
        monkeypatch.setattr(model, "sample", sample)
        tokens[::2] = eos
        logprobs[::2] = (logits / temperature).log_softmax(-1)[::2, eos]
        return tokens, logprobs

    monkeypatch.setattr(model, "sample", ends)


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty answers"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(temperature=0.7, gamma=0.9, lam=0.8, kl_kind="k3", no_eos_score=-3.0),
        dict(micro_batch_size=1, lam=1.0),
        dict(whiten_rewards=True, kl_coef=0.5, micro_batch_size=12),
    ],
    ids=str,
)
def test_experience_against_one_response_at_a_time(
    home, ppo_args, four_models, changes, empty, monkeypatch
):
    if empty:
        every_second_says_nothing(monkeypatch, home.tokenizer.eos_token_id)
    args = ppo_args(max_new_tokens=5, **changes)
    experience, said = make_experience(four_models, home, args)
    mask, eos = experience["mask"], home.tokenizer.eos_token_id
    slow = SimpleNamespace(
        **{
            name: copy.deepcopy(getattr(four_models, name)).double()
            for name in ("actor", "ref", "critic", "reward_model")
        }
    )
    assert [prompt for prompt, _ in experience["texts"]] == four_models.prompts
    responses = [response for _, response in experience["texts"]]
    lengths = [len(response) for response in responses]
    assert (responses.count([eos]) >= len(responses) // 2) == empty
    assert experience["lengths"] == [len(p) + n for p, n in zip(four_models.prompts, lengths)]
    assert mask.tolist() == [[1.0] * length + [0.0] * (max(lengths) - length) for length in lengths]
    assert all(eos not in response[:-1] for response in responses)

    rewards, values, scores, kls, counted, objectives = [], [], [], [], [], []
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(four_models.prompts, responses)):
            logprobs = slow_token_logprobs(slow.actor, prompt, response, args.temperature)[
                0
            ].tolist()
            ref_logprobs = slow_token_logprobs(slow.ref, prompt, response, args.temperature)[
                0
            ].tolist()
            at = slow_values(slow.critic, prompt + response).tolist()
            # one position before the token
            values.append(
                [at[len(prompt) + t - 1] for t in range(len(response))]
            )
            scores.append(slow_values(slow.reward_model, prompt + response)[-1].item())
            assert experience["old_logprobs"][i, : len(response)].tolist() == pytest.approx(
                logprobs, abs=1e-4
            )
            assert experience["old_values"][i, : len(response)].tolist() == pytest.approx(
                values[i], abs=1e-4
            )
            log_ratios = [a - b for a, b in zip(logprobs, ref_logprobs)]
            kl = [math.exp(-d) - 1 + d if args.kl_kind == "k3" else d for d in log_ratios]
            as_it_is = response[-1] == eos or args.no_eos_score is None
            counted.append(scores[i] if as_it_is else args.no_eos_score)
            rewards.append([-args.kl_coef * k for k in kl])
            rewards[i][-1] += counted[i]
            kls.append(sum(log_ratios))
            objectives.append(sum(rewards[i]))
    flattened = [r for row in rewards for r in row]
    if args.whiten_rewards:  # divided by the deviation; the mean stays
        mean = sum(flattened) / len(flattened)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in flattened) / len(flattened))
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    advantages, returns = [], []
    for r, v in zip(rewards, values):
        row = [0.0] * len(r)
        for t in range(len(r)):  # the sum over all later TD errors
            for k in range(t, len(r)):
                next_value = v[k + 1] if k + 1 < len(v) else 0.0
                row[t] += (args.gamma * args.lam) ** (k - t) * (
                    r[k] + args.gamma * next_value - v[k]
                )
        advantages.append(row)
        returns.append([a + b for a, b in zip(row, v)])
    flattened = [a for row in advantages for a in row]
    mean = sum(flattened) / len(flattened)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flattened) / len(flattened))
    for i, length in enumerate(lengths):
        whitened = [(a - mean) / deviation for a in advantages[i]]
        assert experience["returns"][i, :length].tolist() == pytest.approx(returns[i], abs=1e-3)
        assert experience["advantages"][i, :length].tolist() == pytest.approx(whitened, abs=1e-3)
        for name in ("old_values", "returns", "advantages"):
            assert not experience[name][i, length:].any()

    number, all_returns = len(scores), [r for row in returns for r in row]
    mean_return = sum(all_returns) / len(all_returns)
    spread = sum((r - mean_return) ** 2 for r in all_returns) / len(all_returns)
    ended = [response[-1] == eos for response in responses]
    of_ended, of_cut = ([s for s, e in zip(scores, ended) if e == which] for which in (True, False))
    mean_kl = sum(kls) / number
    kl_error = math.sqrt(sum((kl - mean_kl) ** 2 for kl in kls) / (number - 1) / number)
    expected = dict(
        score=sum(counted) / number,
        score_ended=sum(of_ended) / len(of_ended),
        score_cut=sum(of_cut) / len(of_cut),
        kl=mean_kl,
        kl_error=kl_error,
        objective=sum(objectives) / number,
        explained_variance=1 - deviation**2 / spread,  # an advantage is a return minus its value
        kl_coef=args.kl_coef,
        response_length=sum(lengths) / number,
        ended=sum(ended) / number,
    )
    assert said == pytest.approx(expected, abs=1e-3)
    assert 0 < said["ended"] < 1 and abs(said["kl"]) > 0.01  # the test has something to see


def test_the_objective_is_what_is_maximized(home, ppo_args, four_models):
    experience, said = make_experience(
        four_models, home, ppo_args(), deviation_of=lambda scores: 4
    )
    assert said["objective"] == pytest.approx(experience["rewards"].sum(1).mean().item(), abs=1e-5)
    assert said["score"] == pytest.approx(experience["scores"].mean().item(), abs=1e-5)


def slow_minibatch(actor, critic, experience, rows, demonstrations, args):
    """The statistics of a mini-batch by loops, each response alone, and the gradients of actor and
    critic."""
    terms = defaultdict(list)
    for i in rows:
        prompt, response = experience["texts"][i]
        logprobs, entropies = slow_token_logprobs(actor, prompt, response, args.temperature)
        values = slow_values(critic, prompt + response)[len(prompt) - 1 : -1]
        for t, (logprob, value) in enumerate(zip(logprobs, values)):
            old, advantage, old_value, target = (
                experience[name][i, t].item()
                for name in ("old_logprobs", "advantages", "old_values", "returns")
            )
            ratio = (logprob - old).exp()
            free = ratio * advantage
            # a number: it has no gradient
            held = (
                min(max(ratio.item(), 1 - args.clip), 1 + args.clip) * advantage
            )
            terms["policy_loss"].append(0 * free - held if held < free.item() else -free)
            terms["clip_fraction"].append(float(held < free.item()))
            error = (value - target) ** 2
            near = min(max(value.item(), old_value - args.value_clip), old_value + args.value_clip)
            near_error = (near - target) ** 2
            terms["value_loss"].append(
                (0 * error + near_error if near_error > error.item() else error) / 2
            )
            terms["value_clip_fraction"].append(float(near_error > error.item()))
            terms["entropy"].append(entropies[t])
            # its mean under old is KL(old || new)
            terms["approx_kl"].append(
                ratio.item() - 1 - math.log(ratio.item())
            )
            terms["largest_ratio"].append(ratio.item())
    result = {name: sum(parts) / len(parts) for name, parts in terms.items()}
    result |= {"largest_ratio": max(terms["largest_ratio"])}
    if demonstrations:
        result["ptx_loss"] = torch.cat(
            [-slow_token_logprobs(actor, p, c)[0] for p, c, _ in demonstrations]
        ).mean()
    actor.zero_grad(), critic.zero_grad()
    (
        result["policy_loss"]
        - args.entropy_coef * result["entropy"]
        + args.ptx_coef * result.get("ptx_loss", 0)
    ).backward()
    result["value_loss"].backward()
    said = {
        name: value.item() if torch.is_tensor(value) else value for name, value in result.items()
    }
    return said, gradient(actor.parameters()), gradient(critic.parameters())


@pytest.mark.parametrize("ptx_coef, empty", [(0.0, False), (0.5, False), (0.5, True)])
def test_minibatch_step_is_the_slow_gradient_however_it_is_cut(
    home, ppo_args, four_models, ptx_coef, empty, monkeypatch
):
    monkeypatch.setattr(ppo, "PIECE", 40)  # tokens: the logits of a row or two at a time
    if empty:
        every_second_says_nothing(monkeypatch, home.tokenizer.eos_token_id)
    args = ppo_args(
        ptx_coef=ptx_coef,
        entropy_coef=0.3,
        temperature=0.8,
        max_grad_norm=1e9,
        clip=0.05,
        value_clip=0.01,
    )
    experience, _ = make_experience(four_models, home, args)
    rows = [10, 2, 7, 5, 0, 11, 3]
    demonstrations = examples_of(home.demos, home.tokenizer)[:5] if ptx_coef else []
    # the models have moved on since: ratios and values lie on both sides of the clips
    actor, critic = perturbed(four_models.actor, 0.05, 4), perturbed(four_models.critic, 0.05, 5)
    expected, *slow = slow_minibatch(
        copy.deepcopy(actor).double(),
        copy.deepcopy(critic).double(),
        experience,
        rows,
        demonstrations,
        args,
    )
    assert 0 < expected["clip_fraction"] < 1 and 0 < expected["value_clip_fraction"] < 1
    stepped = []
    for args.micro_batch_size in (1, 3, 7):
        ours = copy.deepcopy(actor), copy.deepcopy(critic)
        optimizers = [PlainDescent(module.parameters(), lr=1.0) for module in ours]
        said = ppo.train_minibatch(
            trained(*ours, *optimizers), experience, rows, demonstrations, home.tokenizer, args
        )
        for optimizer, reference in zip(optimizers, slow):
            assert distance(optimizer.change(), reference) < 1e-4
        assert said == pytest.approx(expected, rel=1e-4, abs=1e-5)
        # the next step starts from nothing
        assert all(
            p.grad is None for module in ours for p in module.parameters()
        )
        stepped.append(flat(after for optimizer in optimizers for after in optimizer.after))
    for other in stepped[1:]:
        torch.testing.assert_close(other, stepped[0], rtol=0, atol=1e-5)


def test_gradients_are_clipped_each_by_its_own_norm(home, ppo_args, four_models):
    args = ppo_args(max_grad_norm=1e-3)
    experience, _ = make_experience(four_models, home, args)
    modules = [copy.deepcopy(module) for module in (four_models.actor, four_models.critic)]
    optimizers = [PlainDescent(module.parameters(), lr=1.0) for module in modules]
    ppo.train_minibatch(
        trained(*modules, *optimizers), experience, [0, 1, 2], [], home.tokenizer, args
    )
    for optimizer in optimizers:
        assert optimizer.change().norm().item() == pytest.approx(1e-3, rel=0.01)


def test_one_model_at_a_time_has_gradients(home, ppo_args, four_models, monkeypatch):
    args, held, clip_gradients = ppo_args(), [], ppo.clip_gradients
    experience, _ = make_experience(four_models, home, args)
    modules = [copy.deepcopy(module) for module in (four_models.actor, four_models.critic)]
    optimizers = [PlainDescent(module.parameters(), 1e-3) for module in modules]

    def spy(model, max_norm):
        assert model is modules[len(held)]
        held.append([all(p.grad is None for p in module.parameters()) for module in modules])
        return clip_gradients(model, max_norm)

    monkeypatch.setattr(ppo, "clip_gradients", spy)
    ppo.train_minibatch(
        trained(*modules, *optimizers), experience, [0, 1, 2], [], home.tokenizer, args
    )
    assert held == [[False, True], [True, False]]


def test_ptx_inputs_labels_and_mask_come_from_the_same_records(
    home, ppo_args, four_models, monkeypatch
):
    args = ppo_args(micro_batch_size=2)
    experience, _ = make_experience(four_models, home, args)
    demonstrations = examples_of(home.demos, home.tokenizer)[:5]
    actor, critic, inputs, seen = (
        copy.deepcopy(four_models.actor),
        copy.deepcopy(four_models.critic),
        [],
        [],
    )
    actor.model.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    ptx_loss = ppo.ptx_loss

    def spy(logits, labels):
        assert logits.shape[:2] == labels.shape
        # positions before the first target may be left out
        skipped = (
            inputs[-1].shape[1] - labels.shape[1]
        )
        for row, label in zip(inputs[-1].tolist(), labels.tolist()):
            label = [-100] * skipped + label
            assert all(target in (-100, token) for target, token in zip(label, row))
            targets = [t for t, target in enumerate(label) if target != -100]
            assert targets == list(range(targets[0], targets[-1] + 1))
            seen.append(
                (row[: targets[0]], row[targets[0] : targets[-1] + 1], row[targets[-1] + 1 :])
            )
        return ptx_loss(logits, labels)

    monkeypatch.setattr(ppo, "ptx_loss", spy)
    optimizers = [PlainDescent(module.parameters(), 1e-3) for module in (actor, critic)]
    ppo.train_minibatch(
        trained(actor, critic, *optimizers),
        experience,
        [0, 1],
        demonstrations,
        home.tokenizer,
        args,
    )
    assert sorted((p, c) for p, c, _ in seen) == sorted((p, c) for p, c, _ in demonstrations)
    assert all(token == home.tokenizer.pad_token_id for _, _, rest in seen for token in rest)


def test_ptx_logits_are_made_for_few_rows_at_a_time(home, ppo_args, four_models, monkeypatch):
    args = ppo_args(micro_batch_size=8)
    experience, _ = make_experience(four_models, home, args)
    demonstrations = examples_of(home.demos, home.tokenizer)[:8]
    modules, sizes = [copy.deepcopy(m) for m in (four_models.actor, four_models.critic)], []
    optimizers = [PlainDescent(module.parameters(), 1e-3) for module in modules]
    ptx_loss = ppo.ptx_loss

    def spy(logits, labels):
        sizes.append(logits[..., 0].numel())
        return ptx_loss(logits, labels)

    monkeypatch.setattr(ppo, "PIECE", 60)
    monkeypatch.setattr(ppo, "ptx_loss", spy)
    ppo.train_minibatch(
        trained(*modules, *optimizers), experience, [0, 1], demonstrations, home.tokenizer, args
    )
    assert len(sizes) > 1 and max(sizes) <= 60 < sum(sizes) / 2  # each piece twice: once backward


@pytest.mark.parametrize("size, n", [(10, 3), (5, 5), (7, 20), (1, 4)])
def test_each_index_is_dealt_once_a_round(size, n):
    cards, again, other = (
        deal(size, 3 * size * n, 0),
        deal(size, 3 * size * n, 0),
        deal(size, 3 * size * n, 1),
    )
    assert len(cards) == 3 * size * n and cards == again
    assert deal(size, n, 0) == cards[:n]  # what comes first does not depend on how many there are
    rounds = [cards[start : start + size] for start in range(0, len(cards) - size + 1, size)]
    assert len(rounds) >= 3 and all(sorted(cards) == list(range(size)) for cards in rounds)
    if size > 1:
        assert len(set(map(tuple, rounds))) > 1 and cards != other


def test_the_reward_model_is_asked_about_the_end_that_it_knows(home, ppo_args, four_models):
    """LLaMA 3 has three tokens that end a text; its reward model was trained on one."""
    eos, other = home.tokenizer.eos_token_id, 9
    two_ends = SimpleNamespace(end_ids=[eos, other], pad_token_id=home.tokenizer.pad_token_id)
    texts = [(prompt, [11, 12, end]) for prompt in four_models.prompts[:3] for end in (eos, other, 13)]
    scores, ended = ppo.score_responses(four_models.reward_model, texts, two_ends, ppo_args())
    assert ended.tolist() == 3 * [True, True, False]
    for start, (prompt, response) in enumerate(texts[::3]):
        own = slow_values(four_models.reward_model, prompt + response)[-1].item()
        cut = slow_values(four_models.reward_model, prompt + response[:-1] + [13])[-1].item()
        assert scores[3 * start:3 * start + 3].tolist() == pytest.approx([own, own, cut], abs=1e-5)
        assert abs(own - cut) > 1e-3


def test_texts_fit_the_context_of_the_reward_model(ppo_argv, rm_run, tmp_path, monkeypatch, capsys):
    shutil.copytree(rm_run.folder, tmp_path / "rm")
    config = tmp_path / "rm" / "config.json"
    said = config.read_text().replace('max_position_embeddings": 128', 'max_position_embeddings": 24')
    config.write_text(said)
    seen, score_responses = [], ppo.score_responses

    def spy(reward_model, texts, *given):
        seen.extend(len(prompt) + len(response) for prompt, response in texts)
        return score_responses(reward_model, texts, *given)

    monkeypatch.setattr(ppo, "score_responses", spy)
    ppo.main(ppo_argv(rm=tmp_path / "rm", updates=1, critic="sft", out=tmp_path / "out"))
    assert max(seen) <= 24 and "cut on the left to 16 tokens" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The run

PPO_COLUMNS = [
    "update",
    "score",
    "kl",
    "kl_coef",
    "objective",
    "entropy",
    "policy_loss",
    "value_loss",
    "ptx_loss",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl",
    "explained_variance",
    "largest_ratio",
    "response_length",
    "ended",
    "lr",
    "tokens_per_s",
]


def test_ppo_metrics(ppo_run):
    [started], rows = ppo_run.started, ppo_run.rows
    assert {name for name, value in started.items() if value is not None} == {
        "update",
        "eval_score",
        "eval_gold",
    }
    assert set(PPO_COLUMNS) <= set(rows[0]) and [row["update"] for row in rows] == [1, 2, 3]
    assert all(
        row[name] is not None and math.isfinite(row[name]) for row in rows for name in PPO_COLUMNS
    )
    assert [row["eval_score"] is not None and row["eval_gold"] is not None for row in rows] == [
        False,
        True,
        True,
    ]
    for row in rows:
        assert (
            row["largest_ratio"] > 0.99
            and 0 <= row["ended"] <= 1
            and 1 <= row["response_length"] <= 8
        )
        assert (
            0 < row["entropy"] < math.log(2000)
            and row["tokens_per_s"] > 0
            and row["approx_kl"] >= 0
        )
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3], rel=1e-4)


def test_before_any_step_the_actor_is_the_reference(ppo_run):
    assert abs(ppo_run.rows[0]["kl"]) < 1e-3 < max(abs(row["kl"]) for row in ppo_run.rows[1:])


def test_only_actor_and_critic_learn(ppo_run):
    for name, module, before in ppo_run.models:
        moved = any(
            not torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items()
        )
        assert moved == (name in ("actor", "critic")), name
        if not moved:
            assert all(p.grad is None and not p.requires_grad for p in module.parameters()), name
    parameters = [
        id(parameter) for _, module, _ in ppo_run.models for parameter in module.parameters()
    ]
    assert len(parameters) == len(set(parameters))  # no two of the four share any


def test_ppo_exports_in_plain_transformers(ppo_run, home):
    actor, critic = (
        ppo_run.exported[folder]
        for folder in (ppo_run.folder, os.path.join(ppo_run.folder, "critic"))
    )
    assert_same_llama(ppo_run.folder, actor, home.tokenizer)
    examples = examples_of(home.demos, home.tokenizer)[:4]
    with torch.no_grad():
        ours = [slow_values(critic, p + c)[-1].item() for p, c, _ in examples]
    assert plain_scores(os.path.join(ppo_run.folder, "critic"), examples) == pytest.approx(
        ours, abs=1e-4
    )
    # what was exported is what the last update left
    for trained, (_, module, _) in zip((actor, critic), ppo_run.models):
        assert torch.equal(flat(trained.parameters()), flat(module.parameters()))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ppo_run.folder, "critic"))
    assert tokenizer.get_vocab() == home.tokenizer.get_vocab()


def test_ppo_evaluation(ppo_run, rm_run, home):
    """The last row's held-out means are those of greedy answers of the exported actor, a token at a
    time."""
    actor, scores, gold = AutoModelForCausalLM.from_pretrained(ppo_run.folder).eval(), [], []
    for record in home.records["prompts_eval"][:4]:
        prompt, response = encode_prompt(home.tokenizer, record["user_input"]), []
        while len(response) < 8 and response[-1:] != [home.tokenizer.eos_token_id]:
            with torch.no_grad():
                response.append(
                    actor(torch.tensor([prompt + response])).logits[0, -1].argmax().item()
                )
        ended = response[-1] == home.tokenizer.eos_token_id
        scores += plain_scores(rm_run.folder, [(prompt, response, None)]) if ended else [-1.0]
        text = home.tokenizer.decode(response, skip_special_tokens=True).strip()
        gold.append(data_gen.score(record["user_input"], text))
    assert ppo_run.rows[-1]["eval_score"] == pytest.approx(sum(scores) / 4, abs=1e-3)
    assert ppo_run.rows[-1]["eval_gold"] == pytest.approx(sum(gold) / 4, abs=1e-3)


PRECISIONS = {
    "float32": {},
    "bf16": dict(dtype="bfloat16"),
    "LoRA": dict(lora_rank=4),
    "LoRA, bf16": dict(lora_rank=4, dtype="bfloat16"),
    "LoRA, bf16 base": dict(lora_rank=4, base_dtype="bfloat16"),
    "LoRA, bf16 and bf16 base": dict(lora_rank=4, dtype="bfloat16", base_dtype="bfloat16"),
}


@pytest.mark.parametrize("changes", PRECISIONS.values(), ids=PRECISIONS)
def test_before_any_step_every_ratio_is_1_and_the_kl_is_0(ppo_argv, tmp_path, monkeypatch, changes):
    """With a step of next to nothing: in every minibatch of the first pass, cut into micro-batches
    of different lengths. (approx_kl is the mean of ratio - 1 - log ratio, which is above 0 wherever
    a ratio is not 1.)"""
    passes, train_minibatch = [], ppo.train_minibatch
    monkeypatch.setattr(
        ppo, "train_minibatch", lambda *given: passes.append(train_minibatch(*given)) or passes[-1]
    )
    usual = dict(
        updates=1,
        batch_size=12,
        minibatch_size=5,
        micro_batch_size=2,
        ppo_epochs=1,
        lr=1e-30,
        critic_lr=1e-30,
        ptx_coef=0,
        demonstrations=None,
        eval_prompts=None,
        gold=None,
        max_new_tokens=30,
        out=tmp_path,
    )
    run = run_stage(ppo, ppo_argv(**usual, **changes))
    assert len(passes) == 3 and run.rows[0]["response_length"] > 3
    for said in passes:
        assert said["largest_ratio"] == pytest.approx(1, abs=1e-3) and said["approx_kl"] < 1e-7
    assert abs(run.rows[0]["kl"]) < (1e-4 if not changes or changes == dict(lora_rank=4) else 1e-6)


def test_a_cut_response_gets_a_fixed_score(home, ppo_args, four_models):
    """Whatever the reward model says of it, which is logged; one that ended gets what the reward
    model says."""
    args = ppo_args(max_new_tokens=5, no_eos_score=-7.0, kl_coef=0.0)
    experience, said = make_experience(four_models, home, args)
    eos = home.tokenizer.eos_token_id
    ended = [response[-1] == eos for _, response in experience["texts"]]
    with torch.no_grad():
        scores = [
            slow_values(four_models.reward_model, p + r)[-1].item() for p, r in experience["texts"]
        ]
    expected = [score if e else -7.0 for score, e in zip(scores, ended)]
    assert said["score"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert said["ended"] == pytest.approx(sum(ended) / len(ended))
    last = [len(response) - 1 for _, response in experience["texts"]]
    # gamma 1, no KL: with lambda 1 the return of every token is the score
    experience, _ = make_experience(
        four_models, home, ppo_args(max_new_tokens=5, no_eos_score=-7.0, kl_coef=0.0, lam=1.0)
    )
    for i, (score, t) in enumerate(zip(expected, last)):
        assert experience["returns"][i, : t + 1].tolist() == pytest.approx(
            [score] * (t + 1), abs=1e-3
        )
    assert 0 < sum(ended) < len(ended)


def test_same_seed_same_metrics(ppo_run, ppo_argv, tmp_path):
    again = run_stage(ppo, ppo_argv(out=tmp_path / "again"))
    other = run_stage(ppo, ppo_argv(updates=1, seed=1, out=tmp_path / "other"))
    assert without_speed(again.rows) == without_speed(ppo_run.rows)
    assert other.rows[0]["score"] != ppo_run.rows[0]["score"]


def test_kl_target_adapts_the_coefficient(ppo_argv, tmp_path):
    """kl_coef <- kl_coef (1 + clamp(KL / target - 1, -0.2, 0.2) n / horizon) after each update
    (Ziegler et al. 2.2)."""
    changes = dict(
        updates=4, kl_target=0.2, kl_horizon=32, lr=5e-3, ptx_coef=0, eval_prompts=None, gold=None
    )
    run = run_stage(ppo, ppo_argv(**changes, out=tmp_path / "adaptive"))
    coef, errors = 0.1, []
    for row in run.rows:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-4)
        errors.append(min(max(row["kl"] / 0.2 - 1, -0.2), 0.2))
        coef *= 1 + errors[-1] * 8 / 32
    assert errors[0] == -0.2 and max(errors) > 0  # it has fallen, and it has risen
    assert all(row["ptx_loss"] is None for row in run.rows)  # there is none


def test_target_kl_ends_an_update_early(ppo_argv, tmp_path, monkeypatch):
    """No step is taken after the first whose old and new policy are further apart; the next update
    goes on as usual."""
    updates, make_experience, train_minibatch = [], ppo.make_experience, ppo.train_minibatch

    def train(*given):
        result = train_minibatch(*given)
        updates[-1].append(result["approx_kl"])
        return result

    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: updates.append([]) or make_experience(*given)
    )
    monkeypatch.setattr(ppo, "train_minibatch", train)
    changes = dict(updates=2, ppo_epochs=3, lr=1e-2, eval_prompts=None, gold=None)
    ppo.main(ppo_argv(**changes, out=tmp_path / "free"))
    assert [len(steps) for steps in updates] == [6, 6]
    target = sorted(updates[0])[2]  # somewhere on the way
    updates.clear()
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: steps.append(1) or step(*given))
    ppo.main(ppo_argv(**changes, target_kl=target, out=tmp_path / "held"))
    assert 1 < len(updates[0]) < 6 and len(updates) == 2
    # the step that was found too far is not taken, neither by the actor nor by the critic
    assert len(steps) == 2 * sum(kl <= target for update in updates for kl in update)
    for steps in updates:
        assert all(kl <= target for kl in steps[:-1]) and (steps[-1] > target or len(steps) == 6)


def nan(x):
    return x * math.nan


@pytest.mark.parametrize(
    "name, function, spoil",
    [
        ("the reward model's score", "score_responses", nan),
        ("the policy loss", "policy_loss", nan),
        ("the value loss", "value_loss", nan),
        ("the ptx loss", "ptx_loss", nan),
        ("the gradient of the actor", "policy_loss", steep),
        ("the gradient of the critic", "value_loss", steep),
    ],
)
def test_ppo_stops_on_what_is_not_finite(
    ppo_argv, tmp_path, monkeypatch, capsys, name, function, spoil
):
    """In the second update: exit code 1 with the name of what it was, and the models stay as the
    first left them."""
    experiences, make_experience, works = [], ppo.make_experience, getattr(ppo, function)

    def spoiled(*given):
        result = works(*given)
        if len(experiences) < 2:
            return result
        return (spoil(result[0]), *result[1:]) if isinstance(result, tuple) else spoil(result)

    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: experiences.append(1) or make_experience(*given)
    )
    monkeypatch.setattr(ppo, function, spoiled)
    saved, out = {}, tmp_path / "out"

    def save(trained, tokenizer, folder):
        model.save_checkpoint(trained, tokenizer, folder)
        saved.update({path: path.read_bytes() for path in Path(folder).glob("*.safetensors")})

    monkeypatch.setattr(ppo, "save_checkpoint", save)
    argv = ppo_argv(eval_every=1, eval_prompts=None, gold=None, out=out)
    line = error_line(capsys, lambda: ppo.main(argv), code=1)
    assert line.startswith(f"error: {name} is nan") or line.startswith(f"error: {name} is inf")
    assert str(out) in line and len(read_rows(out)) == 1 and len(experiences) == 2
    assert set(saved) == {out / "model.safetensors", out / "critic" / "model.safetensors"}
    assert all(path.read_bytes() == data for path, data in saved.items())
    for loaded in (
        AutoModelForCausalLM.from_pretrained(out),
        load_scalar_head(str(out / "critic")),
    ):
        assert flat(loaded.parameters()).isfinite().all()


# ------------------------------------------------------------------------------------------------
# Waiting for a GPU


def test_ppo_waits_once_a_token_and_once_a_minibatch(ppo_argv, tmp_path, monkeypatch):
    """Per update: once per token of the longest response (on a GPU per 16); for the prompts'
    lengths, the longest response, the responses, their lengths, and the statistics; once per
    mini-batch, and for its rows, on the CPU; and once for each of the two models where they are
    exported. However many pieces the demonstrations take."""
    monkeypatch.setattr(ppo, "PIECE", 40)
    argv = ppo_argv(eval_prompts=None, gold=None, out=tmp_path / "out")
    waited = waits_of_steps(ppo, argv)
    assert len(waited) == 2 and max(waited) <= 8 + 5 + 4 * 2 + 2


# ------------------------------------------------------------------------------------------------
# Without options the demo runs every stage that is missing


def with_demo(script, **values):
    """The script's table of settings with other values for the demo."""
    return [
        row if isinstance(row, str) else (row[0], values.get(row[0], row[1]), *row[2:])
        for row in script.SETTINGS
    ]


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """The demo in an empty directory, on less data, with a smaller model and fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "DEMO_MODEL", TINY)
    less = functools.partial(
        data_gen.make_data, held_out=40, demonstrations=400, ranked=40, completions=4
    )
    monkeypatch.setattr(data_gen, "make_data", less)
    short = dict(
        updates=1, batch_size=4, minibatch_size=4, ppo_epochs=1, max_new_tokens=8, eval_number=4
    )
    for script, values in ((sft, dict(epochs=1)), (train_rm, dict(epochs=1)), (ppo, short)):
        monkeypatch.setattr(script, "SETTINGS", with_demo(script, **values))


def test_ppo_from_an_empty_directory(tiny_demo, tmp_path, capsys):
    ppo.main([])
    said = capsys.readouterr().out
    steps = [
        "data/ is missing: running data_gen.py",
        "runs/sft is missing: running sft.py",
        "runs/rm is missing: running train_rm.py",
        "saved runs/ppo",
    ]
    places = [said.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    for folder in ("runs/sft", "runs/ppo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    for folder in ("runs/rm", "runs/ppo/critic"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    line = error_line(capsys, lambda: ppo.main([]))
    assert line.startswith("error: runs/ppo: holds an earlier run")


def test_bad_input_leaves_the_earlier_run(ppo_argv, ppo_run, tmp_path, capsys):
    """--overwrite ends the earlier run when the new one begins, not before its input is read."""
    out = tmp_path / "out"
    shutil.copytree(ppo_run.folder, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error_line(
        capsys, lambda: ppo.main(ppo_argv(out=out, prompts=tmp_path / "none.json", overwrite=True))
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


DATA, SFT, RM = "data/tokenizer/tokenizer.model", "runs/sft/config.json", "runs/rm/config.json"


@pytest.mark.parametrize("there", [[], [DATA], [DATA, SFT], [DATA, RM], [DATA, SFT, RM]], ids=str)
def test_only_missing_stages_run(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    ran, results = [], {DATA: data_gen, SFT: sft, RM: train_rm}
    for result, script in results.items():
        monkeypatch.setattr(
            script, "main", lambda argv, result=result: ran.append((result, argv[:2]))
        )
    ppo.run_missing_stages(parse(ppo, ["--seed", "7"]))
    assert ran == [(result, ["--seed", "7"]) for result in results if result not in there]
