"""The budget of --dry_run against real models, PyTorch's own FLOP counter and what autograd keeps."""

import argparse
import os
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import model
import ppo
import sft
import train_rm

SIZE = dict(vocab_size=101, hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=64)


def config(**other):
    return LlamaConfig(**SIZE, **other)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("heads", [1, 4])
def test_parameters_are_those_of_the_real_model_and_of_the_formula(tied, heads):
    c = config(num_key_value_heads=heads, tie_word_embeddings=tied)
    counted = model.parameters(c)
    assert sum(counted.values()) == sum(p.numel() for p in LlamaForCausalLM(c).parameters())
    d, i, q, k = 32, 80, 32, 8 * heads
    assert counted["layers"] == 3 * (2 * d * q + 2 * d * k + 3 * d * i + 2 * d)
    assert model.parameters(c, lora_rank=2)["adapters"] == 3 * 2 * (2 * (d + q) + 2 * (d + k) + 3 * (d + i))


def test_flops_are_those_of_the_flop_counter():
    c = config(num_key_value_heads=2)
    network, ids = LlamaForCausalLM(c), torch.randint(101, (5, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as forward:
        loss = network(ids).logits.sum()
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    assert forward.get_total_flops() == model.forward_flops(c, 5, 16, 5 * 16)
    assert forward.get_total_flops() + backward.get_total_flops() == model.training_flops(c, 5, 16, 5 * 16)


def test_generation_flops_are_those_of_the_flop_counter():
    c = config(num_key_value_heads=4)
    ids = torch.randint(101, (5, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.generate(LlamaForCausalLM(c), ids, torch.ones_like(ids), 7, eos_token_id=-1)
    assert counter.get_total_flops() == model.generation_flops(c, 5, 16, 7)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_a_layer_keeps_the_bytes_of_the_formula(kv_heads, bf16):
    def kept(layers):
        c = LlamaConfig(**SIZE | {"num_hidden_layers": layers}, num_key_value_heads=kv_heads)
        network, storages = LlamaForCausalLM(c), {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        cast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
            loss = network.model(torch.randint(101, (5, 16)), use_cache=False).last_hidden_state.sum()
        weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
        del loss
        return sum(s.nbytes() for pointer, s in storages.items() if pointer not in weights)

    def predicted(layers):
        return model.activation_bytes(LlamaConfig(**SIZE | {"num_hidden_layers": layers}, num_key_value_heads=kv_heads), 5, 16, 0, bf16=bf16)

    assert kept(3) - kept(2) == predicted(3) - predicted(2)


def test_processes_lora_and_checkpointing_need_less():
    c = config(num_key_value_heads=4)
    whole, shared = model.model_bytes(c), model.model_bytes(c, processes=4)
    layers = 4 * model.parameters(c)["layers"]
    assert [a - b for a, b in zip(whole, shared)] == [0.75 * layers, 0.75 * layers, 1.5 * layers]
    args = dict(dtype="float32", base_dtype="float32", device="cpu", processes=1, gradient_checkpointing=False, batch_size=8,
                minibatch_size=4, micro_batch_size=2, ppo_epochs=1, max_prompt_length=8, max_new_tokens=8, ptx_coef=0.0)
    full, lora, half = (model.budget("ppo", c, argparse.Namespace(**args | other)) for other in (
        dict(lora_rank=0), dict(lora_rank=2), dict(lora_rank=2, base_dtype="bfloat16")))
    weights = 4 * sum(p.numel() for p in LlamaForCausalLM(c).parameters())
    backbone = weights - 4 * 101 * 32 + 4 * 32  # the head gives way to one number
    adapters = 4 * model.parameters(c, 2)["adapters"]
    assert full["weights"] == 2 * (weights + backbone)  # four copies of LLaMA; with LoRA two
    assert lora["weights"] == weights + backbone + 2 * adapters
    assert half["weights"] == (weights + backbone) / 2 + 2 * adapters
    assert lora["gradients"] == 2 * adapters + 4 * 32 and lora["optimizer"] == 2 * lora["gradients"]
    assert model.activation_bytes(c, 2, 16, 0, checkpointing=True) < model.activation_bytes(c, 2, 16, 0)


@pytest.mark.parametrize("stage, name", [(sft, "--model"), (train_rm, "--model"), (ppo, "--sft")])
def test_dry_run_prints_and_writes_nothing(stage, name, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "llama"
    config(num_key_value_heads=4).save_pretrained(checkpoint)  # no weights: none are read
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(SystemExit) as end:
        stage.main([name, str(checkpoint), "--dry_run", "--processes", "8"])
    out = capsys.readouterr().out
    assert end.value.code == 0
    for word in ("parameters, layers: 35,520", "weights:", "gradients:", "optimizer:", "activations:", "peak:", "FLOP"):
        assert word in out
    assert os.listdir(".") == [] and os.listdir(checkpoint) == ["config.json"]


def test_a_configuration_that_is_not_there_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        model.dry_run("sft", str(tmp_path), SimpleNamespace())
    assert end.value.code == 2 and capsys.readouterr().err.count("\n") == 1
