"""sft.py on a tiny LLaMA: the gradient of a batch, however it is cut; what is logged, warned of and
exported.

For a comparison of gradients AdamW gives way to plain gradient descent at learning rate 1: the
change of the weights is then the gradient itself, and an error in it shows at its full size.
"""

import copy
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sft
from lib.data import collate
from makers import (
    PlainDescent, assert_same_llama, clipped, distance, error_line, examples_of, flat, gradient,
    in_file_order, read_rows, slow_token_logprobs, write_records,
)
from model import load_llama, load_tokenizer
from waits import waits_of_steps


def test_sft_learns(sft_run):
    losses = [row["loss"] for row in sft_run.rows]
    held_out = [row["eval_loss"] for row in sft_run.rows if row["eval_loss"]]
    assert losses[0] > 6.5 and sum(losses[-10:]) / 10 < 3 and held_out[-1] < held_out[0]


def test_sft_metrics(sft_run, home):
    steps_an_epoch = math.ceil(len(home.records["demos"]) / 16)
    with open(os.path.join(sft_run.folder, "metrics.csv"), encoding="utf-8") as file:
        assert file.readline().strip() == "step,epoch,loss,eval_loss,lr,grad_norm,tokens_per_s"
    assert [row["step"] for row in sft_run.rows] == list(range(1, 8 * steps_an_epoch + 1))
    assert [row["epoch"] for row in sft_run.rows] == [
        epoch for epoch in range(1, 9) for _ in range(steps_an_epoch)
    ]
    for row in sft_run.rows:
        assert (row["eval_loss"] is not None) == (row["step"] % steps_an_epoch == 0)
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert row["grad_norm"] > 0 and row["tokens_per_s"] > 0
    rates, warmup = [row["lr"] for row in sft_run.rows], math.ceil(0.03 * len(sft_run.rows))
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(
        rates[warmup:], reverse=True
    )
    assert max(rates) == pytest.approx(1e-2, rel=0.01) and rates[-1] < 1e-4
    # the last evaluation is that of the exported model
    exported = load_llama(sft_run.folder, home.tokenizer, torch.float64)
    with torch.no_grad():
        held_out = examples_of(home.demos_eval, home.tokenizer)
        losses = torch.cat([-slow_token_logprobs(exported, p, c)[0] for p, c, _ in held_out])
    assert sft_run.rows[-1]["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_sft_export_in_plain_transformers(sft_run, home):
    assert_same_llama(sft_run.folder, sft_run.exported[sft_run.folder], home.tokenizer)


FLOAT32 = SimpleNamespace(device="cpu", dtype="float32")


def test_completion_losses(sft_run, ragged, home):
    """Against a loop over tokens; none for a prompt token, none for padding, and one for
    end-of-sequence."""
    llama = load_llama(sft_run.folder, home.tokenizer)
    prompts, completions, _ = zip(*ragged.examples)
    batch = collate(ragged.examples, home.tokenizer.pad_token_id)
    losses = sft.completion_losses(llama, *batch, FLOAT32, piece=5)
    slow = [
        -slow_token_logprobs(copy.deepcopy(llama).double(), p, c)[0]
        for p, c in zip(prompts, completions)
    ]
    torch.testing.assert_close(losses.double(), torch.cat(slow), rtol=1e-4, atol=1e-4)
    assert len(losses) == sum(map(len, completions))
    assert all(completion[-1] == home.tokenizer.eos_token_id for completion in completions)


def test_no_loss_falls_on_the_prompt(sft_run, ragged, home):
    """The vocabulary projection receives a gradient at the states before completion tokens, and at
    no other."""
    llama = load_llama(sft_run.folder, home.tokenizer)
    prompts, completions, _ = zip(*ragged.examples)
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    llama.model.register_forward_hook(keep)
    batch = collate(ragged.examples, home.tokenizer.pad_token_id)
    sft.completion_losses(llama, *batch, FLOAT32, scale=1.0, piece=5)
    touched = kept[0].grad.abs().sum(-1).nonzero().tolist()
    ends = [
        (len(prompt), len(prompt) + len(completion))
        for prompt, completion in zip(prompts, completions)
    ]
    assert touched == [
        [row, t - 1] for row, (start, end) in enumerate(ends) for t in range(start, end)
    ]


@pytest.fixture(scope="session")
def sft_gradient(sft_run, ragged):
    """The gradient of the batch's mean loss a token, by loops; and what it is if each micro-batch
    uses its own mean."""
    llama = load_llama(sft_run.folder, load_tokenizer(sft_run.folder), torch.float64)
    in_order = sorted(ragged.examples, key=lambda example: len(example[0]) + len(example[1]))
    each = []  # (gradient, tokens) of the sum of each record's losses
    for prompt, completion, _ in in_order:
        llama.zero_grad()
        (-slow_token_logprobs(llama, prompt, completion)[0]).sum().backward()
        each.append((gradient(llama.parameters()), len(completion)))

    def own_means(size):
        parts = [each[start : start + size] for start in range(0, len(each), size)]
        return sum(sum(g for g, _ in part) / sum(n for _, n in part) for part in parts) / len(parts)

    return SimpleNamespace(
        right=sum(g for g, _ in each) / sum(n for _, n in each), own_means=own_means
    )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_sft_micro_batches_change_nothing(
    sft_argv, sft_gradient, ragged, tmp_path, monkeypatch, micro_batch_size
):
    """One optimizer step on 8 ragged records is the gradient of their mean loss a token, however
    they are cut."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    sft.main(
        sft_argv(
            data=ragged.path, batch_size=8, micro_batch_size=micro_batch_size, lr=1, out=tmp_path
        )
    )
    error = distance(PlainDescent.made.change(), clipped(sft_gradient.right))
    assert error < 1e-4
    # the known error, each micro-batch divided by its own tokens, would be a thousand times that
    known = distance(clipped(sft_gradient.own_means(micro_batch_size)), clipped(sft_gradient.right))
    print(
        f"micro-batches of {micro_batch_size}: off by {error:.1e}; with their own means by {known:.1e}"
    )
    assert known < 1e-12 if micro_batch_size == 8 else known > 0.1
    [row] = read_rows(tmp_path)
    assert row["grad_norm"] == pytest.approx(sft_gradient.right.norm().item(), rel=1e-4)
    exported = flat(AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert torch.equal(exported, flat(PlainDescent.made.after))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_sft_evaluate_weighs_tokens(sft_run, ragged, home, micro_batch_size):
    llama = load_llama(sft_run.folder, home.tokenizer)
    args = SimpleNamespace(micro_batch_size=micro_batch_size, device="cpu", dtype="float32")
    with torch.no_grad():
        each = [(-slow_token_logprobs(llama, p, c)[0]).tolist() for p, c, _ in ragged.examples]
    by_token = sum(map(sum, each)) / sum(map(len, each))
    mean_of_means = sum(sum(losses) / len(losses) for losses in each) / len(each)
    assert sft.evaluate(llama, ragged.examples, args, home.tokenizer.pad_token_id) == pytest.approx(
        by_token, rel=1e-5
    )
    assert abs(by_token - mean_of_means) > 0.1


@pytest.fixture
def suspicious(sft_argv, tmp_path, monkeypatch):
    """The options of an SFT run of 24 steps of 3 records, in the order of the file, that barely
    learns.

    Record 2 is too long and dropped, so that a position in the batch is not the number of a record.
    """
    monkeypatch.setattr(sft, "length_batches", in_file_order)
    usual = {"user_input": "What is 3 plus 4?", "completion": "7."}

    def argv(replaced={}, **changes):
        records = [usual, usual | {"completion": "word " * 200}, *[usual] * 71]
        records = [replaced.get(number, record) for number, record in enumerate(records, 1)]
        data = write_records(tmp_path / "data.json", records)
        return sft_argv(
            **dict(data=data, batch_size=3, micro_batch_size=3, lr=1e-9, out=tmp_path / "out")
            | changes
        )

    return argv


@pytest.mark.parametrize("number, micro_batch_size", [(67, 3), (68, 1), (69, 2)])
def test_a_garbage_record_is_named(
    suspicious, sft_run, home, tmp_path, capsys, number, micro_batch_size
):
    """With its mean loss a token."""
    garbage = {"user_input": "What is 3 plus 4?", "completion": "剪剪]剪&猫%锤 z车q"}
    sft.main(suspicious({number: garbage}, micro_batch_size=micro_batch_size))
    [warning] = [line for line in capsys.readouterr().out.split("\n") if "warning: " in line]
    step = (number - 2) // 3 + 1  # without record 2
    assert (
        f"step {step}:" in warning and f"record {number} of {tmp_path / 'data.json'} (" in warning
    )
    [example] = examples_of(write_records(tmp_path / "garbage.json", [garbage]), home.tokenizer)
    with torch.no_grad():
        loss = (
            -slow_token_logprobs(load_llama(sft_run.folder, home.tokenizer), *example[:2])[0]
            .mean()
            .item()
        )
    assert float(re.search(r"\((\d+\.\d+)\)$", warning)[1]) == pytest.approx(loss, abs=0.02)


@pytest.mark.parametrize("same", [True, False])
def test_no_warning_without_garbage(suspicious, home, capsys, same):
    sft.main(suspicious({} if same else dict(enumerate(home.records["demos"][:73], 1))))
    assert "warning: " not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_sft_stops_on_what_is_not_finite(suspicious, home, tmp_path, monkeypatch, capsys, what):
    """Exit code 1, the numbers of the batch's records, the steps before it on disk, nothing
    exported."""
    losses, poison = sft.completion_losses, home.tokenizer.encode("&", add_special_tokens=False)[-1]

    def poisoned(llama, input_ids, *rest, **options):
        result = losses(llama, input_ids, *rest, **options)
        if (input_ids == poison).any():
            (result if what == "loss" else llama.lm_head.weight.grad)[0] = math.nan
        return result

    monkeypatch.setattr(sft, "completion_losses", poisoned)
    argv = suspicious({9: {"user_input": "What is 3 plus 4?", "completion": "7 & 8."}})
    line = error_line(capsys, lambda: sft.main(argv), code=1)
    assert re.search(
        "the loss is nan" if what == "loss" else r"the loss is \d.*, the gradient nan", line
    )
    assert "at step 3, on records [8, 9, 10]" in line and "data.json" in line
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "metrics.csv"]
    assert len(read_rows(tmp_path / "out")) == 2


def test_sft_waits_once_a_step(sft_argv, home, tmp_path):
    data = write_records(tmp_path / "data.json", home.records["demos"][:32])
    argv = sft_argv(data=data, batch_size=8, micro_batch_size=2, out=tmp_path / "out")
    assert set(waits_of_steps(sft, argv)) == {1}


def test_sft_gives_the_embedding_the_rows_that_it_lacks(sft_argv, sft_run, tmp_path, capsys):
    larger = AutoTokenizer.from_pretrained(sft_run.folder)
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(tmp_path / "tokenizer")
    argv = sft_argv(tokenizer=tmp_path / "tokenizer", out=tmp_path / "out")
    assert "[PAD]" in error_line(capsys, lambda: sft.main(argv))
    sft.main([*argv, "--resize_embedding"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(trained.lm_head.weight) == len(larger) == trained.config.vocab_size
