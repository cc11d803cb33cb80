"""What the LLM is asked, by kind of data set. A templates.json with some of these keys overrides
them."""

import json
import os
import re

from lib.errors import explain, stop

TEMPLATES = {
    "actor": "Here are some tasks that people have given to an assistant:\n\n{examples}\n\nWrite "
             "{number} new ones, in {language}. Vary the subject, the kind of task, the wording "
             "and the length. Each must make sense without the others and be answerable with text "
             "alone. Reply with nothing but a numbered list.",
    "rlhf": "These are things that users have said to a chat assistant:\n\n{examples}\n\nThink of "
            "{number} other users and write what each of them says first, in {language}: "
            "questions and requests as different as possible, each complete in itself. Reply with "
            "nothing but a numbered list.",
    "reward": "You grade the answers of an assistant. A user wrote:\n\n{user_input}\n\nThe "
              "assistant answered:\n\n{completion}\n\nHow good is the answer? Look at whether it "
              "does what was asked, is true, clear, polite and no longer than it needs to be. Give "
              "a number from 0 (useless) to 5 (could not be better), decimals allowed. Reply with "
              "one line: Score: <number>",
}
NEEDED = {"actor": ["examples"], "rlhf": ["examples"], "reward": ["user_input", "completion"]}


def template_of(name, path):
    """The template `name`: that of the file `path`, or of a templates.json in this folder, or the
    built-in one. A file that is not JSON is the template itself."""
    if not path and os.path.exists("templates.json"):
        path = "templates.json"
    template = TEMPLATES[name]
    if path:
        with explain(f"{path}: cannot be read as templates"):
            with open(path, encoding="utf-8-sig") as file:
                template = file.read()
            if path.endswith(".json"):
                template = json.loads(template).get(name, TEMPLATES[name])
            if not isinstance(template, str):
                raise TypeError(f"what stands under '{name}' is not a text")
    for slot in NEEDED[name]:
        if f"{{{slot}}}" not in template:
            stop(f"{path}: template '{name}' lacks its placeholder {{{slot}}}")
    return template


def fill_in(template, **slots):
    """Fills every `{slot}` at once: a brace in what is filled in stays as it is."""
    return re.sub(r"\{(\w+)\}", lambda found: str(slots.get(found[1], found[0])), template)
