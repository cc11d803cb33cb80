"""Records of others as ours: which of their fields plays which part.

A record of ours is a prompt, `{"user_input": ...}`, with a completion, or with a completion and its
score. `PARTS` says under which names the parts of one are found elsewhere; `LAYOUTS` has what needs
more than names. What a record holds is used, or named: see `Found`.
"""

import csv
import gzip
import io
import math
import re
from collections import Counter

from lib.data import read_values, what_is_wrong
from lib.errors import explain, stop

# Part: the names of the field that plays it. The first that a file has counts, but all of `input`.
PARTS = {
    "system": ["system", "system_prompt"],
    "history": ["history"],            # earlier turns: [[question, answer], ...]
    "messages": ["messages", "conversations", "conversation", "dialogue", "data", "text"],
    "prompt": ["user_input", "prompt", "instruction", "question", "query", "input", "context"],
    "input": ["input", "context"],     # what the prompt is about, where it is not the prompt
    "completion": ["completion", "output", "response", "answer", "target"],
    "chosen": ["chosen", "chosen_response", "preferred_output", "preferred"],
    "rejected": ["rejected", "rejected_response", "non_preferred_output", "dispreferred"],
    "score": ["score", "rating", "overall_score", "helpfulness"],
    "label": ["label", "kto_tag"],     # whether the completion is a good one
}
ROLES = {"system": "system", "developer": "system", "human": "user", "user": "user",
         "prompter": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant"}


class LeftOut(Exception):
    """Raised for a record that is of no use; says why, in words that follow "left out: "."""


# ------------------------------------------------------------------------------------------------
# Dialogues

def turns_of(text):
    """Chat messages from a text: turns after "### Human:" (guanaco), after "Human:" at the
    beginning of a paragraph (HH) or, where the text begins with it, of a line (BELLE); else one
    message of the user."""
    mark = r"(?:^|\n\n)(Human|Assistant):"
    if re.match(r"\s*### (Human|Assistant):", text):
        mark = r"### (Human|Assistant):"
    elif text.startswith("Human:"):
        mark = r"(?:^|\n+)(Human|Assistant):"
    _, *parts = re.split(mark, text)
    return [(role, said.strip()) for role, said in zip(parts[::2], parts[1::2])] or [("user", text)]


def text_of(content):
    """The text of a message, which may come as a list of parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and isinstance(part.get("text"), str)
                   for part in content):
            raise LeftOut("a message has a part that is no text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise LeftOut("a message has no text")
    return content


def dialogue(value):
    """Chat messages from a text (see `turns_of`), from a message or a list of them, {"role",
    "content"} or ShareGPT's {"from", "value"}, or from a list of texts that take turns.

    Neighbours of one role become one message: many chat templates take no other dialogue.
    """
    if isinstance(value, dict) and "messages" in value:
        value = value["messages"]
    if isinstance(value, str):
        said = turns_of(value)
    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        said = [(("user", "assistant")[n % 2], text) for n, text in enumerate(value)]
    elif isinstance(value, (dict, list)):
        said = []
        for message in [value] if isinstance(value, dict) else value:
            if not isinstance(message, dict):
                raise LeftOut("a message is not an object")
            role = message.get("role", message.get("from"))
            said.append((role, text_of(message.get("content", message.get("value")))))
    else:
        raise LeftOut("a dialogue is not a list of messages")
    messages = []
    for theirs, text in said:
        role = ROLES.get(str(theirs).lower())
        if role is None:
            raise LeftOut(f"a message is of {theirs!r}")
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text
        else:
            messages.append({"role": role, "content": text})
    if messages and messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # of a transcript that ends with "Assistant:"
    return messages


def as_prompt(messages):
    """A lone message of the user is a text, anything longer stays a list of messages."""
    roles = [message["role"] for message in messages if message["role"] != "system"]
    if not roles or all(not m["content"].strip() for m in messages if m["role"] == "user"):
        raise LeftOut("there is no prompt")
    if roles[0] != "user" or roles[-1] != "user":
        raise LeftOut(f"the dialogue {'begins' if roles[0] != 'user' else 'ends'} with the "
                      "assistant")
    return messages[0]["content"] if len(messages) == 1 else messages


def with_system(system, messages):
    if not system:
        return messages
    if messages and messages[0]["role"] == "system":
        system, messages = f"{system}\n\n{messages[0]['content']}", messages[1:]
    return [{"role": "system", "content": system}, *messages]


# ------------------------------------------------------------------------------------------------
# Records by the names of their fields

def parts_of(fields, mapped):
    """{part: its field, or a list of them} for a file whose records have these fields. `mapped`:
    what --map says."""
    parts = {}
    for part, names in PARTS.items():
        named = [name for name in names if name in fields and name not in mapped.values()]
        if part in mapped:
            parts[part] = mapped[part]
        elif named:
            parts[part] = named[0]
    inputs = [name for name in PARTS["input"] if name in fields and name != parts.get("prompt")]
    parts["input"] = [mapped["input"]] if "input" in mapped else inputs
    if "chosen" in parts:  # a pair has no other completion
        parts.pop("completion", None)
    if "prompt" in parts and parts.get("messages") in ("text", "data"):
        del parts["messages"]  # where there is a prompt, these are something else
    return {part: names for part, names in parts.items() if names}


def words(value):
    """A text that is there: "" for what stands for none."""
    if value is None or value == "<noinput>":
        return ""
    if not isinstance(value, str):
        raise LeftOut("a field that should be a string is not one")
    return value


def number(value):
    try:
        return float(value)
    except (TypeError, ValueError):
        raise LeftOut("its score is not a number") from None


def asked_in(record, parts):
    """The messages before the answer, or with it where the record is a whole dialogue."""
    messages = dialogue(record[parts["messages"]]) if record.get(parts.get("messages")) else []
    if "text" == parts.get("messages") and len(messages) < 2:
        raise LeftOut("its text has no turns")
    for pair in record.get(parts.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise LeftOut("its history is not a list of pairs")
        messages += [{"role": role, "content": words(text)}
                     for role, text in zip(("user", "assistant"), pair)]
    prompt = record.get(parts.get("prompt"))
    if prompt is not None:
        messages = messages + dialogue(prompt)
    more = [text for name in parts.get("input", []) if (text := words(record.get(name)))]
    if more and messages and messages[-1]["role"] == "user":
        last = messages[-1]["content"]
        messages[-1] = {"role": "user", "content": "\n\n".join([last] * bool(last) + more)}
    elif more:
        messages.append({"role": "user", "content": "\n\n".join(more)})
    return with_system(words(record.get(parts.get("system"))), messages)


def from_parts(record, parts, all_turns):
    """Our records of one whose fields play these parts, and how many answers it has that none of
    them demonstrates."""
    messages = asked_in(record, parts)
    if "chosen" in parts and "rejected" in parts:
        return from_pair(messages, *(record.get(parts[side]) for side in ("chosen", "rejected"))), 0
    completion, is_ours = record.get(parts.get("completion")), parts.get("prompt") == "user_input"
    if completion is None and "completion" in parts and not is_ours:  # ours may be a bare prompt
        raise LeftOut(f"its {parts['completion']} is missing")
    if isinstance(completion, (list, dict)):
        said = dialogue(completion)
        if [message["role"] for message in said] != ["assistant"]:
            raise LeftOut("its completion is not a message of the assistant")
        completion = said[0]["content"]
    if completion is not None:
        messages = [*messages, {"role": "assistant", "content": words(completion)}]
    if not messages or messages[-1]["role"] != "assistant":
        return [{"user_input": as_prompt(messages)}], 0
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    score = record.get(parts.get("score", parts.get("label")))
    if ("score" in parts or "label" in parts) and not (is_ours and score is None):
        if "score" not in parts and score not in (True, False, "true", "false", "True", "False"):
            raise LeftOut(f"its {parts['label']} is neither true nor false")
        score = number(score) if "score" in parts else float(score in (True, "true", "True"))
        return [answer_in(messages, answers[-1]) | {"score": score}], 0
    shown = answers if all_turns else answers[-1:]
    ours = [answer_in(messages, i) for i in shown if messages[i]["content"].strip()]
    if not ours:
        raise LeftOut("its completion is empty")
    return ours, len(answers) - len(shown)


def answer_in(messages, i):
    """What the assistant says as message i, and what it answers."""
    return {"user_input": as_prompt(messages[:i]), "completion": messages[i]["content"].strip()}


def from_pair(before, chosen, rejected, better=1.0):
    """Each side is an answer to the messages `before`, or the whole dialogue."""
    sides = []
    for side in (chosen, rejected):
        if before and isinstance(side, str) and not side.startswith("\n\nHuman:"):
            said = [{"role": "assistant", "content": side}]
        else:
            said = dialogue(side)
        if not said or said[-1]["role"] != "assistant":
            raise LeftOut("a side does not end with the assistant")
        sides.append((said[:-1] or before, said[-1]["content"].strip()))
    (prompt, chosen), (other_prompt, rejected) = sides
    if prompt != other_prompt:
        raise LeftOut("its two sides answer different prompts")
    return scored(as_prompt(prompt), [(chosen, better), (rejected, 0.0)])


def scored(prompt, answers):
    """Records of [(text, score)], answers to one prompt."""
    if len({text for text, _ in answers}) < 2:
        raise LeftOut("its completions are all the same")
    return [{"user_input": prompt, "completion": text, "score": score} for text, score in answers]


# ------------------------------------------------------------------------------------------------
# Records that need more than names: (name, fields, fields of what lies in these, function)

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


def from_rated(prompt, items, text, score, sign=1):
    """The items of a list, each with its text and its score; sign -1: ranks, the best being the
    lowest."""
    def convert(r):
        found = [(words(item[text]).strip(), sign * number(item[score])) for item in r[items]
                 if item.get(score) is not None]
        return scored(as_prompt(dialogue(r[prompt])), found)
    return convert


def from_webgpt(r):
    asked = r["question"]["full_text"] if isinstance(r["question"], dict) else r["question"]
    return scored(asked, [(words(r[f"answer_{i}"]).strip(), number(r[f"score_{i}"]))
                          for i in (0, 1)])


def from_safe_rlhf(r):
    better = int(r["better_response_id"])
    return scored(as_prompt(dialogue(r["prompt"])),
                  [(words(r[f"response_{i}"]).strip(), float(i == better)) for i in (0, 1)])


def from_summaries(r):
    info = r["info"]
    post = "\n\n".join(words(info.get(name)) for name in ("title", "post") if info.get(name))
    return scored(post, [(words(summary["text"]).strip(), float(i == int(r["choice"])))
                         for i, summary in enumerate(r["summaries"])])


def from_tree(r):
    """OASST: the replies to each prompt of a tree; where people ranked them, the last of n scores
    0, the first n - 1."""
    records = []

    def walk(node, messages):
        messages = messages + [{"role": ROLES[node["role"]], "content": words(node["text"])}]
        replies = [reply for reply in node.get("replies") or [] if not reply.get("deleted")]
        if messages[-1]["role"] == "user" and replies:
            ranked = [reply for reply in replies if reply.get("rank") is not None]
            if len(ranked) > 1:
                records.extend(scored(as_prompt(messages), [
                    (reply["text"].strip(), float(len(ranked) - 1 - reply["rank"]))
                    for reply in ranked]))
            else:
                records.append({"user_input": as_prompt(messages),
                                "completion": words(replies[0]["text"]).strip()})
        for reply in replies:
            walk(reply, messages)
    walk(r["prompt"], [])
    return records


LAYOUTS = [
    ("SHP comments", {"history", "human_ref_A", "human_ref_B", "labels", "score_ratio"}, set(),
     from_shp),
    ("self-instruct seed tasks", {"instruction", "instances"}, {"input", "output"}, from_seed_task),
    ("UltraFeedback", {"instruction", "completions"}, {"response", "overall_score"},
     from_rated("instruction", "completions", "response", "overall_score")),
    ("Nectar", {"prompt", "answers"}, {"answer", "rank"},
     from_rated("prompt", "answers", "answer", "rank", -1)),
    ("GPT-4-LLM comparisons", {"user_input", "completion_a", "completion_b",
                               "responses_and_scores"}, {"response", "score"},
     from_rated("user_input", "responses_and_scores", "response", "score")),
    ("WebGPT comparisons", {"question", "answer_0", "answer_1", "score_0", "score_1"},
     {"full_text"}, from_webgpt),
    ("PKU-SafeRLHF", {"prompt", "response_0", "response_1", "better_response_id"}, set(),
     from_safe_rlhf),
    ("summaries with feedback", {"info", "summaries", "choice"}, {"title", "post", "text"},
     from_summaries),
    ("OASST trees", {"message_tree_id", "prompt"}, {"role", "text", "replies", "rank", "deleted"},
     from_tree),
]


# ------------------------------------------------------------------------------------------------
# Files

def read_file(path):
    """The records of a file: what `read_values` reads, one object over several lines, a list in the
    field "data", tables with a head (.csv, .tsv), .parquet."""
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
            inner = values.get("data")
            is_list = isinstance(inner, list) and inner and isinstance(inner[0], dict)
            return inner if is_list else [values]
        return values
    with explain(f"{path}: cannot be read"):
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = io.StringIO(file.read().decode("utf-8-sig"), newline="")
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(text, delimiter="\t" if name.endswith(".tsv") else ","))


def is_something(value):
    return value not in (None, "", [], {})


class Found:
    """What a file held: our records, and what of theirs was left out or not used."""

    def __init__(self):
        self.records, self.left_out, self.unused, self.turns = [], {}, Counter(), 0

    def leave_out(self, n, reason):
        self.left_out.setdefault(reason, []).append(n)

    def say(self, path, number, what):
        print(f"{path}: {number} records, {what}")
        for reason, records in self.left_out.items():
            numbers = ", ".join(map(str, records[:3])) + ", ..." * (len(records) > 3)
            print(f"  left out {len(records)}: {reason} (records {numbers})")
        if self.turns:
            print(f"  {self.turns} answers of earlier turns are not used: --all_turns takes them")
        lost = [f"{field} (in {n} records)" for field, n in self.unused.most_common()]
        print(f"  not used: {', '.join(lost)}" if lost else "  all fields used")


def convert_file(path, number, mapped, all_turns):
    """Our records of one file, of its first `number`. Says what was found."""
    values, found = read_file(path)[:number], Found()
    if not values:
        stop(f"{path}: holds no records")
    objects = [value for value in values if isinstance(value, dict)]
    if not objects and all(isinstance(value, list) for value in values):
        objects = values = [{"messages": value} for value in values]  # bare lists of messages
    fields = set().union(*objects)
    layout = next((layout for layout in LAYOUTS if layout[1] <= fields and not mapped), None)
    if layout:
        what, used, inner, convert = layout
    else:
        parts = parts_of(fields, mapped)
        if not parts.keys() & {"prompt", "messages"} and not {"chosen", "rejected"} <= parts.keys():
            stop(f"{path}: none of the fields {', '.join(sorted(fields))} is known as a prompt: "
                 "say which plays which part, as in --map prompt=question,completion=answer")
        names = {part: " and ".join([name] if isinstance(name, str) else name)
                 for part, name in parts.items()}
        what = ", ".join(f"{name} as {part}" if name != part else name
                         for part, name in names.items())
        used = {field for name in parts.values() for field in ([name] if isinstance(name, str)
                                                               else name)}
        inner = {"messages", "role", "from", "content", "value"}
    for n, theirs in enumerate(values, 1):
        if not isinstance(theirs, dict):
            found.leave_out(n, "not a JSON object")
            continue
        try:
            ours, turns = (convert(theirs), 0) if layout else from_parts(theirs, parts, all_turns)
            for record in ours:
                for field, value in record.items():
                    if wrong := what_is_wrong(field, value):
                        raise LeftOut(f"its {field} {wrong}")
        except LeftOut as reason:
            found.leave_out(n, str(reason))
            continue
        except (LookupError, TypeError, ValueError, AttributeError):
            found.leave_out(n, f"not what {what} look like")
            continue
        found.records += ours
        found.turns += turns
        unused = {field for field in theirs if field not in used and is_something(theirs[field])}
        for field in used & theirs.keys():
            items = theirs[field] if isinstance(theirs[field], list) else [theirs[field]]
            unused |= {f"{field}: {name}" for item in items if isinstance(item, dict)
                       for name in item if name not in inner and is_something(item[name])}
        found.unused.update(unused)
    found.say(path, len(values), what)
    return found.records
