"""Meta's layout and Hugging Face directories, each written by hand from random tensors: logits
against `makers.plain_llama`; and what cannot be read ends with one line and exit code 2."""

import copy
import json
import math
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from lib.formats import read_meta
from lib.state import fingerprint
from makers import (
    DIM, FFN, HEADS, LLAMA1, LLAMA2, LLAMA2_GQA, LLAMA3, LLAMA31, POINTER, ROOT, TIKTOKEN_MODEL,
    assert_close, cut, logits_of, plain_frequencies, plain_llama, random_tokens, random_weights,
    refused, scaled_frequencies, write, write_gguf, write_hugging_face, write_meta,
)
from model import load_llama, load_scalar_head, load_tokenizer, save_checkpoint


# ------------------------------------------------------------------------------------------------
# Meta's layout


@pytest.mark.parametrize(
    "params, shards, length",
    [
        pytest.param(LLAMA1, 1, 2048, id="llama 1, one shard"),
        pytest.param(LLAMA1, 2, 2048, id="llama 1, two shards"),
        pytest.param(LLAMA2, 1, 4096, id="llama 2, one shard"),
        pytest.param(LLAMA2_GQA, 2, 4096, id="llama 2 with grouped queries, two shards"),
        pytest.param(LLAMA3, 1, 8192, id="llama 3, one shard"),
        pytest.param(LLAMA3, 2, 8192, id="llama 3, two shards"),
        pytest.param(LLAMA31, 1, 131072, id="llama 3.1, one shard"),
        pytest.param(LLAMA31, 2, 131072, id="llama 3.1, two shards"),
    ],
)
def test_meta_layout_gives_the_logits_of_the_plain_llama(
    tmp_path, sentencepiece_model, params, shards, length
):
    is_3 = "rope_theta" in params
    kv_heads = params.get("n_kv_heads", HEADS)
    weights = random_weights(params["vocab_size"] if is_3 else 400, kv_heads)
    path = write_meta(
        tmp_path / "meta",
        weights,
        params,
        TIKTOKEN_MODEL if is_3 else sentencepiece_model,
        shards,
        embedding="rows" if is_3 else "columns",
    )
    tokenizer = load_tokenizer(path)
    model = load_llama(path, tokenizer)
    frequencies = plain_frequencies(params.get("rope_theta", 10000.0))
    if "use_scaled_rope" in params:
        frequencies = scaled_frequencies(frequencies, 8.0)
    tokens = random_tokens(len(weights["tok_embeddings.weight"]), 60)
    assert_close(
        logits_of(model, tokens),
        plain_llama(weights, tokens, kv_heads, frequencies, params["norm_eps"]),
        1e-4,
    )
    assert model.config.max_position_embeddings == length
    assert (
        len(tokenizer.end_ids) == (3 if "rope_theta" in params else 1)
        and tokenizer.end_ids[0] == tokenizer.eos_token_id
        and tokenizer.pad_token_id != tokenizer.eos_token_id
    )
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())


def test_llama_31_scales_the_slow_waves(tmp_path):
    plain = plain_frequencies(500000.0)
    scaled = scaled_frequencies(plain, 8.0)
    ratios = [p / s for p, s in zip(plain, scaled)]
    # all three kinds of wave
    assert (
        ratios[0] == 1 and ratios[-1] == pytest.approx(8) and any(1.1 < r < 7.9 for r in ratios)
    )
    weights = random_weights(LLAMA31["vocab_size"])
    path = write_meta(tmp_path, weights, LLAMA31, TIKTOKEN_MODEL)
    model = load_llama(path, load_tokenizer(path))
    assert_close(model.model.rotary_emb.inv_freq, torch.tensor(scaled), 1e-7)
    tokens = random_tokens(LLAMA31["vocab_size"], 300)
    logits = logits_of(model, tokens)
    assert_close(logits, plain_llama(weights, tokens, 2, scaled), 1e-4)
    assert (
        logits - plain_llama(weights, tokens, 2, plain)
    ).abs().max() > 0.1  # so the scaling can be seen


def config_of(folder, params):
    """What `read_meta` makes of this params.json. The tensors are only as wide as it looks."""
    write(folder / "params.json", params)
    torch.save(
        {
            "layers.0.attention.wq.weight": torch.zeros(params["dim"], 1),
            "layers.0.feed_forward.w1.weight": torch.zeros(7, 1),
            "output.weight": torch.zeros(9, 1),
            "tok_embeddings.weight": torch.zeros(9, 1),
        },
        folder / "consolidated.00.pth",
    )
    return read_meta(str(folder))[0]


@pytest.mark.parametrize(
    "dim, more, factor",
    [
        (4096, {}, 8.0),
        (2048, {}, 32.0),
        (3072, {}, 32.0),
        (2048, {"rope_scaling_factor": 8.0}, 8.0),
    ],
)
def test_llama_31_and_32_are_scaled_by_different_factors(tmp_path, dim, more, factor):
    """8 for 3.1's 8B, 32 for 3.2's 1B and 3B, unless params.json says so."""
    params = {
        "dim": dim,
        "n_layers": 1,
        "n_heads": 32,
        "n_kv_heads": 8,
        "norm_eps": 1e-5,
        "rope_theta": 5e5,
        "use_scaled_rope": True,
    }
    config = config_of(tmp_path, params | more)
    assert (
        config.rope_parameters["factor"] == factor and config.rope_parameters["rope_theta"] == 5e5
    )
    assert (config.intermediate_size, config.vocab_size, config.num_key_value_heads) == (7, 9, 8)


@pytest.mark.parametrize(
    "dim, eps, kv_heads, length",
    [(8192, 1e-5, None, 2048), (8192, 1e-5, 8, 4096), (4096, 1e-5, None, 4096)],
    ids=["llama 1 65B", "llama 2 70B", "llama 2 7B"],
)
def test_the_context_of_llama_1_and_2(tmp_path, dim, eps, kv_heads, length):
    """LLaMA 1's 65B is the one of its generation with LLaMA 2's norm_eps."""
    params = {"dim": dim, "n_layers": 1, "n_heads": 64, "norm_eps": eps}
    config = config_of(tmp_path, params | ({"n_kv_heads": kv_heads} if kv_heads else {}))
    assert config.max_position_embeddings == length


def test_meta_weights_in_bfloat16(tmp_path, sentencepiece_model):
    weights = {name: tensor.bfloat16() for name, tensor in random_weights(400).items()}
    path = write_meta(tmp_path, weights, LLAMA2_GQA, sentencepiece_model, shards=2)
    tokenizer, tokens = load_tokenizer(path), random_tokens(400, 40)
    assert_close(
        logits_of(load_llama(path, tokenizer), tokens),
        plain_llama(weights, tokens, 2, plain_frequencies()),
        1e-4,
    )
    half = load_llama(path, tokenizer, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    # positions cannot be counted in bfloat16
    assert (
        half.model.rotary_emb.inv_freq.dtype == torch.float32
    )


def test_a_folder_name_with_brackets_is_no_pattern(tmp_path, sentencepiece_model):
    weights, tokens = random_weights(400), random_tokens(400, 20)
    path = write_meta(tmp_path / "llama[2]", weights, LLAMA2_GQA, sentencepiece_model)
    assert_close(
        logits_of(load_llama(path, load_tokenizer(path)), tokens),
        plain_llama(weights, tokens, 2, plain_frequencies()),
        1e-4,
    )


# ------------------------------------------------------------------------------------------------
# Hugging Face directories


@pytest.mark.parametrize("files", [1, 3])
def test_hugging_face_directory_gives_the_logits_of_the_plain_llama(tmp_path, tokenizer, files):
    weights, tokens = random_weights(400), random_tokens(400, 60)
    path = write_hugging_face(tmp_path / "hf", weights, tokenizer, files=files)
    model = load_llama(path, load_tokenizer(path))
    assert_close(
        logits_of(model, tokens),
        plain_llama(weights, tokens, 2, plain_frequencies(), pairs="halves"),
        1e-4,
    )


def test_hugging_face_directory_in_bfloat16(tmp_path, tokenizer):
    weights, tokens = {
        name: tensor.bfloat16() for name, tensor in random_weights(400).items()
    }, random_tokens(400, 40)
    path = write_hugging_face(tmp_path / "hf", weights, tokenizer)
    expected = plain_llama(weights, tokens, 2, plain_frequencies(), pairs="halves")
    model, half = load_llama(path, tokenizer), load_llama(path, tokenizer, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.float32} and {
        p.dtype for p in half.parameters()
    } == {torch.bfloat16}
    assert_close(logits_of(model, tokens), expected, 1e-4)
    assert (
        logits_of(half, tokens) - expected
    ).abs().mean() < 0.05 * expected.std()  # bfloat16 has 8 bits


def test_hugging_face_directory_with_llama_31_scaling(tmp_path, tokenizer):
    weights, tokens = random_weights(400), random_tokens(400, 300)
    path = write_hugging_face(
        tmp_path / "hf",
        weights,
        tokenizer,
        rope_theta=500000.0,
        max_position_embeddings=131072,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    expected = plain_llama(
        weights, tokens, 2, scaled_frequencies(plain_frequencies(500000.0), 32.0), pairs="halves"
    )
    assert_close(logits_of(load_llama(path, tokenizer), tokens), expected, 1e-4)


def test_a_name_of_the_hub(tmp_path, tokenizer):
    """The files lie where the hub's client keeps its downloads, in HF_HOME; a program without
    network finds them by the model's name."""
    weights, tokens = random_weights(400), random_tokens(400, 40)
    cache = tmp_path / "home" / "hub"
    snapshot = "0123456789abcdef0123456789abcdef01234567"
    write(cache / "models--some-lab--tiny-llama" / "refs" / "main", snapshot)
    write_hugging_face(
        cache / "models--some-lab--tiny-llama" / "snapshots" / snapshot, weights, tokenizer
    )
    code = (
        "import sys, torch; from model import load_llama, load_tokenizer; tokenizer = load_tokenizer('some-lab/tiny-llama')\n"
        "model = load_llama('some-lab/tiny-llama', tokenizer)\n"
        "torch.save((model.lm_head(model(torch.load(sys.argv[1])[None]))[0].detach(), tokenizer('the fox').input_ids), sys.argv[2])\n"
        "load_llama('some-lab/another-llama', tokenizer)"
    )
    torch.save(tokens, tmp_path / "tokens")
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))
    }
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokens"), str(tmp_path / "logits")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    logits, ids = torch.load(tmp_path / "logits")
    assert_close(logits, plain_llama(weights, tokens, 2, plain_frequencies(), pairs="halves"), 1e-4)
    assert ids == tokenizer("the fox").input_ids
    # and one that is not there ends as any other bad path does
    assert (
        done.returncode == 2
        and done.stderr.startswith("error: some-lab/another-llama: ")
        and done.stderr.count("\n") == 1
    )


# ------------------------------------------------------------------------------------------------
# Bad paths


def test_paths_that_are_no_checkpoint(tmp_path, tokenizer, capfd):
    (tmp_path / "empty").mkdir()
    for path, reason in [
        (tmp_path / "nothing" / "here", "no such file or folder"),
        (tmp_path / "empty", "no config.json"),
        (tmp_path / "no.gguf", "no such file"),
        (write(tmp_path / "notes.txt", "hello"), "not .gguf"),
    ]:
        line = refused(capfd, load_llama, str(path), tokenizer)
        assert f"error: {path}: " in line and reason in line


@pytest.mark.parametrize("missing, named", [(["00"], "00"), (["01"], "01"), (["00", "01"], "00")])
def test_a_missing_shard_is_named(meta, tokenizer, capfd, missing, named):
    for number in missing:
        (meta / f"consolidated.{number}.pth").unlink()
    line = refused(capfd, load_llama, str(meta), tokenizer)
    assert str(meta) in line and f"consolidated.{named}.pth" in line and "missing" in line


def test_a_gap_among_the_shards_is_named(tmp_path, sentencepiece_model, tokenizer, capfd):
    path = write_meta(tmp_path, random_weights(400, HEADS), LLAMA2, sentencepiece_model, shards=4)
    (tmp_path / "consolidated.02.pth").unlink()
    line = refused(capfd, load_llama, path, tokenizer)
    assert path in line and "consolidated.02.pth" in line and "missing" in line


def test_a_shard_too_many_is_not_called_missing(meta, tokenizer, capfd):
    shutil.copy(meta / "consolidated.01.pth", meta / "consolidated.02.pth")
    line = refused(capfd, load_llama, str(meta), tokenizer)
    assert str(meta) in line and "missing" not in line


@pytest.mark.parametrize("keep", [0, 3, 200, 0.5, 0.99])
def test_a_damaged_pth(meta, tokenizer, capfd, keep):
    cut(meta / "consolidated.01.pth", keep)
    assert f"{meta}/consolidated.01.pth: damaged" in refused(
        capfd, load_llama, str(meta), tokenizer
    )


class Trap:
    """Unpickled as it comes, it makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_no_code_in_a_pth_is_run(meta, tokenizer, capfd):
    trap = Trap(str(meta / "sprung"))
    torch.save({"norm.weight": trap}, meta / "consolidated.00.pth")
    assert "consolidated.00.pth: damaged, or not a file of weights" in refused(
        capfd, load_llama, str(meta), tokenizer
    )
    (meta / "consolidated.00.pth").write_bytes(pickle.dumps(trap))
    assert "consolidated.00.pth: damaged, or not a file of weights" in refused(
        capfd, load_llama, str(meta), tokenizer
    )
    assert not (meta / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    [
        "{",
        "[]",
        "7",
        "",
        b"\xff\xfe",
        {"dim": None},
        {"n_heads": None},
        {"n_layers": None},
        {"norm_eps": None},
        {"dim": 128},
        {"n_layers": 3},
        {"n_heads": 3},
        {"n_heads": 0},
        {"n_heads": "4"},
        {"n_kv_heads": 4},
        {"n_layers": "2"},
        {"rope_theta": "fast"},
    ],
    ids=repr,
)
def test_a_corrupt_params_json(meta, tokenizer, capfd, change):
    if isinstance(change, dict):  # None: left out
        change = {name: value for name, value in (LLAMA2_GQA | change).items() if value is not None}
    write(meta / "params.json", change)
    assert refused(capfd, load_llama, str(meta), tokenizer).startswith(f"error: {meta}")


def test_meta_shards_with_missing_or_misshapen_tensors(meta, tokenizer, capfd):
    whole = torch.load(meta / "consolidated.00.pth")
    # without the first two not even the sizes are known; of the others Hugging Face's name is said
    for name, said in [
        ("output.weight", "output.weight"),
        ("layers.0.attention.wq.weight", "layers.0.attention.wq.weight"),
        ("layers.1.feed_forward.w2.weight", "model.layers.1.mlp.down_proj.weight"),
        ("norm.weight", "model.norm.weight"),
    ]:
        torch.save(
            {key: tensor for key, tensor in whole.items() if key != name},
            meta / "consolidated.00.pth",
        )
        assert said in refused(capfd, load_llama, str(meta), tokenizer)
    torch.save(
        whole | {"layers.1.feed_forward.w2.weight": torch.zeros(DIM, 7)},
        meta / "consolidated.00.pth",
    )
    assert refused(capfd, load_llama, str(meta), tokenizer).startswith(f"error: {meta}")
    torch.save([1, 2], meta / "consolidated.00.pth")
    assert refused(capfd, load_llama, str(meta), tokenizer).startswith(f"error: {meta}")


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_damaged_safetensors(hf, tokenizer, capfd, keep):
    cut(hf / "model.safetensors", keep)
    assert f"error: {hf}: cannot be loaded" in refused(capfd, load_llama, str(hf), tokenizer)
    config = json.loads((hf / "config.json").read_text())
    write(hf / "config.json", config | {"architectures": ["LlamaForSequenceClassification"]})
    assert f"error: {hf}: cannot be loaded" in refused(capfd, load_scalar_head, str(hf))


def test_safetensors_with_missing_or_misshapen_tensors(hf, tokenizer, capfd):
    whole = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for tensors in [
        {key: tensor for key, tensor in whole.items() if key != name},
        whole | {name: torch.zeros(FFN, 7)},
    ]:
        save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
        line = refused(capfd, load_llama, str(hf), tokenizer)
        assert f"error: {hf}: " in line and "missing or of the wrong shape" in line and name in line
    (hf / "model.safetensors").unlink()
    assert f"error: {hf}: cannot be loaded" in refused(capfd, load_llama, str(hf), tokenizer)


@pytest.mark.parametrize("rope, said", [
    (dict(rope_type="longrope", factor=2.0, short_factor=[1.0] * 8, long_factor=[2.0] * 8),
     "rope_scaling of type longrope"),
    (dict(rope_type="linear", factor=2.0, partial_rotary_factor=0.5), "a partial_rotary_factor"),
])
def test_positions_that_are_not_implemented(hf, tokenizer, capfd, rope, said):
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | dict(rope_scaling=rope)))
    assert f"error: {hf}: {said}" in refused(capfd, load_llama, str(hf), tokenizer)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_named(hf, tokenizer, reward_model, tmp_path, capfd, wrong):
    """As of a run that diverged. A generator would write one token again and again."""
    save_checkpoint(reward_model, tokenizer, str(tmp_path / "rm"))
    for folder, load in ((hf, lambda path: load_llama(path, tokenizer)),
                         (tmp_path / "rm", load_scalar_head)):
        tensors = load_file(folder / "model.safetensors")
        name = "model.layers.1.mlp.up_proj.weight"
        tensors[name][3, 5] = wrong
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        line = refused(capfd, load, str(folder))
        assert line.startswith(f"error: {folder}: {name} holds nan or inf")
    reward_model = copy.deepcopy(reward_model)
    reward_model.score.weight.data[0, 3] = wrong
    with pytest.raises(SystemExit) as end:
        save_checkpoint(reward_model, tokenizer, str(tmp_path / "new"))
    assert end.value.code == 1 and not (tmp_path / "new").exists()


def test_a_missing_safetensors_shard(tmp_path, tokenizer, capfd):
    path = write_hugging_face(tmp_path, random_weights(400), tokenizer, files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert f"error: {path}: cannot be loaded" in refused(capfd, load_llama, path, tokenizer)


@pytest.mark.parametrize("content", [b"", b"not a zip file at all", "trap"])
def test_a_damaged_or_malicious_bin(hf, tokenizer, capfd, content):
    (hf / "model.safetensors").unlink()
    if content == "trap":
        torch.save({"lm_head.weight": Trap(str(hf / "sprung"))}, hf / "pytorch_model.bin")
    else:
        write(hf / "pytorch_model.bin", content)
    assert f"error: {hf}: cannot be loaded" in refused(capfd, load_llama, str(hf), tokenizer)
    assert not (hf / "sprung").exists()


@pytest.mark.parametrize(
    "change",
    ["{", "[]", "7", "", {"hidden_size": "64"}, {"num_attention_heads": 0}, {"model_type": None}],
    ids=repr,
)
def test_a_corrupt_config_json(hf, tokenizer, capfd, change):
    if isinstance(change, dict):
        whole = json.loads((hf / "config.json").read_text())
        change = {name: value for name, value in (whole | change).items() if value is not None}
    write(hf / "config.json", change)
    assert f"error: {hf}: " in refused(capfd, load_llama, str(hf), tokenizer)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "no-such"])
def test_another_architecture(hf, tokenizer, capfd, name):
    write(hf / "config.json", {"model_type": name})
    line = refused(capfd, load_llama, str(hf), tokenizer)
    assert line.startswith(f"error: {hf}: ") and name in line.removeprefix(f"error: {hf}: ")


def test_remote_code_is_not_run(hf, tokenizer, capfd):
    config = json.loads((hf / "config.json").read_text())
    write(
        hf / "config.json",
        config
        | {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "trap.C", "AutoModelForCausalLM": "trap.M"},
        },
    )
    write(
        hf / "trap.py",
        f"import os\nos.mkdir({str(hf / 'sprung')!r})\nclass C: pass\nclass M: pass\n",
    )
    assert f"error: {hf}: " in refused(capfd, load_llama, str(hf), tokenizer)
    assert not (hf / "sprung").exists()


@pytest.mark.parametrize("load", [load_llama, lambda path, tokenizer: load_tokenizer(path)])
@pytest.mark.parametrize(
    "files, words",
    [
        (
            {"adapter_config.json": "{}", "adapter_model.safetensors": b"x" * 2000},
            ["adapter", "merge"],
        ),
        ({"config.json": "{}", "model.safetensors": POINTER}, ["model.safetensors", "Git LFS"]),
        ({"params.json": "{}", "consolidated.00.pth": POINTER}, ["consolidated.00.pth", "Git LFS"]),
        ({"params.json": "{}", "tokenizer.model": POINTER}, ["tokenizer.model", "Git LFS"]),
        ({"params.json": "{}", "consolidated.safetensors": b"x" * 2000}, ["Mistral"]),
    ],
)
def test_what_is_often_taken_for_a_checkpoint(tmp_path, tokenizer, capfd, load, files, words):
    for name, content in files.items():
        write(tmp_path / "it" / name, content)
    line = refused(capfd, load, str(tmp_path / "it"), tokenizer)
    assert f"error: {tmp_path}" in line and all(word in line for word in words)


def test_quantized_weights_are_refused(hf, tokenizer, capfd):
    config = json.loads((hf / "config.json").read_text())
    write(
        hf / "config.json",
        config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
    )
    line = refused(capfd, load_llama, str(hf), tokenizer)
    assert f"error: {hf}: " in line and "quantized (bitsandbytes)" in line and "dequantize" in line


def test_a_reward_model_is_no_language_model(tmp_path, tokenizer, reward_model, capfd):
    save_checkpoint(reward_model, tokenizer, str(tmp_path))
    line = refused(capfd, load_llama, str(tmp_path), tokenizer)
    assert "LlamaForSequenceClassification" in line and "language model is wanted" in line


@pytest.mark.parametrize("part", ["self_attn.q_proj", "mlp.up_proj"])
def test_biases_that_the_configuration_does_not_announce_are_refused(hf, tokenizer, capfd, part):
    tensors = load_file(hf / "model.safetensors")
    name = f"model.layers.0.{part}.bias"
    tensors[name] = torch.ones(len(tensors[name.replace("bias", "weight")]))
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    line = refused(capfd, load_llama, str(hf), tokenizer)
    assert f"error: {hf}: " in line and name in line


def test_an_embedding_that_lacks_a_token_is_resized_when_asked(tmp_path, tokenizer, capfd):
    """Alpaca's [PAD] has the number 32000, of an embedding with rows 0 to 31999."""
    weights = random_weights(400)
    path = write_hugging_face(tmp_path / "hf", weights, tokenizer)
    larger = AutoTokenizer.from_pretrained(path)
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(path)
    larger = load_tokenizer(path)
    assert larger.pad_token_id == 400
    line = refused(capfd, load_llama, path, larger)
    assert "[PAD]" in line and "400" in line and "--resize_embedding" in line
    model = load_llama(path, larger, resize=True)
    tokens = random_tokens(400, 30)
    logits = model.lm_head(model(tokens[None])[0])
    assert logits.shape == (30, 401)
    expected = plain_llama(weights, tokens, 2, plain_frequencies(), pairs="halves")
    assert_close(logits[:, :400], expected, 1e-4)
    assert_close(logits[:, 400], expected.mean(1), 1e-4)  # its row is the mean of the others
    save_checkpoint(model, larger, str(tmp_path / "out"))
    assert load_llama(str(tmp_path / "out"), larger).config.vocab_size == 401


def test_a_tokenizer_larger_than_the_embedding(
    tmp_path, tokenizer, sentencepiece_model, pieces, capfd
):
    weights = random_weights(399)
    for path in [
        write_meta(tmp_path / "meta", weights, LLAMA2_GQA, sentencepiece_model),
        write_hugging_face(tmp_path / "hf", weights, tokenizer),
        write_gguf(tmp_path / "tiny.gguf", weights, pieces),
    ]:
        line = refused(capfd, load_llama, path, tokenizer)
        assert f"error: {path}: " in line and "400" in line and "399" in line


def test_a_larger_embedding_than_the_tokenizer_is_fine(tmp_path, tokenizer):
    # padded to a multiple of 64, as many are
    path = write_hugging_face(
        tmp_path, random_weights(448), tokenizer
    )
    assert load_llama(path, tokenizer).config.vocab_size == 448


def test_a_head_of_its_own_beside_a_config_that_says_tied(hf, tokenizer, capsys):
    config = json.loads((hf / "config.json").read_text())
    write(hf / "config.json", config | {"tie_word_embeddings": True})
    tensors = load_file(hf / "model.safetensors")
    assert not torch.equal(tensors["lm_head.weight"], tensors["model.embed_tokens.weight"])
    llama = load_llama(str(hf), tokenizer)
    assert torch.equal(llama.lm_head.weight, tensors["lm_head.weight"])
    assert not llama.config.tie_word_embeddings
    assert "has a head of its own" in capsys.readouterr().out


def test_a_link_to_nothing_beside_good_weights(hf, tokenizer):
    before = fingerprint(str(hf))
    (hf / "pytorch_model.bin").symlink_to(hf / "gone")
    load_llama(str(hf), load_tokenizer(str(hf)))
    assert fingerprint(str(hf)) == before
