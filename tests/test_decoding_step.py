"""One step of decoding: what is captured on a GPU, run here as it is."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import model
from lib import graphs
from model import DEMO_MODEL, decoding_copy, generate, random_llama

PROMPTS = [[5], [7, 8, 9, 10, 11, 12, 13], [20, 21, 22], [30, 31, 32, 33]]
ENDS = [3, 4, 17]


@pytest.fixture(params=[(4, 2), (4, 4), (4, 1)], ids=["grouped", "all heads", "one key head"])
def llama(request):
    heads, key_heads = request.param
    torch.manual_seed(0)
    sizes = DEMO_MODEL | dict(num_attention_heads=heads, num_key_value_heads=key_heads,
                              initializer_range=0.2)
    return random_llama(LlamaConfig(vocab_size=40, **sizes)).eval()


def padded():
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in PROMPTS])
    return ids, torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in PROMPTS])


def naive(llama, prompt, uniform, temperature):
    """For each token the whole text again, and the first word at which the sum of the
    probabilities, added one by one, reaches the random number."""
    text = list(prompt)
    for u in uniform.tolist():
        with torch.no_grad():
            logits = llama.lm_head(llama(torch.tensor([text]))[0, -1]).double() / temperature
        p, word, reached = logits.softmax(-1).tolist(), -1, 0.0
        while reached < u and word < len(p) - 1:
            word += 1
            reached += p[word]
        text.append(word)
        if word in ENDS:
            break
    return text[len(prompt):]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampling_is_that_of_a_naive_sampler_with_the_same_random_numbers(llama, temperature):
    """Row b, token t: number (b, t) of the generator, whatever the neighbours do."""
    out = generate(llama, *padded(), 30, ENDS, temperature,
                   generator=torch.Generator().manual_seed(1))
    uniform = 1 - torch.rand(len(PROMPTS), 30, generator=torch.Generator().manual_seed(1))
    answers = [row[used.bool()].tolist() for row, used in zip(out.tokens, out.mask)]
    assert answers == [naive(llama, p, u, temperature) for p, u in zip(PROMPTS, uniform)]
    assert len(set(map(len, answers))) > 1  # some end while others write


class StandIn(contextlib.nullcontext):
    """Of torch.cuda's streams and graphs: a graph that runs what was captured."""

    def wait_stream(self, other):
        pass


def test_a_captured_step_gives_what_the_plain_step_does(llama, monkeypatch):
    """The capture's two trial steps leave nothing behind; rows leave when half have ended."""
    plain = [generate(llama, *padded(), 30, ENDS, temperature, generator=generator)
             for temperature, generator in ((0, None), (1.0, torch.Generator().manual_seed(5)))]
    captures, replays = [], []

    def capture(step, state):
        captures.append(len(state[0]))
        graph = SimpleNamespace()
        monkeypatch.setattr(graphs, "side_stream", lambda device: StandIn())
        monkeypatch.setattr(torch.cuda, "device", lambda device: StandIn())
        monkeypatch.setattr(torch.cuda, "current_stream", StandIn)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: StandIn())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: contextlib.nullcontext())

        def replay():
            replays.append(1)
            step()

        graph.replay = replay
        before = [x.clone() for x in state]
        run = captured(without_the_last(step), state)
        assert all(torch.equal(x, y) for x, y in zip(state, before))
        return run

    def without_the_last(step):
        # capturing records the third call and does not run it
        calls = []
        return lambda: calls.append(1) or (step() if len(calls) < 3 else None)

    captured = model.captured
    monkeypatch.setattr(model, "can_be_captured", lambda llama: True)
    monkeypatch.setattr(model, "captured", capture)
    for expected, temperature, generator in (
            (plain[0], 0, None), (plain[1], 1.0, torch.Generator().manual_seed(5))):
        out = generate(llama, *padded(), 30, ENDS, temperature, generator=generator)
        assert torch.equal(out.tokens, expected.tokens) and torch.equal(out.mask, expected.mask)
        torch.testing.assert_close(out.logprobs, expected.logprobs, atol=1e-4, rtol=1e-4)
    assert replays and captures


def test_the_copy_in_bf16_answers_as_a_bf16_model_without_a_cache_does(llama):
    copy = decoding_copy(llama, torch.bfloat16)
    out = generate(copy, *padded(), 12, [-1], temperature=0)
    agree = 0
    for prompt, row in zip(PROMPTS, out.tokens.tolist()):
        for t, token in enumerate(row):
            with torch.no_grad():
                text = torch.tensor([prompt + row[:t]])
                logits = copy.lm_head(copy(text)[0, -1]).float()
            best = logits.topk(2).values
            # the likeliest token, or one that bf16's three digits do not tell from it
            assert logits[token] >= best[0] - 0.02 * best[0].abs() - 0.02
            agree += logits.argmax().item() == token
    assert agree >= 0.9 * 12 * len(PROMPTS)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_on_a_gpu_is_captured_and_fused(llama, dtype):
    """Every attention runs in a fused kernel: with the unfused one switched off nothing fails."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    copy = decoding_copy(llama, dtype).to("cuda")
    ids, mask = (x.to("cuda") for x in padded())
    assert model.can_be_captured(copy)
    greedy = generate(copy.cpu(), *padded(), 30, ENDS, temperature=0)
    copy = copy.to("cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
        out = generate(copy, ids, mask, 30, ENDS, temperature=0)
    if dtype == torch.float32:
        assert torch.equal(out.tokens.cpu(), greedy.tokens)
    assert out.tokens.shape[0] == len(PROMPTS)
