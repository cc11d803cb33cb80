"""Data: files -> records -> tokens -> batches. docs/data.md has the formats."""

import contextlib
import functools
import gzip
import json
import re
import sys
import zlib
from typing import NamedTuple

import torch

from lib.errors import explain, first_line, stop, write_whole


# ------------------------------------------------------------------------------------------------
# Files and records

def read_values(path, whole=False):
    """The JSON values of a file: an array, or one per line, whatever its name; `.gz` of either.
    `whole`: or one object over all lines, as it is."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        stop(f"{path}: no such file (python data_gen.py writes the built-in data sets to data/)")
    except UnicodeDecodeError as error:
        stop(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        stop(f"{path}: cannot be read ({error})")
    if text.startswith("version https://git-lfs"):
        stop(f"{path}: a Git LFS pointer, not the file: run git lfs pull in its folder")
    number = 0
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        if whole:
            with contextlib.suppress(ValueError):  # more than one
                return json.loads(text)
        values = []
        for number, line in enumerate((line for line in text.split("\n") if line.strip()), 1):
            values.append(json.loads(line))
        return values
    except (ValueError, RecursionError) as error:
        where = f"record {number}: not JSON" if number else "not JSON"
        stop(f"{path}: {where} ({first_line(error)}); a file holds an array of records, or one "
             "record per line")


def read_records(path, *fields):
    """The records of a data file (see `read_values`).

    `fields` names those that each record must have: "user_input" (a text, or a list of chat
    messages with "role" and "content" that ends with the user's), "completion" (a text), "score" (a
    finite number). Anything else ends the program with one line that names the file, the record
    (counted from 1) and the field.
    """
    records = read_values(path)
    if not records:
        stop(f"{path}: holds no records")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            stop(f"{path}: record {number}: not a JSON object")
        for field in fields:
            if field not in record:
                stop(f"{path}: record {number}: field '{field}' is missing")
            if wrong := what_is_wrong(field, record[field]):
                stop(f"{path}: record {number}: field '{field}' {wrong}")
    return records


def save(path, records):
    """A data file as `read_records` reads it: a JSON array, or JSON Lines where it is named so;
    `.gz` of either."""
    lines = [json.dumps(record, ensure_ascii=False).encode() for record in records]
    data = b"[\n" + b",\n".join(lines) + b"\n]\n"
    if path.removesuffix(".gz").endswith(".jsonl"):
        data = b"\n".join(lines) + b"\n"
    write_whole(path, gzip.compress(data, mtime=0) if path.endswith(".gz") else data)
    print(f"{path}: {len(records)} records")


def half_character(text):
    """JSON can hold half of a character that is written in two, such as "\\ud83d" of a cut
    emoji."""
    if any("\ud800" <= c <= "\udfff" for c in text):
        return "holds half a character (a lone surrogate)"
    return None


def what_is_wrong(field, value):
    """Why `value` cannot stand in `field` of a data record, in words; None when it can."""
    if field == "score":
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return None if number and abs(value) <= sys.float_info.max else "must be a finite number"
    if isinstance(value, str):
        return half_character(value)
    if field == "completion":
        return "must be a string"
    if not isinstance(value, list) or not value:
        return "must be a string or a list of chat messages"
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return 'has a message that is not {"role": ..., "content": text}'
        if wrong := half_character(message["content"]):
            return wrong
        if message.get("role") not in ("system", "user", "assistant"):
            return (f"has a message with role {message.get('role')!r}; roles are system, user and "
                    "assistant")
    return None if value[-1]["role"] == "user" else "must end with a message of the user"


# ------------------------------------------------------------------------------------------------
# Text to tokens

def encode_text(tokenizer, text):
    """The tokens of a plain text. A "</s>" in it is four characters of text, never a control
    token."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True  # as text; each call of transformers sets it again
    return backend.encode(text, add_special_tokens=False).ids


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
def control_pattern(tokenizer):
    """Finds control tokens in a text. (transformers' all_special_tokens has only those with a role,
    such as eos_token: of LLaMA 3's, <|start_header_id|> has none.)"""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")


def as_messages(user_input):
    return [{"role": "user", "content": user_input}] if isinstance(user_input, str) else user_input


def encode_dialogue(tokenizer, messages):
    """The tokens of a dialogue in the checkpoint's chat template, up to where the assistant is to
    write, if it is its turn -> tokens, and {index of a message: where its answer begins in tokens}.

    The template writes control tokens around what people said. The same characters inside what they
    said stay text: a mark, which exists only while the template is filled in, tells them apart.
    Each answer of the assistant has the tokens that it has when it is written after its prompt.
    Raises ValueError if the template refuses the dialogue.
    """
    control = control_pattern(tokenizer)
    mark = next(chr(c) for c in range(0xE000, 0xF900)
                if not any(chr(c) in message["content"] for message in messages))
    marked = [{**message, "content": control.sub(lambda found: found[0][0] + mark + found[0][1:],
                                                 message["content"])} for message in messages]

    def render(number, is_prompt):
        try:
            return tokenizer.apply_chat_template(marked[:number], tokenize=False,
                                                 add_generation_prompt=is_prompt)
        except Exception as error:  # a template may refuse a dialogue, of two users in a row, say
            raise ValueError("the checkpoint's chat template refuses this dialogue: "
                             f"{first_line(error)}") from error

    text = render(len(messages), messages[-1]["role"] != "assistant")
    borders = {}  # place in the text: the answer that begins there
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and text.startswith(before := render(i, True)):
            borders[len(before)] = i
    found = list(control.finditer(text))
    controls = {match.start() for match in found}
    cuts = sorted({0, len(text), *borders, *controls, *(match.end() for match in found)})
    tokens, answers, before = [], {}, ""  # before: the plain text since the last control token
    for start, end in zip(cuts, cuts[1:]):
        if start in borders:
            answers[borders[start]] = len(tokens)
        if start in controls:
            tokens.append(tokenizer.convert_tokens_to_ids(text[start:end]))
            before = ""
        else:
            part = text[start:end].replace(mark, "")
            tokens += encode_after(tokenizer, before, part)
            before += part
    return tokens, answers


def encode_prompt(tokenizer, user_input):
    """The tokens of a prompt in the chat format, up to where the assistant's answer begins.
    `user_input` is a text or a list of chat messages."""
    return encode_dialogue(tokenizer, as_messages(user_input))[0]


def encode_completion(tokenizer, user_input, completion):
    """(prompt, completion) in tokens: together they are the dialogue in the chat format, up to the
    token with which its template ends the assistant's turn."""
    asked = as_messages(user_input)
    tokens, answers = encode_dialogue(
        tokenizer, [*asked, {"role": "assistant", "content": completion}])
    if len(asked) not in answers:  # a template that renders an answer unlike the prompt for it
        return encode_prompt(tokenizer, asked), [*encode_text(tokenizer, completion),
                                                 tokenizer.eos_token_id]
    prompt, answer = tokens[:answers[len(asked)]], tokens[answers[len(asked)]:]
    control = {tokenizer.convert_tokens_to_ids(token.content)
               for token in tokenizer.added_tokens_decoder.values() if token.special}
    end = next((i for i, token in enumerate(answer) if token in control), None)
    return prompt, answer + [tokenizer.eos_token_id] if end is None else answer[:end + 1]


def cut_left(tokenizer, user_input, prompt, room):
    """A prompt without the beginning of its text, if it is longer than `room` tokens. What the
    template writes before that text, such as BOS, stays."""
    if len(prompt) <= room:
        return prompt
    first, *rest = as_messages(user_input)
    others = [encode_prompt(tokenizer, [{**first, "content": text}, *rest]) for text in "ab"]
    head = next((i for i, tokens in enumerate(zip(*others)) if tokens[0] != tokens[1]), 0)
    head = head if head < room else 0
    return prompt[:head] + prompt[len(prompt) - room + head:]


def encode_prompts(user_inputs, tokenizer, room, name):
    """The tokens of each prompt. Those longer than `room` are cut on the left, with a notice."""
    prompts = []
    for number, user_input in enumerate(user_inputs, 1):
        with explain(f"{name}: record {number}"):
            prompts.append(encode_prompt(tokenizer, user_input))
    if cut := sum(len(prompt) > room for prompt in prompts):
        print(f"{name}: of {len(prompts)} prompts, {cut} cut on the left to {room} tokens")
    return [cut_left(tokenizer, user_input, prompt, room)
            for user_input, prompt in zip(user_inputs, prompts)]


def encode_records(records, tokenizer, max_length, name):
    """[(prompt, completion, number of the record)] in tokens; a completion ends with end-of-turn.

    What is longer than `max_length` tokens loses the beginning of its prompt, at the same place for
    all completions of a prompt, which a reward model compares; a completion that leaves no room for
    a prompt is dropped. Both are counted and printed.
    """
    pairs = []
    for number, record in enumerate(records, 1):
        with explain(f"{name}: record {number}"):
            pairs.append(encode_completion(tokenizer, record["user_input"], record["completion"]))
    keys = [json.dumps(record["user_input"], sort_keys=True) for record in records]
    rooms = {}  # of each prompt: what the longest of its completions leaves
    for key, (_, completion) in zip(keys, pairs):
        if len(completion) < max_length:
            rooms[key] = min(rooms.get(key, max_length), max_length - len(completion))
    examples, cut = [], 0
    for number, (record, key, (prompt, completion)) in enumerate(zip(records, keys, pairs), 1):
        if len(completion) < max_length:
            cut += len(prompt) > rooms[key]
            prompt = cut_left(tokenizer, record["user_input"], prompt, rooms[key])
            examples.append((prompt, completion, number))
    if cut or len(examples) < len(records):
        print(f"{name}: of {len(records)} records, {cut} prompts cut on the left and "
              f"{len(records) - len(examples)} completions dropped to fit {max_length} tokens")
    if not examples:
        stop(f"{name}: no completion fits {max_length} tokens")
    return examples


# ------------------------------------------------------------------------------------------------
# Batches

class Places(NamedTuple):
    """Where the N completion tokens of a batch are: token n is `input_ids[row[n], column[n]]`, and
    token t[n] of its completion, from 0. All (N,), one text after the other. (Indices rather than a
    mask: how many tokens a mask selects is known only once the GPU has been waited for.)"""
    row: torch.Tensor
    column: torch.Tensor
    t: torch.Tensor


def on(device, values):
    """A tensor of these numbers on the device. Python does not wait for the copy."""
    return torch.as_tensor(values).to(device, non_blocking=True)


def collate(examples, pad_token_id, device="cpu"):
    """[(prompt, completion, ...)] in tokens -> `input_ids` (B, L): prompt, completion, padding; and
    the `Places` of the completion tokens.

    Padding is only on the right, where causal attention does not look: no mask is needed.
    """
    length = max(len(prompt) + len(completion) for prompt, completion, *_ in examples)
    input_ids, places = torch.full((len(examples), length), pad_token_id), Places([], [], [])
    for i, (prompt, completion, *_) in enumerate(examples):
        text = [*prompt, *completion]
        input_ids[i, :len(text)] = torch.tensor(text)
        places.row.extend([i] * len(completion))
        places.column.extend(range(len(prompt), len(text)))
        places.t.extend(range(len(completion)))
    return on(device, input_ids), Places(*(on(device, numbers) for numbers in places))


def left_pad(prompts, pad_token_id, device="cpu"):
    """Lists of tokens -> `input_ids`, `attention_mask` (B, P), padded on the left, for
    `generate`."""
    length = max(map(len, prompts))
    rows = [[pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return on(device, rows), on(device, mask)


def length_batches(lengths, batch_size, generator):
    """Shuffled batches of indices with similar lengths in a batch, so that little is padded:
    shuffle, sort within stretches of 16 batches, cut, shuffle the batches. Every index occurs once;
    the last batch may be smaller."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretch = 16 * batch_size
    order = [i for start in range(0, len(order), stretch)
             for i in sorted(order[start:start + stretch], key=lambda i: lengths[i])]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def deal(size, number, seed):
    """`number` indices below `size` in random order, each once before any comes again; [] if there
    is nothing to deal."""
    if not size:
        return []
    generator = torch.Generator().manual_seed(seed)
    rounds = -(-number // size)
    order = [torch.randperm(size, generator=generator) for _ in range(rounds)]
    return torch.cat(order)[:number].tolist()
