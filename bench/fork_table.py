"""PPO beside its forks (bench/forks/*.diff), on the demo: equal numbers of samples, several seeds.

    python bench/fork_table.py                     # the table
    python bench/fork_table.py --seeds 0 --updates 10

Each fork is applied to a copy of ppo.py. All have the demo's settings; REINFORCE and RLOO, which
have no ratio to clip, make one pass over each round's samples, the others two. Every seed has its
own data, SFT model and reward model. One thread each, --jobs at a time. The held-out scores are
those of greedy answers at the end, the KL is the mean of the last 5 updates; seconds and peak
memory are those of the process. What is complete is not run again.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench.break_it import DEMO, cell, metrics, run, value  # noqa: E402

FORKS = {"PPO": None, "dense": "dense", "REINFORCE": "reinforce", "RLOO": "rloo", "GRPO": "grpo"}
COLUMNS = {"gold score": "eval_gold", "score, held out": "eval_score",
           "KL, nats per response": "kl", "seconds": "seconds", "peak MB": "megabytes"}


def prepare(folder, seed):
    """Data, SFT model and reward model of a seed."""
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/data/tokenizer/tokenizer.model"):
        run(folder, "data_gen.py", ["--seed", str(seed)], "data")
    for stage, name in (("sft.py", "sft"), ("train_rm.py", "rm")):
        if not os.path.exists(f"{folder}/runs/{name}/config.json"):
            run(folder, stage, ["--seed", str(seed), "--overwrite"], name)


def forked(folder, fork):
    """The path of a ppo.py with this fork's changes."""
    os.makedirs(folder, exist_ok=True)
    shutil.copy(f"{ROOT}/ppo.py", f"{folder}/ppo.py")
    if fork:
        subprocess.run(["git", "apply", f"{ROOT}/bench/forks/{fork}.diff"], cwd=folder, check=True,
                       env=os.environ | {"GIT_CEILING_DIRECTORIES": os.path.dirname(folder)})
    return f"{folder}/ppo.py"


def launch(folder, fork, name, settings):
    """Runs ppo.py with this fork's changes in `folder`, in a process of its own with one thread, as
    far as it is not complete; what it took is in cost.json of its `out`."""
    out = settings["out"]
    if os.path.exists(f"{out}/cost.json"):
        return
    script, started = forked(f"{folder}/forks/{name}", fork), time.time()
    with open(script, encoding="utf-8") as file:
        source = file.read()
    settings = {option: x for option, x in settings.items()  # a fork may lack some of ppo.py's
                if option not in DEMO or f'("{option}",' in source}
    with open(f"{folder}/{name}.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, script, "--overwrite",
             *(f"--{option}={x}" for option, x in settings.items())], cwd=folder, stdout=log,
            stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT})
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"error: {name} failed; see {folder}/{name}.log")
    with open(f"{out}/cost.json", "w") as file:
        json.dump(dict(seconds=time.time() - started, cpu=usage.ru_utime + usage.ru_stime,
                       megabytes=usage.ru_maxrss / 1024), file)


def train(folder, seed, name, updates):
    """One run, unless it is there -> its row: the held-out scores of the end and so on."""
    fork, out = FORKS[name], f"{folder}/runs/fork-{name}-{updates}"
    settings = DEMO | dict(updates=updates, eval_every=updates, eval_number=100, seed=seed, out=out)
    if fork in ("reinforce", "rloo"):
        settings["ppo_epochs"] = 1
    launch(folder, fork, name, settings)
    rows = metrics(out)
    with open(f"{out}/cost.json") as file:
        row = json.load(file)
    row |= {column: value(rows, column) for column in ("eval_gold", "eval_score", "kl")}
    print(f"seed {seed}, {name}: gold score {row['eval_gold']:.2f}", file=sys.stderr, flush=True)
    return row | dict(first_gold=float(rows[0]["eval_gold"]), first=float(rows[0]["eval_score"]))


def main():
    parser = argparse.ArgumentParser(description="PPO beside its forks, on the demo.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40, help="rounds of 64 samples per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/forks", help="where the runs go")
    args = parser.parse_args()
    folders = {seed: os.path.abspath(f"{args.out}/seed-{seed}") for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed), args.seeds))
        jobs = [(seed, name) for seed in args.seeds for name in FORKS]
        rows = list(pool.map(lambda job: train(folders[job[0]], *job, args.updates), jobs))
    print(f"{args.updates} updates of 64 samples; mean of {len(args.seeds)} seeds, smallest to "
          "largest\n")
    print("| | " + " | ".join(COLUMNS) + " |\n" + "| --- " * (len(COLUMNS) + 1) + "|")
    first = rows[::len(FORKS)]
    print(f"| the SFT model | {cell([row['first_gold'] for row in first])} | "
          f"{cell([row['first'] for row in first])} |" + " |" * (len(COLUMNS) - 2))
    for i, name in enumerate(FORKS):
        mine = rows[i::len(FORKS)]
        cells = [cell([row[column] for row in mine]) for column in COLUMNS.values()]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nseconds, median of all runs: {statistics.median(row['seconds'] for row in rows):.0f}")


if __name__ == "__main__":
    main()
