"""A reward function of the user's: what it is given, and what counts as a score."""

import json

import numpy
import pytest
import torch

import data_gen
from lib.rewards import Judge

RECORDS = [dict(user_input="1 + 1?", answer=2, level="easy"), dict(user_input="2 + 3?", answer=5)]
ANSWERS, ENDED = ["It is 2.", "It is 6."], [True, False]


@pytest.fixture
def judge(tmp_path):
    """A `Judge` of a file with this text."""
    def make(text):
        (tmp_path / "own.py").write_text(text)
        return Judge("--reward", str(tmp_path / "own.py"))
    return make


@pytest.mark.parametrize("text, expected", [
    ("def score(user_input, completion): return len(completion)", [8, 8]),
    ("def score(user_input, completion, answer): return float(str(answer) in completion)", [1, 0]),
    ("def score(user_input, completion, answer, level='none'): return len(level)", [4, 4]),
    ("def score(user_input, completion, **record): return record['answer']", [2, 5]),
    ("def score(prompt, text, answer): return answer + len(prompt)", [8, 11]),
    ("def score(user_input, completion, ended): return 1.5 if ended else 0", [1.5, 0]),
    ("def scores(user_inputs, completions, answer): return [2 * a for a in answer]", [4, 10]),
    ("def scores(user_inputs, completions, ended): return [int(e) for e in ended]", [1, 0]),
])
def test_what_the_function_names_it_gets(judge, text, expected):
    found = judge(text)
    found.check("prompts.json", RECORDS)
    assert found(RECORDS, ANSWERS, ENDED) == expected


@pytest.mark.parametrize("score", [1.5, numpy.float32(1.5), numpy.array(1.5), torch.tensor(1.5)],
                         ids=["float", "numpy scalar", "numpy array", "torch"])
def test_scalars_of_numpy_and_torch_are_numbers(judge, score):
    found = judge("def score(user_input, completion): return VALUE")
    found.function.__globals__["VALUE"] = score
    assert found(RECORDS[:1], ANSWERS[:1], ENDED[:1]) == [1.5]


@pytest.mark.parametrize("value, told", [
    ("None", "None"), ("'3'", "'3'"), ("float('nan')", "nan"), ("float('inf')", "inf"),
    ("[1.0]", "[1.0] (list)")])
def test_what_is_no_number_is_refused_with_what_it_is(judge, capsys, value, told):
    found = judge(f"def score(user_input, completion): return {value}")
    with pytest.raises(SystemExit) as end:
        found(RECORDS, ANSWERS, ENDED)
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.count("\n") == 1
    assert f"the score is {told}, which is not a finite number" in line


def test_a_field_that_a_record_lacks_is_named(judge, capsys):
    with pytest.raises(SystemExit) as end:
        judge("def score(user_input, completion, level): return 0").check("prompts.json", RECORDS)
    line = capsys.readouterr().err
    assert end.value.code == 2 and "prompts.json: record 2: field 'level' is missing" in line


def test_sums_are_right_and_no_pair_of_numbers_comes_twice(tmp_path):
    data_gen.main(["sums", "--out", str(tmp_path), "--prompts", "300", "--demonstrations", "300"])
    pairs = []
    for name in ("actor_training_data", "actor_training_data_eval", "rlhf_training_data",
                 "rlhf_training_data_eval"):
        for record in json.loads((tmp_path / f"{name}.json").read_text("utf-8")):
            a, b = (int("".join(digits)) for digits in numbers_of(record["user_input"]))
            found = record.get("answer", record.get("completion", ""))
            value = [int("".join(digits)) for digits in numbers_of(found)]
            assert value in ([a + b], [max(a, b)]), record
            pairs.append((value == [a + b], min(a, b), max(a, b)))
    assert len(pairs) == 1200 and len(set(pairs)) == len(pairs)
    assert {is_sum for is_sum, *_ in pairs} == {True, False}
    assert (tmp_path / "tokenizer" / "tokenizer.model").exists()


def numbers_of(text):
    """The runs of digits of a text, character by character."""
    runs, before = [], ""
    for character in text:
        if character.isdigit():
            if not before.isdigit():
                runs.append([])
            runs[-1].append(character)
        before = character
    return runs
