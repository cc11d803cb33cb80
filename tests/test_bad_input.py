"""Bad options and bad records of the stages: one line on standard error, exit code 2, no traceback,
no run directory with anything in it."""

import itertools
import math
import os
import shutil
from pathlib import Path

import pytest

import ppo
import sft
import train_rm
from lib.settings import parse
from makers import error_line, read_rows, write_records

STAGES = dict(sft=sft, train_rm=train_rm, ppo=ppo)


@pytest.fixture
def argv_of(sft_argv, rm_argv, ppo_argv, tmp_path):
    """(stage, changes) -> the options of it, with --out out/ in this test's folder."""
    stages = dict(sft=sft_argv, train_rm=rm_argv, ppo=ppo_argv)
    return lambda stage, **changes: stages[stage](**dict(out=tmp_path / "out") | changes)


@pytest.mark.parametrize(
    "stage, option",
    [
        *itertools.product(["sft"], ["model", "data", "eval_data"]),
        *itertools.product(["train_rm"], ["model", "data", "eval_data", "demonstrations"]),
        *itertools.product(
            ["ppo"], ["sft", "rm", "prompts", "eval_prompts", "demonstrations", "gold"]
        ),
    ],
)
def test_a_named_path_that_is_missing(argv_of, tmp_path, monkeypatch, capsys, stage, option):
    """It is named in the line, and never made up by running another stage."""
    monkeypatch.chdir(tmp_path)
    argv = argv_of(stage, **{option: tmp_path / "nowhere.json"})
    line = error_line(capsys, lambda: STAGES[stage].main(argv))
    assert str(tmp_path / "nowhere.json") in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


RECORDS = {
    "sft": {"user_input": "Hi", "completion": "ok."},
    "ppo": {"user_input": "Hi"},
    "train_rm": {"user_input": "Hi", "completion": "ok.", "score": 1},
}


@pytest.mark.parametrize(
    "stage, change, said",
    [
        ("sft", {"completion": None}, "field 'completion' must be a string"),
        ("sft", {"user_input": 3}, "field 'user_input' must be a string or a list of chat messages"),
        ("train_rm", {"score": "5"}, "field 'score' must be a finite number"),
        ("train_rm", {"score": math.nan}, "field 'score' must be a finite number"),
        ("train_rm", {"completion": 1.5}, "field 'completion' must be a string"),
        ("ppo", {"user_input": []}, "field 'user_input' must be a string or a list of chat messages"),
        ("sft", "completion", "field 'completion' is missing"),
        ("train_rm", "score", "field 'score' is missing"),
        ("ppo", "user_input", "field 'user_input' is missing"),
    ],
    ids=str,
)
def test_a_bad_record_is_named(argv_of, tmp_path, capsys, stage, change, said):
    good = RECORDS[stage]
    bad = (
        {key: value for key, value in good.items() if key != change}
        if isinstance(change, str)
        else good | change
    )
    data = write_records(tmp_path / "bad.json", [good, bad, good])
    argv = argv_of(stage, **{"prompts" if stage == "ppo" else "data": data})
    line = error_line(capsys, lambda: STAGES[stage].main(argv))
    hint = "; python data_gen.py import converts other layouts" if said.endswith("missing") else ""
    assert line == f"error: {data}: record 2: {said}{hint}"
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("option", ["data", "eval_data"])
@pytest.mark.parametrize(
    "second, words",
    [
        ({"completion": "no."}, "every score is 1"),
        ({"user_input": "Bye", "score": 2}, "nothing to rank; --loss regression"),
    ],
    ids=["equal scores", "single completions"],
)
def test_nothing_to_rank(argv_of, tmp_path, capsys, option, second, words):
    data = write_records(
        tmp_path / "pairless.json", [RECORDS["train_rm"], RECORDS["train_rm"] | second]
    )
    line = error_line(capsys, lambda: train_rm.main(argv_of("train_rm", **{option: data})))
    assert line.startswith(f"error: {data}: ") and words in line


def test_what_a_chat_template_refuses_is_named(argv_of, home, sft_run, rm_run, tmp_path, capsys):
    """File and record, in each stage."""
    dialogue = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    template = "{% if messages[1:] and messages[1].role == 'assistant' and messages[2:] %}{{ raise_exception('too long') }}{% endif %}"
    for folder in (sft_run.folder, rm_run.folder):
        copy_of = tmp_path / os.path.basename(folder)
        shutil.copytree(folder, copy_of, ignore=shutil.ignore_patterns("last"))
        (copy_of / "chat_template.jinja").write_text(
            template + home.tokenizer.chat_template, "utf-8"
        )
    for stage in STAGES:
        data = write_records(
            tmp_path / "data.json", [RECORDS[stage], RECORDS[stage] | {"user_input": dialogue}]
        )
        models = dict(
            sft=tmp_path / os.path.basename(sft_run.folder),
            rm=tmp_path / os.path.basename(rm_run.folder),
        )
        if stage != "ppo":
            models = dict(model=models["sft"])
        argv = argv_of(stage, **models, **{"prompts" if stage == "ppo" else "data": data})
        line = error_line(capsys, lambda: STAGES[stage].main(argv))
        assert line.startswith(f"error: {data}: record 2 (") and "too long" in line


@pytest.mark.parametrize("tokens", [128, 500])
def test_max_new_tokens_larger_than_the_context(argv_of, capsys, tokens):
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", max_new_tokens=tokens)))
    assert f"--max_new_tokens {tokens} leaves no room for a prompt" in line and "128" in line


def test_prompts_are_cut_to_what_the_context_leaves(argv_of, capsys, monkeypatch):
    """The beginning goes, the end with "Assistant:" stays; prompt and response together fit the
    context."""
    seen, make_experience = [], ppo.make_experience
    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: seen.extend(given[4]) or make_experience(*given)
    )
    ppo.main(
        argv_of("ppo", max_new_tokens=122, updates=1, ptx_coef=0, eval_prompts=None, gold=None)
    )
    assert {len(prompt) for prompt in seen} == {6}
    assert "cut on the left to 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "def judge(user_input, completion):\n    return 1.0\n",
        "def score(:\n",
        "import not_a_module\n",
        "raise RuntimeError('no')\n",
        "score = 5\n",
    ],
    ids=["a folder", "empty", "no score", "no Python", "import fails", "raises", "no function"],
)
def test_gold_that_cannot_be_used(argv_of, tmp_path, capsys, text):
    gold = tmp_path / "judge.py"
    gold.mkdir() if text is None else gold.write_text(text)
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", gold=gold)))
    assert line.startswith(f"error: --gold {gold}: not a Python file with a function score")


def test_gold_that_cannot_judge_a_prompt(argv_of, home, tmp_path, capsys):
    prompts = write_records(
        tmp_path / "foreign.json", [home.records["prompts"][0], {"user_input": "What is love?"}]
    )
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", eval_prompts=prompts)))
    assert (
        line.startswith(f"error: {prompts}: record 2: ") and "data_gen.py cannot judge it" in line
    )


def test_ptx_without_demonstrations(argv_of, capsys):
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", demonstrations=None)))
    assert line == "error: --ptx_coef needs --demonstrations"


def test_an_earlier_run_is_left_alone(argv_of, sft_run, rm_run, ppo_run, capsys):
    for stage, run in (("sft", sft_run), ("train_rm", rm_run), ("ppo", ppo_run)):

        def files():
            return {
                path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()
            }

        before = files()
        line = error_line(capsys, lambda: STAGES[stage].main(argv_of(stage, out=run.folder)))
        assert (
            line.startswith(f"error: {run.folder}: holds an earlier run") and "--overwrite" in line
        )
        assert files() == before


def test_overwrite(argv_of, ragged, tmp_path):
    for lr in (1e-3, 1e-2):
        sft.main(argv_of("sft", data=ragged.path, lr=lr, overwrite=True))
        [row] = read_rows(tmp_path / "out")
        assert row["lr"] == lr


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("below", ["", "run"], ids=["a file", "below a file"])
def test_an_out_that_cannot_be_made(argv_of, tmp_path, capsys, stage, below):
    (tmp_path / "file").write_text("not a folder")
    line = error_line(
        capsys, lambda: STAGES[stage].main(argv_of(stage, out=tmp_path / "file" / below))
    )
    assert line.startswith(f"error: {tmp_path / 'file' / below}: cannot be written")
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.parametrize("stage, option, value", [
    ("sft", "lr", "-1"), ("sft", "lr", "nan"), ("sft", "lr", "inf"), ("sft", "weight_decay", "-1"),
    ("ppo", "kl_coef", "inf"),
    ("sft", "seed", str(10**30)), ("train_rm", "lr", "x"), ("ppo", "adam_eps", "0"),
    ("ppo", "temperature", "0"), ("ppo", "temperature", "inf"), ("ppo", "max_grad_norm", "0"),
    ("ppo", "clip", "-1"), ("ppo", "kl_target", "0"), ("ppo", "target_kl", "nan"),
    ("ppo", "no_eos_score", "nan"),
])
def test_numbers_out_of_range(argv_of, tmp_path, capsys, stage, option, value):
    with pytest.raises(SystemExit) as ended:
        STAGES[stage].main(argv_of(stage, **{option: value}))
    said = f"argument --{option}: {value} is not a"
    assert ended.value.code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", ["max_grad_norm", "target_kl", "kl_target"])
def test_inf_switches_a_bound_off(option):
    args, _ = parse("ppo.py", "", ppo.SETTINGS, [f"--{option}=inf"], [])
    assert getattr(args, option) == math.inf


@pytest.mark.parametrize("changes, said", [
    (dict(kl_target=1, kl_coef=0), "--kl_target adapts --kl_coef"),
    (dict(kl_target=1, kl_horizon=1, batch_size=8), "could turn the sign of kl_coef"),
    (dict(eval_prompts=None), "--gold judges held-out prompts: --eval_prompts is missing"),
])
def test_options_that_would_do_nothing(argv_of, capsys, changes, said):
    assert said in error_line(capsys, lambda: ppo.main(argv_of("ppo", **changes)))


def test_a_prompt_without_tokens(argv_of, sft_run, home, tmp_path, capsys):
    folder = shutil.copytree(sft_run.folder, tmp_path / "sft")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{{ "
                                                "eos_token if m['role'] == 'assistant' }}{% endfor %}")
    prompts = write_records(tmp_path / "p.json", [{"user_input": "Hi"}, {"user_input": ""}])
    argv = argv_of("ppo", sft=folder, prompts=prompts, gold=None, eval_prompts=None)
    assert f"{prompts}: record 2 (the prompt has no tokens" in error_line(
        capsys, lambda: ppo.main(argv))


@pytest.mark.parametrize("path", ["./typo", "runs/typo", "/nowhere/typo", "a/b/typo"])
def test_a_local_path_that_is_not_there_is_not_sought_on_the_hub(path, home, tmp_path, capsys,
                                                                 monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = error_line(capsys, lambda: sft.main(["--model", path, "--data", str(home.demos)]))
    assert f"{path}: no such file or folder" in line
