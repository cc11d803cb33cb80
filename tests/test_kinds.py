"""What checkpoints and run directories of others look like, one kind of surprise after the other:

    generation_config.json that transformers calls invalid
    a vocabulary that is padded to a round number
    tensors under the names that DDP, torch.compile, FSDP and PEFT give them
    two runs in one directory
    a config.json that transformers takes amiss, or in silence
"""

import csv
import errno
import fcntl
import json
import os
import random
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GenerationConfig, PreTrainedTokenizerFast

import data_gen
import lib.run
import model
import ppo
import sft
from forked import fork
from lib.data import collate
from makers import refused
from model import decoding_copy, generate, load_llama, load_scalar_head, load_tokenizer

TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny LLaMA, a reward model, and a few records."""
    folder, rng = tmp_path_factory.mktemp("kinds"), random.Random(0)
    prompts = data_gen.draw_prompts(rng, 12)
    demos = [{"user_input": p, "completion": data_gen.write(rng, p, "friendly")} for p in prompts]
    (folder / "demos.json").write_text(json.dumps(demos))
    (folder / "tokenizer").mkdir()
    texts = [f"{demo['user_input']} {demo['completion']}" for demo in demos]
    (folder / "tokenizer" / "tokenizer.model").write_bytes(
        data_gen.train_tokenizer(texts, vocab_size=500))
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "DEMO_MODEL", TINY)
        llama = load_llama(None, tokenizer)
    model.save_checkpoint(llama, tokenizer, str(folder / "llama"))
    model.save_checkpoint(model.ScalarHead(llama.model), tokenizer, str(folder / "rm"))
    return folder


def copy(home, tmp_path, name="llama"):
    shutil.copytree(home / name, tmp_path / name)
    return tmp_path / name


def train(path, home, out, *options):
    sft.main(["--model", str(path), "--data", str(home / "demos.json"), "--out", str(out),
              "--epochs", "1", "--batch_size", "6", *options])


# ------------------------------------------------------------------------------------------------
# generation_config.json

# what it says: what of it is not exported
INVALID = {
    "length penalty without beams": ({"length_penalty": 0.5, "top_k": 50}, {"length_penalty"}),
    "early stopping without beams": ({"early_stopping": True}, {"early_stopping"}),
    "early stopping of no kind": ({"early_stopping": [1], "num_beams": 2}, {"early_stopping"}),
    "more answers than beams": ({"num_beams": 2, "num_return_sequences": 3},
                                {"num_return_sequences"}),
    "beams before what needs them": ({"length_penalty": 0.5, "num_beams": 2}, set()),
    "beams that are a text": ({"length_penalty": 0.5, "num_beams": 1}, {"length_penalty"}),
    "no new tokens": ({"max_new_tokens": 0, "repetition_penalty": 1.1}, {"max_new_tokens"}),
    "a wrong type": ({"max_new_tokens": "5", "repetition_penalty": 1.1}, {"max_new_tokens"}),
    "a cache of no kind": ({"cache_implementation": "mine"}, {"cache_implementation"}),
    "a negative padding token": ({"pad_token_id": -1}, {"pad_token_id"}),
    "unknown": ({"my_key": {"a": 1}}, set()),
    "an argument of generate": ({"streamer": True, "my_key": 1}, {"streamer"}),
    "a method": ({"validate": 3, "to_dict": 4}, {"validate", "to_dict"}),
    "scores that nobody returns": ({"output_scores": True}, {"output_scores"}),
    "a number that JSON has not": ({"repetition_penalty": float("nan")}, {"repetition_penalty"}),
    "sampling and beams": ({"temperature": 0.5, "do_sample": True, "length_penalty": 2.0},
                           {"length_penalty"}),
}


@pytest.mark.parametrize("said, left_out", INVALID.values(), ids=INVALID)
def test_what_transformers_would_not_write_is_left_out_and_named(
        home, tmp_path, capsys, said, left_out):
    path = copy(home, tmp_path)
    tokenizer = load_tokenizer(str(path))
    ends = [*tokenizer.end_ids, 7]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends} | said))
    tokenizer = load_tokenizer(str(path))
    assert sorted(tokenizer.end_ids) == sorted(ends)
    llama = load_llama(str(path), tokenizer)
    lines = [line for line in capsys.readouterr().out.split("\n") if "not exported" in line]
    assert len(lines) == bool(left_out)
    for name in left_out:
        assert f"{path}/generation_config.json" in lines[0] and f"{name} (" in lines[0]
    model.save_checkpoint(llama, tokenizer, str(tmp_path / "out"))
    again = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert sorted(again["eos_token_id"]) == sorted(ends)
    assert again["pad_token_id"] == tokenizer.pad_token_id
    for name in said.keys() - {"pad_token_id"}:
        assert (name in again) == (name not in left_out)
        assert name in left_out or again[name] == said[name]
    GenerationConfig.from_pretrained(str(tmp_path / "out")).validate(strict=True)
    load_llama(str(tmp_path / "out"), tokenizer)
    assert "generation_config" not in capsys.readouterr().out


def test_an_invalid_one_is_no_obstacle_to_training(home, tmp_path):
    path = copy(home, tmp_path)
    (path / "generation_config.json").write_text('{"length_penalty": 0.5, "max_new_tokens": "x"}')
    train(path, home, tmp_path / "out")
    assert "length_penalty" not in (tmp_path / "out" / "generation_config.json").read_text()


def test_config_json_that_speaks_of_generation(home, tmp_path, capsys):
    """As older checkpoints do, which have no generation_config.json."""
    path = copy(home, tmp_path)
    (path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"length_penalty": 0.5}))
    tokenizer = load_tokenizer(str(path))
    llama = load_llama(str(path), tokenizer)
    assert "length_penalty (" in capsys.readouterr().out
    model.save_checkpoint(llama, tokenizer, str(tmp_path / "out"))


@pytest.mark.parametrize("text", [b'{"eos_token_id": 2', b"", b"[2]", b"3", b'{"a": "\xff"}'])
def test_one_that_is_no_json_object(home, tmp_path, capfd, text):
    path = copy(home, tmp_path)
    (path / "generation_config.json").write_bytes(text)
    tokenizer = load_tokenizer(str(home / "llama"))
    for load in (load_tokenizer, lambda path: load_llama(path, tokenizer)):
        line = refused(capfd, load, str(path))
        assert f"{path}/generation_config.json: damaged" in line


@pytest.mark.parametrize("ends", ["</s>", [2, "</s>", None, -1, 2.5, True], {"a": 2}])
def test_ends_that_are_no_ids(home, tmp_path, ends):
    path = copy(home, tmp_path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert load_tokenizer(str(path)).end_ids == load_tokenizer(str(home / "llama")).end_ids


# ------------------------------------------------------------------------------------------------
# A vocabulary that is padded to a round number

@pytest.fixture(params=[False, True], ids=["", "tied"])
def padded(home, tmp_path, request):
    """The LLaMA with 12 rows more, which would always be sampled."""
    path = copy(home, tmp_path)
    tensors, config = load_file(path / "model.safetensors"), json.loads(
        (path / "config.json").read_text())
    rows = tensors["lm_head.weight"]
    # the state of a token is a mix of few directions: the largest of these rows wins in all
    tensors["lm_head.weight"] = torch.cat([rows, 40 * torch.randn(
        12, 32, generator=torch.Generator().manual_seed(1))])
    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"].clone()
    if request.param:
        del tensors["lm_head.weight"]
    config |= dict(vocab_size=len(rows) + 12, tie_word_embeddings=request.param)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def test_rows_without_a_token_are_never_sampled(padded):
    tokenizer = load_tokenizer(padded)
    llama, words = load_llama(padded, tokenizer), len(tokenizer)
    prompts = torch.randint(words, (16, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        everything = F.linear(llama(prompts)[:, -1], llama.lm_head.weight)
    assert (everything.argmax(-1) >= words).float().mean() > 0.5  # so they would be
    for writer in (llama, decoding_copy(llama, torch.float32),
                   decoding_copy(llama, torch.bfloat16), llama.bfloat16()):
        for options in (dict(temperature=0), {}, dict(top_k=words + 5), dict(top_p=0.9)):
            out = generate(writer, prompts, torch.ones_like(prompts), 8, tokenizer.end_ids,
                           **options)
            assert out.tokens.max() < words and out.logprobs.isfinite().all()


def test_the_other_rows_are_the_whole_distribution(padded):
    """Log probabilities, entropy, losses and gradients are those of a model without the rows."""
    tokenizer = load_tokenizer(padded)
    llama, words = load_llama(padded, tokenizer), len(tokenizer)
    texts = [([5, 6, 7], [8, 9]), ([4], [3, 11, 12])]
    input_ids, places = collate(texts, 0)
    head = llama.lm_head.weight.detach()[:words].double()
    states = llama(input_ids).detach().double()
    expected, entropies = [], []
    for row, (prompt, completion) in enumerate(texts):
        for t, token in enumerate(completion):
            p = (head @ states[row, len(prompt) + t - 1]).softmax(0)
            expected.append(p[token].log())
            entropies.append(-sum(x * x.log() for x in p if x > 0))
    expected, entropies = torch.stack(expected), torch.stack(entropies)

    args = ppo.parse("ppo.py", "", ppo.SETTINGS, ["--entropy_coef", "0.1"], [])[0]
    args.temperature, mask = 1.0, torch.tensor([[1.0, 1, 0], [1, 1, 1]])
    logprobs, entropy = ppo.response_logprobs(llama, input_ids, places, mask, args, entropy=True)
    torch.testing.assert_close(logprobs[mask.bool()].double(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(entropy[mask.bool()].double(), entropies, atol=1e-4, rtol=1e-4)
    (logprobs.sum() + entropy.sum()).backward()
    assert (llama.lm_head.weight.grad[words:] == 0).all()
    assert llama.lm_head.weight.grad[:words].abs().max() > 0
    assert all(p.grad.isfinite().all() for p in llama.parameters() if p.grad is not None)

    llama.zero_grad()
    losses = sft.completion_losses(llama, input_ids, places, args, scale=1.0)
    torch.testing.assert_close(losses.double(), -expected, atol=1e-4, rtol=1e-4)
    labels = torch.full_like(input_ids, -100).index_put(
        (places.row, places.column), input_ids[places.row, places.column])
    loss = ppo.ptx_loss(llama.lm_head(llama(input_ids)), labels)
    torch.testing.assert_close(loss.double(), -expected.mean(), atol=1e-4, rtol=1e-4)
    loss.backward()
    assert (llama.lm_head.weight.grad[words:] == 0).all()


@pytest.mark.parametrize("options", [[], ["--lora_rank", "2"], ["--dtype", "bfloat16"]])
def test_ppo_begins_at_the_reference(padded, home, tmp_path, options, capsys):
    """Ratio 1 and KL 0 before the first step; what was written is text; the export keeps its
    shape, and its rows without a token what they were."""
    ppo.main(["--sft", padded, "--rm", str(home / "rm"), "--prompts", str(home / "demos.json"),
              "--demonstrations", str(home / "demos.json"), "--ptx_coef", "0.1",
              "--eval_prompts", str(home / "demos.json"), "--eval_number", "4", "--updates", "1",
              "--batch_size", "4", "--minibatch_size", "4", "--ppo_epochs", "1", "--seed", "3",
              "--max_new_tokens", "8", "--out", str(tmp_path / "out"), *options])
    with open(tmp_path / "out" / "metrics.csv") as file:
        row = list(csv.DictReader(file))[-1]
    assert abs(float(row["kl"])) < 1e-4 and abs(float(row["largest_ratio"]) - 1) < 1e-4
    assert 0 < float(row["entropy"]) and float(row["ptx_loss"]) < 100
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before, after = (load_file(f"{path}/model.safetensors") for path in (padded, tmp_path / "out"))
    words, name = len(load_tokenizer(padded)), "model.embed_tokens.weight"
    assert config["vocab_size"] == len(after[name]) == words + 12
    assert torch.equal(after[name][words:], before[name][words:])
    samples = [json.loads(line) for line in open(tmp_path / "out" / "samples.jsonl")]
    assert len(samples) == 8


def test_ids_with_holes(tmp_path, capfd):
    """A tokenizer without the ids 3 and 5 of 8."""
    vocab = {"<s>": 0, "</s>": 1, "a": 2, "b": 4, "c": 6}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocab)),
                                        bos_token="<s>", eos_token="</s>")
    assert len(tokenizer) == 5
    llama = load_llama(None, tokenizer)
    assert llama.config.vocab_size == 7
    logits = llama.lm_head(torch.ones(1, llama.config.hidden_size))
    assert logits.isinf().nonzero()[:, 1].tolist() == [3, 5]


def test_a_vocabulary_that_fits_costs_nothing(home):
    llama = load_llama(str(home / "llama"), load_tokenizer(str(home / "llama")))
    assert llama.lm_head.unused is None


# ------------------------------------------------------------------------------------------------
# Names of tensors

PREFIXES = {
    "DDP": lambda name: "module." + name,
    "torch.compile": lambda name: "_orig_mod." + name,
    "both": lambda name: "_orig_mod.module." + name,
    "DDP twice": lambda name: "module.module." + name,
    "FSDP": lambda name: "_fsdp_wrapped_module." + name.replace(
        "layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "compiled layers": lambda name: name.replace("layers.1.", "layers.1._orig_mod."),
    "a model in a model": lambda name: "model." + name,
    "PEFT, merged": lambda name: "base_model.model." + name,
    "TRL": lambda name: "pretrained_model." + name,
    "Lightning": lambda name: "module._orig_mod.actor.net." + name,
}


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("kind", ["llama", "rm"])
@pytest.mark.parametrize("rename", PREFIXES.values(), ids=PREFIXES)
def test_prefixes_are_taken_off(home, tmp_path, capsys, rename, kind, file):
    path = copy(home, tmp_path, kind)
    tensors = load_file(path / "model.safetensors")
    os.remove(path / "model.safetensors")
    renamed = {rename(name): tensor for name, tensor in tensors.items()}
    if file.endswith(".bin"):
        torch.save(renamed, path / file)
    else:
        save_file(renamed, path / file, metadata={"format": "pt"})
    tokenizer = load_tokenizer(str(path))
    capsys.readouterr()
    found = load_scalar_head(str(path)) if kind == "rm" else load_llama(str(path), tokenizer)
    lines = capsys.readouterr().out.splitlines()
    # transformers itself knows that a model may be in a model
    assert len(lines) == (rename("x") != "model.x")
    assert all("prefix" in line and str(path) in line for line in lines)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, tensors[name])


def test_an_adapter_that_is_not_merged_is_refused_by_name(home, tmp_path, capfd):
    path = copy(home, tmp_path)
    tensors = load_file(path / "model.safetensors")
    renamed = {}
    for name, tensor in tensors.items():
        if "q_proj" in name:
            base = "base_model.model." + name.removesuffix(".weight")
            renamed[f"{base}.base_layer.weight"] = tensor
            renamed[f"{base}.lora_A.default.weight"] = torch.zeros(2, 32)
            renamed[f"{base}.lora_B.default.weight"] = torch.zeros(32, 2)
        else:
            renamed["base_model.model." + name] = tensor
    save_file(renamed, path / "model.safetensors", metadata={"format": "pt"})
    line = refused(capfd, load_llama, str(path), load_tokenizer(str(path)))
    assert "lora_A" in line and "merge" in line


def test_a_name_that_is_there_with_and_without_a_prefix_is_refused(home, tmp_path, capfd):
    path = copy(home, tmp_path)
    tensors = load_file(path / "model.safetensors")
    norm = tensors.pop("model.norm.weight")
    tensors |= {"module.model.norm.weight": norm, "_orig_mod.model.norm.weight": norm + 1}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    assert "model.norm.weight" in refused(capfd, load_llama, str(path), load_tokenizer(str(path)))


# ------------------------------------------------------------------------------------------------
# Two runs in one directory

def take_the_lock(out, held, seconds):
    lock = lib.run.locked(str(out))
    held.write_text(lock.name)
    time.sleep(seconds)


def test_a_second_run_is_refused_while_the_first_lives(home, tmp_path, capfd):
    out = tmp_path / "out"
    out.mkdir()
    first = fork(take_the_lock, out, tmp_path / "held", 600)
    try:
        while not (tmp_path / "held").exists():
            assert first.exitcode is None
            time.sleep(0.01)
        for options in ([], ["--resume"], ["--overwrite"]):
            line = refused(capfd, train, home / "llama", home, out, *options)
            assert f"{out}: another run" in line and os.listdir(out) == [".lock"]
    finally:
        first.kill()
        first.join()
    train(home / "llama", home, out)  # its mark is still there
    train(home / "llama", home, out, "--overwrite")
    load_llama(str(out), load_tokenizer(str(out)))


def test_a_run_that_failed_leaves_no_lock(home, tmp_path, capfd):
    out = tmp_path / "out"
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(SystemExit):  # whose traceback keeps the run alive
        train(home / "llama", home, out, "--data", str(bad))
    train(home / "llama", home, out)


def test_the_lock_ends_with_the_run(home, tmp_path):
    out = tmp_path / "out"
    train(home / "llama", home, out)
    other = fork(take_the_lock, out, tmp_path / "held", 0)
    other.join()
    assert other.exitcode == 0


def test_a_file_system_without_locks(home, tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    train(home / "llama", home, tmp_path / "out")


# ------------------------------------------------------------------------------------------------
# config.json

def changed(home, tmp_path, name, **fields):
    path = copy(home, tmp_path, name)
    said = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(said | fields))
    return path


@pytest.mark.parametrize("name", ["llama", "rm"])
@pytest.mark.parametrize("pad", [-1, 500, 10**6])
def test_a_padding_token_without_a_row(home, tmp_path, capsys, name, pad):
    """-1 is LLaMA 1's; the size of the vocabulary, of those who added one to the tokenizer alone."""
    path = str(changed(home, tmp_path, name, pad_token_id=pad))
    tokenizer = load_tokenizer(str(home / "llama"))
    ours, theirs = (load_llama(path, tokenizer) if name == "llama" else load_scalar_head(path)
                    for path in (path, str(home / name)))
    assert (f"pad_token_id {pad}" in capsys.readouterr().out) == (pad > 0)
    ids = torch.randint(500, (2, 9))
    assert torch.equal(ours(ids), theirs(ids))


@pytest.mark.parametrize("scaling, said", [
    ({"factor": 2.0}, "a factor, and no type"),
    ({"type": "su", "factor": 2.0}, "KeyError 'su'"),
])
def test_a_rope_that_would_be_another(home, tmp_path, capfd, scaling, said):
    path = changed(home, tmp_path, "llama", rope_scaling=scaling, rope_parameters=None)
    tokenizer = load_tokenizer(str(home / "llama"))
    assert said in refused(capfd, lambda: load_llama(str(path), tokenizer))
