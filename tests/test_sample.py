"""`data_gen.py sample`: completions of a checkpoint.

    pytest tests/test_sample.py
"""

import json
import re

import pytest
from data_commands import DIALOGUE, read, refused, run, write

import model
from lib.data import left_pad
from lib.dialogue import encode_prompt
from tools.data import sample, sets

HOT = 1000.0  # a temperature


@pytest.fixture(autouse=True)
def many_ends(monkeypatch):
    """Every third token ends an answer, and HOT makes all tokens about equally probable. Which
    answers end may differ between processors, which round differently; that of those to each
    prompt some do, and of all some do not, is certain but for one chance in a hundred thousand.
    """
    def load(*given):
        tokenizer = model.load_tokenizer(*given)
        tokenizer.end_ids += range(10, len(tokenizer), 3)
        return tokenizer

    monkeypatch.setattr(sample, "load_tokenizer", load)
    return load


def test_sample(tmp_path, checkpoint, capsys, many_ends):
    prompts = [{"user_input": f"Say {i}."} for i in range(9)] + [
        {"user_input": DIALOGUE},
        {"user_input": "Say 0."},
        {"user_input": "long " * 3000},
    ]
    source = write(tmp_path / "x.json", prompts)
    options = dict(model=checkpoint, k=16, max_new_tokens=3, batch_size=16, temperature=HOT)
    run("sample", source, out=tmp_path / "a.json", **options)
    said = capsys.readouterr().out
    assert "of 11 prompts, 1 cut on the left" in said
    records = read(tmp_path / "a.json")
    assert list(dict.fromkeys(sets.prompt_key(r["user_input"]) for r in records)) == [
        sets.prompt_key(p["user_input"]) for p in prompts if p is not prompts[10]
    ]
    cut, same = (int(re.search(rf"(\d+) that {why}", said)[1]) for why in ("were cut", "repeat"))
    assert len(records) == 11 * 16 - cut - same == len({json.dumps(r) for r in records}) > 11
    assert cut > 0
    # a run that was stopped goes on with the same result
    journal = (tmp_path / "a.json.journal.jsonl").read_bytes().split(b"\n")
    (tmp_path / "b.json.journal.jsonl").write_bytes(b"\n".join(journal[:6]))
    run("sample", source, out=tmp_path / "b.json", **options)
    assert read(tmp_path / "b.json") == records
    run("sample", source, out=tmp_path / "c.json", seed=1, **options)
    assert read(tmp_path / "c.json") != records
    greedy = dict(options, temperature=0, k=2, max_new_tokens=12, batch_size=3)
    run("sample", source, out=tmp_path / "d.json", **greedy)
    tokenizer = many_ends(checkpoint)
    llama = model.load_llama(checkpoint, tokenizer)
    expected = []
    for prompt in prompts[:9]:
        ids, mask = left_pad([encode_prompt(tokenizer, prompt["user_input"])],
                             tokenizer.pad_token_id)
        tokens = model.generate(llama, ids, mask, 12, tokenizer.end_ids, temperature=0).tokens[0]
        if tokens[-1] in tokenizer.end_ids:
            expected.append(tokenizer.decode(tokens, skip_special_tokens=True).strip())
    assert [r["completion"] for r in read(tmp_path / "d.json")
            if str(r["user_input"]).startswith("Say")] == expected and 0 < len(expected)


def test_every_completion_is_cut(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setattr(sample, "load_tokenizer", model.load_tokenizer)
    source = write(tmp_path / "x.json", [{"user_input": "Say 1."}])
    with pytest.raises(SystemExit) as ended:
        run("sample", source, out=tmp_path / "a.json", model=checkpoint, k=2, max_new_tokens=1)
    assert ended.value.code == 1 and "every completion was cut" in capsys.readouterr().err
    assert not (tmp_path / "a.json").exists()


def test_a_prompt_more_leaves_the_other_completions(tmp_path, checkpoint):
    """People may have ranked them."""
    prompts = [{"user_input": f"Say {i}."} for i in range(5)]
    options = dict(model=checkpoint, k=4, max_new_tokens=8, batch_size=8, temperature=HOT,
                   out=tmp_path / "a.json")
    run("sample", write(tmp_path / "x.json", prompts), **options)
    before = read(tmp_path / "a.json")
    run("sample", write(tmp_path / "x.json", [*prompts, {"user_input": "Hi"}]), **options)
    after = read(tmp_path / "a.json")
    assert [r for r in after if r["user_input"] != "Hi"] == before and len(after) > len(before)


def test_the_fields_of_a_prompt_stay_with_its_samples(tmp_path, checkpoint, capsys):
    """A judge may ask for them."""
    prompts = [
        {"user_input": "Say 1.", "answer": "5", "completion": "Old.", "score": 2.0},
        {"user_input": "Say 2.", "answer": "6", "completion": "Old."},
        {"user_input": "Say 1.", "answer": "five"},
        {"user_input": "Say 2.", "answer": "6", "score": 1.0},  # nothing else is new
        {"user_input": "Say 1.", "answer": "V"},
    ]
    source = write(tmp_path / "x.json", prompts)
    options = dict(model=checkpoint, k=4, max_new_tokens=8, batch_size=3, temperature=HOT)
    run("sample", source, out=tmp_path / "a.json", **options)
    assert f"{source}: 1 prompts came again with other fields" in capsys.readouterr().out
    records = read(tmp_path / "a.json")
    assert {r["user_input"]: r["answer"] for r in records} == {"Say 1.": "5", "Say 2.": "6"}
    assert all(list(r) == ["user_input", "answer", "completion"] for r in records)
    assert len(records) > 2 and "Old." not in {r["completion"] for r in records}
    journal = (tmp_path / "a.json.journal.jsonl").read_bytes().split(b"\n")
    (tmp_path / "b.json.journal.jsonl").write_bytes(b"\n".join(journal[:2]) + b"\n{")
    run("sample", source, out=tmp_path / "b.json", **options)
    assert (tmp_path / "b.json").read_bytes() == (tmp_path / "a.json").read_bytes()
    judge = write(tmp_path / "judge.py",
                  "def score(user_input, completion, answer): return float(answer)")
    run("score", tmp_path / "a.json", out=tmp_path / "c.json", judge=judge)
    assert [r["score"] for r in read(tmp_path / "c.json")] == [float(r["answer"]) for r in records]


@pytest.mark.parametrize("option, value", [("k", 3), ("seed", 1), ("temperature", 1.0),
                                           ("top_k", 5), ("top_p", 0.5), ("max_new_tokens", 9)])
def test_completions_sampled_in_another_way_do_not_take_their_place(
    tmp_path, checkpoint, capsys, option, value
):
    source = write(tmp_path / "x.json", [{"user_input": "Say 1."}])
    options = dict(model=checkpoint, k=4, max_new_tokens=8, temperature=HOT,
                   out=tmp_path / "a.json")
    run("sample", source, **options)
    before = (tmp_path / "a.json").read_bytes()
    line = refused(capsys, lambda: run("sample", source, **options | {option: value}))
    assert f"was made with another {option}" in line
    assert (tmp_path / "a.json").read_bytes() == before
