"""Records of others as ours: which of their fields plays which part.

A record of ours is a prompt, `{"user_input": ...}`, with a completion, or with a completion and its
score. `PARTS` says under which names the parts of one are found elsewhere. layouts_compared.py has
what needs more than names, layouts_files.py reads the files.
"""

import re

# Part: the names of the field that plays it, in small or capital letters. The first that a file has
# counts, but all of `input`.
PARTS = {
    "system": ["system", "system_prompt"],
    "history": ["history"],            # earlier turns: [[question, answer], ...]
    "messages": ["messages", "conversations", "conversation", "dialogue", "trajectory",
                 "data", "text"],
    "prompt": ["user_input", "prompt", "instruction", "question", "problem", "query", "input",
               "inputs", "context"],
    "input": ["input", "context"],     # what the prompt is about, where it is not the prompt
    "completion": ["completion", "output", "response", "solution", "answer", "target",
                   "targets"],
    "chosen": ["chosen", "chosen_response", "preferred_output", "preferred", "response_j",
               "pos_resp"],
    "rejected": ["rejected", "rejected_response", "non_preferred_output", "dispreferred",
                 "response_k", "neg_resp"],
    "score": ["score", "rating", "overall_score", "helpfulness"],
    "label": ["label", "kto_tag", "is_safe", "is_correct"],  # whether the completion is a good one
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
    beginning of a paragraph (HH) or, where the text begins with it, of a line (BELLE), in ChatML or
    in [INST] of LLaMA 2; else one message of the user."""
    if text.lstrip().startswith("<|im_start|>"):
        found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)(?:<\|im_end\|>|$)", text, re.S)
        return [(role, said.strip()) for role, said in found]
    if re.match(r"\s*(<s>)?\s*\[INST\]", text):
        system, rest = re.fullmatch(r"(?:.*?<<SYS>>\s*(.*?)\s*<</SYS>>)?(.*)", text, re.S).groups()
        turns = re.split(r"\[/?INST\]|</s>|<s>", rest)
        said = [turn.strip() for turn in turns if turn.strip()]
        return [("system", system)] * bool(system) + [
            (("user", "assistant")[i % 2], turn) for i, turn in enumerate(said)]
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
    "content"} or ShareGPT's {"from", "value"}, from a list of texts that take turns, or from a list
    of exchanges, {"human", "assistant"} or {"input", "output"}.

    Neighbours of one role become one message: many chat templates take no other dialogue.
    """
    if isinstance(value, dict):
        value = next((value[name] for name in ("messages", "full_text") if name in value), value)
    if isinstance(value, str):
        said = turns_of(value)
    elif isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        said = [(("user", "assistant")[n % 2], text) for n, text in enumerate(value)]
    elif isinstance(value, (dict, list)):
        said = []
        for message in [value] if isinstance(value, dict) else value:
            if not isinstance(message, dict):
                raise LeftOut("a message is not an object")
            asked = named_in(message, PARTS["prompt"] + ["human", "user"])
            answer = named_in(message, PARTS["completion"] + ["assistant", "gpt"])
            if asked and answer and not message.keys() & {"role", "from"}:
                said += [("user", text_of(message[asked[0]])),
                         ("assistant", text_of(message[answer[0]]))]
            else:
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

def named_in(fields, names):
    """Those of the fields that have one of these names, in the order of the names."""
    by_name = {field.lower(): field for field in sorted(fields)}
    return [by_name[name] for name in names if name in by_name]


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
    except (TypeError, ValueError):
        raise LeftOut("its score is not a number") from None


SCALE = re.compile(r"\s*([-+.\d]+)\s*(?:(?:/|out of|of)\s*([.\d]+)|%)\s*", re.I)


def score_of(value):
    """(the number, what it is out of) of a score: 8 and 10 for "8/10", "8 of 10" or "8 out of 10",
    80 and 100 for "80%"; a plain number is out of None."""
    if match := isinstance(value, str) and SCALE.fullmatch(value):
        return number(match[1]), number(match[2] or 100)
    return number(value), None


def asked_in(record, parts):
    """The messages before the answer, or with it where the record is a whole dialogue."""
    messages = dialogue(record[parts["messages"]]) if record.get(parts.get("messages")) else []
    if parts.get("messages", "").lower() == "text" and len(messages) < 2:
        raise LeftOut("its text has no turns (--map prompt=text takes it as a prompt)")
    prompt = record.get(parts.get("prompt"))
    asked = [] if prompt is None else dialogue(prompt)
    # no_robots has both a dialogue and its first message
    said = [message for message in messages if message["role"] != "system"]
    is_said = bool(said) and said[:len(asked)] == asked
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
        messages = [*messages, {"role": "assistant", "content": answer_of(completion)}]
    if not messages or messages[-1]["role"] != "assistant":
        return [{"user_input": as_prompt(messages)}], 0
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    score = record.get(parts.get("score", parts.get("label")))
    if ("score" in parts or "label" in parts) and not (is_ours and score is None):
        if "score" not in parts and score not in (True, False, "true", "false", "True", "False"):
            raise LeftOut(f"its {parts['label']} is neither true nor false")
        if "score" not in parts:
            score = float(score in (True, "true", "True"))
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
    """Of a prompt, each side may be a list of texts too: several answers, as in RewardBench 2."""
    answers = [(answer, score) for side, score in ((chosen, better), (rejected, 0.0)) for answer in
               (side if before and isinstance(side, list) and isinstance(side[0], str) else [side])]
    return from_sides(before, *zip(*answers))


def from_sides(before, sides, scores):
    """Each side is an answer to the messages `before`, or the whole dialogue."""
    prompts, answers = [], []
    for side in sides:
        if before and isinstance(side, str) and not side.startswith("\n\nHuman:"):
            said = [{"role": "assistant", "content": side}]
        else:
            said = dialogue(side)
        if not before and len(said) < 2:
            raise LeftOut("there is no prompt")
        if not said or said[-1]["role"] != "assistant":
            raise LeftOut("a side does not end with the assistant")
        prompts.append(said[:-1] or before)
        answers.append(said[-1]["content"].strip())
    if any(prompt != prompts[0] for prompt in prompts):
        raise LeftOut(f"its {'two ' * (len(sides) == 2)}sides answer different prompts")
    return scored(as_prompt(prompts[0]), list(zip(answers, scores, strict=True)))


def scored(prompt, answers):
    """Records of [(text, score)], answers to one prompt."""
    if len({text for text, _ in answers}) < 2:
        raise LeftOut("its completions are all the same")
    return [{"user_input": prompt, "completion": text, "score": score} for text, score in answers]
