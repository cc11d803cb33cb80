"""Rewards that can be checked: PPO, GRPO and RLOO on sums and comparisons of two-digit numbers,
paid 1 for a right answer and 0 for any other, without a reward model.

    python bench/checkable.py                     # the table
    python bench/checkable.py --seeds 0 --updates 20

The tasks are those of `data_gen.py sums`, whose demonstrations have people's mistakes in them, and
from these SFT teaches the demo's LLaMA the tasks and the mistakes. After it, each algorithm learns
from nothing but its own answers to 2000 other tasks and their reward: bench/checkable_reward.py,
which says what counts as right. There is no PTX, which would teach the mistakes again. The table
has the share of right answers to 400 held-out tasks, none of which came before, however it was
asked. Greedy answers come from metrics.csv and samples.jsonl: all of them, and those to tasks at
which nobody slips, to sums with a carry, and to comparisons in which the last digits mislead.
SAMPLES answers per task are drawn here, at temperature 1.

GRPO and RLOO are bench/forks/*.diff, with four answers to each of 32 tasks where PPO has one to
each of 128. All share what they can: samples, KL coefficient, schedule. RLOO, which has no ratio to
clip, makes one pass over each round's samples, the others two; RATES has the learning rates. Every
seed has its own tasks and SFT model. One thread each, --jobs at a time; seconds are those of the
CPU. What is complete is not run again.
"""

import argparse
import json
import os
import re
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench.break_it import DEMO, cell, metrics, run, value  # noqa: E402
from bench.checkable_reward import score  # noqa: E402
from bench.fork_table import FORKS, launch  # noqa: E402
from lib.data import encode_prompts, left_pad  # noqa: E402
from model import generate, load_llama, load_tokenizer  # noqa: E402
from tools.data.sums import slip  # noqa: E402

SETTINGS = DEMO | dict(
    sft="runs/sft", reward=f"{ROOT}/bench/checkable_reward.py", eval_number=400, batch_size=128,
    minibatch_size=64, micro_batch_size=64, max_new_tokens=24, kl_coef=0.01, ptx_coef=0, lam=1)
del SETTINGS["gold"]  # the demo's judge knows other tasks
RATES = {"PPO": 1e-4, "GRPO": 1e-4, "RLOO": 2e-4}
SAMPLES = 8  # per held-out task
COLUMNS = {"greedy": "eval_score", "no slip": "none", "carries": "sum", "last digits": "larger",
           "sampled": "sampled", f"any of {SAMPLES} samples": "any",
           "KL, nats per response": "kl", "CPU seconds": "cpu"}


def prepare(folder, seed):
    """Tasks and SFT model of a seed."""
    os.makedirs(folder, exist_ok=True)
    if not os.path.exists(f"{folder}/data/tokenizer/tokenizer.model"):
        run(folder, "data_gen.py", ["sums", "--out", "data", "--seed", str(seed)], "data")
    if not os.path.exists(f"{folder}/runs/sft/config.json"):
        run(folder, "sft.py", ["--epochs", "12", "--seed", str(seed), "--overwrite"], "sft")


def train(folder, seed, name, updates):
    """The folder of one run, which runs first if it is not there yet."""
    out = f"{folder}/runs/{name}-{updates}"
    settings = SETTINGS | dict(updates=updates, eval_every=updates, lr=RATES[name], seed=seed,
                               out=out)
    if name == "RLOO":
        settings["ppo_epochs"] = 1
    launch(folder, FORKS[name], name, settings)
    print(f"seed {seed}, {name}: {value(metrics(out), 'eval_score'):.3f} right", file=sys.stderr,
          flush=True)
    return out


@torch.no_grad()
def sample(path, tasks):
    """Share of right answers at temperature 1, and share of the tasks with one among SAMPLES."""
    tokenizer = load_tokenizer(path)
    llama, generator = load_llama(path, tokenizer), torch.Generator().manual_seed(0)
    prompts = encode_prompts([task["user_input"] for task in tasks], tokenizer, 128, path)
    right = []
    for task, prompt in zip(tasks, prompts):
        out = generate(llama, *left_pad([prompt] * SAMPLES, tokenizer.pad_token_id, "cpu"), 24,
                       tokenizer.end_ids, generator=generator)
        texts = [tokenizer.decode(row[used.bool()].tolist(), skip_special_tokens=True).strip()
                 for row, used in zip(out.tokens, out.mask)]
        right.append([score(task["user_input"], text, task["answer"]) for text in texts])
    return dict(sampled=statistics.mean(map(statistics.mean, right)),
                any=statistics.mean(map(max, right)))


def shares(out, update, tasks):
    """Share of right greedy answers after this update, by the slip that would change the answer:
    {"sum": a forgotten carry, "larger": a comparison of the last digits, "none": neither}."""
    with open(f"{out}/samples.jsonl", encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    scores = [sample["score"] for sample in samples if sample["update"] == update]
    found = {"sum": [], "larger": [], "none": []}
    for task, right in zip(tasks, scores, strict=True):
        a, b = re.findall("[0-9]+", task["user_input"])
        family = "larger" if task["answer"] in (a, b) else "sum"
        found["none" if slip(family, a, b) == task["answer"] else family].append(right)
    return {kind: statistics.mean(right) for kind, right in found.items()}


def row(out, tasks, last=True):
    """The columns of one run, at its end or at its beginning: the SFT model."""
    rows = metrics(out)
    if not last:
        return dict(eval_score=float(rows[0]["eval_score"])) | shares(out, 0, tasks)
    with open(f"{out}/cost.json", encoding="utf-8") as file:
        cpu = json.load(file)["cpu"]
    return dict(eval_score=value(rows, "eval_score"), kl=value(rows, "kl"), cpu=cpu) | shares(
        out, int(rows[-1]["update"]), tasks)


def table(rows):
    """{name: the rows of its seeds} -> the lines of the table."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, mine in rows.items():
        cells = [cell([row[column] for row in mine]) if column in mine[0] else ""
                 for column in COLUMNS.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description="PPO, GRPO and RLOO on tasks that can be checked.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=80, help="rounds of 128 samples per run")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--out", default="runs/checkable", help="where the runs go")
    args = parser.parse_args()
    folders = {seed: os.path.abspath(f"{args.out}/seed-{seed}") for seed in args.seeds}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda seed: prepare(folders[seed], seed), args.seeds))
        jobs = [(seed, name) for seed in args.seeds for name in RATES]
        outs = dict(zip(jobs, pool.map(lambda job: train(folders[job[0]], *job, args.updates),
                                       jobs)))
    torch.set_num_threads(1)
    rows = {name: [] for name in ("the SFT model", *RATES)}
    for seed, folder in folders.items():
        with open(f"{folder}/data/rlhf_training_data_eval.json", encoding="utf-8") as file:
            tasks = json.load(file)
        rows["the SFT model"].append(row(outs[seed, "PPO"], tasks, last=False)
                                     | sample(f"{folder}/runs/sft", tasks))
        for name in RATES:
            rows[name].append(row(outs[seed, name], tasks) | sample(outs[seed, name], tasks))
    print(f"{args.updates} updates of 128 samples; share of right answers, mean of "
          f"{len(args.seeds)} seeds, smallest to largest\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
