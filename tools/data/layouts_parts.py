"""Foreign records to ours, where the names of their fields say which part they play."""

import contextlib
import re

from tools.data.layouts import (ENDS, PARTS, TEMPLATE, LeftOut, as_prompt, dialogue, named_in,
                                with_system)


def parts_of(fields, mapped):
    """{part: its field, or a list of them} for a file whose records have these fields. `mapped`:
    what --map says."""
    parts = {}
    for part, names in PARTS.items():
        named = named_in(fields - set(mapped.values()), names)
        if part in mapped:
            parts[part] = mapped[part]
        elif named:
            parts[part] = named[0]
    inputs = [name for name in named_in(fields, PARTS["input"]) if name != parts.get("prompt")]
    parts["input"] = [mapped["input"]] if "input" in mapped else inputs
    if "chosen" in parts:  # a pair has no other completion
        parts.pop("completion", None)
    if "prompt" in parts and parts.get("messages", "").lower() in ("text", "data"):
        del parts["messages"]  # where there is a prompt, these are something else
    return {part: names for part, names in parts.items() if names}


TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


def truth_of(value):
    """What a label says, a boolean, 0 or 1, or a text of these; None if it is something else."""
    return TRUTHS.get(str(value).lower())


def misnamed(objects, fields):
    """The fields that do not play the part that their name says: a label that is an object or a
    list, such as topics; a `prompt` that is a template with instruction and answer in it."""
    wrong = {field for field in named_in(fields, ["label"])
             if all(isinstance(r.get(field), dict | list | None) for r in objects)}
    whole, asked = named_in(fields, ["prompt"]), named_in(fields, ["instruction"])
    answer = named_in(fields, PARTS["completion"])
    if whole and asked and answer:
        texts = [[str(r.get(names[0]) or "").strip() for names in (whole, asked, answer)]
                 for r in objects]
        filled = [bool(said) and ask in text and text.endswith(said) for text, ask, said in texts]
        if 2 * sum(filled) > len(objects):
            wrong.add(whole[0])
    return wrong


def words(value):
    """A text that is there: "" for what stands for none."""
    if value is None or value == "<noinput>":
        return ""
    if not isinstance(value, str):
        raise LeftOut("a field that should be a string is not one")
    return value


def answer_of(value):
    """The text of an answer, which may come as a message of the assistant."""
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        raise LeftOut("its completion is a list of texts, and nothing says which is the better")
    if isinstance(value, (list, dict)):
        said = dialogue(value)
        if [message["role"] for message in said] != ["assistant"]:
            raise LeftOut("its completion is not a message of the assistant")
        value = said[0]["content"]
    return words(value)


def number(value):
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise LeftOut("its score is not a number") from None


SCALE = re.compile(r"\s*([-+.\d]+)\s*(?:(?:/|out of|of)\s*([.\d]+)|%)\s*", re.I)


def score_of(value):
    """(the number, what it is out of) of a score: 8 and 10 for "8/10", "8 of 10" or "8 out of 10",
    80 and 100 for "80%"; a plain number is out of None."""
    if match := isinstance(value, str) and SCALE.fullmatch(value):
        return number(match[1]), number(match[2] or 100)
    return number(value), None


def unspaced(messages):
    """The messages to compare, whatever their white space."""
    return [(message["role"], message["content"].split()) for message in messages]


def asked_in(record, parts):
    """The messages before the answer, or with it where the record is a whole dialogue."""
    messages = dialogue(record[parts["messages"]]) if record.get(parts.get("messages")) else []
    if parts.get("messages", "").lower() == "text" and len(messages) < 2:
        raise LeftOut("its text has no turns (--map prompt=text takes it as a prompt)")
    prompt = record.get(parts.get("prompt"))
    asked = [] if prompt is None else dialogue(prompt)
    # no_robots has both a dialogue and its first message
    said = [message for message in messages if message["role"] != "system"]
    is_said = bool(said) and unspaced(asked) in (unspaced(said[:len(asked)]),
                                                 unspaced(messages[:len(asked)]))
    for pair in record.get(parts.get("history")) or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise LeftOut("its history is not a list of pairs")
        messages += [{"role": role, "content": words(text)}
                     for role, text in zip(("user", "assistant"), pair)]
    messages = messages if is_said else messages + asked
    more = [text for name in parts.get("input", []) if (text := words(record.get(name)))]
    if more and messages and messages[-1]["role"] == "user":
        last = messages[-1]["content"]
        messages[-1] = {"role": "user", "content": "\n\n".join([last] * bool(last) + more)}
    elif more:
        messages.append({"role": "user", "content": "\n\n".join(more)})
    return with_system(words(record.get(parts.get("system"))), messages)


def has_answer(messages):
    """Whether a dialogue ends with the assistant."""
    with contextlib.suppress(LeftOut):
        return [message["role"] for message in dialogue(messages)][-1:] == ["assistant"]
    return False


def hides_answer(record, parts):
    """Whether a record's dialogue ends with the assistant, and no longer with its prompt added."""
    with contextlib.suppress(LeftOut, TypeError):
        said = record.get(parts["messages"])
        return has_answer(said) and not has_answer(asked_in(record, parts))
    return False


def from_parts(record, parts, all_turns):
    """Our records of one whose fields play these parts, and how many answers it has that none of
    them demonstrates."""
    messages = asked_in(record, parts)
    if "chosen" in parts and "rejected" in parts:
        return from_pair(messages, *(record.get(parts[side]) for side in ("chosen", "rejected"))), 0
    completion, is_ours = record.get(parts.get("completion")), parts.get("prompt") == "user_input"
    if completion is None and "completion" in parts and not is_ours:  # ours may be a bare prompt
        raise LeftOut(f"its {parts['completion']} is missing")
    if completion is not None:
        said = said_in(answer_of(completion), messages)
        if not said or said[-1]["role"] != "assistant":
            raise LeftOut("its completion does not end with the assistant")
        messages = [*asked_by(messages, said[:-1]), said[-1]]
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not messages or messages[-1]["role"] != "assistant":
        shown = answers if all_turns else []
        ours = [answer_in(messages, i) for i in shown if messages[i]["content"].strip()]
        return [*ours, {"user_input": as_prompt(messages)}], len(answers) - len(shown)
    score = record.get(parts.get("score", parts.get("label")))
    if ("score" in parts or "label" in parts) and not (is_ours and score is None):
        if "score" not in parts and (score := truth_of(score)) is None:
            raise LeftOut(f"its {parts['label']} is neither true nor false")
        return [answer_in(messages, answers[-1]) | {"score": score}], 0
    shown = answers if all_turns else answers[-1:]
    ours = [answer_in(messages, i) for i in shown if messages[i]["content"].strip()]
    if not ours:
        raise LeftOut("its completion is empty")
    return ours, len(answers) - len(shown)


def answer_in(messages, i):
    """What the assistant says as message i, and what it answers."""
    return {"user_input": as_prompt(messages[:i]), "completion": messages[i]["content"].strip()}


def without_ends(ours, theirs):
    """Our records; if a text of theirs is in a chat template, without the marks of a turn's end
    behind the answers."""
    if not any(isinstance(text, str) and TEMPLATE.match(text) for text in theirs.values()):
        return ours
    return [r | {"completion": ENDS.sub("", r["completion"]).strip()} if "completion" in r else r
            for r in ours]


def from_pair(before, chosen, rejected, better=1.0):
    """Where there is a prompt, `before`, a side may also be a list of texts: several answers, as in
    RewardBench 2."""
    answers = [(answer, score) for side, score in ((chosen, better), (rejected, 0.0)) for answer in
               (side if before and isinstance(side, list) and isinstance(side[0], str) else [side])]
    return from_sides(before, *zip(*answers))


def said_in(text, before):
    """The messages of a text that answers `before`: the answer; or a dialogue that ends with it, if
    the text is in a chat template, begins as HH's do, or repeats the question. Any other text with
    turns in it is an answer about a dialogue."""
    said, asked = dialogue(text), unspaced(before[-1:])
    if TEMPLATE.match(text) or text.startswith("\n\nHuman:") or any(
            turn in asked for turn in unspaced(said[:-1])):
        return said
    return [{"role": "assistant", "content": text}]


def asked_by(before, said):
    """What a side answers that says, before its answer, `said`: `before` may have more to it, such
    as earlier turns, or only a system message."""
    if not said or unspaced(before[-len(said):]) == unspaced(said):
        return before
    first = [message for message in before[:1] if message["role"] == "system"]
    # one that was split off a text is still in the text
    if first and said[0]["role"] != "system" and first[0]["content"] not in said[0]["content"]:
        return first + said
    return said


def from_sides(before, sides, scores):
    """Each side is an answer to the messages `before`, or the whole dialogue."""
    if len(sides) < 2:
        raise LeftOut("fewer than two of its completions have a score")
    prompts, answers = [], []
    for side in sides:
        said = said_in(side, before) if before and isinstance(side, str) else dialogue(side)
        if not before and len(said) < 2:
            raise LeftOut("there is no prompt")
        if not said or said[-1]["role"] != "assistant":
            raise LeftOut("a side does not end with the assistant")
        prompts.append(asked_by(before, said[:-1]))
        answers.append(said[-1]["content"].strip())
    if any(prompt != prompts[0] for prompt in prompts):
        raise LeftOut(f"its {'two ' * (len(sides) == 2)}sides answer different prompts")
    return scored(as_prompt(prompts[0]), list(zip(answers, scores, strict=True)))


def scored(prompt, answers):
    """Records of [(text, score)], answers to one prompt, compared with each other."""
    if len({text for text, _ in answers}) < 2:
        raise LeftOut("its completions are all the same")
    return [{"user_input": prompt, "completion": text, "score": score,
             "compared": repr(answers)} for text, score in answers]
