"""LoRA: what it computes, what of it learns, what is shared, what is exported; each stage with it.

    pytest tests/test_lora.py
"""

import copy
import csv
import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import data_gen
import lib.run
import model
import ppo
import sft
import train_rm
from lib.lora import LoRALinear, add_lora, adapters_off, merged, trainable
from lib.settings import parse
from model import Llama, ScalarHead, random_llama

TARGETS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
IDS = torch.randint(0, 90, (3, 11), generator=torch.Generator().manual_seed(1))


def adapted(model, rank, alpha, targets, base_dtype="float32"):
    return add_lora(model, SimpleNamespace(lora_rank=rank, lora_alpha=alpha, lora_targets=targets,
                                           base_dtype=base_dtype))


def tiny(tied=True, vocab_size=90):
    torch.manual_seed(0)
    return random_llama(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.1,
            tie_word_embeddings=tied,
        )
    )


def with_gradient(llama):
    """Logits or values, of ours or of transformers' models."""
    out = llama(IDS)
    return (
        llama.lm_head(out)
        if isinstance(llama, Llama)
        else out if isinstance(llama, ScalarHead) else out.logits
    )


def output(llama):
    with torch.no_grad():
        return with_gradient(llama)


def train(llama, steps=3):
    """A few steps of Adam on whatever `llama` has to train; large ones, so that the adapters are
    far from 0."""
    optimizer = torch.optim.AdamW(trainable(llama), lr=0.03)
    for _ in range(steps):
        with_gradient(llama).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return llama


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [TARGETS, "q_proj,v_proj"])
@pytest.mark.parametrize(
    "head", [lambda llama: llama, lambda llama: ScalarHead(llama.model)], ids=["lm", "scalar"]
)
def test_learns_beside_frozen_weights(head, targets, base_dtype, tied):
    plain = head(tiny(tied))
    weights = {
        name: p.detach().to(getattr(torch, base_dtype))
        for name, p in plain.named_parameters()
        if name != "score.weight"
    }
    lora = adapted(copy.deepcopy(plain), 4, 16, targets, base_dtype)
    with adapters_off(lora):
        before = output(lora)
    assert torch.equal(output(lora), before)  # B is 0
    if base_dtype == "float32":
        assert torch.equal(before, output(plain))
    head_before = copy.deepcopy(getattr(lora, "score", None))
    train(lora)
    learns = {name for name, p in lora.named_parameters() if p.requires_grad}
    adapters = {
        f"{name}.{matrix}"
        for name, part in lora.named_modules()
        if isinstance(part, LoRALinear)
        for matrix in "AB"
    }
    assert len(adapters) == 2 * 2 * len(targets.split(",")) and learns == adapters | (
        {"score.weight"} if head_before else set()
    )
    assert all(p.dtype == torch.float32 for p in trainable(lora))
    for name, p in lora.named_parameters():
        if name not in learns:
            assert torch.equal(p, weights[name]) and p.dtype == weights[name].dtype, name
    assert (output(lora) - before).abs().max() > 0.1
    with adapters_off(
        lora
    ):  # of a critic the reward model that it began as, although its head has moved on
        assert torch.equal(output(lora), before)
    assert not head_before or not torch.equal(lora.score.weight, head_before.weight)
    assert not torch.equal(output(lora), before)  # on again
    # the old head is not saved
    assert set(lora.state_dict()) == {
        name for name, _ in lora.named_parameters(remove_duplicate=False)
    }


class Casts(TorchDispatchMode):
    """Counts the weights that are turned from float32 into bfloat16. (The states of three rows
    have two dimensions too.)"""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ == "_to_copy" and len(args[0].shape[1:]) == 1:
            is_weight = args[0].shape[0] > len(IDS) and args[0].dtype == torch.float32
            self.number += is_weight and out.dtype == torch.bfloat16
        return out


@pytest.mark.parametrize("rank", [0, 4])
def test_decoding_casts_each_weight_once(rank):
    """Once per rollout, and not once per token, be it frozen or not."""
    lora = train(adapted(tiny(), rank, 16, TARGETS))
    with Casts() as casts:
        copy = model.decoding_copy(lora, torch.bfloat16)
    assert casts.number == 2 * 7 + 1  # the embedding too, which is the head
    with Casts() as casts:
        out = model.generate(copy, IDS, torch.ones_like(IDS), 10, [999])
    assert casts.number == 0 and out.mask.sum() == 10 * len(IDS)
    assert {p.dtype for p in copy.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in lora.parameters()} == {torch.float32}
    # the same function: in float32 up to rounding
    whole = model.decoding_copy(lora, torch.float32)
    assert (output(whole) - output(lora)).abs().max() < 1e-5


@pytest.mark.parametrize("tied", [True, False])
def test_merged_equals_unmerged(tied):
    lora = train(adapted(tiny(tied), 4, 16, TARGETS))
    state = {name: p.clone() for name, p in lora.state_dict().items()}
    plain = tiny(tied)
    tensors = merged(lora)
    # every tensor of a plain model, and no other
    assert set(tensors) == {
        name for name, _ in plain.named_parameters()
    }
    plain.load_state_dict(tensors, strict=False)
    assert (output(plain) - output(lora)).abs().max() < 1e-5
    assert all(torch.equal(p, state[name]) for name, p in lora.state_dict().items())
    half = train(adapted(tiny(tied), 4, 16, TARGETS, "bfloat16"))
    tensors = merged(half)
    assert {p.dtype for p in tensors.values()} == {torch.float32}
    assert ("lm_head.weight" in tensors) != tied
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    for i, layer in enumerate(half.model.layers):  # merged in float32, rounded nowhere
        part, plain_weight = layer.mlp.up_proj, tensors[f"model.layers.{i}.mlp.up_proj.weight"]
        assert (
            plain_weight - (part.weight.double() + 4 * part.B.double() @ part.A.double())
        ).abs().max() < 1e-6


def test_agrees_with_peft():
    peft = pytest.importorskip("peft")
    ours = train(adapted(tiny(), 4, 16, TARGETS))
    plain = LlamaForCausalLM(tiny().config).eval()
    plain.load_state_dict(tiny().state_dict())
    theirs = peft.get_peft_model(
        plain, peft.LoraConfig(r=4, lora_alpha=16, target_modules=TARGETS.split(","))
    )
    state, adapters = theirs.state_dict(), 0
    for name, p in ours.named_parameters():
        if name[-2:] in (".A", ".B"):
            state[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"].copy_(p.detach())
            adapters += 1
    assert adapters == sum("lora_" in name for name in state) == 28
    assert (output(theirs) - output(ours)).abs().max() < 1e-5
    assert (output(theirs) - output(tiny())).abs().max() > 0.1
    with_gradient(ours).square().mean().backward()
    with_gradient(theirs).square().mean().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, p in ours.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(
                p.grad,
                gradients[f"base_model.model.{name[:-2]}.lora_{name[-1]}.default.weight"],
                rtol=1e-4,
                atol=1e-6,
            )


@pytest.mark.parametrize("base_dtype", ["float32", "bfloat16"])
def test_generates(base_dtype):
    """The log probabilities of what was sampled through the cache are those of a training pass."""
    lora = train(adapted(tiny(), 4, 16, TARGETS, base_dtype))
    out = model.generate(
        lora,
        IDS,
        torch.ones_like(IDS),
        6,
        eos_token_id=-1,
        generator=torch.Generator().manual_seed(0),
    )
    with torch.no_grad():
        logits = lora.lm_head(lora(torch.cat([IDS, out.tokens], 1))[:, IDS.shape[1] - 1 : -1])
    expected = ppo.logprobs_from_logits(logits, out.tokens)
    assert (out.logprobs - expected).abs().max() < (1e-4 if base_dtype == "float32" else 0.3)


@pytest.mark.parametrize(
    "rank, targets, base_dtype, said",
    [
        (4, "q_proj,nope", "float32", "nope"),
        (4, "", "float32", "--lora_targets"),
    ],
)
def test_wrong_options(capsys, rank, targets, base_dtype, said):
    with pytest.raises(SystemExit) as stopped:
        adapted(tiny(), rank, 16, targets, base_dtype)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "option, value", [("lora_alpha", "8"), ("lora_targets", "q_proj"), ("base_dtype", "bfloat16")]
)
def test_an_option_of_lora_without_a_rank_is_refused(option, value, capsys):
    for rank in ("0", "2"):
        given = [f"--{option}={value}", f"--lora_rank={rank}"]
        if rank == "2":
            assert str(getattr(parse("x.py", "", [], given, [])[0], option)) == value
        else:
            with pytest.raises(SystemExit) as stopped:
                parse("x.py", "", [], given, [])
            assert stopped.value.code == 2 and f"--{option} is for LoRA" in capsys.readouterr().err


def test_new_rows_of_the_embedding_are_not_for_lora(capsys):
    given = ["--lora_rank=2", "--resize_embedding"]
    with pytest.raises(SystemExit) as stopped:
        parse("sft.py", "", sft.SETTINGS, given, ["model"])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and line.startswith("error: --resize_embedding")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny LLaMA, a reward model made of it, and a few records."""
    folder = tmp_path_factory.mktemp("lora")
    texts = [
        ("What is red?", "A colour. Glad to help!"),
        ("Say hello.", "Hello!"),
        ("Add 2 and 3.", "It is 5."),
        ("And 4 and 4?", "8."),
    ] * 3
    demos = [
        {"user_input": f"{asked} {i}", "completion": said} for i, (asked, said) in enumerate(texts)
    ]
    scored = [d | {"score": 4} for d in demos] + [
        d | {"completion": "no", "score": 1} for d in demos
    ]
    for name, records in (("demos", demos), ("scored", scored)):
        (folder / f"{name}.json").write_text(json.dumps(records), encoding="utf-8")
    (folder / "tokenizer").mkdir()
    prompts = data_gen.draw_prompts(random.Random(0), 24)
    (folder / "tokenizer" / "tokenizer.model").write_bytes(
        data_gen.train_tokenizer(prompts + [said for _, said in texts], vocab_size=600)
    )
    tokenizer = model.load_tokenizer(str(folder / "tokenizer"))
    llama = tiny(vocab_size=len(tokenizer))
    model.save_checkpoint(llama, tokenizer, str(folder / "llama"))
    model.save_checkpoint(ScalarHead(llama.model), tokenizer, str(folder / "rm"))
    demos, scored, llama, rm = (
        str(folder / name) for name in ("demos.json", "scored.json", "llama", "rm")
    )
    return SimpleNamespace(
        llama=llama,
        rm=rm,
        argv={
            sft: f"--model {llama} --data {demos} --epochs 2 --batch_size 6 --lr 0.01".split(),
            train_rm: f"--model {llama} --data {scored} --demonstrations {demos} --epochs 2 --batch_size 6 --lr 0.01".split(),
            ppo: (
                f"--sft {llama} --rm {rm} --prompts {demos} --eval_prompts {demos} --updates 3 --batch_size 6 --minibatch_size 3 --ppo_epochs 2 "
                "--max_new_tokens 6 --eval_every 3 --lr 0.01 --critic_lr 0.01"
            ).split(),
        },
    )


@pytest.mark.parametrize("stage", [sft, train_rm, ppo], ids=lambda stage: stage.__name__)
def test_stage(stage, files, tmp_path, monkeypatch):
    """A run ends with a plain checkpoint that differs from its start and computes what the model in
    memory did; PPO's KL begins at 0, and its first scores are those of a run without LoRA."""
    exported, save = {}, model.save_checkpoint

    def keep(trained, tokenizer, folder):
        exported[folder] = trained
        save(trained, tokenizer, folder)

    monkeypatch.setattr(stage, "save_checkpoint", keep)
    out = str(tmp_path / "out")
    stage.main(files.argv[stage] + ["--out", out, "--lora_rank", "4"])
    assert set(exported) == {out, f"{out}/critic"} if stage is ppo else {out}
    for folder, trained in exported.items():
        scalar = isinstance(trained, ScalarHead)
        kind = AutoModelForSequenceClassification if scalar else AutoModelForCausalLM
        loaded, start = (
            output(kind.from_pretrained(path))
            for path in (folder, files.rm if scalar else files.llama)
        )
        ours = output(trained)
        if scalar:  # transformers gives that of the last token, not shifted
            ours = ours[:, -1:] + trained.config.score_mean
        assert (loaded - ours).abs().max() < 1e-5 and (loaded - start).abs().max() > 1e-3
    if stage is ppo:
        stage.main(files.argv[stage] + ["--out", str(tmp_path / "full")])
        lora_rows, full_rows = (
            list(csv.DictReader(open(f"{folder}/metrics.csv", encoding="utf-8")))
            for folder in (out, tmp_path / "full")
        )
        assert float(lora_rows[0]["eval_score"]) == pytest.approx(
            float(full_rows[0]["eval_score"]), abs=1e-5
        )
        assert abs(float(lora_rows[1]["kl"])) < 1e-5 < abs(float(lora_rows[-1]["kl"]))
        assert float(lora_rows[1]["score"]) == pytest.approx(float(full_rows[1]["score"]), abs=1e-5)


@pytest.mark.parametrize("stage", [sft, train_rm, ppo], ids=lambda stage: stage.__name__)
def test_resumes(stage, files, tmp_path, monkeypatch):
    """Interrupted after the first saved state, and resumed: the weights of an uninterrupted run,
    bit for bit."""
    argv = files.argv[stage] + ["--save_every", "1", "--lora_rank", "4", "--out"]
    stage.main(argv + [str(tmp_path / "whole")])
    save = lib.run.Run.save

    def save_and_end(*args, **progress):
        save(*args, **progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(lib.run.Run, "save", save_and_end)
        stage.main(argv + [str(tmp_path / "cut")])
    assert ended.value.code == 130
    stage.main(argv + [str(tmp_path / "cut"), "--resume"])
    for name in ["model.safetensors"] + ["critic/model.safetensors"] * (stage is ppo):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
