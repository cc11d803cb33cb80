"""Common layouts of records: what the parts of a record are called, and dialogues.

A record of ours is a prompt, `{"user_input": ...}`, with a completion, or with a completion and its
score. `PARTS` says under which names these parts are found elsewhere. layouts_parts.py goes by
these names, layouts_compared.py has what needs more than names, layouts_files.py reads the files.
"""

import re

# Part: the names of the field that plays it, in small or capital letters. Of several in one file
# the first counts; of `input`, all.
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
    "chosen": ["chosen", "chosen_response", "response_chosen", "preferred_output", "preferred",
               "response_j", "pos_resp"],
    "rejected": ["rejected", "rejected_response", "response_rejected", "non_preferred_output",
                 "dispreferred", "response_k", "neg_resp"],
    "score": ["score", "rating", "overall_score", "helpfulness"],
    "label": ["label", "kto_tag", "is_safe", "is_correct"],  # whether the completion is a good one
}
ROLES = {"system": "system", "developer": "system", "human": "user", "user": "user",
         "prompter": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "chatgpt": "assistant", "bot": "assistant", "chatbot": "assistant"}


class LeftOut(Exception):
    """Raised for a record that cannot be used; the message says why."""


def named_in(fields, names):
    """Those of the fields that have one of these names, in the order of the names."""
    by_name = {field.lower(): field for field in sorted(fields)}
    return [by_name[name] for name in names if name in by_name]


# ------------------------------------------------------------------------------------------------
# Dialogues

# How a chat template writes a message: what begins it, with the role in it, and what ends it. A
# prompt that somebody stripped ends with the role.
TEMPLATES = {
    r"<\|im_start\|>([^\n<]*)(?:\n|<\|im_sep\|>|$)": r"<\|im_end\|>",       # ChatML, Phi 4
    r"<\|start_header_id\|>([^\n<]*)<\|end_header_id\|>": r"<\|eot_id\|>",  # LLaMA 3
    r"<start_of_turn>([^\n<]*)(?:\n|$)": "<end_of_turn>",                   # Gemma
    r"<\|(system|user|assistant)\|>(?:\n|$)": r"</s>|<\|end\|>",            # Zephyr, Tulu, Phi 3
}
START = r"\s*(?:<s>|<bos>|<\|begin_of_text\|>|<\|endoftext\|>)?\s*"
TEMPLATE = re.compile(rf"{START}(?:{'|'.join(TEMPLATES)}|\[INST\])")
ENDS = re.compile(r"(?:(?:<\|im_end\|>|<\|eot_id\|>|<end_of_turn>|<\|end\|>|</s>|<eos>|"
                  r"<\|end_?of_?text\|>)\s*)+$")


def turns_of(text):
    """Chat messages from a text: turns after "### Human:" (guanaco), after "Human:" at the
    beginning of a paragraph (HH) or, where the text begins with it, of a line (BELLE), in one of
    TEMPLATES, in [INST] of LLaMA 2, or after <extra_id_1> (HelpSteer 2); else one message of the
    user. What stands before the first turn of a transcript is the system message; of HelpSteer 2,
    the user's.
    """
    for begin, end in TEMPLATES.items():
        if re.match(START + begin, text):
            _, *parts = re.split(begin, text)
            said = [ENDS.sub("", part).strip() for part in parts[1::2]]
            if any(re.search(end, part) for part in said):
                raise LeftOut("there is text outside its messages")
            return [(role, part) for role, part in zip(parts[::2], said)
                    if part or role != "system"]  # Zephyr's template writes an empty one
    if re.match(r"\s*(<s>)?\s*\[INST\]", text):
        system, rest = re.fullmatch(r"(?:(?:<s>|\[INST\]|\s)*<<SYS>>\s*(.*?)\s*<</SYS>>)?(.*)",
                                    text, re.S).groups()
        turns = re.split(r"\[/?INST\]|</s>|<s>", rest)
        said = [turn.strip() for turn in turns if turn.strip()]
        return [("system", system)] * bool(system) + [
            (("user", "assistant")[i % 2], turn) for i, turn in enumerate(said)]
    mark, first = r"(?:^|\n\n)(Human|Assistant):", "system"
    if re.match(r"\s*### (Human|Assistant):", text):
        mark = r"### (Human|Assistant):"
    elif text.startswith("Human:"):
        mark = r"(?:^|\n+)(Human|Assistant):"
    elif "<extra_id_1>Assistant\n" in text:
        mark, first = r"<extra_id_1>(User|Assistant)\n", "user"
    before, *parts = re.split(mark, text)
    if not parts:
        return [("user", text)]
    turns = [(role, said.strip()) for role, said in zip(parts[::2], parts[1::2])]
    return [(first, before.strip())] * bool(before.strip()) + turns


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
    "content"}, {"role", "text"} or ShareGPT's {"from", "value"}, from a list of texts that take
    turns, or from a list of exchanges, {"human", "assistant"} or {"input", "output"}.

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
                names = [name for name in ("content", "value", "text") if name in message]
                said.append((role, text_of(message[names[0]] if names else None)))
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
