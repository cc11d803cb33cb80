"""Files in common layouts, converted to our data sets.

    python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out data/alpaca

layouts*.py hold the layouts that are known.
"""

import json

from lib.errors import stop
from tools.data.commands import EVAL_SHARE, OUT, parser_of
from tools.data.layouts import PARTS
from tools.data.layouts_files import KEPT, convert_file
from tools.data.sets import add_make, prompt_key, save_sets


def convert(paths, number=None, mapped={}, all_turns=False, keep=()):
    """Our records of files in any layout, of each file's first `number`, without exact duplicates.
    Those with fields to keep have them in {"kept": {field: value}}; those whose score is a label's
    have {"by_label": True}; those of a prompt of which several source records compare answers have
    the number of theirs, {"comparison": 1}."""
    records, found, comparisons = {}, 0, {}
    for path in paths:
        made = convert_file(path, number, mapped, all_turns, keep)
        found += len(made)
        for ours in made:
            prompt, compared = prompt_key(ours["user_input"]), ours.pop("compared", None)
            if compared:
                of_prompt = comparisons.setdefault(prompt, {})
                ours["comparison"] = of_prompt.setdefault(compared, len(of_prompt) + 1)
            key = (prompt, ours.get("completion"), ours.get("score"), ours.get("comparison"),
                   json.dumps(ours.get("kept"), sort_keys=True))
            records.setdefault(key, ours)
    if found > len(records):
        print(f"{found - len(records)} exact duplicates dropped")
    for ours in records.values():
        if len(comparisons.get(prompt_key(ours["user_input"]), [])) < 2:
            ours.pop("comparison", None)
    return list(records.values())


def import_files(args):
    mapped = {}
    for pair in args.map.split(",") if args.map else []:
        part, _, field = pair.partition("=")
        if part not in PARTS or not field:
            stop(f"--map {args.map}: must be part=field pairs, with commas between; the "
                 f"parts are {', '.join(PARTS)}")
        if part in mapped:
            stop(f"--map {args.map}: names {part} more than once; give it one field")
        mapped[part] = field
    keep = args.keep.split(",") if args.keep else []
    if not all(keep) or "user_input" in keep:
        stop(f"--keep {args.keep}: must be fields of the files, with commas between; a prompt "
             "keeps its user_input anyway")
    records = convert(args.files, mapped=mapped, all_turns=args.all_turns, keep=keep)
    if keep and "rlhf" not in args.make and any("completion" in r for r in records):
        stop(f"--keep {args.keep}: only prompts keep fields, and these records are more than "
             "prompts: add --make rlhf")
    save_sets(records, args, args.make, args.overwrite)


def main(name, argv):
    command = parser_of(
        name, "Converts files in common layouts to our data sets; the layout is recognized, and "
        "reported.",
        "python data_gen.py import alpaca_data.json more.jsonl.gz --eval_share 0.02 --out "
        "data/alpaca",
        OUT, EVAL_SHARE)
    command.add_argument("files", nargs="+", metavar="FILE", help="JSON, JSON Lines, CSV, TSV, "
                         "also .gz of them; Parquet")
    command.add_argument("--map", help="which field plays which part, such as "
                         f"prompt=question,completion=answer; the parts are {', '.join(PARTS)}")
    command.add_argument("--keep", metavar="FIELD,...", help="fields that the records of "
                         "rlhf_training_data keep, for a reward function (default: those of "
                         f"{', '.join(KEPT)} that play no other part)")
    command.add_argument("--all_turns", action="store_true", help="every answer of a dialogue "
                         "demonstrates, not only the last")
    add_make(command)
    import_files(command.parse_args(argv))
