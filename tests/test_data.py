"""lib/data.py: files to records, records to batches."""

import gzip
import json
import math
import random

import pytest
import torch

from lib.data import collate, encode_records, file_of, length_batches, read_records
from lib.dialogue import cut_left, encode_prompt
from lib.tokenizer import load_tokenizer
from makers import dialogue, refused, write
from model import last_token


# ------------------------------------------------------------------------------------------------
# Records to batches


def test_encode_records_cuts_prompts_on_the_left_and_drops_what_cannot_fit(
    tokenizer, pieces, capsys
):
    records = [
        {"user_input": "the fox", "completion": "a dog </s>"},
        {"user_input": "the quick brown fox " * 4, "completion": "and then"},
        {"user_input": "x", "completion": "the quick brown fox jumps over a lazy dog " * 3},
        {"user_input": "day", "completion": ""},
    ]
    whole = [
        (
            [1, *pieces.encode(f"User: {r['user_input']}\nAssistant:")],
            [*pieces.encode(r["completion"]), 2],
        )
        for r in records
    ]
    # the template writes a space before an answer, also before an empty one
    whole[3][1].insert(
        0, pieces.piece_to_id("▁")
    )
    assert encode_records(records, tokenizer, 1000, "some.json") == [
        (*pair, i) for i, pair in enumerate(whole, 1)
    ]
    assert capsys.readouterr().out == ""
    limit = len(whole[0][0]) + len(whole[0][1])  # the first just fits
    assert sum(map(len, whole[1])) > limit and len(whole[2][1]) > limit > sum(map(len, whole[3]))
    short = encode_records(records, tokenizer, limit, "some.json")
    # the beginning of the text goes; what the template writes before it stays
    kept, head = limit - len(whole[1][1]), [1, *pieces.encode("User:")]
    cut_prompt = head + whole[1][0][len(head) - kept :]
    assert len(cut_prompt) == kept and short == [
        (*whole[0], 1),
        (cut_prompt, whole[1][1], 2),
        (*whole[3], 4),
    ]
    told = capsys.readouterr().out
    assert (
        told
        == f"some.json: of 4 records, 1 prompts cut on the left and 1 completions dropped to fit {limit} tokens\n"
    )
    # room for one token
    prompt, completion, number = encode_records(
        records, tokenizer, len(whole[0][1]) + 1, "some.json"
    )[
        0
    ]
    assert (prompt, completion, number) == (whole[0][0][-1:], whole[0][1], 1)
    # room for none
    assert 1 not in [
        number for *_, number in encode_records(records, tokenizer, len(whole[0][1]), "some.json")
    ]


def test_the_completions_of_a_prompt_are_cut_at_the_same_place(tokenizer):
    """Also a dialogue's: a reward model compares like with like."""
    asked = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "a dog"},
        {"role": "user", "content": "the day " * 9},
    ]
    for user_input in ("the quick brown fox " * 6, asked):
        records = [
            {"user_input": user_input, "completion": text}
            for text in ("a", "and then the fox", "x", "the dog is lazy " * 30)
        ]
        examples = encode_records(records, tokenizer, 30, "some.json")
        # the last leaves no room for any prompt, and cuts none
        assert [number for *_, number in examples] == [
            1,
            2,
            3,
        ]
        assert (
            len({tuple(prompt) for prompt, _, _ in examples}) == 1
            and max(len(p) + len(c) for p, c, _ in examples) == 30
        )
        assert examples[0][0][0] == tokenizer.bos_token_id


# as Mistral's: the system message stands before the last question
SYSTEM_LAST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {% if loop.last and "
    "messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}{{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("named", [False, True], ids=["one template", "several"])
def test_a_prompt_is_cut_after_what_the_template_writes_first(
    sentencepiece_model, tmp_path, named
):
    write(tmp_path / "tokenizer.model", sentencepiece_model)
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.chat_template = {"default": SYSTEM_LAST} if named else SYSTEM_LAST
    messages = dialogue("the quick brown fox jumps")
    prompt = encode_prompt(tokenizer, messages)
    room = len(prompt) - 9
    heads = [n for n in range(room) if tokenizer.decode(prompt[:n]).split() == ["<s>", "[INST]"]]
    assert heads and cut_left(tokenizer, messages, prompt, room) in [
        prompt[:n] + prompt[n + 9 :] for n in heads
    ]


@pytest.mark.parametrize("words, stays", [(2, True), (40, False)])
def test_a_system_message_stays_if_it_is_short(chatml_tokenizer, words, stays):
    t, system = chatml_tokenizer, " ".join(["fox"] * words)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "dog " * 80}]
    prompt = encode_prompt(t, messages)
    cut = cut_left(t, messages, prompt, 60)
    assert len(cut) == 60
    text = t.decode(cut)
    begins = f"<|im_start|> system\n{system}<|im_end|> \n<|im_start|> user\n"
    assert text.startswith(begins if stays else "<|im_start|> system\n") and "dog dog" in text
    assert text.endswith("<|im_end|> \n<|im_start|> assistant\n")


def test_encode_records_with_nothing_left(tokenizer, capfd):
    line = refused(
        capfd,
        encode_records,
        [{"user_input": "x", "completion": "the quick brown fox"}],
        tokenizer,
        3,
        "some.json",
    )
    assert "some.json" in line and "3 tokens" in line


def test_collate():
    input_ids, places = collate(
        [([5, 6, 7], [1]), ([8], [2, 3, 4, 9], "and more"), ([], [4, 2])], 0
    )
    assert (
        input_ids.tolist() == [[5, 6, 7, 1, 0], [8, 2, 3, 4, 9], [4, 2, 0, 0, 0]]
        and input_ids.dtype == torch.long
    )
    assert places.row.tolist() == [0, 1, 1, 1, 1, 2, 2]
    assert places.column.tolist() == [3, 1, 2, 3, 4, 0, 1]
    assert places.t.tolist() == [0, 0, 1, 2, 3, 0, 1]
    assert last_token(input_ids, places).tolist() == [1, 9, 2]


@pytest.mark.parametrize("number, size", [(1, 4), (4, 4), (7, 3), (64, 8), (1000, 8), (333, 1)])
def test_length_batches_hold_every_index_once(number, size):
    rng = random.Random(number)
    lengths = [rng.randrange(1, 200) for _ in range(number)]
    batches = length_batches(lengths, size, torch.Generator().manual_seed(0))
    assert sorted(i for batch in batches for i in batch) == list(range(number))
    assert sorted(map(len, batches)) == sorted(
        [size] * (number // size) + [number % size] * (number % size > 0)
    )
    assert batches == length_batches(lengths, size, torch.Generator().manual_seed(0))
    if number == 1000:
        other = length_batches(lengths, size, torch.Generator().manual_seed(1))
        # another order, other batches
        assert batches != other and {frozenset(b) for b in batches} != {
            frozenset(b) for b in other
        }
        padding = sum(
            max(lengths[i] for i in b) * len(b) - sum(lengths[i] for i in b) for b in batches
        )
        unsorted = sum(
            max(part) * len(part) - sum(part)
            for part in (lengths[k : k + size] for k in range(0, number, size))
        )
        assert padding < 0.2 * unsorted
        tallest = [max(lengths[i] for i in batch) for batch in batches]
        # the batches do not come sorted
        assert sum(a <= b for a, b in zip(tallest, tallest[1:])) < 0.7 * len(
            batches
        )


# ------------------------------------------------------------------------------------------------
# Data files

FIELDS = ("user_input", "completion", "score")
GOOD = {"user_input": "hi", "completion": "hello", "score": 3}


def record(**changes):
    return GOOD | changes


def without(field):
    return {key: value for key, value in GOOD.items() if key != field}


@pytest.mark.parametrize(
    "bad, words",
    [
        ([1], ["record 2", "not a JSON object"]),
        ("hi", ["record 2", "not a JSON object"]),
        (None, ["record 2", "not a JSON object"]),
        (without("user_input"), ["record 2", "'user_input'", "missing"]),
        (without("completion"), ["record 2", "'completion'", "missing"]),
        (without("score"), ["record 2", "'score'", "missing"]),
        (record(completion=7), ["record 2", "'completion'", "string"]),
        (record(completion=None), ["record 2", "'completion'", "string"]),
        (record(completion=["hi"]), ["record 2", "'completion'", "string"]),
        (record(score="3"), ["record 2", "'score'", "finite number"]),
        (record(score=None), ["record 2", "'score'", "finite number"]),
        (record(score=True), ["record 2", "'score'", "finite number"]),
        (record(score=math.nan), ["record 2", "'score'", "finite number"]),
        (record(score=math.inf), ["record 2", "'score'", "finite number"]),
        (record(score=-math.inf), ["record 2", "'score'", "finite number"]),
        (record(score=[3]), ["record 2", "'score'", "finite number"]),
        (record(user_input=3), ["record 2", "'user_input'", "string or a list"]),
        (record(user_input=[]), ["record 2", "'user_input'", "string or a list"]),
        (
            record(user_input={"role": "user", "content": "hi"}),
            ["record 2", "'user_input'", "string or a list"],
        ),
        (record(user_input=["hi"]), ["record 2", "'user_input'", "message"]),
        (record(user_input=[{"role": "user"}]), ["record 2", "'user_input'", "message"]),
        (
            record(user_input=[{"role": "user", "content": 3}]),
            ["record 2", "'user_input'", "message"],
        ),
        (record(user_input=[{"content": "hi"}]), ["record 2", "'user_input'", "role"]),
        (
            record(user_input=[{"role": "human", "content": "hi"}]),
            ["record 2", "'user_input'", "'human'"],
        ),
        (
            record(user_input=[{"role": ["user"], "content": "hi"}]),
            ["record 2", "'user_input'", "role"],
        ),
        (
            record(
                user_input=[
                    {"role": "user", "content": "hi"},
                    {"role": "assistant", "content": "ho"},
                ]
            ),
            ["record 2", "'user_input'", "must end"],
        ),
    ],
    ids=lambda x: None if isinstance(x, list) and "record 2" in x else json.dumps(x)[:60],
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.jsonl.gz"])
def test_a_bad_record_is_named(tmp_path, capfd, bad, words, name):
    records = [GOOD, bad, GOOD]
    text = "\n".join(map(json.dumps, records)) if "jsonl" in name else json.dumps(records)
    path = write(tmp_path / name, gzip.compress(text.encode()) if name.endswith(".gz") else text)
    line = refused(capfd, read_records, path, *FIELDS)
    assert line.startswith(f"error: {path}: ") and all(word in line for word in words), line


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("data.json", "", ["no records"]),
        ("data.json", "hello", ["not JSON"]),
        ("data.json", '[{"user_input": "hi"},\n{"user_input": }]', ["not JSON", "line 2"]),
        ("data.json", '[{"user_input": "hi"}', ["not JSON"]),
        ("data.json", '{\n"user_input": "hi"\n}', ["record 1", "not JSON", "one record per line"]),
        ("data.json", '"hi"', ["record 1", "not a JSON object"]),
        ("data.json", "[]", ["no records"]),
        ("data.jsonl", "", ["no records"]),
        ("data.jsonl", "\n \n", ["no records"]),
        (
            "data.jsonl",
            '{"user_input": "a"}\n{"user_input": "b"}\n{"user_input": \n',
            ["record 3", "not JSON"],
        ),
        ("data.jsonl", '{"user_input": "a"}\n{"user_input": "b"} {}\n', ["record 2", "not JSON"]),
        ("data.json", b'[{"user_input": "caf\xe9"}]', ["not UTF-8", "byte 20"]),
        ("data.jsonl", b'{"user_input": "a"}\n\xff', ["not UTF-8", "byte 20"]),
        ("data.json.gz", b"hello", ["cannot be read"]),
        (
            "data.json.gz",
            gzip.compress(b'[{"user_input": "hello"}]', mtime=0)[:-12],
            ["cannot be read"],
        ),
        (
            "data.jsonl.gz",
            gzip.compress(b'{"user_input": "hello"}', mtime=0)[:12],
            ["cannot be read"],
        ),
        (
            "data.json.gz",
            gzip.compress(b'[{"user_input": "hello"}]', mtime=0)[:10] + b"\xff" * 20,
            ["cannot be read"],
        ),
        ("data.json.gz", gzip.compress(b"hello", mtime=0), ["not JSON"]),
        ("data.json.gz", gzip.compress(b"\xff\xfe", mtime=0), ["not UTF-8"]),
    ],
)
def test_a_bad_file_is_named(tmp_path, capfd, name, content, words):
    path = write(tmp_path / name, content)
    line = refused(capfd, read_records, path, "user_input")
    assert line.startswith(f"error: {path}: ") and all(word in line for word in words), line


def test_missing_files(tmp_path, capfd):
    for name in ["none.json", "none.jsonl", "none.json.gz"]:
        assert f"error: {tmp_path}/{name}: no such file" in refused(
            capfd, read_records, str(tmp_path / name), "user_input"
        )
    assert f"error: {tmp_path}: cannot be read" in refused(
        capfd, read_records, str(tmp_path), "user_input"
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (
            '[{"user_input": "hi", "completion": "x", "score": 1' + "0" * 400 + "}]",
            ["record 1", "'score'"],
        ),
        ('[{"user_input": "hi", "completion": "x", "score": 1' + "0" * 5000 + "}]", []),
        ("[" * 200000, []),
        (
            '[{"user_input": "hi \\ud83d", "completion": "x", "score": 1}]',
            ["record 1", "'user_input'"],
        ),
        (
            '[{"user_input": [{"role": "user", "content": "\\udc00"}], "completion": "x", "score": 1}]',
            ["record 1", "'user_input'"],
        ),
        (
            '[{"user_input": "hi", "completion": "\\ud83d", "score": 1}]',
            ["record 1", "'completion'"],
        ),
    ],
    ids=[
        "400 digits",
        "5000 digits",
        "200000 brackets",
        "half an emoji",
        "half an emoji in a dialogue",
        "half an emoji in a completion",
    ],
)
def test_numbers_too_large_nesting_too_deep_and_halves_of_characters(
    tmp_path, tokenizer, capfd, text, words
):
    path = write(tmp_path / "data.json", text)
    line = refused(capfd, lambda: encode_records(read_records(path, *FIELDS), tokenizer, 100, path))
    assert line.startswith(f"error: {path}: ") and all(word in line for word in words)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.json.gz", "data.jsonl.gz"])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_good_files(tmp_path, name, ascii_only):
    records = [
        record(),
        record(user_input="你好 😀", score=-2.5),
        record(user_input="line\u2028separator\u2029 next\x85 line\x0b\x0c", completion=""),
        record(user_input=dialogue("say"), extra=[1], score=0),
        record(completion="a\nb\r\n"),
    ]
    if "jsonl" in name:
        text = "\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records) + "\n\n"
        # as an editor on Windows leaves it
        text = (
            text.replace("\n", "\r\n") if ascii_only else text
        )
    else:
        text = json.dumps(records, ensure_ascii=ascii_only, indent=1)
    data = (b"\xef\xbb\xbf" if ascii_only else b"") + text.encode()  # with its mark of UTF-8
    path = write(tmp_path / name, gzip.compress(data) if name.endswith(".gz") else data)
    assert read_records(path, *FIELDS) == records


def test_half_a_character_in_a_field_that_nobody_reads(tmp_path):
    records = [{"user_input": "你好 😀", "extra": "x\ud83d", "\\\udc00": [1]}]
    written = file_of("data.jsonl", records)
    assert written.decode() == r'{"user_input": "你好 😀", "extra": "x\ud83d", "\\\udc00": [1]}' + "\n"
    assert read_records(write(tmp_path / "data.jsonl", written), "user_input") == records


def test_only_the_fields_asked_for_are_looked_at(tmp_path):
    records = [{"user_input": "a", "score": "high", "completion": None}]
    assert read_records(write(tmp_path / "data.json", records), "user_input") == records
