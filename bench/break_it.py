"""Break it on purpose: what each part of PPO is there for, seen by taking it away, on the demo and
with several seeds.

    python bench/break_it.py                      # the table, and docs/overoptimization.png
    python bench/break_it.py --seeds 0 --updates 10

The held-out scores are those of the end; KL and the like are means over the last 5 updates. Every
seed has its own data, SFT model and reward models. Runs lie in --out; one that is complete is not
run again, so the same command completes an interrupted table.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from lib.health import unhealthy  # noqa: E402
from ppo import SETTINGS  # noqa: E402

# the demo's settings that have a value: with --rm given, those of a real model would apply
DEMO = {row[0]: row[1] for row in SETTINGS
        if not isinstance(row, str) and row[1] is not None and not isinstance(row[1], bool)}

RUNS = {  # name: (options of ppo.py, which reward model)
    "as it is": ([], "rm"),
    "no KL penalty": (["--kl_coef", "0"], "rm"),
    "no clipping": (["--clip", "1e9", "--value_clip", "1e9"], "rm"),
    "no advantage whitening": (["--no_whiten_advantages"], "rm"),
    "no PTX": (["--ptx_coef", "0"], "rm"),
    "critic from scratch": (["--critic", "sft"], "rm"),
    "lambda 1": (["--lam", "1"], "rm"),
    "one pass": (["--ppo_epochs", "1"], "rm"),
    "Adam's epsilon 1e-8": (["--adam_eps", "1e-8"], "rm"),
    "reward model from a tenth of the data": ([], "rm_tenth"),
    "a tenth of the data and no KL penalty": (["--kl_coef", "0"], "rm_tenth"),
}
LAST = 5  # updates: what is measured on 64 samples jumps, so the mean over the last few counts
COLUMNS = {"score, held out": "eval_score", "gold score": "eval_gold",
           "KL, nats per response": "kl", "explained variance": "explained_variance",
           "entropy, nats per token": "entropy", "length, tokens": "response_length"}


def run(folder, script, options, log):
    """One stage in a process of its own with one thread, in `folder`."""
    with open(os.path.join(folder, log + ".log"), "w") as file:
        done = subprocess.run([sys.executable, os.path.join(ROOT, script), *options], cwd=folder,
                              stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"})
        if done.returncode:
            raise SystemExit(f"error: {script} failed; see {folder}/{log}.log")


def prepare(folder, seed):
    """Data, SFT model and both reward models of a seed."""
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/data/tokenizer/tokenizer.model"):
        run(folder, "data_gen.py", ["--seed", str(seed)], "data")
    if not os.path.exists(f"{folder}/runs/sft/config.json"):
        run(folder, "sft.py", ["--seed", str(seed), "--overwrite"], "sft")
    with open(f"{folder}/data/reward_training_data.json", encoding="utf-8") as file:
        records = json.load(file)
    prompts = list(dict.fromkeys(record["user_input"] for record in records))
    tenth = set(prompts[::10])
    with open(f"{folder}/tenth.json", "w", encoding="utf-8") as file:
        json.dump([record for record in records if record["user_input"] in tenth], file)
    for name, options in (("rm", []), ("rm_tenth", ["--data", "tenth.json"])):
        if not os.path.exists(f"{folder}/runs/{name}/config.json"):
            run(folder, "train_rm.py",
                ["--seed", str(seed), "--out", f"runs/{name}", "--overwrite", *options], name)


def metrics(folder):
    try:
        with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except FileNotFoundError:
        return []


def ppo(folder, seed, name, updates):
    """The rows of metrics.csv of one PPO run, which runs first if it is not there yet."""
    options, reward_model = RUNS[name]
    out = "runs/" + name.replace(" ", "_")
    rows = metrics(f"{folder}/{out}")
    # a longer run is another one: its learning rate falls more slowly
    if not rows or int(rows[-1]["update"]) != updates:
        settings = DEMO | dict(rm=f"runs/{reward_model}", updates=updates, eval_every=5,
                               eval_number=100, seed=seed, out=out)
        options = [f"--{option}={value}" for option, value in settings.items()] + options
        run(folder, "ppo.py", ["--overwrite", *options], out.replace("/", "_"))
        rows = metrics(f"{folder}/{out}")
    before, after = (float(row["eval_gold"]) for row in (rows[0], rows[-1]))
    print(f"seed {seed}, {name}: gold score {before:.2f} -> {after:.2f}", file=sys.stderr,
          flush=True)
    return rows


def value(rows, column):
    """The held-out scores of the end, and the mean of everything else over the last updates."""
    last = 1 if column.startswith("eval_") else LAST
    return statistics.mean(float(row[column]) for row in rows[1:][-last:])  # the first: update 0


def warnings(runs, updates):
    """What ppo.py warned of, and in how many of the runs."""
    counts = {}
    for rows in runs:
        first, *rows = [{name: float(number) for name, number in row.items() if number}
                        for row in rows]
        for name in {name for n in range(1, len(rows) + 1)
                     for name in unhealthy(rows[:n], first, updates)}:
            counts[name] = counts.get(name, 0) + 1
    return ", ".join(f"{name} ({count} of {len(runs)})" for name, count in sorted(counts.items()))


def cell(values):
    """Mean over the seeds, smallest and largest."""
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def draw(results, path):
    """Reward model's and gold score against the KL: over-optimization is where the one rises and
    the other falls."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    names = ["as it is", "no KL penalty", "reward model from a tenth of the data",
             "a tenth of the data and no KL penalty"]
    figure, axes = plt.subplots(1, len(names), figsize=(4 * len(names), 3.4), sharey=True)
    for axis, name in zip(axes, names):
        twin = axis.twinx()
        for number, rows in enumerate(results[name]):
            kl, score, gold = zip(*((float(row["kl"] or 0), float(row["eval_score"]),
                                     float(row["eval_gold"])) for row in rows if row["eval_gold"]))
            labels = ("gold score", "reward model") if number == 0 else (None, None)
            axis.plot(kl, gold, "o-", color="tab:green", label=labels[0], ms=3)
            twin.plot(kl, score, "s--", color="tab:orange", label=labels[1], ms=3)
        axis.set(title=name, xlabel="KL to the SFT policy (nats per response)",
                 ylabel="gold score (0 to 5)")
        twin.set_ylabel("score of the reward model")
        axis.legend(loc="lower left", fontsize=8)
        twin.legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description="Break PPO on purpose, and see what happens.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=40, help="PPO updates per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/break_it", help="where the runs go")
    parser.add_argument("--picture", default=os.path.join(ROOT, "docs", "overoptimization.png"))
    args = parser.parse_args()
    folders = {seed: os.path.abspath(f"{args.out}/seed-{seed}") for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed), args.seeds))
        jobs = [(seed, name) for seed in args.seeds for name in RUNS]
        done = list(pool.map(lambda job: ppo(folders[job[0]], *job, args.updates), jobs))
    results = {name: [rows for (_, other), rows in zip(jobs, done) if other == name]
               for name in RUNS}
    print("| run | " + " | ".join(COLUMNS) + " | what ppo.py warned of |")
    print("|" + " --- |" * (len(COLUMNS) + 2))
    score, gold = ([float(rows[0][column]) for rows in results["as it is"]]
                   for column in ("eval_score", "eval_gold"))
    print(f"| the SFT model | {cell(score)} | {cell(gold)} |" + "  |" * (len(COLUMNS) - 1))
    for name, runs in results.items():
        cells = [cell([value(rows, column) for rows in runs]) for column in COLUMNS.values()]
        print(f"| {name} | {' | '.join(cells)} | {warnings(runs, args.updates)} |")
    draw(results, args.picture)


if __name__ == "__main__":
    main()
