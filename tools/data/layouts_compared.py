"""Layouts that need more than names: several answers to a prompt, and what says which is better.

Two rules cover most of them. A list of answers, each with its score or rank: `find_list`. Fields
such as response_a and response_b, and a verdict on them: `find_sides`. `LAYOUTS` has the rest.
"""

import math
import re

from tools.data.layouts import PARTS, ROLES, LeftOut, as_prompt, named_in
from tools.data.layouts_parts import (answer_of, asked_in, from_pair, from_parts, from_sides,
                                      number, scored, words)

ANSWERS_ONLY = ["response", "completion", "answer", "output", "generation", "candidate", "summary",
                "human_ref", "reply", "assistant"]
ANSWERS = [*ANSWERS_ONLY, "text", "content", "body"]
SIDES = ["conversation", *ANSWERS]
SCORES = [*PARTS["score"], "pm_score", "reward", "votes", "upvotes"]
RANKS = ["rank", "ranking"]


def is_something(value):
    return value not in (None, "", [], {})


# ------------------------------------------------------------------------------------------------
# A list of answers

def rows_of(value):
    """A list of objects, which may come as an object of lists, {"text": [...], "score": [...]}."""
    columns = list(value.values()) if isinstance(value, dict) else []
    if columns and all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns):
        return [dict(zip(value, row)) for row in zip(*value.values())]
    return value


def plural(names):
    return [name + "s" for name in names] + names


def find_list(objects, fields, parts):
    """(what, used fields, their fields, function) where a field lists answers with their scores or
    ranks, or two fields do: `answers: [{text, pm_score}, ...]`, `responses` and `ranks`."""
    lists = {}  # field: the items in it of the first records
    for field in sorted(fields):
        values = [rows_of(r.get(field)) for r in objects[:100]]
        items = [item for value in values if isinstance(value, list) for item in value]
        if items:
            lists[field] = items
    texts = [field for field in named_in(lists, plural(ANSWERS))
             if any(isinstance(item, str) for item in lists[field])]
    marks = named_in(lists, plural(SCORES + RANKS))
    if texts and marks:
        used, text, mark = [texts[0], marks[0]], texts[0], marks[0]
    else:
        for field, items in lists.items():
            inner = set().union(*(item for item in items if isinstance(item, dict)))
            # a text in a list of another name may be a passage that was found for the question
            names = ANSWERS if field.lower() in plural(ANSWERS) + ["comments"] else ANSWERS_ONLY
            text = named_in(inner, names) if not inner & {"role", "from"} else []
            mark = named_in(inner, SCORES + RANKS)
            if text and mark:
                used, text, mark = [field], text[0], mark[0]
                break
        else:
            return None
    is_rank = mark.lower() in plural(RANKS)

    def convert(r):
        items = rows_of({name: r[name] for name in used} if len(used) > 1 else r[used[0]])
        marked = [item for item in items if is_something(item.get(mark))]
        scores = [-number(item[mark]) if is_rank else item[mark] for item in marked]
        answers = [answer_of(item[text]) for item in marked]
        return from_sides(asked_in(r, parts), answers, scores), len(items) - len(marked)
    of = "" if len(used) > 1 else f"{used[0]}: "
    what = f"{of}{text} as completion, {mark} as {'rank, 1 the best' if is_rank else 'score'}"
    # the sides of GPT-4-LLM's comparisons stand in its list too
    return what, {*used, *sides_in(fields).values()}, {text, mark}, convert


# ------------------------------------------------------------------------------------------------
# Sides: response_a and response_b, answer1 and answer2

VERDICTS = ["winner", "preference", "preferred", "overall_preference", "preference_strength",
            "choice", "better_response_id", "better", "best", "chosen", "selected", "label",
            "labels", "verdict", "comparison", "pairwise", "pw", "annotations",
            "choose-best-response", "preference.responses"]
SIGNED = ["overall_preference", "preference_strength"]  # HelpSteer's: above 0, the second is better
TIE = re.compile(r"\W*(tie|both|equal|same|draw|neither|no.preference)")
NAME = re.compile(r"\W*(?:(?:model|option|side|" + "|".join(SIDES) +
                  r")[-_ ]*)*(\d+|a|b|c|d|left|right|first|second)\W*")
PLACES = {"left": 0, "first": 0, "right": 1, "second": 1}


def sides_in(fields, stems=SIDES):
    """{"a": "response_a", "b": "response_b"} of the first of the stems, such as "response", that
    has two fields or more; else {}."""
    for stem in stems:
        matches = [(re.fullmatch(rf"{stem}[-_ ]?([a-d]|\d+)", field, re.I), field)
                   for field in fields]
        sides = {match[1].lower(): field for match, field in matches if match}
        if len(sides) > 1:
            order = sorted(sides, key=lambda name: (len(name), name))
            return {name: sides[name] for name in order}
    return {}


def votes_in(verdict):
    """A verdict may be one vote, several people's, or an object that holds them."""
    if isinstance(verdict, dict):
        names = [name for name in ("selected", "choices", "value") if name in verdict]
        is_best = verdict.get("rank", 1) in (1, "1")
        return votes_in(verdict[names[0]]) if names and is_best else []
    if isinstance(verdict, list):
        return [vote for part in verdict for vote in votes_in(part)]
    return [verdict] if is_something(verdict) else []


def shares(vote, names, models):
    """What each side, of these names, has of a vote: "model_a", "Response 2", "left", 1, "tie", or
    the name of its model. Of sides 1 and 2, 1.5 is a tie."""
    said = str(vote).strip().lower()
    if vote in models:
        return [float(model == vote) / models.count(vote) for model in models]
    if TIE.match(said):
        return [1 / len(names)] * len(names)
    name = NAME.fullmatch(re.sub(r"^(\d+)\.0$", r"\1", said))
    place = PLACES.get(name[1]) if name else None
    if name and name[1] in names:
        place = names.index(name[1])
    if place is not None and place < len(names):
        return [float(i == place) for i in range(len(names))]
    if len(names) == 2 and names[0].isdigit() and re.fullmatch(r"[\d.]+", said):
        low, high, value = (number(text) for text in (*names, said))
        if low <= value <= high:
            return [high - value, value - low]
    raise LeftOut(f"its verdict {said[:40]!r} names none of the sides {', '.join(names)}")


def find_sides(objects, fields, parts):
    """(what, used fields, their fields, function) where fields are sides and others say which is
    better: a score or rank of each, a flag of each, or a verdict."""
    sides = sides_in(fields)
    if not sides:
        return None
    names, texts = list(sides), list(sides.values())
    marks, flags = sides_in(fields, SCORES + RANKS), sides_in(fields, ["winner_model", "winner"])
    models = list(sides_in(fields, ["model", "generator"]).values())
    ties = named_in(fields, ["winner_tie", "winner_model_tie"])
    verdict = named_in(fields, VERDICTS)[:1]
    if list(marks) == names:
        by = list(marks.values())
        sign = -1 if sides_in(fields, RANKS) == marks else 1
    elif list(flags) == names:
        by = [*flags.values(), *ties]
    elif verdict:
        by = verdict
    else:
        return None
    # 1 of sides 1 and 2 may be the second
    is_index = verdict and "0" not in names and any(str(r.get(by[0])) in ("0", "0.0")
                                                    for r in objects)

    def flagged(r):
        on = [str(r.get(field)).lower() in ("1", "1.0", "true") for field in by]
        if not any(on):
            raise LeftOut("none of its sides is the winner")
        return ["tie" if place >= len(names) else names[place]
                for place, is_on in enumerate(on) if is_on]

    def scores(r):
        if list(marks) == names:
            return [-number(r[field]) if sign < 0 else r[field] for field in by]
        if by[0].lower() in SIGNED:
            strength = number(r[by[0]])
            return [max(-strength, 0.0), max(strength, 0.0)]
        if by == verdict and is_index and names[0].isdigit():
            raise LeftOut(f"its {by[0]} is 0 in some records: it does not number the sides "
                          f"{', '.join(names)}")
        votes = flagged(r) if list(flags) == names else votes_in(r[by[0]])
        if not votes:
            raise LeftOut("nobody says which side is better")
        each = [shares(vote, names, [r.get(model) for model in models]) for vote in votes]
        return [sum(of_side) / len(votes) for of_side in zip(*each)]

    def convert(r):
        said, asked = [r[text] for text in texts], r.get(parts.get("prompt"))
        if isinstance(asked, list) and all(isinstance(text, str) for text in asked):  # turns
            said = [[text for turn in zip(asked, map(words, side), strict=True) for text in turn]
                    for side in said]
            return from_sides([], said, scores(r)), 0
        return from_sides(asked_in(r, parts), said, scores(r)), 0
    what = f"{' and '.join(texts)} compared by {' and '.join(by)}"
    return what, {*texts, *by}, {"role", "content", "value"}, convert


# ------------------------------------------------------------------------------------------------
# The others: (name, fields, fields of what lies in these, function)

def from_shp(r):
    """Ethayarajh et al. 2022: two comments on a post. The one with r times the votes of the other
    scores log2(1 + r), at least 1, and the other 0."""
    ratio = number(r["score_ratio"])
    if not 0 <= ratio < math.inf:
        raise LeftOut("its score_ratio is no number from 0")
    sides = [r["human_ref_A"], r["human_ref_B"]]
    chosen, rejected = sides if int(r["labels"]) else sides[::-1]
    return from_pair([{"role": "user", "content": words(r["history"])}], chosen, rejected,
                     math.log2(1 + ratio))


def from_seed_task(r):
    return [ours for instance in r["instances"]
            for ours in from_parts(r | instance, dict(prompt="instruction", input=["input"],
                                                      completion="output"), False)[0]]


def from_summaries(r):
    info = r["info"]
    texts = [words(info.get(name)) for name in ("title", "post", "article") if info.get(name)]
    post = as_prompt([{"role": "user", "content": "\n\n".join(texts)}])
    if "summary" in r:
        return [{"user_input": post, "completion": words(r["summary"]["text"]).strip(),
                 "score": r["summary"]["axes"]["overall"]}]
    return scored(post, [(words(summary["text"]).strip(), float(i == int(r["choice"])))
                         for i, summary in enumerate(r["summaries"])])


def from_tree(r):
    """OASST: the replies to each prompt of a tree; where people ranked them, the last of n scores
    0, the first n - 1. One that nobody ranked is a demonstration."""
    records = []

    def walk(node, messages):
        messages = messages + [{"role": ROLES[node["role"]], "content": words(node["text"])}]
        replies = [reply for reply in node.get("replies") or []
                   if str(reply.get("deleted")).lower() not in ("true", "1")]
        if messages[-1]["role"] == "user":
            ranked = [reply for reply in replies if is_something(reply.get("rank"))]
            if len({reply["text"].strip() for reply in ranked}) > 1:
                records.extend(scored(as_prompt(messages), [
                    (reply["text"].strip(), len(ranked) - 1 - number(reply["rank"]))
                    for reply in ranked]))
            else:  # it was compared with nothing, or with itself
                ranked = []
            records.extend({"user_input": as_prompt(messages),
                            "completion": words(reply["text"]).strip()}
                           for reply in replies if reply not in ranked)
        for reply in replies:
            walk(reply, messages)
    walk(r["prompt"], [])
    return records


LAYOUTS = [
    ("SHP comments", {"history", "human_ref_A", "human_ref_B", "labels", "score_ratio"}, set(),
     from_shp),
    ("self-instruct seed tasks", {"instruction", "instances"}, {"input", "output"}, from_seed_task),
    ("summaries with feedback", {"info", "summaries", "choice"},
     {"title", "post", "article", "text"}, from_summaries),
    ("rated summaries", {"info", "summary"}, {"title", "post", "article", "text", "axes"},
     from_summaries),
    ("OASST trees", {"message_tree_id", "prompt"},
     {"message_id", "parent_id", "message_tree_id", "role", "text", "replies", "rank", "deleted"},
     from_tree),
]
