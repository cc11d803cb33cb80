"""tools/budget.py and bench/memory.py against real models, PyTorch's own FLOP counter, and what
autograd keeps."""

import contextlib
import os
import re
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import bench.memory as measuring
import ppo
import sft
import train_rm
from forked import fork, redirect
from lib import flops, memory
from model import Llama, generate
from tools import budget

SIZE = dict(
    vocab_size=101,
    hidden_size=32,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=64,
)
HIDDEN_PAIRS = 4 * 3 * 32 * 5 * (16 * 15 // 2)  # FLOP: the counter counts what the mask hides, too


def config(**other):
    return LlamaConfig(**SIZE | other)


def settings(stage="ppo", *flags, **options):
    return budget.settings(stage, flags, device="cpu", **options)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_parameters_are_those_of_the_real_model_and_of_the_formula(tied, heads):
    c = config(num_key_value_heads=heads, tie_word_embeddings=tied)
    counted = budget.parameters(budget.networks("sft", c, settings("sft"))[0])
    assert sum(counted.values()) == sum(p.numel() for p in LlamaForCausalLM(c).parameters())
    d, i, q, k = 32, 80, 32, 8 * heads
    assert counted["layers"] == 3 * (2 * d * q + 2 * d * k + 3 * d * i + 2 * d)
    lora = budget.parameters(budget.networks("sft", c, settings("sft", lora_rank=2))[0])
    assert lora["adapters"] == 3 * 2 * (2 * (d + q) + 2 * (d + k) + 3 * (d + i))


def nearly(number):
    """Some versions of transformers find the angles of rope by a product, of 2 h / 2 T FLOP."""
    return pytest.approx(number, rel=2e-4)


def test_flops_are_those_of_the_flop_counter():
    c = config(num_key_value_heads=2)
    llama, ids = Llama(c), torch.randint(101, (5, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = llama.lm_head(llama(ids)).sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    counted, texts = forward.get_total_flops(), 5 * [16]
    assert counted == nearly(flops.forward_flops(c, texts, 5 * 16) + HIDDEN_PAIRS)
    assert counted + backward.get_total_flops() == nearly(
        flops.training_flops(c, texts, 5 * 16, settings()) + 3 * HIDDEN_PAIRS
    )


def test_generation_flops_are_those_of_the_flop_counter():
    c = config(num_key_value_heads=4)
    ids = torch.randint(101, (5, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(Llama(c), ids, torch.ones_like(ids), 7, eos_token_id=-1)
    assert counter.get_total_flops() == nearly(
        flops.generation_flops(c, 5 * [(16, 7)]) + HIDDEN_PAIRS
    )


def test_an_update_asks_the_actor_once_more_where_it_is_not_exact():
    c, texts = config(), [(5, 3), (9, 2)]
    exact, half, base, tf32 = (
        flops.update_flops(c, texts, settings("ppo", *flags, lora_rank=2))
        for flags in ([], ["--dtype=bfloat16"], ["--base_dtype=bfloat16"], ["--tf32"])
    )
    torch.set_float32_matmul_precision("highest")
    assert half == base == tf32 == exact + flops.forward_flops(c, [8, 11], 5)


def kept(c, args, rows, length):
    """Bytes that autograd saves in a forward pass up to the hidden states; each storage once, and
    no weights."""
    (llama,), storages = budget.networks("sft", c, args, "cpu"), {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), sft.autocast(args):
        hidden = llama(torch.randint(101, (rows, length)))
    weights = {p.untyped_storage().data_ptr() for p in llama.parameters()}
    del hidden
    return sum(s.nbytes() for pointer, s in storages.items() if pointer not in weights)


# large enough for lib.kernels.linear to compute as a convolution
SMALL, LARGE = SIZE, dict(SIZE, hidden_size=512, intermediate_size=640)


@pytest.mark.parametrize(
    "size, kv_heads, options, within",
    [
        (SMALL, 1, {}, 0),
        (SMALL, 4, {}, 0),
        (LARGE, 2, {}, 0.03),
        (SMALL, 1, dict(dtype="bfloat16"), 0),
        (SMALL, 4, dict(dtype="bfloat16"), 0),
        # the formula leaves out the adapters, which are small in larger models
        (LARGE, 4, dict(lora_rank=1), 0.03),
        (LARGE, 4, dict(lora_rank=1, base_dtype="bfloat16"), 0.03),
        (LARGE, 4, dict(lora_rank=1, dtype="bfloat16", base_dtype="bfloat16"), 0.03),
    ],
)
def test_a_layer_keeps_the_bytes_of_the_formula(size, kv_heads, options, within):
    args, rows, length = settings("sft", **options), 5, 25

    def layer(of):
        three, two = (
            of(LlamaConfig(**size | dict(num_hidden_layers=n, num_key_value_heads=kv_heads)))
            for n in (3, 2)
        )
        return three - two

    measured = layer(lambda c: kept(c, args, rows, length))
    assert measured == pytest.approx(
        layer(lambda c: memory.activation_bytes(c, rows, length, 0, 0, args)), rel=within
    )


def test_lora_checkpointing_and_processes_need_less():
    c = config(num_key_value_heads=4)
    options = dict(
        batch_size=8, minibatch_size=4, micro_batch_size=2, max_prompt_length=8, max_new_tokens=8
    )
    full, lora, half, three, shared, split = (
        budget.budget("ppo", c, settings(**options, **other))
        for other in (
            {},
            dict(lora_rank=2),
            dict(lora_rank=2, base_dtype="bfloat16"),
            dict(lora_rank=2, critic="sft"),
            dict(processes=4),
            dict(processes=4, lora_rank=2),
        )
    )
    weights = 4 * sum(p.numel() for p in LlamaForCausalLM(c).parameters())
    scalar = weights - 4 * 101 * 32 + 4 * 32  # the head gives way to one number
    actor = budget.networks("ppo", c, settings(lora_rank=2))[0]
    adapters = 4 * budget.parameters(actor)["adapters"]
    assert full["weights"] == 2 * (weights + scalar)  # four copies of LLaMA; with LoRA two
    assert lora["weights"] == weights + scalar + 2 * adapters
    assert three["weights"] == lora["weights"] + scalar  # the reward model is not the critic's
    assert half["weights"] == (weights + scalar - 4 * 32) / 2 + 4 * 32 + 2 * adapters
    assert full["gradients"] == weights and full["optimizer"] == 2 * (weights + scalar)
    # the critic's, which has a head
    assert lora["gradients"] == adapters + 4 * 32
    assert lora["optimizer"] == 2 * (2 * adapters + 4 * 32)
    for name in ("weights", "gradients", "optimizer"):
        assert shared[name] == full[name] / 4
    # embedding, norm and head of all four; those of the actor again as gradients; three layers
    ends, layer = 4 * 32 * (101 + 1), 4 * budget.parameters(Llama(c))["layers"] / 3
    heads = 2 * 4 * 32 * 101 + 2 * 4 * 32
    assert shared["gathered"] == 4 * ends + heads + ends + 4 * 32 * 101 + 3 * layer
    assert full["gathered"] == 0 and split["peak"] < shared["peak"] < full["peak"]
    few, many = (
        memory.activation_bytes(c, 2, 16, 0, 0, settings("ppo", *flags))
        for flags in (["--gradient_checkpointing"], [])
    )
    assert few < many


@pytest.mark.parametrize("script", [sft, train_rm, ppo])
def test_dry_run_says_where_it_went(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--dry_run"])
    assert end.value.code == 2 and "python -m tools.budget" in capsys.readouterr().err


@pytest.mark.parametrize("stage, name", [("sft", "--model"), ("rm", "--model"), ("ppo", "--sft")])
def test_budget_of_a_run_prints_and_writes_nothing(stage, name, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "llama"
    # no weights: none are read
    config(num_key_value_heads=4, max_position_embeddings=256).save_pretrained(checkpoint)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    budget.main([stage, name, str(checkpoint), "--processes", "8"])
    out = capsys.readouterr().out
    for word in (
        "parameters, layers: 35,520",
        "weights:",
        "gradients:",
        "optimizer:",
        "activations:",
        "peak:",
        "FLOP",
    ):
        assert word in out
    assert os.listdir(".") == [] and os.listdir(checkpoint) == ["config.json"]


def test_a_configuration_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        budget.main(["sft", "--model", str(tmp_path)])
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--processes", "4"], "ppo --processes 4"),
        (["--lora_rank=0"], "ppo --lora_rank 0"),
        (["sfx"], "sfx: not a stage; name sft, rm or ppo"),
        (["--max_new_tokens", "5000"], "leaves no room for a prompt"),
        (["ppo", "--sft", "llama", "--max_new_tokens", "65"], "leaves no room for a prompt"),
        (["ppo", "--sft", "reward"], "--sft reward: a reward model"),
        (["rm", "--model", "reward"], "--model reward: a reward model"),
    ],
)
def test_what_no_run_can_be_ends_in_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config().save_pretrained("llama")
    config(architectures=["LlamaForSequenceClassification"]).save_pretrained("reward")
    with pytest.raises(SystemExit) as end:
        budget.main(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1 and said in err
    assert "GiB" not in out and "parameters, " not in out


def table_into(pipe, errors):
    redirect(errors)
    budget.SIZES = {"1B" * 10**5: budget.SIZES["1B"]}  # longer than what a pipe holds
    sys.stdout = open(pipe, "w")
    budget.main([])


def test_a_reader_that_has_seen_enough_ends_the_program_without_a_traceback(tmp_path):
    """As in `python -m tools.budget | head -1`."""
    os.mkfifo(tmp_path / "pipe")
    program = fork(table_into, tmp_path / "pipe", tmp_path / "errors")
    with open(tmp_path / "pipe") as pipe:
        assert pipe.readline().startswith("| GiB per process |")
    program.join(60)
    assert program.exitcode == 1 and (tmp_path / "errors").read_text() == ""


def measured(stage, said):
    measuring.CHECKED["tiny"] = (SIZE | dict(max_position_embeddings=256), 4)
    with open(said, "w") as file, contextlib.redirect_stdout(file):
        measuring.measure(stage, "tiny", "returned", [])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_step_of_each_stage_is_measured(stage, tmp_path):
    """In a process of its own, as bench/memory.py does: what earlier tests took would hide what a
    step takes."""
    process = fork(measured, stage, tmp_path / "said")
    process.join(120)
    assert process.exitcode == 0
    assert re.fullmatch(
        rf"\| {stage} \| tiny \| returned \|( \d+ MiB \|){{3}} [\d.]+ \|\n",
        (tmp_path / "said").read_text(),
    )
