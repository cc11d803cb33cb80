"""What is not yet a record: JSON inside a string, a message per row, a task of Label Studio."""

import ast
import json
import math
import re

from tools.data.layouts import PARTS, named_in
from tools.data.layouts_compared import is_something, sides_in


def json_in(text):
    """The list or object that a text is in JSON, or as Python prints it; None if it is neither."""
    if not isinstance(text, str) or not text.lstrip().startswith(("[", "{")):
        return None
    for read in json.loads, ast.literal_eval:
        try:
            return read(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            pass
    return None


def is_text(value):
    return isinstance(value, str) and value != ""


def are_messages(value):
    messages = value if isinstance(value, list) else [value]
    return all(isinstance(m, dict) and m.keys() & {"role", "from", "messages"} for m in messages)


def are_turns(value):
    return isinstance(value, list) and all(isinstance(text, str | None) for text in value)


DAMAGED = object()  # what is read of a text that should be JSON and is not
# how a list of messages begins; pandas writes it to a table without commas
MESSAGES = re.compile(r"\s*\[\s*\{\s*['\"](role|from|content|value|human|input)['\"]\s*:")


def read_strings(objects):
    """The records, with what is JSON inside a string read in the fields where most have it; what
    cannot be read there, such as a cell that was cut, is DAMAGED.

    The text of a prompt or of an answer may well be JSON. It is read only if it is messages, or if
    the prompt and all its answers are lists of turns, as in lmsys's files at Kaggle.
    """
    fields, inside = set().union(*objects), {}
    for field in fields:
        texts = [r[field] for r in objects if is_text(r.get(field))]
        read = [json_in(text) for text in texts]
        values = [value for value in read if value is not None]
        damaged = [text for text, value in zip(texts, read)
                   if value is None and MESSAGES.match(text)]
        if texts and 2 * len(values + damaged) >= len(texts):
            inside[field] = values
    sides = set(sides_in(fields).values())
    names = {name for part in PARTS if part not in ("messages", "history") for name in PARTS[part]}
    turns = {field for field in inside if all(map(are_turns, inside[field]))}
    has_turns = sides and sides <= turns and turns & set(PARTS["prompt"])
    for field, values in list(inside.items()):
        is_said = field in sides or field.lower() in names | {"text"}
        if is_said and not all(map(are_messages, values)) and not (has_turns and field in turns):
            del inside[field]
    return [r | {field: DAMAGED if (value := json_in(r[field])) is None else value
                 for field in inside if is_text(r.get(field))} for r in objects]


# ------------------------------------------------------------------------------------------------
# One message a row, and Label Studio's tasks

def number_in(value):
    """The number that a cell holds; None if it holds none."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def rows_joined(rows):
    """[(number, row)] of a file with one message per row -> [(number of the first row, record)]:
    trees by parent_id (OASST), or dialogues by conversation_id; and [(number, why)] of the rows
    that are in none. Other records stay as they are."""
    fields = set().union(*(row for _, row in rows))
    role, text, name, order, talk = (
        next(iter(named_in(fields, names)), None) for names in (
            ["role", "from", "speaker", "sender"], ["text", "content", "value", "message"],
            ["message_id", "id"], ["turn", "turn_id", "turn_number", "position", "index"],
            ["conversation_id", "dialogue_id", "dialog_id", "conv_id", "thread_id", "chat_id"]))
    if role and text and name and "parent_id" in fields:
        return trees_of(rows, role, text, name)
    if not role or not text or not talk:
        return rows, []
    lost = [(n, f"it has no {talk}") for n, row in rows if not is_something(row.get(talk))]
    rows = [(n, row) for n, row in rows if is_something(row.get(talk))]
    places = {n: number_in(row.get(order)) for n, row in rows}
    if set(places.values()) == {None}:
        order = None  # the file's order is all there is
    else:  # a dialogue that lacks a turn is another dialogue
        broken = {str(row[talk]) for n, row in rows if places[n] is None}
        lost += [(n, f"a message of its dialogue has no number as its {order}")
                 for n, row in rows if str(row[talk]) in broken]
        rows = sorted(((n, row) for n, row in rows if str(row[talk]) not in broken),
                      key=lambda numbered: places[numbered[0]])
    talks = {}
    for n, row in rows:
        rest = {field: value for field, value in row.items()
                if field not in (role, text, talk, order) and is_something(value)}
        _, record = talks.setdefault(str(row[talk]), (n, rest | {"messages": []}))
        # what only a later row has is no field of the dialogue: its message has it, to be reported
        later = {field: value for field, value in rest.items() if record.get(field) != value}
        record["messages"].append(later | {"role": row.get(role), "content": row.get(text)})
    return list(talks.values()), lost


def trees_of(rows, role, text, name):
    nodes, lost = {}, []
    for n, row in rows:
        node = row | {"role": row.get(role), "text": row.get(text), "replies": []}
        if nodes.setdefault(str(row.get(name)), (n, node))[0] != n:
            lost.append((n, f"its {name} is that of another message"))
    roots, reached = [], set()
    for n, node in nodes.values():
        if not is_something(node.get("parent_id")):
            roots.append((n, node))
        elif str(node["parent_id"]) in nodes:
            nodes[str(node["parent_id"])][1]["replies"].append(node)
    below = [node for _, node in roots]
    while below:
        node = below.pop()
        reached.add(str(node.get(name)))
        below += node["replies"]
    lost += [(n, "the messages before it are not in the file") for key, (n, _) in nodes.items()
             if key not in reached]
    return [(n, {"message_tree_id": node.get(name), "prompt": node}) for n, node in roots], lost


def is_task(r):
    return isinstance(r.get("data"), dict) and isinstance(r.get("annotations"), list)


def task_of(r):
    """A task of Label Studio as a record: its data, and in "annotations" what people selected."""
    votes = []
    for annotation in r["annotations"]:
        for result in annotation["result"] if not annotation.get("was_cancelled") else []:
            value, sides = result["value"], str(result.get("to_name")).split(",")
            place = {"left": 0, "right": -1}.get(value.get("selected"))
            votes.append(sides[place] if place is not None and set(sides) <= r["data"].keys()
                         else value)
    return {field: r[field] for field in r if field != "data"} | r["data"] | {"annotations": votes}
