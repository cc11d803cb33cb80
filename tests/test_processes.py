"""Two processes over gloo compute what one does: the same curves, the same weights; also when
another number goes on.

    pytest tests/test_processes.py

Run by torchrun, this file is the script of the processes: it names a stage and its options.
"""

import csv
import importlib
import os
import socket
import subprocess
import sys
import time

if __name__ != "__main__":
    import pytest
    import torch

    from forked import forget_ours, fork, redirect
    from test_resume import EXPORTS, argv  # noqa: F401: its tiny LLaMA

LORA = ["--lora_rank", "2"]
STAGES = [("sft", []), ("train_rm", []), ("ppo", []), ("ppo", ["--shard_rollout"]), ("ppo", LORA)]
HERE = os.path.dirname(os.path.abspath(__file__))


def script(stage, *options):
    """What each process runs. Which random number a row gets depends on the rows beside it: here
    all get 1/2."""
    sys.path.insert(0, os.path.dirname(HERE))
    import lib.errors
    import lib.run
    import model
    from lib.distributed import RANK, WORLD

    model.torch.rand = lambda *size, generator=None, device=None: model.torch.full(
        size, 0.5, device=device
    )
    sample = model.sample

    def sometimes_ends(
        logits, *rest
    ):  # so that a process may be done before the other; 2 is end-of-sequence
        logits = logits.clone()
        logits[logits.argmax(-1) % 3 == 0, 2] += 50
        return sample(logits, *rest)

    model.sample = sometimes_ends
    lib.run.draw_curves = lambda *_: None  # it takes longer than training
    if "--die_at" in options:  # the process of the highest rank ends in the middle of the run
        at, log = int(options[options.index("--die_at") + 1]), lib.run.Run.log
        options = [o for i, o in enumerate(options) if "--die_at" not in (o, options[i - 1])]

        def log_or_die(self, **row):
            if at in (row.get("step"), row.get("update")) and RANK == WORLD - 1:
                lib.errors.stop("this process is out of luck", code=1)
            log(self, **row)

        lib.run.Run.log = log_or_die
    importlib.import_module(stage).main(list(options))


def launch(processes, stage, options, out, *more):
    """Run a stage in so many processes -> what `subprocess.run` gives. They are forks, in the
    environment that torchrun would give them; and if one fails, the others end, as there."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    command, log = [stage, *options, "--out", str(out), *more], f"{out}.log"
    world = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    ranks = [world | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(processes)]
    started = [fork(as_rank, rank, log, command) for rank in ranks]
    deadline = time.time() + 120
    while any(process.exitcode is None for process in started):
        if any(process.exitcode for process in started) or time.time() > deadline:
            for process in started:
                process.kill()
        time.sleep(0.02)
    with open(log, encoding="utf-8") as file:
        said = file.read()
    code = max((process.exitcode for process in started), key=lambda code: (code > 0, code < 0))
    return subprocess.CompletedProcess(command, code, said, said)


def as_rank(environment, log, command):
    """One of the processes. What is imported already took itself for the only one."""
    os.environ.update(environment)
    forget_ours()
    redirect(log)
    torch.set_num_threads(1)
    script(*command)


def torchrun(stage, options, out, *more):
    """The same in two processes of torchrun, which ends all when one has ended."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    return subprocess.run(
        [sys.executable, *command, stage, *options, "--out", str(out), *more],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def check(done):
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def rows(out):
    with open(out / "metrics.csv", encoding="utf-8") as file:
        return [
            {name: float(value) for name, value in row.items() if value and name != "tokens_per_s"}
            for row in csv.DictReader(file)
        ]


def weights(stage, out):
    from safetensors.torch import load_file

    return [load_file(out / name) for name in EXPORTS[stage]]


def same(stage, out, expected):
    assert len(rows(out)) == len(rows(expected))
    for row, other in zip(rows(out), rows(expected)):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
    for model, other in zip(weights(stage, out), weights(stage, expected)):
        assert model.keys() == other.keys()
        for name in model:
            torch.testing.assert_close(model[name], other[name], rtol=1e-3, atol=1e-3)


def short(argv, stage):  # noqa: F811
    """24 records in batches of 5, so that the last has 4, and micro-batches of 2: one process of
    two runs out of rows."""
    options, epochs = list(argv[stage]), "--updates" if stage == "ppo" else "--epochs"
    for name, value in ((epochs, "2"), ("--save_every", "100"), ("--lr", "0.001")):
        options[options.index(name) + 1] = value
    demos = options[options.index("--prompts" if stage == "ppo" else "--data") + 1]
    evaluated = {
        "sft": ["--eval_data", demos],
        "train_rm": ["--eval_data", demos, "--eval_every", "5"],
        "ppo": [],
    }[stage]
    return options + evaluated + ["--micro_batch_size", "2"]


def alone(argv, stage, tmp_path_factory, more=(), made={}):  # noqa: F811
    """Where one process ran the stage, once for all tests."""
    if (stage, *more) not in made:
        made[(stage, *more)] = tmp_path_factory.mktemp(stage)
        check(launch(1, stage, short(argv, stage), made[(stage, *more)], *more))
    return made[(stage, *more)]


@pytest.mark.parametrize("stage, more", STAGES) if __name__ != "__main__" else lambda f: f
def test_two_processes_equal_one(argv, tmp_path, tmp_path_factory, stage, more):  # noqa: F811
    """With the layers computed anew in the backward pass."""
    two = tmp_path / "two"
    done = check(launch(2, stage, short(argv, stage), two, "--gradient_checkpointing", *more))
    assert done.stdout.count(f"saved {two}") == 1  # only one of them speaks
    same(stage, two, alone(argv, stage, tmp_path_factory, more if more == LORA else ()))


def test_one_process_asks_reward_and_gold_judge(argv, tmp_path):  # noqa: F811
    """Two processes have the curves of one, and the files are asked as often, about as many
    texts."""
    judge, log = tmp_path / "judge.py", tmp_path / "asked"
    judge.write_text(f"""def scores(user_inputs, completions):
    with open({str(log)!r}, "a") as file:
        file.write(f"{{len(completions)}}\\n")
    return [len(asked + text) % 7 for asked, text in zip(user_inputs, completions)]
""")
    options = short(argv, "ppo")
    at = options.index("--rm")
    options[at : at + 2] = ["--reward", str(judge), "--gold", str(judge)]
    asked = []
    for number in (1, 2):
        check(launch(number, "ppo", options, tmp_path / str(number)))
        asked.append(log.read_text().split())
        log.unlink()
    same("ppo", tmp_path / "2", tmp_path / "1")
    assert asked[0] == asked[1] and rows(tmp_path / "2")[-1]["eval_gold"] > 0


RESUMED = [("sft", 1, 2), ("sft", 2, 1), ("train_rm", 2, 1), ("ppo", 1, 2)]


@pytest.mark.parametrize("stage, first, second", RESUMED) if __name__ != "__main__" else lambda f: f
def test_resume_with_another_number_of_processes(
    argv, tmp_path, tmp_path_factory, stage, first, second
):  # noqa: F811
    options, out = short(argv, stage), tmp_path / "run"
    saved, dies = ("1", "2") if stage == "ppo" else ("7", "9")
    begun = stage, options, out, "--save_every", saved, "--die_at", dies
    half = torchrun(*begun) if (stage, first) == ("sft", 2) else launch(first, *begun)
    # not a hang
    assert half.returncode == 1 and "error: this process is out of luck" in half.stderr
    assert (out / "last" / "state.json").exists()
    check(launch(second, stage, options, out, "--save_every", saved, "--resume"))
    same(stage, out, alone(argv, stage, tmp_path_factory))


if __name__ == "__main__":
    script(*sys.argv[1:])
