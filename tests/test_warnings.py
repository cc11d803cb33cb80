"""The warnings of ppo.py: each at its condition, none for a healthy run, and each once a run.

    pytest tests/test_warnings.py
"""

import csv
import os
import random
import signal
import statistics

import pytest

import ppo
from lib import health
from test_resume import argv  # noqa: F401: the fixture, a tiny pipeline

HEALTHY = dict(
    score=0.47,
    score_ended=0.5,
    score_cut=0.1,
    kl=1.4,
    kl_error=0.1,
    clip_fraction=0.1,
    entropy=0.5,
    explained_variance=0.6,
    response_length=12.0,
    ended=0.98,
)
SFT = dict(eval_score=0.0, eval_gold=3.0)


def run(number=30, **last):
    """The rows of a healthy run, with the given values in its last ten."""
    return [dict(HEALTHY, **(last if i >= number - 10 else {})) for i in range(number)]


def warned(rows, updates=80):
    return list(health.unhealthy(rows, SFT, updates))


@pytest.mark.parametrize(
    "name, values",
    [
        ("negative KL", dict(kl=-0.5)),
        ("KL running away", dict(kl=9.0)),
        ("clipping", dict(clip_fraction=0.4)),
        ("entropy", dict(entropy=0.04)),
        ("critic", dict(explained_variance=-0.2)),
        ("cut responses", dict(ended=0.3)),
        ("cut responses win", dict(ended=0.9, score_ended=-9.0, score=-8.2, score_cut=-11.0)),
        ("cut responses win", dict(ended=0.5, score_ended=-2.0, score=-1.0, score_cut=-3.0)),
    ],
)
def test_each_at_its_condition(name, values):
    assert warned(run(**values)) == [name]
    message = health.unhealthy(run(**values), SFT, 80)[name]
    assert "--" in message and "\n" not in message  # names a knob, in one line


@pytest.mark.parametrize(
    "values",
    [
        {},
        dict(kl=-0.1),
        dict(kl=5.9, clip_fraction=0.25),
        dict(entropy=0.15),
        dict(explained_variance=0.01),
        dict(ended=0.6),
        dict(ended=0.9, score_ended=0.5, score=0.54, score_cut=0.9),  # a --reward judged them
        dict(ended=1.0, score_cut=None),
        dict(ended=0.6, score_ended=0.5, score=-0.1, score_cut=2.0),
    ],
)
def test_none_within_the_usual(values):
    assert warned(run(**values)) == []


@pytest.mark.parametrize("lacking", ["clip_fraction", "explained_variance"])
def test_a_fork_may_lack_a_statistic(lacking):
    rows = [{name: value for name, value in row.items() if name != lacking} for row in run()]
    assert warned(rows) == [] and lacking not in rows[0]


def test_a_long_response_may_be_further_away():
    assert warned(run(kl=20.0, response_length=100.0)) == []


@pytest.mark.parametrize(
    "number, updates, warns",
    [(10, 80, False), (20, 80, False), (21, 80, True), (8, 16, False), (9, 16, True)],
)
def test_a_young_critic_is_given_time(number, updates, warns):
    assert warned([dict(HEALTHY, explained_variance=-3.0)] * number, updates) == ["critic"] * warns


@pytest.mark.parametrize("responses", [1, 2, 16])
def test_noise_of_the_kl_is_no_negative_kl(responses):
    """A policy that does not move: the KL of an update is below 0 half of the time, and with few
    responses by many of its own errors."""
    generator, rows = random.Random(0), []
    for _ in range(300):
        log_ratios = [generator.gauss(0, 0.1) for _ in range(responses)]
        error = statistics.stdev(log_ratios) / responses**0.5 if responses > 1 else 0.0
        rows.append(dict(HEALTHY, kl=statistics.mean(log_ratios), kl_error=error))
        assert warned(rows) == []
    if responses > 1:
        assert warned(rows + [dict(row, kl=row["kl"] - 0.4) for row in rows[:10]]) == [
            "negative KL"
        ]


@pytest.mark.parametrize(
    "later, warns",
    [
        ([(1.2, 3.9)], False),
        ([(1.2, 3.9), (1.3, 3.8)], True),
        ([(1.2, 4.4), (1.3, 3.8)], False),
        ([(0.7, 3.9), (0.7, 3.8)], False),
    ],
)
def test_overoptimization(later, warns):
    """After an evaluation with score 0.8 and gold 4.5: a second one below it, while the score rose,
    and not within the usual scatter."""
    rows = run()
    for score, gold in [(0.8, 4.5), *later]:
        rows += [dict(HEALTHY, eval_score=score, eval_gold=gold)]
        assert warned(rows + run(1)) == []  # said where it is measured
    assert warned(rows) == ["over-optimization"] * warns


def test_overoptimization_from_the_start():
    assert warned([dict(HEALTHY, eval_score=s, eval_gold=2.0) for s in (0.1, 0.2)]) == [
        "over-optimization"
    ]


def test_each_once_also_after_a_break(argv, tmp_path, monkeypatch, capsys):
    """The untrained model of this run ends next to no response. It is stopped after that was said,
    and goes on."""
    check = health.unhealthy

    def stopped_at_7(rows, *given):
        if len(rows) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return check(rows, *given)

    options = argv["ppo"] + ["--out", str(tmp_path / "run"), "--updates", "12"]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(health, "unhealthy", stopped_at_7)
        ppo.main(options)
    before = capsys.readouterr().out
    ppo.main(options + ["--resume"])
    after = capsys.readouterr().out
    assert before.count("are cut at the limit") == 1 and "warning: update 5: " in before
    assert "are cut at the limit" not in after and "saved " in after


def test_standard_error_of_the_kl(argv, tmp_path, monkeypatch):
    """What stands in metrics.csv is the deviation of the responses' log ratios over the root of
    their number."""
    seen, rewards = [], ppo.token_rewards

    def keep(scores, kl, mask, kl_coef):
        seen.append((kl * mask).sum(1).tolist())
        return rewards(scores, kl, mask, kl_coef)

    monkeypatch.setattr(ppo, "token_rewards", keep)
    for size in (1, 5):
        seen.clear()
        ppo.main(
            argv["ppo"]
            + ["--out", str(tmp_path / str(size)), "--updates", "3", "--batch_size", str(size)]
        )
        with open(tmp_path / str(size) / "metrics.csv", encoding="utf-8") as file:
            errors = [float(row["kl_error"]) for row in csv.DictReader(file) if row["kl_error"]]
        assert errors == pytest.approx(
            [statistics.stdev(kl) / size**0.5 if size > 1 else 0 for kl in seen], rel=1e-3, abs=1e-6
        )
        assert size == 1 or errors[-1] > 1e-4
