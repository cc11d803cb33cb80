"""Generation against a full forward pass for every token, one prompt at a time; the frequencies of
sampled tokens by chi-square."""

import math
import random

import pytest
import torch
from transformers import LlamaConfig

from lib import kernels
from lib.data import left_pad
from lib.dialogue import encode_prompt
from makers import assert_close, logits_of
from model import generate, load_llama, random_llama, sample

VOCAB = 24


@pytest.fixture(scope="module")
def speaker():
    """A random LLaMA with few words, so that each is said now and then."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        tie_word_embeddings=False,
    )
    return random_llama(config)


def make_prompts(number, seed=0, longest=12):
    rng = random.Random(seed)
    return [
        [rng.randrange(1, VOCAB) for _ in range(rng.randrange(1, longest + 1))]
        for _ in range(number)
    ]


def slow_greedy(model, prompt, steps, eos=None):
    """One prompt, a whole forward pass for every token."""
    tokens = list(prompt)
    for _ in range(steps):
        tokens.append(logits_of(model, torch.tensor(tokens))[-1].argmax().item())
        if tokens[-1] == eos:
            break
    return tokens[len(prompt) :]


def training_logprobs(model, prompt, response, temperature):
    """log pi(response | prompt) as a training pass has it, one prompt alone."""
    logits = logits_of(model, torch.tensor([*prompt, *response]))[len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(response)[:, None])[:, 0]


def rows_of(result):
    """[(tokens, logprobs)] of a Generation, each cut at its mask, after checking that the mask is
    ones, then zeros."""
    rows = []
    for tokens, logprobs, mask in zip(result.tokens, result.logprobs, result.mask):
        n = int(mask.sum())
        assert mask.tolist() == [1.0] * n + [0.0] * (len(mask) - n)
        rows.append((tokens[:n].tolist(), logprobs[:n]))
    return rows


def test_greedy_is_the_argmax_of_full_forward_passes(speaker):
    prompts = make_prompts(12)
    result = generate(speaker, *left_pad(prompts, 0), 20, -1, temperature=0)
    slow = [slow_greedy(speaker, prompt, 20) for prompt in prompts]
    # or there would be little to get wrong
    assert (
        len({token for row in slow for token in row}) > VOCAB // 2
    )
    assert result.tokens.tolist() == slow
    assert torch.equal(result.mask, torch.ones(12, 20)) and torch.equal(
        result.logprobs, torch.zeros(12, 20)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
def test_logprobs_are_those_of_a_training_pass(speaker, temperature):
    prompts = make_prompts(16, seed=1)
    generator = torch.Generator().manual_seed(3)
    result = generate(
        speaker, *left_pad(prompts, 0), 24, -1, temperature=temperature, generator=generator
    )
    for prompt, (tokens, logprobs) in zip(prompts, rows_of(result)):
        assert len(tokens) == 24
        assert_close(logprobs, training_logprobs(speaker, prompt, tokens, temperature), 1e-4)


def test_rows_of_masks_are_aligned_while_decoding(speaker, monkeypatch):
    """On a GPU fused attention copies every mask whose rows are not 16 numbers apart, or 32, ..."""
    strides, attention = [], kernels.attention

    def see(q, k, v, mask):
        if q.shape[2] == 1:
            strides.append(mask.stride(0))
        return attention(q, k, v, mask)

    monkeypatch.setattr(kernels, "attention", see)
    generate(speaker, *left_pad([[1] * 3, [1] * 5], 0), 6, -1, temperature=0)
    assert strides and all(stride % 16 == 0 for stride in strides)


def test_a_padded_batch_answers_each_prompt_as_if_it_stood_alone(speaker):
    prompts = make_prompts(10, seed=2)
    assert len({len(prompt) for prompt in prompts}) > 4
    greedy = generate(speaker, *left_pad(prompts, 0), 16, -1, temperature=0).tokens
    for pad in (5, VOCAB - 1):  # what stands in the padding does not matter
        assert torch.equal(
            generate(speaker, *left_pad(prompts, pad), 16, -1, temperature=0).tokens, greedy
        )
    for prompt, row in zip(prompts, greedy):
        assert torch.equal(
            generate(speaker, *left_pad([prompt], 0), 16, -1, temperature=0).tokens[0], row
        )
    # with top_k=1 the sampler has no choice either, and with its temperature it gives log
    # probabilities of 0
    forced = generate(speaker, *left_pad(prompts, 0), 16, -1, temperature=0.5, top_k=1)
    assert torch.equal(forced.tokens, greedy) and forced.logprobs.abs().max() == 0


def test_positions_are_counted_from_the_first_token_of_each_prompt(speaker):
    """Turning keys and queries by a position only shows how far they lie apart, so the answers
    alone would not tell."""
    prompts, seen = sorted(make_prompts(6, seed=3), key=len), []
    hook = speaker.model.rotary_emb.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[1].clone())  # a step moves it on in place
    )
    input_ids, mask = left_pad(prompts, 0)
    generate(speaker, input_ids, mask, 5, -1, temperature=0)
    hook.remove()
    steps, first = seen[-4:], [row for positions in seen[:-4] for row in positions]
    assert len(first) == 6
    for row, prompt in enumerate(prompts):
        assert first[row][-len(prompt) :].tolist() == list(range(len(prompt)))
        assert [positions[row].tolist() for positions in steps] == [
            [len(prompt) + step] for step in range(4)
        ]


def test_logprobs_do_not_depend_on_the_padding(speaker):
    """The same draw for the same prompt, once alone and once with ten more places of padding."""
    for seed, prompt in enumerate(make_prompts(6, seed=4)):
        alone = generate(
            speaker, *left_pad([prompt], 0), 10, -1, generator=torch.Generator().manual_seed(seed)
        )
        ids, mask = left_pad([prompt, [1] * (len(prompt) + 10)], 0)
        padded = generate(
            speaker, ids[:1], mask[:1], 10, -1, generator=torch.Generator().manual_seed(seed)
        )
        assert torch.equal(padded.tokens, alone.tokens)
        assert_close(padded.logprobs, alone.logprobs, 1e-4)


def widths(model):
    """Record how many rows each forward pass computes; returns the list and the hook to remove."""
    seen = []
    return seen, model.lm_head.register_forward_hook(
        lambda module, inputs, output: seen.append(len(inputs[0]))
    )


def test_rows_stop_at_the_end_of_sequence_and_are_dropped_without_mixing(speaker):
    prompts = make_prompts(24, seed=5)
    free = [slow_greedy(speaker, prompt, 30) for prompt in prompts]
    # ends rows at the most different steps
    eos = max(
        range(VOCAB), key=lambda t: len({row.index(t) for row in free if t in row})
    )
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in free]
    assert len({len(row) for row in expected}) > 4
    seen, hook = widths(speaker)
    result = generate(speaker, *left_pad(prompts, 0), 30, eos, temperature=0)
    hook.remove()
    prompts_read, steps = seen[: -max(map(len, expected)) + 1], seen[-max(map(len, expected)) + 1 :]
    # ended rows are not computed for ever
    assert (
        sum(prompts_read) == 24 and steps[0] == 24 and steps[-1] < 18 and len(set(steps)) > 2
    )
    assert [tokens for tokens, _ in rows_of(result)] == expected
    assert result.tokens.shape[1] == max(map(len, expected))
    assert (
        result.tokens[result.mask == 0].eq(0).all()
        and result.logprobs[result.mask == 0].eq(0).all()
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_rows_stop_and_keep_their_logprobs_when_others_are_dropped(speaker, temperature):
    prompts = make_prompts(40, seed=6)
    endless = generate(
        speaker, *left_pad(prompts, 0), 40, -1, generator=torch.Generator().manual_seed(0)
    ).tokens
    eos = endless.flatten().bincount().argmax().item()  # what is said most often
    seen, hook = widths(speaker)
    result = generate(
        speaker,
        *left_pad(prompts, 0),
        40,
        eos,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    hook.remove()
    rows = rows_of(result)
    assert len(set(seen)) > 3 and len({len(tokens) for tokens, _ in rows}) > 8
    for prompt, (tokens, logprobs) in zip(prompts, rows):
        assert eos not in tokens[:-1] and (tokens[-1] == eos or len(tokens) == 40)
        assert_close(logprobs, training_logprobs(speaker, prompt, tokens, temperature), 1e-4)
    assert (
        result.tokens[result.mask == 0].eq(0).all()
        and result.logprobs[result.mask == 0].eq(0).all()
    )


def test_any_of_several_ends_ends_a_row(speaker):
    prompts = make_prompts(30, seed=11)
    ends = [3, 5, 9]
    expected = []
    for prompt in prompts:
        row = slow_greedy(speaker, prompt, 25)
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        expected.append(row[: stop + 1])
    assert {row[-1] for row in expected} >= set(ends[:2])  # more than one of them is said
    result = generate(speaker, *left_pad(prompts, 0), 25, ends, temperature=0)
    assert [tokens for tokens, _ in rows_of(result)] == expected


def test_generation_ends_with_the_longest_response(speaker):
    prompt = make_prompts(1, seed=7)[0]
    first = slow_greedy(speaker, prompt, 1)[0]
    result = generate(speaker, *left_pad([prompt], 0), 50, first, temperature=0)
    assert result.tokens.tolist() == [[first]] and result.mask.tolist() == [[1.0]]
    assert generate(speaker, *left_pad([prompt], 0), 1, -1).tokens.shape == (1, 1)


def test_generation_repeats_with_the_same_generator(speaker):
    batch = left_pad(make_prompts(5, seed=8), 0)
    one, two, other = (
        generate(speaker, *batch, 20, -1, generator=torch.Generator().manual_seed(seed)).tokens
        for seed in (0, 0, 1)
    )
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_generation_with_cuts_gives_the_logprobs_of_what_is_left(speaker):
    prompts = make_prompts(8, seed=9)
    generator = torch.Generator().manual_seed(0)
    result = generate(
        speaker,
        *left_pad(prompts, 0),
        12,
        -1,
        temperature=0.8,
        top_k=5,
        top_p=0.8,
        generator=generator,
    )
    for prompt, (tokens, logprobs) in zip(prompts, rows_of(result)):
        logits = logits_of(speaker, torch.tensor([*prompt, *tokens]))[len(prompt) - 1 : -1]
        kept = [plain_distribution(row.tolist(), 0.8, 5, 0.8) for row in logits]
        assert_close(logprobs, torch.tensor([math.log(p[t]) for p, t in zip(kept, tokens)]), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generation_with_a_demo_model_in_both_precisions(tokenizer, dtype):
    torch.manual_seed(0)
    model = load_llama(None, tokenizer, dtype)
    prompts = [
        encode_prompt(tokenizer, text)
        for text in ("the fox", "the quick brown fox jumps over", "你好")
    ]
    result = generate(
        model,
        *left_pad(prompts, tokenizer.pad_token_id),
        12,
        -1,
        generator=torch.Generator().manual_seed(0),
    )
    for prompt, (tokens, logprobs) in zip(prompts, rows_of(result)):
        assert_close(
            logprobs,
            training_logprobs(model, prompt, tokens, 1.0),
            1e-4 if dtype == torch.float32 else 0.15,
        )


def plain_distribution(logits, temperature, top_k, top_p):
    """The probabilities that `sample` must draw from, on a plain list of (different) logits."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if top_k:
        order = order[:top_k]
    weight = {i: math.exp((logits[i] - logits[order[0]]) / temperature) for i in order}
    total, kept, mass = sum(weight.values()), [], 0.0
    for i in order:
        if mass >= top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    total = sum(weight[i] for i in kept)
    return [weight[i] / total if i in kept else 0.0 for i in range(len(logits))]


# of the chi-square distribution, by degrees of freedom: what it exceeds with probability 0.001
CHI_SQUARE = {
    1: 10.83,
    2: 13.82,
    3: 16.27,
    4: 18.47,
    5: 20.52,
    6: 22.46,
    7: 24.32,
    8: 26.12,
    9: 27.88,
}


@pytest.mark.parametrize(
    "temperature, top_k, top_p",
    [
        (1.0, 0, 1.0),
        (0.7, 0, 1.0),
        (2.0, 0, 1.0),
        (1.0, 3, 1.0),
        (0.7, 5, 1.0),
        (1.0, 0, 0.6),
        (1.3, 0, 0.9),
        (0.7, 6, 0.8),
        (1.0, 100, 1.0),
        (1.0, 1, 1.0),
        (1.0, 0, 0.01),
    ],
)
def test_frequencies_and_logprobs_of_sampled_tokens(temperature, top_k, top_p):
    rows = torch.tensor(
        [
            [0.3, -1.0, 1.2, 0.1, -0.4, 0.9, -2.0, 0.6, -0.1, 0.0],
            [2.0, 0.5, -0.5, 0.2, 1.0, -1.5, 0.8, -0.2, 1.4, -3.0],
        ]
    )
    draws = 30000
    logits = rows.repeat(draws, 1)  # the two take turns
    uniform = 1 - torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits.clone(), temperature, top_k, top_p, uniform)
    for i, row in enumerate(rows):
        p = plain_distribution(row.tolist(), temperature, top_k, top_p)
        counts = tokens[i::2].bincount(minlength=10).tolist()
        assert all(count == 0 for count, probability in zip(counts, p) if probability == 0)
        possible = [j for j in range(10) if p[j] > 0]
        chi_square = sum((counts[j] - draws * p[j]) ** 2 / (draws * p[j]) for j in possible)
        assert len(possible) == 1 or chi_square < CHI_SQUARE[len(possible) - 1]
        assert_close(
            logprobs[i::2], torch.tensor([math.log(p[t]) for t in tokens[i::2].tolist()]), 1e-5
        )


def test_sampling_never_takes_what_has_no_probability():
    """In a vocabulary of LLaMA's size, words at both ends and in between are impossible."""
    logits = torch.randn(400, 32000, generator=torch.Generator().manual_seed(0))
    impossible = torch.rand(32000, generator=torch.Generator().manual_seed(1)) < 0.9
    impossible[:100] = impossible[-100:] = True
    logits[:, impossible] = -math.inf
    uniform = 1 - torch.rand(len(logits), 1, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = sample(logits, 1.0, 0, 1.0, uniform)
    assert not impossible[tokens].any()
    assert_close(logprobs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0], 1e-5)
    assert len(set(tokens.tolist())) > 300


def test_sampling_survives_draws_at_both_ends():
    logits = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]])
    for draw, token in [(0.0, 2), (1 - 2**-24, 1)]:  # torch.rand lies in [0, 1)
        uniform = 1 - torch.full((1, 1), draw)
        assert sample(logits, 1.0, 0, 1.0, uniform)[0].tolist() == [token]


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample(logits, 0, 0, 1.0, None)
    assert (
        tokens.tolist() == [max(range(30), key=row.__getitem__) for row in logits.tolist()]
        and logprobs.tolist() == [0.0] * 50
    )


def test_weights_that_diverged_end_nothing_here():
    """Training says in one line that its loss is nan; what comes before it must not fail."""
    tokens, logprobs = sample(torch.full((2, 5), float("nan")), 1.0, 0, 1.0, torch.ones(2, 1))
    assert ((0 <= tokens) & (tokens < 5)).all() and logprobs.isnan().all()
