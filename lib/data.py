"""Data: files -> records -> tokens -> batches. docs/data.md has the formats."""

import contextlib
import gzip
import json
import os
import re
import sys
import zlib
from typing import NamedTuple

import torch

from lib.dialogue import cut_left, encode_completion, encode_prompt
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
                stop(f"{path}: record {number}: field '{field}' is missing; python data_gen.py "
                     "import converts other layouts")
            if wrong := what_is_wrong(field, record[field]):
                stop(f"{path}: record {number}: field '{field}' {wrong}")
    return records


def read_prompts(args):
    """What ppo.py practises on, --prompts, and the first --eval_number of --eval_prompts."""
    records = read_records(args.prompts, "user_input")
    held_out = read_records(args.eval_prompts, "user_input") if args.eval_prompts else []
    return records, held_out[:args.eval_number]


def file_of(path, records):
    """The bytes of a data file as `read_records` reads it: a JSON array, or JSON Lines where it is
    named so; `.gz` of either."""
    # A field that nobody reads may hold half a character, which UTF-8 lacks; Python's escape for
    # it, \ud83d, is JSON's too
    lines = [json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")
             for record in records]
    data = b"[\n" + b",\n".join(lines) + b"\n]\n"
    if path.removesuffix(".gz").endswith(".jsonl"):
        data = b"\n".join(lines) + b"\n"
    return gzip.compress(data, mtime=0) if path.endswith(".gz") else data


def save_all(files, overwrite=False):
    """Write `files`, {path: records, or bytes}. If one is there already, and is another, the
    program ends before any is written, unless it is to `overwrite` them."""
    data = {path: found if isinstance(found, bytes) else file_of(path, found)
            for path, found in files.items()}
    for path in [path for path in data if os.path.exists(path) and not overwrite]:
        with explain(f"{path}: cannot be read"), open(path, "rb") as file:
            if file.read() != data[path]:
                stop(f"{path}: already exists; name another folder, or give data_gen.py "
                     "--overwrite to replace it")
    for path, found in files.items():
        write_whole(path, data[path])
        print(path if isinstance(found, bytes) else f"{path}: {len(found)} records")


def save(path, records):
    """Write one data file, in place of what is there."""
    save_all({path: records}, overwrite=True)


def half_character(text):
    """What is wrong with a text that holds half of a character that JSON writes in two, such as
    "\\ud83d" of a cut emoji; else None."""
    if re.search("[\ud800-\udfff]", text):
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

def not_empty(prompt):
    """Raises ValueError for a prompt without a token: the answer's first token is chosen in the
    state of the prompt's last."""
    if not prompt:
        raise ValueError("the prompt has no tokens: user_input is empty, and the chat template "
                         "writes nothing before an answer")
    return prompt


def encode_prompts(user_inputs, tokenizer, room, name):
    """The tokens of each prompt. Those longer than `room` are cut on the left, with a notice."""
    prompts = []
    for number, user_input in enumerate(user_inputs, 1):
        with explain(f"{name}: record {number}"):
            prompts.append(not_empty(encode_prompt(tokenizer, user_input)))
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
            not_empty(pairs[-1][0])
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


def longest_prompt(models, args):
    """The most tokens that a prompt of ppo.py may have, so that with an answer it fits all models
    that read tokens: those with a configuration."""
    context = min(model.config.max_position_embeddings for model in models
                  if hasattr(model, "config"))
    limit = min(args.max_prompt_length, context - args.max_new_tokens)
    if limit < 1:
        stop(f"--max_new_tokens {args.max_new_tokens} leaves no room for a prompt: the context of "
             f"the model, or of the reward model, is {context} tokens")
    return limit


def encode_inputs(records, eval_records, models, tokenizer, args):
    """What ppo.py reads, as tokens: prompts, held-out prompts, demonstrations for the PTX term.
    `models`: those that read prompts with answers."""
    limit = longest_prompt(models, args)
    prompts, eval_prompts = (
        encode_prompts([record["user_input"] for record in part], tokenizer, limit, path)
        for part, path in ((records, args.prompts), (eval_records, args.eval_prompts)))
    demonstrations = []
    if args.ptx_coef:
        demonstrations = encode_records(
            read_records(args.demonstrations, "user_input", "completion"), tokenizer,
            limit + args.max_new_tokens, args.demonstrations)
    elif args.demonstrations:
        print(f"{args.demonstrations} is not used: --ptx_coef is 0")
    return prompts, eval_prompts, demonstrations


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


def text_lengths(examples):
    """The number of tokens of each text, [(prompt, completion, ...)]."""
    return [len(prompt) + len(completion) for prompt, completion, *_ in examples]


def collate(examples, pad_token_id, device="cpu"):
    """[(prompt, completion, ...)] in tokens -> `input_ids` (B, L): prompt, completion, padding; and
    the `Places` of the completion tokens.

    Padding is only on the right, where causal attention does not look: no mask is needed.
    """
    length = max(text_lengths(examples))
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
