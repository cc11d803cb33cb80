"""train_rm.py on a tiny LLaMA: the gradient of a batch, however it is cut (as in test_sft.py); the
evaluation, and the normalization at the end; what is logged, warned of and exported."""

import itertools
import math
import os
import re
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import model
import train_rm
from lib.data import collate
from lib.scored import group_by_prompt, read_scored
from makers import (
    PlainDescent, clipped, distance, error_line, examples_of, gradient, in_file_order,
    plain_scores, read_rows, slow_values, write_records,
)
from model import LlamaBackbone, ScalarHead, load_llama, load_scalar_head
from waits import waits_of_steps


def by_prompt(records):
    """[[index of a record, ...] of each prompt], by a plain comparison of texts."""
    prompts = list(dict.fromkeys(record["user_input"] for record in records))
    return [
        [i for i, record in enumerate(records) if record["user_input"] == prompt]
        for prompt in prompts
    ]


def slow_pairs(scores, labels, groups):
    """[(1, 0.5 or 0 for the model's order, margin, label gap)] of all pairs with different labels,
    by loops."""
    pairs = []
    for group in groups:
        for better, worse in itertools.permutations(group, 2):
            if labels[better] > labels[worse]:
                margin = scores[better] - scores[worse]
                order = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
                pairs.append((order, margin, labels[better] - labels[worse]))
    return pairs


def test_rm_learns_to_rank(rm_run, home):
    records = home.records["scored"]
    steps = 3 * math.ceil(
        sum(len({records[i]["score"] for i in group}) > 1 for group in by_prompt(records)) / 8
    )
    with open(os.path.join(rm_run.folder, "metrics.csv"), encoding="utf-8") as file:
        assert file.readline().strip() == (
            "step,epoch,loss,accuracy,eval_accuracy,eval_margin,eval_error,lr,grad_norm,"
            "tokens_per_s"
        )
    assert [row["step"] for row in rm_run.rows] == list(range(1, steps + 1))
    for row in rm_run.rows:
        assert (row["eval_accuracy"] is not None) == (row["step"] % 5 == 0 or row["step"] == steps)
        assert row["eval_error"] is None  # a ranking model's scores are not in the labels' units
        assert all(math.isfinite(value) for value in row.values() if value is not None)
    assert rm_run.rows[-1]["eval_accuracy"] > 0.55 and rm_run.rows[-1]["eval_margin"] > 0
    assert sum(row["loss"] for row in rm_run.rows[-5:]) < 0.95 * sum(
        row["loss"] for row in rm_run.rows[:5]
    )


def test_rm_export_in_plain_transformers(rm_run, home):
    """The exported model alone gives the normalized score, ours, in a padded batch as well as each
    completion alone."""
    examples = examples_of(home.demos, home.tokenizer)
    scores = torch.tensor(plain_scores(rm_run.folder, examples))
    assert abs(scores.mean().item()) < 1e-3 and abs(scores.std(unbiased=False).item() - 1) < 1e-3
    input_ids, _ = collate(examples[:16], home.tokenizer.pad_token_id)
    classifier = AutoModelForSequenceClassification.from_pretrained(rm_run.folder).eval()
    assert (
        classifier.config.problem_type == "regression" and abs(classifier.config.score_mean) > 1e-3
    )
    with torch.no_grad():
        ours = rm_run.exported[rm_run.folder](input_ids)
        theirs = classifier(
            input_ids, attention_mask=(input_ids != home.tokenizer.pad_token_id).long()
        ).logits[:, 0]
        theirs -= classifier.config.score_mean
    ours = torch.stack([row[len(p) + len(c) - 1] for row, (p, c, _) in zip(ours, examples)])
    torch.testing.assert_close(ours, scores[:16], rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs, scores[:16], rtol=0, atol=1e-4)
    assert not [name for name in os.listdir(rm_run.folder) if "part" in name]


def test_normalization_keeps_the_ranking(rm_run, home):
    """It is a shift and a division: every pair stays as it was."""
    records, examples = home.records["scored_eval"], examples_of(home.scored_eval, home.tokenizer)
    groups, labels = by_prompt(records), [record["score"] for record in records]
    backbone = load_scalar_head(rm_run.folder).model
    with torch.no_grad():
        hidden = torch.stack([backbone(torch.tensor([p + c]))[0, -1] for p, c, _ in examples])
    before, after = ((hidden @ head[0]) for head in rm_run.heads[-2:])
    assert not torch.equal(*rm_run.heads[-2:])
    accuracy = [
        sum(pair[0] for pair in slow_pairs(scores.tolist(), labels, groups))
        for scores in (before, after)
    ]
    pairs = len(slow_pairs(labels, labels, groups))
    assert accuracy[0] / pairs == pytest.approx(rm_run.rows[-1]["eval_accuracy"], abs=1e-3)
    assert accuracy[0] == accuracy[1]
    apart = [(i, j) for group in groups for i, j in itertools.combinations(group, 2)]
    assert len(apart) > 50 and all(
        (before[i] > before[j]) == (after[i] > after[j]) for i, j in apart
    )


def test_each_completion_goes_through_the_model_once_an_epoch(
    home, rm_argv, few_scored, tmp_path, monkeypatch
):
    """K completions make K (K - 1) / 2 pairs, and K rows."""
    rows, forward, pad = Counter(), LlamaBackbone.forward, home.tokenizer.pad_token_id

    def counted(self, input_ids, **given):
        if torch.is_grad_enabled():
            rows.update(tuple(token for token in row if token != pad) for row in input_ids.tolist())
        return forward(self, input_ids, **given)

    monkeypatch.setattr(LlamaBackbone, "forward", counted)
    train_rm.main(rm_argv(data=few_scored.path, eval_data=None, epochs=2, out=tmp_path / "out"))
    assert rows == Counter(
        {tuple(p + c): 2 for p, c, _ in examples_of(few_scored.path, home.tokenizer)}
    )


def test_last_token():
    """The last token of the completion, not of the prompt and not of the padding, whatever tokens
    these are."""
    prompts, completions = [[5], [5, 6, 7, 0], [8, 9], [4, 4]], [
        [1, 2, 0, 2],
        [3],
        [2, 2, 2, 2, 2],
        [0],
    ]
    input_ids, places = collate(list(zip(prompts, completions)), 0)
    values = torch.arange(input_ids.numel() * 3.0).view(*input_ids.shape, 3)
    ends = [len(p) + len(c) - 1 for p, c in zip(prompts, completions)]
    expected = torch.stack([row[end] for row, end in zip(values, ends)])
    assert torch.equal(model.last_token(values, places), expected)
    assert model.last_token(input_ids, places).tolist() == [2, 3, 2, 0]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 40])
@pytest.mark.parametrize("world", [1, 2])
def test_texts_of_a_micro_batch_are_read_with_little_padding(monkeypatch, number, world):
    """Each score is that of its text, of the token with which it ends. Of forty texts of 2 to 80
    tokens a fifth is padding, where one pass would read twice as much as there is. Of many
    processes each makes as many passes, however few its texts."""
    monkeypatch.setattr(train_rm, "WORLD", world)
    texts = [([7], [100 + i] * (1 + i * 17 % 40 * 2)) for i in range(number)]
    read = []

    def reward_model(input_ids):
        read.append(input_ids.numel())
        return input_ids.float()

    args = SimpleNamespace(device="cpu", dtype="float32")
    scores = train_rm.scores_of(reward_model, texts, args, 0)
    assert scores.tolist() == [100 + i for i in range(number)]
    assert len(read) == (min(number, 4) if world == 1 else 4)
    if number == 40:
        there = sum(len(prompt) + len(completion) for prompt, completion in texts)
        assert there * 1.9 < 40 * max(len(p) + len(c) for p, c in texts)
        assert sum(read) < 1.25 * there


def test_rm_evaluate(rm_run, home):
    """Pair accuracy, margin, error and the accuracy by label gap, against loops over plain
    transformers' scores."""
    records, examples = home.records["scored_eval"], examples_of(home.scored_eval, home.tokenizer)
    groups, labels = by_prompt(records), [record["score"] for record in records]
    args = SimpleNamespace(micro_batch_size=2, device="cpu", dtype="float32")
    assert group_by_prompt(records, examples) == groups
    accuracy, margin, error, by_gap = train_rm.evaluate(
        load_scalar_head(rm_run.folder),
        examples,
        groups,
        torch.tensor(labels),
        args,
        home.tokenizer.pad_token_id,
    )
    scores = plain_scores(rm_run.folder, examples)
    pairs = slow_pairs(scores, labels, groups)
    assert accuracy == pytest.approx(sum(a for a, _, _ in pairs) / len(pairs), abs=1e-3)
    assert margin == pytest.approx(sum(m for _, m, _ in pairs) / len(pairs), abs=1e-3)
    assert error == pytest.approx(
        math.sqrt(sum((s - y) ** 2 for s, y in zip(scores, labels)) / len(labels)), abs=1e-3
    )
    largest, expected = max(gap for _, _, gap in pairs), []
    for quarter in range(1, 5):
        within = [
            a for a, _, gap in pairs if (quarter - 1) / 4 * largest < gap <= quarter / 4 * largest
        ]
        if within:
            expected.append((quarter / 4 * largest, sum(within) / len(within), len(within)))
    assert len(by_gap) == len(expected) >= 3
    for ours, slow in zip(by_gap, expected):
        assert ours == pytest.approx(slow, abs=1e-3)


@pytest.fixture(scope="session")
def few_scored(home):
    """Four prompts with 2, 3, 4 and 4 completions."""
    scored = home.records["scored"]
    groups = [
        group
        for group in by_prompt(scored)
        if scored[group[0]]["score"] != scored[group[1]]["score"]
    ]
    records = [scored[i] for group, size in zip(groups, (2, 3, 4, 4)) for i in group[:size]]
    assert len(records) == 13
    return SimpleNamespace(
        path=write_records(home.folder / "few_scored.json", records), records=records
    )


@pytest.mark.parametrize("loss", ["ranking", "regression"])
def test_rm_micro_batches_change_nothing(
    home, sft_run, rm_argv, few_scored, tmp_path, monkeypatch, loss
):
    """One step is the gradient of the mean over prompts of each prompt's mean, by loops over pairs
    or completions."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    records, examples, changes = (
        few_scored.records,
        examples_of(few_scored.path, home.tokenizer),
        [],
    )
    for size in (1, 3, 4):
        out = tmp_path / str(size)
        train_rm.main(
            rm_argv(
                data=few_scored.path,
                eval_data=None,
                loss=loss,
                epochs=1,
                batch_size=4,
                lr=1,
                micro_batch_size=size,
                out=out,
            )
        )
        changes.append((PlainDescent.made.change(), read_rows(out)[0]))
    reference = ScalarHead(load_llama(sft_run.folder, home.tokenizer).model)
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), PlainDescent.made.before):
            parameter.copy_(value)
    reference = reference.double()
    scores = [slow_values(reference, p + c)[-1] for p, c, _ in examples]
    means = []
    for group in by_prompt(records):
        if loss == "ranking":
            pairs = [
                (i, j) for i in group for j in group if records[i]["score"] > records[j]["score"]
            ]
            terms = [-torch.log(torch.sigmoid(scores[i] - scores[j])) for i, j in pairs]
        else:
            terms = [(scores[i] - records[i]["score"]) ** 2 for i in group]
        means.append(sum(terms) / len(terms))
    expected = sum(means) / len(means)
    expected.backward()
    right = gradient(reference.parameters())
    for change, row in changes:
        assert distance(change, clipped(right)) < 1e-4
        assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(right.norm().item(), rel=1e-4)


def test_rm_regression_learns_the_scores(home, rm_argv, tmp_path):
    """In the labels' units before the normalization, with mean 0 and deviation 1 after it. It needs
    no pairs."""
    first_only = {record["user_input"]: record for record in reversed(home.records["scored"])}
    data = write_records(tmp_path / "single.json", list(first_only.values()))
    changes = dict(data=data, demonstrations=home.demos_eval, loss="regression", epochs=6)
    train_rm.main(rm_argv(**changes, out=tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    losses = {epoch: [row["loss"] for row in rows if row["epoch"] == epoch] for epoch in (1, 6)}
    assert sum(losses[6]) < 0.8 * sum(losses[1])
    errors = [row["eval_error"] for row in rows if row["eval_accuracy"] is not None]
    assert len(errors) > 2 and all(0 < error < 5 for error in errors)
    examples = examples_of(home.demos_eval, home.tokenizer)
    scores = torch.tensor(plain_scores(tmp_path / "out", examples))
    assert abs(scores.mean().item()) < 1e-3 and abs(scores.std(unbiased=False).item() - 1) < 1e-3


def test_rm_regression_on_single_completions(home, rm_argv, tmp_path):
    """ChatLLaMA's own format: a completion per prompt. Then completions of different prompts of a
    batch are compared, however large the micro-batches are."""

    def singles(records, name):
        return write_records(
            tmp_path / name, list({record["user_input"]: record for record in records}.values())
        )

    data, held_out = singles(home.records["scored"], "data.json"), singles(
        home.records["scored"][::-1], "eval.json"
    )
    usual = dict(data=data, eval_data=held_out, loss="regression", epochs=1, eval_every=3)
    train_rm.main(rm_argv(**usual, out=tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    found = [row["accuracy"] for row in rows if row["accuracy"] is not None]  # else all tie
    assert len(found) >= len(rows) - 1 and all(0 <= accuracy <= 1 for accuracy in found)
    train_rm.main(rm_argv(**usual, micro_batch_size=1, out=tmp_path / "one"))
    assert [row["accuracy"] for row in read_rows(tmp_path / "one")] == [
        row["accuracy"] for row in rows]
    held = [row for row in rows if row["eval_error"] is not None]
    assert len(held) > 1 and all(0 <= row["eval_accuracy"] <= 1 for row in held)


def test_pairs_across_prompts_against_a_loop(monkeypatch):
    """Where no prompt has two labels, all pairs of 64 completions at a time count."""
    labels = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0])
    scores = torch.tensor([0.5, 0.4, 0.9, 2.0, 0.6])
    monkeypatch.setattr(train_rm, "score_texts", lambda *_: scores)
    accuracy, margin, error, _ = train_rm.evaluate(
        None, None, [[0], [1], [2], [3], [4]], labels, None, 0
    )
    pairs = slow_pairs(scores.tolist(), labels.tolist(), [range(5)])
    assert len(pairs) == 9
    assert accuracy == pytest.approx(sum(pair[0] for pair in pairs) / 9)
    assert margin == pytest.approx(sum(pair[1] for pair in pairs) / 9)
    assert error == pytest.approx(
        math.sqrt(sum((a - b) ** 2 for a, b in zip(scores.tolist(), labels.tolist())) / 5)
    )


def test_scores_keep_their_order_however_large_they_are(home, tmp_path):
    """As float32, the first two would be equal, and so would the others."""
    numbers = [1700000001, 1700000002, 1e39, 2e39]
    data = write_records(tmp_path / "data.json", [
        {"user_input": "Count.", "completion": str(n), "score": x} for n, x in enumerate(numbers)])
    _, groups, labels = read_scored(str(data), home.tokenizer, 64, ranking=True)
    better, worse = train_rm.pairs(labels[groups[0]])
    assert sorted(zip(better.tolist(), worse.tolist())) == [
        (i, j) for i in range(4) for j in range(i)]


def test_rm_warns_of_data_that_cannot_be_learned(rm_argv, tmp_path, capsys):
    """The same text with two scores is named at once; scores that say nothing, after an epoch."""
    records = [
        {"user_input": f"Say {n}.", "completion": text, "score": score}
        for n in range(12)
        for text, score in (("yes.", 1), ("no.", 0), ("yes.", 0), ("no.", 1))
    ]
    records[3]["completion"] = "or."
    train_rm.main(
        rm_argv(
            data=write_records(tmp_path / "data.json", records),
            eval_data=None,
            epochs=1,
            lr=1e-6,
            out=tmp_path / "out",
        )
    )
    said = capsys.readouterr().out
    assert (
        f"warning: {tmp_path / 'data.json'}: 23 texts occur again with another score, as in records 1 and 3"
        in said
    )
    assert "warning: epoch 1: the mean loss is 0." in said and "log 2 = 0.693" in said
    numbers = re.search(r"on the records ([\d, ]+)", said)[1].split(", ")
    assert 2 <= len(numbers) <= 8 and all(1 <= int(number) <= 48 for number in numbers)


def test_rm_has_no_warning_for_good_data(rm_run):
    assert "normalized" in rm_run.said
    for warning in ("warning: epoch 2", "warning: epoch 3", "another score"):
        assert warning not in rm_run.said


def test_rm_stops_on_what_is_not_finite(rm_argv, few_scored, tmp_path, monkeypatch, capsys):
    """Exit code 1, the numbers of the records, nothing exported."""
    ranking_loss = train_rm.ranking_loss
    monkeypatch.setattr(train_rm, "length_batches", in_file_order)
    monkeypatch.setattr(
        train_rm, "ranking_loss", lambda s, y: ranking_loss(s, y) * (math.nan if len(s) == 3 else 1)
    )
    argv = rm_argv(
        data=few_scored.path, eval_data=None, batch_size=1, epochs=1, out=tmp_path / "out"
    )
    line = error_line(capsys, lambda: train_rm.main(argv), code=1)
    assert (
        "the loss is nan" in line
        and "at step 2, on records [3, 4, 5]" in line
        and "few_scored.json" in line
    )
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "metrics.csv"]
    assert len(read_rows(tmp_path / "out")) == 1


@pytest.mark.parametrize("loss", ["regression", "ranking"])
def test_rm_waits_once_a_step(home, rm_argv, tmp_path, loss):
    """Labels and scores are on the CPU when they are compared, which waits for nobody: once in each
    of four micro-batches, five times for the pairs of each of eight prompts, and once more for a
    ranking."""
    records = home.records["scored"]
    data = [records[i] for group in by_prompt(records)[:24] for i in group]
    argv = rm_argv(
        data=write_records(tmp_path / "data.json", data),
        eval_data=None,
        demonstrations=home.demos_eval,
        epochs=1,
        loss=loss,
        out=tmp_path / "out",
    )
    waited = waits_of_steps(train_rm, argv)
    assert len(waited) == 2
    assert 1 <= max(waited) <= 1 + 4 + 8 * (6 if loss == "ranking" else 5)


def test_ranking_counts_only_pairs_of_one_prompt(monkeypatch):
    """One prompt whose two completions are in the right order, and five whose completions tie: the
    accuracy is 1, whatever the scores of different prompts are."""
    labels = torch.tensor([0.0, 1.0, *[3.0] * 5, *[2.0] * 5])
    scores = torch.tensor([5.0, 6.0, *[1.0] * 5, *[4.0] * 5])
    ties = [[2, 3], [4, 5], [6], [7, 8], [9, 10], [11]]
    monkeypatch.setattr(train_rm, "score_texts", lambda *_: scores)
    accuracy, margin, _, by_gap = train_rm.evaluate(None, None, [[0, 1]], labels, None, 0)
    assert (accuracy, margin, by_gap) == (1.0, 1.0, [(1.0, 1.0, 1)])
    # regression learns from all groups, and makes prompts comparable
    across, *_ = train_rm.evaluate(None, None, [[0, 1], *ties], labels, None, 0)
    pairs = [scores[i] > scores[j] for i in range(12) for j in range(12) if labels[i] > labels[j]]
    assert abs(across - float(sum(pairs) / len(pairs))) < 1e-6 and across < 0.5


def test_one_demonstration_has_no_deviation(rm_argv, home, tmp_path, capsys):
    """Which is said before training, and not after it."""
    path = write_records(tmp_path / "one.json", home.records["demos"][:1] * 3)
    line = error_line(
        capsys, lambda: train_rm.main(rm_argv(demonstrations=path, out=tmp_path / "out"))
    )
    assert f"{path}: all demonstrations are the same" in line
    assert not (tmp_path / "out" / "metrics.csv").exists()
