"""Records as the files of our data sets, some prompts held out in the twins `..._eval.json`."""

import json
import os
import random

from lib.data import save_all
from lib.errors import stop


def prompt_key(user_input):
    """A text that stands for the prompt, equal for equal prompts."""
    return user_input if isinstance(user_input, str) else json.dumps(user_input, sort_keys=True)


def as_text(user_input):
    """A prompt for people, or an LLM, to read."""
    if isinstance(user_input, str):
        return user_input
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in user_input)


def sets_of(records, make):
    """{name: records} of the data sets `make`: the best of a prompt's scored completions becomes a
    demonstration, unless a label says that it is bad, and every prompt one of PPO's. With an empty
    `make` a record stays what it is."""
    prompts, others = {}, 0
    for r in records:
        if make or "completion" not in r:
            prompt = {"user_input": r["user_input"]} | r.get("kept", {})
            others += prompts.setdefault(prompt_key(r["user_input"]), prompt) != prompt
    if others and (not make or "rlhf" in make):
        print(f"{others} prompts come again with other values in the fields that are kept: the "
              "first is taken")
    labelled = {prompt_key(r["user_input"]) for r in records if "by_label" in r}
    answered = [{field: r[field] for field in r if field not in ("kept", "by_label")}
                for r in records if "completion" in r]
    records = list({json.dumps(r, sort_keys=True): r for r in answered}.values())
    if len(records) < len(answered) and make != ["rlhf"]:
        print(f"{len(answered) - len(records)} duplicates dropped: they differed only in the "
              "fields that prompts keep")
    scored = [r for r in records if "score" in r]
    demonstrations = [r for r in records if "score" not in r]
    marks, best = {}, {}  # an answer may stand in several comparisons: its mean score counts
    for r in scored if make else []:
        marks.setdefault((prompt_key(r["user_input"]), r["completion"]), []).append(r)
    for (prompt, _), rows in marks.items():
        mean = sum(r["score"] for r in rows) / len(rows)
        if prompt not in best or mean > best[prompt][0]:
            best[prompt] = mean, rows[0]
    good = [r for key, (mean, r) in best.items() if mean > 0 or key not in labelled]
    if len(good) < len(best) and "actor" in make:
        print(f"{len(best) - len(good)} prompts have only answers that are labelled as bad, which "
              "are not demonstrations")
    demonstrations += [{"user_input": r["user_input"], "completion": r["completion"]}
                       for r in good]
    shown = [r for r in demonstrations if r["completion"].strip()]
    if len(shown) < len(demonstrations) and (not make or "actor" in make):
        print(f"{len(demonstrations) - len(shown)} empty completions, unscored or the best of "
              "their prompt, are not demonstrations")
    sets = {"actor": shown, "reward": scored, "rlhf": list(prompts.values())}
    if not make:
        return sets
    for name in make:
        if not sets[name]:
            what = {"actor": "completions", "reward": "scored completions", "rlhf": "prompts"}
            stop(f"--make {name}: the files hold no {what[name]}")
    return {name: sets[name] for name in make}


def save_sets(records, args, make, overwrite):
    """Write the data sets (see `sets_of`) and their held-out twins to the folder args.out. A prompt
    is on one side only, in whichever set it stands; args.eval_share of them are held out."""
    keys = list(dict.fromkeys(prompt_key(r["user_input"]) for r in records))
    number = 0
    if args.eval_share and len(keys) > 1:
        number = min(max(1, round(args.eval_share * len(keys))), len(keys) - 1)
    held_out = set(random.Random(args.seed).sample(keys, number))
    files = {}
    for name, chosen in sets_of(records, make).items():
        for r in chosen:
            twin = "_eval" if prompt_key(r["user_input"]) in held_out else ""
            path = os.path.join(args.out, f"{name}_training_data{twin}.json")
            files.setdefault(path, []).append(r)
    if not files:
        stop("nothing to write: no record is left")
    save_all(dict(sorted(files.items())), overwrite)
    for path in files:
        twin = path.replace("_training_data.json", "_training_data_eval.json")
        if twin not in files and os.path.exists(twin):
            print(f"{twin}: was there before; its prompts may be in {path} too")


def add_make(command):
    """The option that chooses among these sets."""
    command.add_argument("--make", nargs="+", choices=["actor", "reward", "rlhf"], default=[],
                         help="sets to make of the records (default: what they are): of pairs, "
                         "say, demonstrations and prompts too")
