"""Dialogues -> tokens, in the checkpoint's chat template."""

import functools
import re

from lib.errors import first_line


def encode_text(tokenizer, text):
    """The tokens of a plain text. A "</s>" in it is four characters of text, never a control
    token."""
    return list(plain_tokens(tokenizer, text))


@functools.lru_cache(maxsize=512)  # the completions of a prompt mostly stand together in a file
def plain_tokens(tokenizer, text):
    """What `encode_text` gives, as a tuple: nobody can change what is remembered."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as text; each call of transformers sets it again
    # (encode would note where each token stands in the text, which takes a third longer)
    return tuple(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def encode_after(tokenizer, before, text):
    """The tokens that `text` has where it follows the plain text `before`. (Alone, it would get the
    space that sentencepiece puts before every text.) Where a token would span the border, `text` is
    cut off there, as it is when a model writes it."""
    if not before:
        return encode_text(tokenizer, text)
    first, both = encode_text(tokenizer, before), encode_text(tokenizer, before + text)
    if both[:len(first)] != first:  # no token spans the border to this character
        first, both = (encode_text(tokenizer, "\0" + part) for part in ("", text))
    return both[len(first):]


@functools.lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """{text: token} of the control tokens. (transformers' all_special_tokens has only those with a
    role, such as eos_token: of LLaMA 3's, <|start_header_id|> has none.)"""
    return {token.content: token for token in tokenizer.added_tokens_decoder.values()
            if token.special}


@functools.lru_cache(maxsize=8)
def control_pattern(tokenizer):
    """Finds control tokens in a text."""
    longest_first = sorted(control_tokens(tokenizer), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def in_template(tokenizer, messages, is_prompt=False):
    """Chat messages as text, in the tokenizer's template; a prompt ends where an answer begins."""
    # LLaMA 3.1's and 3.2's templates write a date, the latter today's if they are given none. But a
    # run that is resumed tomorrow, and the next stage, are to see the same prompts: so always 3.1's
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_prompt,
                                         date_string="26 Jul 2024")


def as_messages(user_input):
    return [{"role": "user", "content": user_input}] if isinstance(user_input, str) else user_input


def encode_dialogue(tokenizer, messages):
    """The tokens of a dialogue in the checkpoint's chat template, up to where the assistant is to
    write, if it is its turn -> tokens; {index of a message: where its answer begins in tokens}, of
    the answers that stand in the template as they are; and the plain text since the last control
    token.

    The template writes control tokens around what people said. The same characters inside what they
    said stay text: a mark, which exists only while the template is filled in, tells them apart.
    Each answer of the assistant has the tokens that it has when it is written after its prompt.
    Raises ValueError if the template refuses the dialogue, or leaves out what a message says.
    """
    control = control_pattern(tokenizer)
    mark = next(chr(c) for c in range(0xE000, 0xF900)
                if not any(chr(c) in message["content"] for message in messages))
    marked = [{**message, "content": control.sub(lambda found: found[0][0] + mark + found[0][1:],
                                                 message["content"])} for message in messages]

    def render(number, is_prompt):
        try:
            return in_template(tokenizer, marked[:number], is_prompt)
        except Exception as error:  # a template may refuse a dialogue, of two users in a row, say
            raise ValueError("the checkpoint's chat template refuses this dialogue: "
                             f"{first_line(error)}") from error

    given = len(messages), messages[-1]["role"] != "assistant"
    text = render(*given)
    for i, message in enumerate(marked):
        said = message["content"].strip()
        if said and text.count(said) < sum(other["content"].count(said) for other in marked):
            # it may stand there in other words
            marked[i] = {**message, "content": said + "x"}
            if render(*given) == text:
                raise ValueError("the checkpoint's chat template leaves out what message "
                                 f"{i + 1}, of the {message['role']}, says")
            marked[i] = message
    borders = {}  # place in the text: the answer that begins there, None if it is not as it was
    for i, message in enumerate(marked):
        if message["role"] == "assistant" and text.startswith(before := render(i, True)):
            is_whole = message["content"].strip() in text[len(before):]
            borders[len(before)] = i if is_whole else None
    found = list(control.finditer(text))
    controls = {match.start(): control_tokens(tokenizer)[match[0]] for match in found}
    cuts = sorted({0, len(text), *borders, *controls, *(match.end() for match in found)})
    # Some control tokens swallow the white space on their right (rstrip) or left. After one most of
    # LLaMA 2's tokenizers begin a text with a space; where they do so only at the beginning of the
    # whole dialogue, a character that stands before the text keeps the space away.
    tokens, answers, before, swallows = [], {}, "", False
    inside = "\0" if getattr(tokenizer, "one_space", False) else ""
    for start, end in zip(cuts, cuts[1:]):
        if borders.get(start) is not None:
            answers[borders[start]] = len(tokens)
        if start in controls:
            tokens.append(tokenizer.convert_tokens_to_ids(text[start:end]))
            before, swallows = inside, controls[start].rstrip
        else:
            part = text[start:end].replace(mark, "")
            part = part.lstrip() if swallows and before == inside else part
            part = part.rstrip() if end in controls and controls[end].lstrip else part
            tokens += encode_after(tokenizer, before, part)
            before += part
    return tokens, answers, before


def check_template(tokenizer):
    """Raises ValueError if the template writes into an answer what belongs into the prompt for it:
    where nothing marks the assistant's turn, or with control tokens, which would end the answer."""
    asked = as_messages("a")
    prompt = in_template(tokenizer, asked, is_prompt=True)
    # a character that no template writes stands for the answer
    text = in_template(tokenizer, [*asked, {"role": "assistant", "content": "\ue000"}])
    before = text.removeprefix(prompt).partition("\ue000")[0].strip()
    unmarked = in_template(tokenizer, asked) == prompt
    if text.startswith(prompt) and before and (
            unmarked or control_pattern(tokenizer).search(before)):
        raise ValueError(f"its chat template writes {before!r} before an answer: with "
                         "add_generation_prompt it must write that into the prompt")


def encode_prompt(tokenizer, user_input):
    """The tokens of a prompt in the chat format, up to where the assistant's answer begins.
    `user_input` is a text or a list of chat messages."""
    return encode_dialogue(tokenizer, as_messages(user_input))[0]


def encode_completion(tokenizer, user_input, completion):
    """(prompt, completion) in tokens: together they are the dialogue in the chat format, up to the
    token with which its template ends the assistant's turn."""
    asked = as_messages(user_input)
    tokens, answers, _ = encode_dialogue(
        tokenizer, [*asked, {"role": "assistant", "content": completion}])
    if len(asked) not in answers:
        # A template that writes an answer unlike the prompt for it, or without its thoughts: it is
        # learned as the model is to write it.
        prompt, _, before = encode_dialogue(tokenizer, asked)
        return prompt, [*encode_after(tokenizer, before, completion.strip()),
                        end_of_turn(tokenizer, str(tokenizer.chat_template))]
    prompt, answer = tokens[:answers[len(asked)]], tokens[answers[len(asked)]:]
    control = set(tokenizer.convert_tokens_to_ids([*control_tokens(tokenizer)]))
    end = next((i for i, token in enumerate(answer) if token in control), None)
    return prompt, answer + [tokenizer.eos_token_id] if end is None else answer[:end + 1]


@functools.lru_cache(maxsize=8)
def end_of_turn(tokenizer, template):
    """The token with which the template ends an answer. (`template` is part of the cache's key.)"""
    text = in_template(tokenizer, [*as_messages("a"), {"role": "assistant", "content": "\ue000"}])
    end = control_pattern(tokenizer).search(text.rpartition("\ue000")[2])
    return tokenizer.convert_tokens_to_ids(end[0]) if end else tokenizer.eos_token_id


def cut_left(tokenizer, user_input, prompt, room):
    """A prompt without the beginning of its text, if it is longer than `room` tokens. What the
    template writes before that text, such as BOS, stays, and so does a system message that takes no
    more than half of the room."""
    if len(prompt) <= room:
        return prompt
    messages = as_messages(user_input)
    roles, template = tuple(m["role"] for m in messages), str(tokenizer.chat_template)
    head = 0
    if roles[0] == "system" and len(roles) > 1:
        head = shared(header(tokenizer, template, roles, messages[0]["content"]), prompt)
    if not 0 < head <= room // 2:
        head = shared(header(tokenizer, template, roles), prompt)
    head = head if head < room else 0
    return prompt[:head] + prompt[len(prompt) - room + head:]


@functools.lru_cache(maxsize=64)
def header(tokenizer, template, roles, system=None):
    """The tokens that the template writes before the first message of a dialogue with these roles;
    with a `system` message, those before the second: those with which two dialogues begin that
    differ there. (`template` is part of the cache's key.)"""
    messages = [{"role": role, "content": "c"} for role in roles]
    earlier = [] if system is None else [{**messages.pop(0), "content": system}]
    first, *rest = messages
    one, other = (encode_prompt(tokenizer, [*earlier, {**first, "content": text}, *rest])
                  for text in "ab")
    return one[:shared(one, other)]


def shared(one, other):
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b),
                min(len(one), len(other)))
