"""Nothing is lost: each stage killed at random moments, interrupted, out of space, or resumed by
mistake.

    pytest tests/test_resume.py

Each run that is killed is a process of its own (forked.py).
"""

import argparse
import importlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

import data_gen
import lib.checkpoints
import lib.run
import lib.signals
import lib.state
import model
import ppo
import sft
import train_rm
from forked import fork, redirect
from lib.run import Run, inputs_of

TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
EXPORTS = {
    "sft": ["model.safetensors"],
    "train_rm": ["model.safetensors"],
    "ppo": ["model.safetensors", "critic/model.safetensors"],
}


@pytest.fixture(scope="module")
def argv(tmp_path_factory):
    """{stage: its options without --out}, on a tiny LLaMA and a few records."""
    folder = tmp_path_factory.mktemp("resume")
    rng, old = random.Random(0), model.DEMO_MODEL
    prompts = data_gen.draw_prompts(rng, 24)
    demos = [{"user_input": p, "completion": data_gen.write(rng, p, "friendly")} for p in prompts]
    scored = [
        {"user_input": d["user_input"], "completion": text, "score": score}
        for d in demos
        for text, score in ((d["completion"], 1), ("no", 0))
    ]
    for name, records in (("demos", demos), ("scored", scored)):
        (folder / f"{name}.json").write_text(
            json.dumps(records, ensure_ascii=False), encoding="utf-8"
        )
    os.makedirs(folder / "tokenizer")
    texts = [f"{p} {d['completion']}" for p, d in zip(prompts, demos)]
    (folder / "tokenizer" / "tokenizer.model").write_bytes(
        data_gen.train_tokenizer(texts, vocab_size=600)
    )
    tokenizer = model.load_tokenizer(str(folder / "tokenizer"))
    torch.manual_seed(0)
    model.DEMO_MODEL = TINY
    llama = model.load_llama(None, tokenizer)
    model.DEMO_MODEL = old
    os.makedirs(folder / "rm")
    model.save_checkpoint(llama, tokenizer, str(folder / "llama"))
    model.save_checkpoint(model.ScalarHead(llama.model), tokenizer, str(folder / "rm"))
    demos, scored, llama = (str(folder / name) for name in ("demos.json", "scored.json", "llama"))
    return {
        "sft": f"--model {llama} --data {demos} --epochs 12 --batch_size 5 --lr 0.01 --save_every 1".split(),
        "train_rm": f"--model {llama} --data {scored} --demonstrations {demos} --epochs 12 --batch_size 5 --lr 0.01 --save_every 1".split(),
        "ppo": (
            f"--sft {llama} --rm {folder / 'rm'} --prompts {demos} --eval_prompts {demos} --demonstrations {demos} --ptx_coef 0.1 "
            "--updates 12 --batch_size 5 --minibatch_size 3 --max_new_tokens 6 --eval_every 2 --kl_target 1 --kl_horizon 50 "
            "--ppo_epochs 2 --lr 0.001 --critic_lr 0.01 --save_every 1"
        ).split(),
    }


def run(stage, options):
    torch.set_num_threads(1)
    lib.run.draw_curves = lambda *_: None  # it takes longer than training
    importlib.import_module(stage).main(options)


def finish(stage, options):
    """Run to the end -> the seconds that it took."""
    started, process = time.time(), fork(run, stage, options)
    process.join(120)
    assert process.exitcode == 0
    return time.time() - started


def result(stage, out):
    """What must not depend on interruptions: the exported weights, and metrics.csv but for the
    speed."""
    rows = (out / "metrics.csv").read_text().splitlines()
    speed = rows[0].split(",").index("tokens_per_s")
    rows = [[cell for i, cell in enumerate(row.split(",")) if i != speed] for row in rows]
    return rows, [(out / name).read_bytes() for name in EXPORTS[stage]]


@pytest.fixture(scope="module", params=["sft", "train_rm", "ppo"])
def whole(request, argv, tmp_path_factory):
    """(stage, its options, seconds, result) of a run that nothing interrupted."""
    stage, out = request.param, tmp_path_factory.mktemp("whole") / "run"
    fork(int).join()  # the server starts with its first process
    seconds = finish(stage, argv[stage] + ["--out", str(out)])
    return stage, argv[stage], seconds, result(stage, out)


KILLS = {"sft": 6, "train_rm": 6, "ppo": 8}  # all save with lib/run.py


def test_killed_at_20_random_moments(whole, tmp_path):
    """Half of the kills fall anywhere from the start of the process on, half into the steps and the
    saving of each."""
    stage, options, seconds, expected = whole
    out, rng, killed = tmp_path / "run", random.Random(1), 0
    options = options + ["--out", str(out), "--resume"]
    # noqa: E731
    size = lambda: (
        (out / "metrics.csv").stat().st_size if (out / "metrics.csv").exists() else 0
    )
    for i in range(KILLS[stage]):
        process, before = fork(run, stage, options), size()
        if i % 2:
            while process.exitcode is None and size() <= before:
                time.sleep(0.001)
        process.join(rng.uniform(0, 0.04 if i % 2 else 0.15 * seconds))
        killed += process.exitcode is None
        process.kill()
        process.join()
    assert killed >= 0.75 * KILLS[stage]
    finish(stage, options)
    assert result(stage, out) == expected
    finish(stage, options)  # a run that is complete stays as it is
    assert result(stage, out) == expected


SIGNALS = {"sft": [signal.SIGINT], "train_rm": [signal.SIGTERM]}
SIGNALS["ppo"] = SIGNALS["sft"] + SIGNALS["train_rm"]


def test_signals_finish_the_step_and_save(whole, tmp_path):
    for number in SIGNALS[whole[0]]:
        interrupted_by(number, whole, tmp_path / str(number))


def interrupted_by(number, whole, out):
    stage, options, _, expected = whole
    options = [
        o if o != "1" or options[i - 1] != "--save_every" else "1000" for i, o in enumerate(options)
    ] + ["--out", str(out)]
    process = fork(run, stage, options)
    while process.exitcode is None and (
        not (out / "metrics.csv").exists() or (out / "metrics.csv").read_text().count("\n") < 3
    ):
        time.sleep(0.005)  # until steps are being taken
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert (out / "last" / "state.json").exists()
    finish(stage, options + ["--resume"])
    assert result(stage, out) == expected


def test_a_signal_after_the_last_step(argv, tmp_path, monkeypatch):
    """The run is completed, and whoever started it learns of the signal."""
    normalize = train_rm.normalize_

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return normalize(*given)

    monkeypatch.setattr(train_rm, "normalize_", interrupted)
    with pytest.raises(SystemExit) as ended:
        train_rm.main(argv["train_rm"] + ["--epochs", "1", "--out", str(tmp_path / "run")])
    assert ended.value.code == 143
    model.load_scalar_head(str(tmp_path / "run"))


def test_a_last_step_that_diverges_is_not_saved(argv, tmp_path, monkeypatch, capsys):
    set_lr, out = sft.set_lr, tmp_path / "run"

    def steep_at_the_end(optimizer, peak, step, steps):
        return set_lr(optimizer, float("inf") if step == steps - 1 else peak, step, steps)

    monkeypatch.setattr(sft, "set_lr", steep_at_the_end)
    with pytest.raises(SystemExit) as ended:
        sft.main(argv["sft"] + ["--epochs", "1", "--out", str(out)])
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "last: not written: model." in said and "what was saved before stays. Lower --lr" in said
    state = json.loads((out / "last" / "state.json").read_text())
    assert state["progress"]["step"] == 4 and not (out / "config.json").exists()


def error(capsys, stage, options):
    """The one line with which the stage ends."""
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(stage).main(options)
    assert ended.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def done(argv, tmp_path):
    """(options, folder) of a short run of sft.py that is complete."""
    options = argv["sft"] + ["--epochs", "2", "--out", str(tmp_path / "run")]
    sft.main(options)
    return options, tmp_path / "run"


def test_what_is_refused(done, capsys, monkeypatch):
    options, out = done
    assert "--resume" in error(capsys, "sft", options)
    assert "--lr 0.02" in error(capsys, "sft", options + ["--lr", "0.02", "--resume"])
    assert "--overwrite" in error(capsys, "sft", options + ["--resume", "--overwrite"])
    tensors = next((out / "last").glob("*.safetensors"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-1])
    assert str(tensors) in error(capsys, "sft", options + ["--resume"])
    tensors.unlink()
    assert str(tensors) in error(capsys, "sft", options + ["--resume"])
    (out / "last" / "state.json").write_text("{")
    assert "state.json" in error(capsys, "sft", options + ["--resume"])
    (out / "last" / "state.json").unlink()
    (out / "curves.png").touch()  # a complete run has them
    assert "last" in error(capsys, "sft", options + ["--resume"])


def test_killed_after_an_export_and_before_the_first_save(argv, tmp_path, capsys):
    """ppo.py exports at each evaluation, and may save later: what was exported does not mean that
    there is a state."""
    options = argv["ppo"] + ["--out", str(tmp_path / "run"), "--updates", "2", "--eval_every", "1"]
    ppo.main(options)
    expected = result("ppo", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "last")
    assert (tmp_path / "run" / "config.json").exists()
    capsys.readouterr()
    ppo.main(options + ["--resume"])
    assert "the run starts from the beginning" in capsys.readouterr().out
    assert result("ppo", tmp_path / "run") == expected


def test_a_full_disk_leaves_the_previous_state(argv, tmp_path, capsys, monkeypatch):
    short, saves = argv["sft"] + ["--epochs", "2"], []
    options = short + ["--out", str(tmp_path / "run")]

    def full(tensors, path):
        if len(saves) == 3:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(28, "No space left on device")
        saves.append(path)
        save_file(tensors, path)

    save_file = lib.state.save_file
    monkeypatch.setattr(lib.state, "save_file", full)
    with pytest.raises(SystemExit) as ended:
        sft.main(options)
    assert ended.value.code == 1 and "No space left" in capsys.readouterr().err
    state = json.loads((tmp_path / "run" / "last" / "state.json").read_text())
    assert state["progress"]["step"] == 3
    assert sorted(os.listdir(tmp_path / "run" / "last")) == sorted(["state.json", state["file"]])
    monkeypatch.undo()
    sft.main(options + ["--resume"])
    sft.main(short + ["--out", str(tmp_path / "other")])
    assert result("sft", tmp_path / "run") == result("sft", tmp_path / "other")


@pytest.mark.parametrize("stage", [sft, train_rm, ppo])
def test_the_newest_exports_are_kept(argv, tmp_path, stage):
    out, length = tmp_path / "run", "--updates" if stage is ppo else "--epochs"
    options = argv[stage.__name__] + ["--out", str(out)]
    options += [length, "12" if stage is ppo else "4"]
    stage.main(options + ["--keep", "2", "--save_every", "5"])
    steps = [10, 12] if stage is ppo else [15, 20]
    assert sorted(path.name for path in out.glob("step-*")) == sorted(f"step-{n}" for n in steps)
    load = (
        model.load_scalar_head
        if stage is train_rm
        else lambda path: model.load_llama(path, model.load_tokenizer(path))
    )
    load(str(out / f"step-{steps[-1]}"))
    stage.main(options + [length, "1", "--save_every", "50", "--overwrite"])
    assert not list(out.glob("step-*"))


def test_an_export_comes_before_the_state_that_counts_it(argv, tmp_path, monkeypatch):
    """So a run that dies in the middle of it writes it again. And a folder of the user's that is
    named like an export stays."""
    options = argv["sft"] + ["--epochs", "2", "--out", str(tmp_path / "run"), "--keep", "2"]
    options += ["--save_every", "4"]
    write, folders = lib.checkpoints.write, []

    def die(folder, *given):
        folders.append(os.path.basename(folder))
        if len(folders) == 2:
            raise KeyboardInterrupt
        write(folder, *given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(lib.checkpoints, "write", die)
        sft.main(options)
    shutil.copytree(tmp_path / "run" / "step-4", tmp_path / "run" / "step-4-best")
    assert folders == ["step-4", "step-8"] and not (tmp_path / "run" / "step-8").exists()
    sft.main(options + ["--resume"])
    exports = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert exports == ["step-10", "step-4-best", "step-8"]
    sft.main(options + ["--overwrite"])
    assert (tmp_path / "run" / "step-4-best").exists()


def test_other_data_or_another_model_is_not_taken_for_the_old(argv, tmp_path, capsys):
    """What changed is named, nothing is touched, and --accept_changed_data goes on."""
    options = argv["sft"] + ["--out", str(tmp_path / "run"), "--epochs", "4"]
    copies = {}
    for name in ("--data", "--model"):
        path = options[options.index(name) + 1]
        copies[name] = str(tmp_path / os.path.basename(path))
        (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, copies[name])
        options[options.index(name) + 1] = copies[name]
    sft.main(options)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    records = json.loads(Path(copies["--data"]).read_text("utf-8"))
    changes = {
        "--data": (Path(copies["--data"]), json.dumps(records[::-1])),
        "--model": (Path(copies["--model"]) / "config.json", None),
    }
    for name, (path, text) in changes.items():
        old = path.read_text("utf-8")
        path.write_text(text or old + " ", "utf-8")
        line = error(capsys, "sft", options + ["--resume"])
        assert f"{name} {copies[name]}" in line and "--accept_changed_data" in line
        assert {path: path.read_bytes() for path in before} == before
        path.write_text(old, "utf-8")
    sft.main(options + ["--resume"])
    Path(copies["--data"]).write_text(json.dumps(records[::-1]), "utf-8")
    sft.main(options + ["--resume", "--accept_changed_data"])
    Path(copies["--data"]).write_text(json.dumps(records[:5]), "utf-8")
    line = error(capsys, "sft", options + ["--resume", "--accept_changed_data"])
    assert line.endswith("20 steps are done, and with the data as it is now there are 4 in all: "
                         "nothing is left to do")


@pytest.mark.parametrize(
    "stage, name",
    [
        ("sft", "--model"),
        ("sft", "--data"),
        ("train_rm", "--model"),
        ("ppo", "--sft"),
        ("ppo", "--rm"),
    ],
)
@pytest.mark.parametrize("where", ["", "inside", ".."], ids=["the same", "inside it", "around it"])
def test_a_run_does_not_write_where_it_reads(argv, tmp_path, capsys, stage, name, where):
    path = argv[stage][argv[stage].index(name) + 1]
    if not os.path.isdir(path) and where != "..":
        return
    own = str(tmp_path / "inputs" / os.path.basename(path))
    os.makedirs(tmp_path / "inputs")
    (shutil.copytree if os.path.isdir(path) else shutil.copy)(path, own)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    options = [own if option == path else option for option in argv[stage]]
    line = error(capsys, stage, options + ["--out", os.path.join(own, where), "--overwrite"])
    assert f"--out {os.path.join(own, where)}" in line and f"{name} {own}" in line
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("stage", [sft, train_rm, ppo])
def test_a_finished_run_can_be_prolonged(argv, tmp_path, capsys, stage):
    """The first steps are those of the short run, then it goes on along the longer schedule, on the
    data of the longer run."""
    name = "--updates" if stage is ppo else "--epochs"
    options = [*argv[stage.__name__], "--save_every", "50"]
    few, many = [[*options, name, n, "--out", str(tmp_path / "run")] for n in ("3", "5")]
    stage.main(few)
    first = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    stage.main(few + ["--resume"])  # nothing to do
    assert (tmp_path / "run" / "metrics.csv").read_text().splitlines() == first
    capsys.readouterr()
    stage.main(many + ["--resume"])
    assert f"{name} 5, where 3 were planned" in capsys.readouterr().out
    longer = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert longer[: len(first)] == first
    stage.main([*many, "--out", str(tmp_path / "at once")])
    once = (tmp_path / "at once" / "metrics.csv").read_text().splitlines()
    lr = once[0].split(",").index("lr")
    assert len(longer) == len(once)
    rates = [
        [float(row.split(",")[lr] or 0) for row in rows[len(first) :]] for rows in (longer, once)
    ]
    assert rates[0] == rates[1] and rates[0]
    assert name in error(capsys, stage.__name__, few + ["--resume"])  # shorter is not


def test_a_state_of_another_kind_of_device(argv, tmp_path, capsys):
    """The numbers of its generator do not fit; the run goes on with others, and says so."""
    options = argv["ppo"] + ["--out", str(tmp_path / "run"), "--updates", "2"]
    ppo.main(options)
    path = tmp_path / "run" / "last" / "state.json"
    state = json.loads(path.read_text())
    state["settings"]["device"] = "cuda:0"
    path.write_text(json.dumps(state))
    ppo.main([*options, "--updates", "3", "--resume"])
    assert (
        "saved on cuda: on cpu the random numbers of sampling are different" in capsys.readouterr().out
    )
    assert (tmp_path / "run" / "metrics.csv").read_text().count("\n") == 5


def interrupted_at_once(options, log):
    redirect(log)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    lib.run.Run.begin = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)
    sft.main(options)


def test_ctrl_c_before_the_first_step(argv, tmp_path):
    options, log = argv["sft"] + ["--out", str(tmp_path / "run")], tmp_path / "log"
    process = fork(interrupted_at_once, options, log)
    process.join(60)
    assert process.exitcode == 130 and log.read_text().splitlines()[-1] == "interrupted"


@pytest.mark.parametrize("name", ["step-1", "tensorboard", "critic", "."])
def test_folders_that_a_run_would_replace_are_not_taken_for_empty(argv, tmp_path, capsys, name):
    mine = tmp_path / "run" / name / ("curves.png" if name == "." else "config.json")
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    line = error(capsys, "sft", argv["sft"] + ["--out", str(tmp_path / "run")])
    assert "holds an earlier run" in line and mine.read_text() == "mine"


def test_curves_that_cannot_be_drawn_end_in_one_line(argv, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lib.run, "draw_curves", full)
    with pytest.raises(SystemExit) as ended:
        sft.main(argv["sft"] + ["--epochs", "1", "--out", str(tmp_path / "run")])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 1 and len(lines) == 1 and lines[0].endswith("; the model is saved")
    model.load_llama(str(tmp_path / "run"), model.load_tokenizer(str(tmp_path / "run")))


def test_an_export_that_cannot_be_removed_stays(argv, tmp_path):
    out, options = tmp_path / "run", argv["sft"] + ["--out", str(tmp_path / "run")]
    options += ["--keep", "1", "--save_every", "5"]
    sft.main(options + ["--epochs", "1"])
    os.rename(out / "step-5", tmp_path / "elsewhere")
    (out / "step-5").symlink_to(tmp_path / "elsewhere")
    sft.main(options + ["--epochs", "2", "--resume"])
    assert sorted(path.name for path in out.glob("step-*")) == ["step-10", "step-5"]
    assert (tmp_path / "elsewhere" / "config.json").exists()


def test_what_a_run_read_may_lie_elsewhere_now(argv, tmp_path, capsys):
    """As in a repository that was moved, or on another machine."""
    options = argv["ppo"] + ["--updates", "1", "--out", str(tmp_path / "run")]
    ppo.main(options)
    own = options[options.index("--sft") + 1]
    shutil.copytree(own, tmp_path / "moved")
    options[options.index("--sft") + 1] = str(tmp_path / "moved")
    ppo.main(options + ["--resume"])
    (tmp_path / "moved" / "config.json").write_text("{}")
    assert "--sft" in error(capsys, "ppo", options + ["--resume"])


def test_a_log_that_became_shorter_is_named(argv, tmp_path, capsys):
    options = argv["sft"] + ["--epochs", "2", "--out", str(tmp_path / "run")]
    sft.main(options)
    log = tmp_path / "run" / "metrics.csv"
    log.write_bytes(log.read_bytes().replace(b"\r\n", b"\n"))
    line = error(capsys, "sft", options + ["--epochs", "3", "--resume"])
    assert f"{log}: " in line and b"\0" not in log.read_bytes()


def test_what_an_earlier_run_left_does_not_look_whole(argv, tmp_path, monkeypatch):
    options = argv["ppo"] + ["--updates", "1", "--out", str(tmp_path / "run")]
    ppo.main(options)
    (tmp_path / "run" / "curves.png").write_bytes(b"old")
    monkeypatch.setattr(ppo, "evaluate", lambda *_: 1 / 0)
    with pytest.raises((SystemExit, ZeroDivisionError)):
        ppo.main(options + ["--overwrite"])
    left = {str(path.relative_to(tmp_path / "run")) for path in (tmp_path / "run").rglob("*")}
    assert not {"config.json", "critic/config.json", "curves.png"} & left


def test_what_a_run_reads_is_in_the_first_group_of_its_table(tmp_path):
    """A fork's own row, too; not --out, a choice, a switch, a hub name, or what --reward
    replaces."""
    names = ["rm", "second_rm", "reward", "hub", "critic", "switch", "out"]
    table = ["input and output", *((name, None, None, "what it is") for name in names),
             "training", ("later", None, None, "no input")]
    table[5] += (["rm", "sft"],)
    there = str(tmp_path)
    args = argparse.Namespace(rm=there, second_rm=there, reward=None, hub="someone/llama",
                              critic=there, switch=True, out=there, later=there)
    assert inputs_of(args, table) == dict(rm=there, second_rm=there)
    args.reward = there
    assert inputs_of(args, table) == dict(second_rm=there, reward=there)


def test_a_statistic_without_a_column_is_named(argv, tmp_path):
    """It is an error in a fork's code: no run of the user's can mend it."""
    run = Run(argparse.Namespace(out=str(tmp_path / "out"), resume=False, overwrite=False,
                                 tensorboard=False, device="cpu", accept_changed_data=False),
              "test", ["input and output"], [("step", "counted from 1")])
    run.begin(1, {}, {}, {})
    with pytest.raises(KeyError, match="loss: logged, but not in the table METRICS"):
        run.log(step=1, loss=0.5)
    run.finish()


def test_an_interrupted_process_waits_until_the_state_is_saved(monkeypatch, capsys):
    """Rank 0 saves. Where another ended before, torchrun would end rank 0 too."""
    done, run = [], lib.signals.Signals()
    run.restore()
    run.caught = signal.SIGTERM
    monkeypatch.setattr(lib.signals, "RANK", 1)
    monkeypatch.setattr(lib.signals, "wait_for_all", lambda: done.append("waited"))
    with pytest.raises(SystemExit) as end:
        run.leave("out")
    assert end.value.code == 143 and done == ["waited"] and capsys.readouterr().err == ""
