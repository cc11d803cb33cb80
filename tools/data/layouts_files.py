"""Foreign files to our records: reads them, finds their layout, and reports what was found.

Every field of a record is used, kept, or reported: see `Found`.
"""

import csv
import gzip
import io
import json
import re
from collections import Counter

from lib.data import read_values, what_is_wrong
from lib.errors import explain, stop
from tools.data.layouts import LeftOut, named_in
from tools.data.layouts_compared import (LAYOUTS, find_list, find_sides, is_something, rows_of,
                                         sides_in)
from tools.data.layouts_parts import (from_parts, has_answer, hides_answer, misnamed, parts_of,
                                      score_of, without_ends)
from tools.data.layouts_rows import (DAMAGED, are_messages, is_task, read_strings, rows_joined,
                                     task_of)

# what a reward function may ask for: prompts keep it by default, where it plays no other part
KEPT = ["answer", "answers", "ground_truth", "solution", "final_answer", "expected_answer",
        "reward_model", "verification_info", "test", "tests", "test_list", "test_cases",
        "unit_tests", "input_output"]


# ------------------------------------------------------------------------------------------------
# Reading

def read_file(path):
    """The records of a file: what `read_values` reads, one object over several lines, a list in the
    field "data" or "rows", an object of columns, a table with header (.csv, .tsv), .parquet."""
    name = path.removesuffix(".gz")
    if name.endswith(".parquet"):
        try:
            import pyarrow.parquet
        except ImportError:
            stop(f"{path}: reading .parquet needs a package: pip install pyarrow")
        with explain(f"{path}: cannot be read"):
            return pyarrow.parquet.read_table(path).to_pylist()
    if not name.endswith((".csv", ".tsv")):
        values = read_values(path, whole=True)
        if isinstance(values, dict):
            for outer in ("data", "rows"):  # rows: of the hub's viewer
                inner = values.get(outer)
                if isinstance(inner, list) and inner and isinstance(inner[0], dict):
                    beside = [field for field, value in values.items()
                              if field != outer and is_something(value)]
                    if beside:
                        print(f"{path}: its records are those in {outer}; not used: "
                              f"{', '.join(beside)}")
                    return [item.get("row", item) if isinstance(item, dict) else item
                            for item in inner]
            if all(isinstance(column, dict) and "0" in column for column in values.values()):
                values = {name: list(column.values()) for name, column in values.items()}  # pandas
            rows = rows_of(values) if len(values) > 1 else values
            is_table = isinstance(rows, list) and not any(isinstance(cell, list | dict)
                                                          for row in rows for cell in row.values())
            return rows if is_table else [values]
        return values
    with explain(f"{path}: cannot be read"):
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            try:
                text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
            except UnicodeDecodeError as error:
                stop(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
        csv.field_size_limit(2**31 - 1)
        by, called = ("\t", "tabs") if name.endswith(".tsv") else (",", "commas")
        rows = csv.DictReader(text, delimiter=by, restkey="cells beyond the header")
        names = Counter(filter(None, rows.fieldnames or []))
        if len(names) == 1 and (other := re.search("[;,|\t]", *names)):
            stop(f"{path}: its header is one column, {[*names][0]!r}; save the file with {called}, "
                 f"not {other[0]!r}, between the columns")
        if again := [field for field, n in names.items() if n > 1]:
            stop(f"{path}: its header names {', '.join(map(repr, again))} more than once: rename "
                 "these columns")
        return list(rows)


# ------------------------------------------------------------------------------------------------
# A file

class Found:
    """What a file held: our records, and what of theirs was left out or not used."""

    def __init__(self):
        self.records, self.left_out, self.turns = [], {}, 0
        self.kept, self.unused = Counter(), Counter()

    def leave_out(self, n, reason):
        self.left_out.setdefault(reason, []).append(n)

    def say(self, what):
        print(what)
        for reason, records in self.left_out.items():
            numbers = ", ".join(map(str, records[:3])) + ", ..." * (len(records) > 3)
            print(f"  left out {len(records)}: {reason} (records {numbers})")
        if self.turns:
            why = ("without a score are not used" if any("score" in r for r in self.records) else
                   "of earlier turns are not used: --all_turns takes them")
            print(f"  {self.turns} answers {why}")
        if self.kept:
            kept = [f"{field} (in {n} records)" for field, n in self.kept.most_common()]
            print(f"  kept in prompts (--make rlhf): {', '.join(kept)}")
        lost = [f"{field} (in {n} records)" for field, n in self.unused.most_common()]
        print(f"  not used: {', '.join(lost)}" if lost else "  all fields used")


def find_layout(path, objects, mapped, keep):
    """(what the file holds, its fields that are used, those of what lies in them, a function from a
    record and `all_turns` to our records and the number of answers that are not used)."""
    fields = set().union(*objects)
    parts, compared = parts_of(fields - misnamed(objects, fields), mapped), None
    if not mapped:
        for name, theirs, inner, convert in LAYOUTS:
            if theirs <= fields:
                return name, theirs, inner, lambda r, all_turns: (convert(r), 0)
    if not mapped and not {"chosen", "rejected"} <= parts.keys():
        asked = {part: parts[part] for part in ("system", "history", "messages", "prompt", "input")
                 if part in parts}
        compared = find_list(objects, fields, asked) or find_sides(objects, fields, asked)
        parts = asked if compared else parts
    if parts.get("completion") in keep and not all(
            value is None or isinstance(value, str) or are_messages(value)
            for value in (r.get(parts["completion"]) for r in objects)):
        del parts["completion"]  # an answer to compare with, such as a number or a list of them
    if {"messages", "completion"} <= parts.keys() and has_answer(objects[0].get(parts["messages"])):
        del parts["completion"]  # the dialogue has it, or another one
    is_dialogue = "messages" in parts and not parts.keys() & {"completion", "chosen"}
    beside = parts.keys() & {"prompt", "input"} - mapped.keys()
    if is_dialogue and beside and not compared and any(hides_answer(r, parts) for r in objects):
        for part in beside:
            del parts[part]  # a persona, say, or a topic
    sides = sides_in(fields).values()
    if not compared and any(isinstance(r.get(side), list) for r in objects for side in sides):
        stop(f"{path}: nothing says which of {' and '.join(sides)} is better")
    if not compared and not (parts.keys() & {"prompt", "messages"} or
                             {"chosen", "rejected"} <= parts.keys()):
        stop(f"{path}: none of the fields {', '.join(sorted(fields))} is known as a prompt: say "
             "which plays which part, as in --map prompt=question,completion=answer")
    lists = {part: [names] if isinstance(names, str) else names for part, names in parts.items()}
    what = [f"{name} as {part}" if name != part else name
            for part, names in lists.items() for name in [" and ".join(names)]]
    used = {name for names in lists.values() for name in names}
    inner = {"messages", "role", "from", "content", "value", "text", "full_text", "human",
             "assistant", "input", "output"}
    if not compared:
        return ", ".join(what), used, inner, lambda r, all_turns: from_parts(r, parts, all_turns)
    how, used_too, inner_too, convert = compared
    return (", ".join([*what, how]), used | used_too, inner | inner_too,
            lambda r, all_turns: convert(r))


def with_numbers(ours):
    """Our records with their scores as numbers, and what these are out of (see `score_of`). One
    whose score is a label's, true or false, has {"by_label": True}."""
    records, scales = [], set()
    for record in ours:
        is_label = isinstance(record.get("score"), bool)
        if "score" in record:
            score, scale = score_of(record["score"])
            record = record | {"score": score}
            scales.add("a plain number" if scale is None else f"out of {scale:g}")
        for field, value in record.items():
            if wrong := what_is_wrong(field, value):
                raise LeftOut(f"its {field} {wrong}")
        records.append(record | {"by_label": True} if is_label else record)
    if len(scales) > 1:
        raise LeftOut("its scores are on different scales")
    return records, scales.pop() if scales else None


def kept_of(r, keep, must):
    """What stands in the fields to keep. `must`: each has to be there."""
    kept = {field: r[field] for field in keep if r.get(field) is not None}
    for field in keep:
        if must and field not in kept:
            raise LeftOut(f"it has no {field}, which --keep names")
        try:
            json.dumps(kept.get(field), ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError):  # of a Parquet file: a date, bytes
            raise LeftOut(f"its {field} cannot be written as JSON") from None
    return kept


def rows_in(path, number, found):
    """[(number, record, fields as they stand in the file)] of a file's first `number` records, in
    their final form (layouts_rows.py), and what to call them. What is none, `found` leaves out."""
    values = read_file(path)
    values = (values if isinstance(values, list) else [values])[:number]
    if not values:
        stop(f"{path}: holds no records")
    if all(isinstance(value, list) for value in values):
        values = [{"messages": value} for value in values]  # bare lists of messages
    rows = []
    for n, value in enumerate(values, 1):
        if isinstance(value, dict):
            rows.append((n, value))
        else:
            found.leave_out(n, "not a JSON object")
    are_tasks = bool(rows) and all(is_task(r) for _, r in rows)
    if are_tasks:
        with explain(f"{path}: not what Label Studio's tasks look like"):
            rows = [(n, task_of(r)) for n, r in rows]
    original = dict(rows)
    read = read_strings([r for _, r in rows])
    rows, lost = rows_joined([(n, r) for (n, _), r in zip(rows, read)])
    for n, reason in lost:
        found.leave_out(n, reason)
    if not rows:
        stop(f"{path}: holds no record that can be used: {'; '.join(found.left_out)}")
    what = f"{path}: {len(values)} records, " + "Label Studio's tasks: " * are_tasks
    return [(n, r, original[n]) for n, r in rows], what


def convert_file(path, number, mapped, all_turns, keep=()):
    """Our records of one file, of its first `number`. The fields `keep` of theirs, or those of KEPT
    that play no other part, stand in {"kept": {field: value}}. Says what was found."""
    found, made = Found(), []
    rows, heading = rows_in(path, number, found)
    objects = [theirs for _, theirs, _ in rows]
    fields = set().union(*objects)
    whole = [r for r in objects if DAMAGED not in r.values()]
    asked = [(f"--keep {field}", field) for field in keep]
    asked += [(f"--map {part}={field}", field) for part, field in mapped.items()]
    for option, field in asked:
        if field not in fields:
            stop(f"{option}: no record of {path} has it; they have {', '.join(sorted(fields))}")
    what, used, inner, convert = find_layout(path, whole or objects, mapped, keep)
    kept = keep or [field for field in named_in(fields, KEPT) if field not in used]
    for n, theirs, original in rows:
        try:
            for field in sorted(used):
                if theirs.get(field) is DAMAGED:
                    raise LeftOut(f"its {field} cannot be read as JSON")
            ours, turns = convert(theirs, all_turns)
            ours, scale = with_numbers(without_ends(ours, theirs))
            made.append((n, theirs, ours, turns, scale, kept_of(theirs | original, kept, keep)))
        except LeftOut as reason:
            found.leave_out(n, str(reason))
        except (LookupError, TypeError, ValueError, AttributeError, RecursionError):
            found.leave_out(n, f"not what {what} look like")
    scales = Counter(scale for _, _, _, _, scale, _ in made if scale)
    for n, theirs, ours, turns, scale, extra in made:
        if scale and scale != (most := scales.most_common(1)[0][0]):
            found.leave_out(n, f"its score is {scale}, where most are {most}")
            continue
        found.records += [record | {"kept": extra} if extra else record for record in ours]
        found.turns += turns
        found.kept.update(extra.keys())
        unused = {field for field in theirs if field not in used and field not in extra and
                  is_something(theirs[field])}
        for field in used & theirs.keys():
            items = theirs[field] if isinstance(theirs[field], list) else [theirs[field]]
            unused |= {f"{field}: {name}" for item in items if isinstance(item, dict)
                       for name in item if name not in inner and is_something(item[name])}
        found.unused.update(sorted(unused))
    found.say(heading + what)
    return found.records
