"""GGUF files, written by hand from random tensors: logits against `makers.plain_llama`; and what
cannot be read ends with one line and exit code 2."""

import math

import gguf
import pytest
import torch

from makers import (
    DIM, HEADS, LAYERS, LLAMA31, POINTER, assert_close, cut, logits_of, plain_frequencies,
    plain_llama, random_tokens, random_weights, refused, scaled_frequencies, write, write_gguf,
)
from model import load_llama, load_tokenizer


@pytest.mark.parametrize(
    "kind, kv_heads",
    [(None, 4), (None, 2), (gguf.GGMLQuantizationType.F16, 2), (gguf.GGMLQuantizationType.Q8_0, 2)],
)
def test_gguf_gives_the_logits_of_the_plain_llama(tmp_path, pieces, kind, kv_heads):
    weights = random_weights(400, kv_heads)
    path = write_gguf(tmp_path / "tiny.gguf", weights, pieces, kind)
    tokenizer, tokens = load_tokenizer(path), random_tokens(400, 60)
    if kind is not None:  # what the file says after rounding
        weights = {
            name: (
                torch.from_numpy(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
                if tensor.dim() == 2
                else tensor
            )
            for name, tensor in weights.items()
        }
    model = load_llama(path, tokenizer)
    assert_close(
        logits_of(model, tokens), plain_llama(weights, tokens, kv_heads, plain_frequencies()), 1e-4
    )
    assert model.config.max_position_embeddings == 512


def test_gguf_without_an_output_matrix_ties_it_to_the_embedding(tmp_path, pieces):
    weights, tokens = random_weights(400), random_tokens(400, 30)
    del weights["output.weight"]
    path = write_gguf(tmp_path / "tiny.gguf", weights, pieces)
    model = load_llama(path, load_tokenizer(path))
    weights["output.weight"] = weights["tok_embeddings.weight"]
    assert_close(
        logits_of(model, tokens), plain_llama(weights, tokens, 2, plain_frequencies()), 1e-4
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_gguf_of_llama_31_scales_the_slow_waves(tmp_path):
    weights, tokens = random_weights(LLAMA31["vocab_size"]), random_tokens(
        LLAMA31["vocab_size"], 300
    )
    plain = plain_frequencies(500000.0)
    scaled = scaled_frequencies(plain, 8.0)
    path = write_gguf(
        tmp_path / "tiny.gguf",
        weights,
        None,
        theta=500000.0,
        rope_factors=[p / s for p, s in zip(plain, scaled)],
    )
    model = load_llama(path, load_tokenizer(path))
    assert_close(logits_of(model, tokens), plain_llama(weights, tokens, 2, scaled), 1e-4)
    assert (logits_of(model, tokens) - plain_llama(weights, tokens, 2, plain)).abs().max() > 0.1


def yarn_frequencies(factor, length, theta=10000.0, fast=32.0, slow=1.0):
    """Peng et al. 2023, eq. 17 to 23: waves that turn over `fast` times in `length` tokens stay,
    those that turn under `slow` times are stretched by `factor`, and those between are mixed along
    a line."""
    d, plain = DIM // HEADS, plain_frequencies(theta)

    def dimension(turns):  # the pair of dimensions that turns so often
        return d * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(math.floor(dimension(fast)), 0), min(math.ceil(dimension(slow)), d - 1)
    mixed = []
    for i, f in enumerate(plain):
        stretched = min(max((i - low) / (high - low), 0), 1)
        mixed.append(stretched * f / factor + (1 - stretched) * f)
    return mixed


@pytest.mark.parametrize(
    "said, frequencies, scale",
    [
        (
            dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0),
            [f / 4 for f in plain_frequencies()],
            1.0,
        ),
        (dict(llama__rope__scale_linear=2.0), [f / 2 for f in plain_frequencies()], 1.0),
        (
            dict(llama__rope__scaling__type="none", llama__rope__scaling__factor=4.0),
            plain_frequencies(),
            1.0,
        ),
        (
            dict(
                llama__rope__scaling__type="yarn",
                llama__rope__scaling__factor=8.0,
                llama__rope__scaling__original_context_length=64,
            ),
            yarn_frequencies(8.0, 64),
            1 + 0.1 * math.log(8),
        ),
        (
            dict(
                llama__rope__scaling__type="yarn",
                llama__rope__scaling__factor=8.0,
                llama__rope__scaling__original_context_length=64,
                llama__rope__scaling__yarn_beta_fast=8.0,
                llama__rope__scaling__yarn_beta_slow=2.0,
                llama__rope__scaling__attn_factor=0.9,
            ),
            yarn_frequencies(8.0, 64, fast=8.0, slow=2.0),
            0.9 * (1 + 0.1 * math.log(8)),
        ),
    ],
    ids=["linear", "linear in older files", "none", "yarn", "yarn with all its settings"],
)
def test_gguf_rope_scaling(tmp_path, pieces, said, frequencies, scale):
    weights, tokens = random_weights(400), random_tokens(400, 100)
    path = write_gguf(tmp_path / "tiny.gguf", weights, pieces, **said)
    logits = logits_of(load_llama(path, load_tokenizer(path)), tokens)
    assert_close(logits, plain_llama(weights, tokens, 2, frequencies, scale=scale), 1e-4)
    if frequencies != plain_frequencies():
        assert (logits - plain_llama(weights, tokens, 2, plain_frequencies())).abs().max() > 0.1


def with_biases(weights, parts):
    generator, biased = torch.Generator().manual_seed(1), dict(weights)
    for i in range(LAYERS):
        for part in parts:
            rows = len(weights[f"layers.{i}.{part}.weight"])
            biased[f"layers.{i}.{part}.bias"] = torch.randn(rows, generator=generator)
    return biased


QKV = ["attention.wq", "attention.wk", "attention.wv"]


@pytest.mark.parametrize(
    "parts",
    [QKV, [*QKV, "attention.wo"], ["feed_forward.w1", "feed_forward.w2", "feed_forward.w3"]],
)
def test_gguf_biases(tmp_path, pieces, parts):
    weights, tokens = with_biases(random_weights(400), parts), random_tokens(400, 40)
    path = write_gguf(tmp_path / "tiny.gguf", weights, pieces)
    logits = logits_of(load_llama(path, load_tokenizer(path)), tokens)
    assert_close(logits, plain_llama(weights, tokens, 2, plain_frequencies()), 1e-4)
    assert (
        logits - plain_llama(random_weights(400), tokens, 2, plain_frequencies())
    ).abs().max() > 0.1


@pytest.mark.parametrize(
    "said, words",
    [
        (
            dict(llama__rope__scaling__type="longrope", llama__rope__scaling__factor=4.0),
            ["rope scaling", "longrope"],
        ),
        (dict(dimensions=DIM // HEADS // 2), ["8 of 16 dimensions"]),
        (dict(rope_factors=[1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]), ["rope_freqs.weight"]),
        (dict(split__count=3), ["one of 3 parts", "llama-gguf-split"]),
    ],
)
def test_gguf_that_cannot_be_read_is_named(tmp_path, tokenizer, pieces, capfd, said, words):
    path = write_gguf(tmp_path / "tiny.gguf", random_weights(400), pieces, **said)
    line = refused(capfd, load_llama, path, tokenizer)
    assert line.startswith(f"error: {path}: ") and all(word in line for word in words), line


# ------------------------------------------------------------------------------------------------
# Bad paths


@pytest.mark.parametrize("keep", [0, 3, 20, 200, 5000, 0.5, 0.99])
def test_a_damaged_gguf(gguf_file, tokenizer, capfd, keep):
    cut(gguf_file, keep)
    assert f"error: {gguf_file}: damaged" in refused(capfd, load_llama, str(gguf_file), tokenizer)


def test_gguf_files_that_hold_something_else(tmp_path, tokenizer, pieces, capfd):
    path = write(
        tmp_path / "text.gguf",
        "this is not a gguf file at all, but it is long enough to have a header",
    )
    assert f"error: {path}: damaged" in refused(capfd, load_llama, path, tokenizer)
    path = write_gguf(tmp_path / "other.gguf", random_weights(400), pieces, architecture="falcon")
    line = refused(capfd, load_llama, path, tokenizer)
    assert f"error: {path}: " in line and "'falcon'" in line
    weights = random_weights(400)
    del weights["layers.1.attention.wo.weight"]
    path = write_gguf(tmp_path / "holes.gguf", weights, pieces)
    assert "model.layers.1.self_attn.o_proj.weight" in refused(capfd, load_llama, path, tokenizer)


def test_a_gguf_pointer(tmp_path, tokenizer, capfd):
    assert "Git LFS" in refused(capfd, load_llama, write(tmp_path / "a.gguf", POINTER), tokenizer)
