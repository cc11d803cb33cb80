"""PPO on the real run's models with one thing changed at a time: the steps adam and levers of
bench/real_run.py. `epsilon 1e-8` changes nothing: it is what the others are compared with."""

import csv
import json

from model import load_llama, load_tokenizer

STEPS = ["adam", "levers"]
LAST = 3  # updates whose means the tables give


def variants(step, args):
    """{name: options of ppo.py} of a step. `args`: the sizes of bench/real_run.py."""
    large_epsilon, all_at_once = ["--adam_eps", "1e-5"], ["--minibatch_size", args.batch]
    no_clipping, twice = ["--max_grad_norm", "inf"], ["--lr", "5e-5", "--critic_lr", "1e-4"]
    if step == "adam":
        return {
            "epsilon 1e-8": [],
            "epsilon 1e-5": large_epsilon,
            "no clipping": no_clipping,
            "epsilon 1e-5, no clipping": large_epsilon + no_clipping,
            "one mini-batch": all_at_once,
            "epsilon 1e-5, one mini-batch": large_epsilon + all_at_once,
        }
    small_batch = ["--batch_size", args.batch // 2, "--minibatch_size", args.batch // 4,
                   "--updates", 2 * args.short_episodes // args.batch, "--eval_every",
                   2 * args.every]
    return {  # what might make an answer count for more, or a nat
        "epsilon 1e-8": [],
        "twice the learning rates": twice,
        "epsilon 1e-5, twice the learning rates": large_epsilon + twice,
        "lambda 1": ["--lam", 1],
        "one pass": ["--ppo_epochs", 1],
        "batches half as large": small_batch,
        "kl_coef 0.1": ["--kl_coef", 0.1],
        "kl_coef 0.2": ["--kl_coef", 0.2],
        "k3": ["--kl_kind", "k3"],
    }


def folder(name, seed):
    return f"variant-{name.replace(', ', '-').replace(' ', '-')}-{seed}"


def moved(before, after, rates):
    """How far the weights went from the start to the end, in sums of learning rates: the mean of
    |w - w_0| over `rates`, the sum over all optimizer steps. Weights that go to and fro get less
    far than their steps are long."""
    pairs = list(zip(before.parameters(), after.parameters()))
    distance = sum((a - b).abs().double().sum().item() for a, b in pairs)
    return distance / sum(a.numel() for a, _ in pairs) / rates


def report(args, step):
    """`step`.md in --out: each variant and seed, all of which have been run."""
    tokenizer = load_tokenizer(f"{args.out}/sft")
    before, lines = load_llama(f"{args.out}/sft", tokenizer), []
    for name in variants(step, args):
        for seed in args.seeds:
            path = f"{args.out}/{folder(name, seed)}"
            with open(f"{path}/metrics.csv", encoding="utf-8") as file:
                rows = [{key: float(value) for key, value in row.items() if value}
                        for row in csv.DictReader(file)]
            with open(f"{path}/last/state.json", encoding="utf-8") as file:
                settings = json.load(file)["settings"]
            judged = {int(row["update"]) * settings["batch_size"]: row["eval_gold"]
                      for row in rows if "eval_gold" in row}
            score, kl = (sum(row[key] for row in rows[-LAST:]) / LAST for key in ("score", "kl"))
            steps = settings["ppo_epochs"] * settings["batch_size"] / settings["minibatch_size"]
            length = moved(before, load_llama(path, tokenizer),
                           steps * sum(row["lr"] for row in rows if "lr" in row))
            cells = [name, seed, *(f"{gold:.2f}" for gold in judged.values()), f"{score:.2f}",
                     f"{kl:.2f}", f"{length:.3f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    heads = ["", "seed", *(f"{answers:,} answers" for answers in judged),
             "score of the samples", "KL, nats per response", "weights moved"]
    text = "\n".join(["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|", *lines]) + "\n"
    with open(f"{args.out}/{step}.md", "w", encoding="utf-8") as file:
        file.write(text)
    print(text)
