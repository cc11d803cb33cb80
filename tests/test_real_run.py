"""bench/real_run.py and its data, tools/data/ratings.py:

    pytest tests/test_real_run.py
"""

import importlib.util
import itertools
import json
import os
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ppo
from bench import variants
from lib.settings import parse
from tools.data import ratings

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def real_run():
    spec = importlib.util.spec_from_file_location("real_run", ROOT / "bench" / "real_run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def review_files(number, seed=0):
    """The two texts of `number` sentences, as they lie in the archive, and {sentence: ratings}."""
    rng, people, sentences, said = random.Random(seed), [], [], {}
    nouns, words = "film plot cast story script".split(), "good bad dull bright warm long".split()
    for n in range(1, number + 1):
        text = f"The {rng.choice(nouns)} number {n} is {rng.choice(words)} and {rng.choice(words)}"
        values = [rng.randint(-4, 4) for _ in range(15)]
        mean = statistics.mean(values)
        people.append(f"{n}\t{mean:.9f}\t{statistics.pstdev(values):.5f}\t{values}")
        sentences.append(f"{n}\t{mean:.11f}\t{text}")
        said[text] = values
    return "\r\n".join(people) + "\r\n", "\r\n".join(sentences) + "\r\n", said


def test_reviews_are_read_and_dealt(monkeypatch, tmp_path):
    people, sentences, said = review_files(40)
    sentences += "41\t1.0\ttoo short\r\n42\t1.0\tThe  film  number 1 is gone\r\n"
    people += "41\t1.0\t0\t[1, 1]\r\n42\t1.0\t0\t[1]\r\n"
    reviews = dict(ratings.read_reviews(people, sentences))
    assert reviews == said | {"The film number 1 is gone": [1]}
    monkeypatch.setattr(ratings, "PARTS", {name: 5 for name in ratings.PARTS})
    monkeypatch.setattr(ratings, "fetch", lambda: (people, sentences))
    args = SimpleNamespace(out=str(tmp_path), seed=0, overwrite=False)
    ratings.download(args)
    files = {path.stem: json.loads(path.read_text("utf-8")) for path in tmp_path.iterdir()}
    assert set(files) == {*ratings.PARTS, "rlhf_training_data"}
    texts = []
    for name, records in files.items():
        for record in records:
            begun = record["user_input"].removeprefix(ratings.ASKED)
            assert begun != record["user_input"] and 2 <= len(begun.split()) <= 4
            if "rlhf" in name:
                assert set(record) == {"user_input"} and any(t.startswith(begun) for t in reviews)
                continue
            texts.append(f"{begun} {record['completion']}")
            if name.startswith(("reward", "gold")):
                assert record["score"] == pytest.approx(
                    statistics.mean(reviews[texts[-1]]), abs=1e-4
                )
            if name == "reward_training_data_eval":
                assert record["ratings"] == reviews[texts[-1]]
    assert len(texts) == len(set(texts)) == 30 and set(texts) <= set(reviews)  # each in one part
    args.seed = 1
    with pytest.raises(SystemExit):
        ratings.download(args)  # overwrites nothing unasked


def test_a_mean_that_is_not_that_of_the_ratings():
    with pytest.raises(ValueError, match="sentence 1"):
        ratings.read_reviews("1\t1.0\t0\t[1, 1]\r\n", "1\t2.0\ta b c d e\r\n")


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_against_all_choices(real_run, n):
    generator = torch.Generator().manual_seed(0)
    scores, gold = torch.randn(2, 3, 5, generator=generator)
    expected = [
        gold[row, max(choice, key=lambda i: scores[row, i].item())].item()
        for row in range(3)
        for choice in itertools.combinations(range(5), n)
    ]
    assert real_run.gold_of_best(scores, gold, n) == pytest.approx(
        statistics.mean(expected), abs=1e-6
    )


def test_the_whole_run_in_small(real_run, tmp_path, monkeypatch, capsys):
    """All steps but TRL's, on a tiny LLaMA, twice: the second time there is nothing left to do. The
    stages, processes of their own otherwise, run in this one."""
    people, sentences, _ = review_files(120)
    os.makedirs(tmp_path / "run" / "data")
    reviews = ratings.read_reviews(people, sentences)
    records = [ratings.as_record(random.Random(n), *review) for n, review in enumerate(reviews)]
    for k, name in enumerate([*ratings.PARTS, "poor_training_data", "rlhf_training_data"]):
        part = records[12 * k : 12 * k + 12]
        (tmp_path / "run" / "data" / f"{name}.json").write_text(json.dumps(part), "utf-8")

    def stage(command, env):
        assert command[0] == sys.executable and os.path.isfile(command[1])
        monkeypatch.setenv("GOLD", env["GOLD"])
        importlib.import_module(Path(command[1]).stem).main(command[2:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(real_run.subprocess, "run", stage)
    one = {"no clipping": ["--max_grad_norm", "inf"]}
    monkeypatch.setattr(real_run.variants, "variants", lambda step, args: one)
    steps = ["data", "sft", "rm", "ppo", "over", "levers", "report"]
    options = ["--small", "--seeds", "0", "--device", "cpu", "--dtype", "float32", "--steps", *steps]
    monkeypatch.setattr(sys, "argv", ["real_run.py", *options, "--out", str(tmp_path / "run")])
    reports = []
    for _ in range(2):
        capsys.readouterr()
        real_run.main()
        reports.append((tmp_path / "run" / "report.md").read_text("utf-8"))
    assert reports[0] == reports[1] and "+ " not in capsys.readouterr().out
    for row in (
        "| reward model A |",
        "| VADER's lexicon |",
        "| half of the raters",
        "| SFT | 0.00 |",
        "| PPO, seed 0 |",
        "no KL penalty |",
        "| 4 | 0.64 |",
    ):
        assert row in reports[0]
    assert (tmp_path / "run" / "real_run.png").stat().st_size > 10000
    head, _, row = (tmp_path / "run" / "levers.md").read_text("utf-8").splitlines()
    assert head.startswith("|  | seed | 0 answers | 16 answers | 32 answers |")
    assert row.startswith("| no clipping | 0 | ") and 0 < float(row.split(" | ")[-1][:-2]) <= 1


@pytest.mark.parametrize("step", variants.STEPS)
def test_the_options_of_a_variant(real_run, step):
    args = SimpleNamespace(out="runs", **real_run.SMALL)
    usual = [str(option) for option in real_run.ppo_options(
        args, "rm", args.short_episodes // args.batch, 0.05, 0)]
    seen = []
    for name, options in variants.variants(step, args).items():
        options = [*usual, *map(str, options)]
        args_of_run, _ = parse("ppo.py", "", ppo.SETTINGS, options, real_if=["sft"])
        seen.append(vars(args_of_run))
        assert args_of_run.updates * args_of_run.batch_size == args.short_episodes, name
        assert args_of_run.eval_every * args_of_run.batch_size == args.every * args.batch, name
    assert all(seen.count(settings) == 1 for settings in seen)  # each changes something


def test_how_far_weights_moved():
    before, after = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    for model, (a, b, c) in ((before, (1.0, 2.0, 3.0)), (after, (1.5, 2.0, 2.0))):
        model.weight.data, model.bias.data = torch.tensor([[a, b]]), torch.tensor([c])
    assert variants.moved(before, after, rates=0.25) == pytest.approx((0.5 + 0 + 1) / 3 / 0.25)
