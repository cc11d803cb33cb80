"""See what PPO sees: a run's curves, its answers, and new ones token by token, on one page.

    python -m tools.look runs/ppo                    # writes runs/ppo/look.html
    python -m tools.look runs/rm                     # the reward model after each token
    python -m tools.look runs/ppo runs/other         # their curves together

The numbers are those of `ppo.make_experience`.
"""

import argparse
import base64
import csv
import hashlib
import json
import math
import os

import torch
from safetensors import safe_open

import ppo
import sft
import train_rm
from lib import rewards
from lib.data import collate, encode_prompts, longest_prompt, read_records
from lib.distributed import to_device
from lib.errors import clean_exit, explain, stop, write_whole
from lib.lora import add_lora
from lib.scored import read_scored, with_pairs
from lib.settings import COMMON, DEVICE, positive, usable_device
from lib.state import FREE
from lib.training import autocast, set_lr
from model import last_token, load_llama, load_scalar_head, load_tokenizer, states_of, tokens_of
from tools.data.sets import as_text
from tools.texts import pieces, shown

TEMPLATE = os.path.splitext(__file__)[0] + ".html"
COLUMNS = dict(kl="kl", value="old_values", reward="rewards", advantage="advantages", ratio="ratio",
               entropy="entropy")  # a quantity of the page: its name in the experience


def about_run(folder, settings, progress, table):
    """What a run's folder says without its models."""
    rows = [row for row in table + COMMON  # a fork may lack some
            if not isinstance(row, str) and row[0] in settings and row[0] not in FREE]
    said = settings | (dict(no_eos_score=None) if settings.get("no_eos_score") == -1 else {})
    differ = [[f"{row[0]} {said[row[0]]}" for row in rows if said[row[0]] != row[column]]
              for column in (1, 2)]  # the demo's, a real model's
    run = dict(name=folder, changed=", ".join(min(differ, key=len)), warnings=[])
    path = os.path.join(folder, "metrics.csv")
    with explain(f"{path}: missing or damaged"):
        with open(path, encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        run["x"] = x = next(iter(rows[0]))
        columns = {name: [(float(row[x]), float(row[name])) for row in rows
                          if row[name] and math.isfinite(float(row[name]))] for name in rows[0]}
    run["columns"] = {name: points for name, points in columns.items() if points and name != x}
    if table is not ppo.SETTINGS:
        return run
    run["warnings"] = list(progress.get("warned", {}).values())

    path, prompts = os.path.join(folder, "samples.jsonl"), {}
    if not os.path.exists(path):
        print(f"{path}: missing, so no answers are shown")
        return run
    rows = read_records(path, "user_input", "completion")
    with explain(f"{path}: not as ppo.py writes it, with every prompt at each evaluation"):
        for row in rows:
            answers = prompts.setdefault(row["number"], (as_text(row.pop("user_input")), {}))[1]
            answers[row["update"]] = row
        run["updates"] = sorted({row["update"] for row in rows})
        run["answers"] = [dict(prompt=prompt, evals=[answers[u] for u in run["updates"]])
                          for prompt, answers in prompts.values()]
    return run


def find(path, folder, option, local=True):
    """Where `path` is now: there, or beside this run; a name of the hub, not `local`, stays."""
    for now in (path, os.path.join(folder, "..", os.path.basename(path))):
        if os.path.exists(now) or not local:
            return now
    stop(f"{path}: missing, where {folder} read it; {option} says where it is now")


def digits(x):
    return round(x, 7) if math.isfinite(x) else None


def experience_of(folder, args, progress, records):
    """Answers to these records -> the tokenizer, and what `ppo.make_experience` gives, with
    `entropy`, `ratio` and the five likeliest, [[name, probability], ...], of `policy` and
    `reference` for each token. The ratio is that after one step of `ppo.train_minibatch` on all
    answers: the run's first learning rates, a new Adam, no PTX term."""
    tokenizer = load_tokenizer(folder)
    args.gold = args.critic = None  # samples.jsonl has its scores; the critic is the saved one
    judge, _ = rewards.judges(args, records, [])
    text_reward = rewards.reward_of_texts(args, tokenizer, judge, load_scalar_head, last_token)
    actor = load_llama(folder, tokenizer)
    reward_model = text_reward or to_device(load_scalar_head(args.rm), args)
    prompts = encode_prompts([record["user_input"] for record in records], tokenizer,
                             longest_prompt([actor, reward_model], args), args.prompts)
    if text_reward:
        text_reward.remember(prompts, records)

    critic = load_scalar_head(os.path.join(folder, "critic"))
    actor, critic = (to_device(add_lora(model, args), args) for model in (actor, critic))
    trained = ppo.with_optimizers(args, actor=actor, critic=critic)
    set_lr(trained["actor"][1], args.lr, 0, 1, "linear")
    set_lr(trained["critic"][1], args.critic_lr, 0, 1, "linear")
    ref = to_device(load_llama(args.sft, tokenizer), args)
    deviation_of = rewards.RunningDeviation(args.normalize_reward, **progress["deviation"])
    everything = list(range(len(prompts)))
    experience, _ = ppo.make_experience(
        actor, critic, reward_model, ref, prompts, [everything], tokenizer, args,
        progress["kl_coef"], torch.Generator(args.device).manual_seed(args.seed), deviation_of)
    texts = experience["texts"]

    def ask(model):
        for text in texts:
            input_ids, places = collate([text], tokenizer.pad_token_id, args.device)
            with torch.no_grad(), autocast(args):
                logits = model.lm_head(states_of(model(input_ids), places))
            top = ppo.tempered_log_softmax(logits, args.temperature).exp().topk(5)
            yield (ppo.logprobs_from_logits(logits, tokens_of(input_ids, places), args.temperature),
                   ppo.entropy_from_logits(logits, args.temperature),
                   [[[shown(tokenizer, token), round(p, 6)] for token, p in zip(*five)]
                    for five in zip(top.indices.tolist(), top.values.tolist())])

    before, experience["entropy"], experience["policy"] = zip(*ask(actor))
    *_, experience["reference"] = zip(*ask(ref))
    ppo.train_minibatch(trained, experience, everything, [], tokenizer, args)
    experience["ratio"] = [(now - old).exp() for (now, *_), old in zip(ask(actor), before)]
    return tokenizer, experience


def inside(folder, args, progress):
    records = read_records(args.prompts, "user_input")[:args.number]
    tokenizer, experience = experience_of(folder, args, progress, records)
    rows = {name: [x.tolist() for x in experience[own]] for name, own in COLUMNS.items()}
    cards = []
    for i, score in enumerate(experience["scores"].tolist()):
        tokens = pieces(tokenizer, experience["texts"][i][1])
        for t, token in enumerate(tokens):
            token |= {name: digits(row[i][t]) for name, row in rows.items()}
            token |= {name: experience[name][i][t] for name in ("policy", "reference")}
        cards.append(dict(prompt=as_text(records[i]["user_input"]), tokens=tokens, score=score,
                          label=f"score {score:.3f}; expected {rows['value'][i][0]:.3f}"))
    about = (f"Sampled, on {args.prompts}. Choose a colour; point at a token for its numbers. The "
             "line is the value, before the token; the dot, the score that came. The ratio is that "
             "after one more step on these answers.")
    return dict(name=folder, about=about, names=list(COLUMNS), cards=cards)


def trained_scale(path, reward_model):
    """The differences of the exported scores times this are log odds, as in training: the head in
    `path`, the saved state, is from before the division by the deviation (train_rm.normalize_)."""
    with explain(f"{path}: missing or damaged"):
        with safe_open(path, "pt") as tensors:
            head = tensors.get_tensor("reward_model.score.weight")
    return (head.norm() / reward_model.score.weight.norm().cpu()).item()


def reliability(margins, accuracies):
    """The model prefers one of two with probability sigmoid(|margin|); how often do people?
    `margins`, `accuracies` (number of pairs,) -> [(mean probability, share, number of pairs)] of
    five bins of 0.1, from 0.5 to 1, without empty ones."""
    predicted = torch.sigmoid(margins.abs())
    bin_of = ((predicted - 0.5) * 10).long().clamp(max=4)
    return [(predicted[own].mean().item(), accuracies[own].mean().item(), int(own.sum()))
            for own in (bin_of == b for b in bin_of.unique())]


def judge(folder, args):
    """The value after each token of good and bad held-out completions; the reliability."""
    tokenizer = load_tokenizer(folder)
    reward_model = to_device(load_scalar_head(folder), args)
    records = read_records(args.eval_data, "user_input")
    max_length = min(args.max_length, reward_model.config.max_position_embeddings)
    examples, groups, labels = read_scored(args.eval_data, tokenizer, max_length,
                                           args.loss == "ranking")
    groups = with_pairs(groups, labels)
    scores = train_rm.score_texts(reward_model, examples, args, tokenizer.pad_token_id).cpu()
    accuracy, margin, _ = map(torch.cat, zip(*(
        train_rm.pair_statistics(scores[group], labels[group]) for group in groups)))
    bins, cards = [], []
    if args.loss == "ranking":
        bins = reliability(margin * trained_scale(args.state, reward_model), accuracy)
    for group in groups[:args.number]:
        for name, i in (("good", labels[group].argmax()), ("bad", labels[group].argmin())):
            prompt, completion, n = examples[group[i]]
            input_ids, places = collate([(prompt, completion)], tokenizer.pad_token_id, args.device)
            with torch.no_grad(), autocast(args):
                # no shift: the value of the text up to and including the token
                values = tokens_of(reward_model(input_ids), places).tolist()
            tokens = pieces(tokenizer, completion)
            for t, token in enumerate(tokens):
                token["value"] = digits(values[t])
                token["change"] = digits(values[t] - values[t - 1]) if t else None
            cards.append(dict(prompt=as_text(records[n - 1]["user_input"]), tokens=tokens,
                              label=f"{name}: label {labels[group[i]]:g}, score {values[-1]:.3f}"))
    about = (f"What it says of {args.eval_data} after each token; only the last counts. It prefers "
             f"the better one in {accuracy.mean():.1%} of {len(accuracy)} pairs; on the dashed "
             "line it would be as sure as it is right.")
    return dict(name=folder, about=about, bins=bins, cards=cards)


def page(data):
    """What people and models wrote is JSON without a `<`, and becomes text nodes. The browser runs
    this script alone, and fetches nothing."""
    with open(TEMPLATE, encoding="utf-8") as file:
        template = file.read()
    script = template.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    before, after = template.replace("HASH", digest).split("DATA</script>")
    return before + text.replace("<", "\\u003c") + "</script>" + after


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tools.look", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="run", help="directories of ppo.py, train_rm.py "
                        "or sft.py; the tokens are of the first of each kind")
    parser.add_argument("--out", help="the page (default: look.html in the first run)")
    parser.add_argument("--prompts", help="prompts to answer; for a run of train_rm.py scored "
                        "completions (default: the run's held-out ones)")
    parser.add_argument("--number", type=positive, default=8, help="of these (default 8)")
    parser.add_argument("--sft", help="the reference (default: the run's)")
    parser.add_argument("--rm", help="the reward model (default: the run's)")
    parser.add_argument("--reward", help="the reward file (default: the run's)")
    parser.add_argument("--device", default=DEVICE, type=usable_device)
    given = parser.parse_args(argv)
    data = dict(runs=[], inside=None, judge=None)
    for folder in map(os.path.normpath, given.runs):
        path = os.path.join(folder, "last", "state.json")
        with explain(f"{path}: missing or damaged"):
            with open(path, encoding="utf-8") as file:
                state = json.load(file)
            settings, progress = state["settings"], state["progress"]
            saved = os.path.join(folder, "last", state["file"])
            script = ppo if "kl_coef" in settings else train_rm if "loss" in settings else sft
        data["runs"].append(about_run(folder, settings, progress, script.SETTINGS))
        args = argparse.Namespace(**settings | dict(
            number=given.number, device=given.device, state=saved))
        critic, is_first = os.path.join(folder, "critic", "config.json"), not data["inside"]
        if script is ppo and is_first and not os.path.exists(critic):  # a fork may have none
            print(f"{critic}: missing, so no tokens are shown")
        elif script is ppo and is_first:
            asked = args.eval_prompts or args.prompts
            args.prompts = given.prompts or find(asked, folder, "--prompts")
            local = state["inputs"]
            args.sft = given.sft or find(args.sft, folder, "--sft", "sft" in local)
            args.reward = given.reward or (None if given.rm or not args.reward else
                                           find(args.reward, folder, "--reward"))
            args.rm = given.rm or find(args.rm, folder, "--rm", "rm" in local)
            data["inside"] = inside(folder, args, progress)
        if script is train_rm and args.eval_data and not data["judge"]:
            args.eval_data = find(given.prompts or args.eval_data, folder, "--prompts")
            data["judge"] = judge(folder, args)
    path = given.out or os.path.join(given.runs[0], "look.html")
    write_whole(path, page(data).encode())
    print(f"wrote {path}, {os.path.getsize(path) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
