"""`data_gen.py score`: what counts as a score, and judges that are no LLM. Servers: test_llm.py.

    pytest tests/test_score.py
"""

import os

import pytest
from data_commands import COMPLETIONS, ROOT, asking, number_of, read, refused, run, write

import data_gen
from tools.data.score import read_score


@pytest.mark.parametrize(
    "text, score",
    [
        ("4.5", 4.5),
        ("Score: 4/5", 4),
        ("**Score:** 4", 4),
        ("Score: <4>", 4),
        ("Rating: 4.5 / 5.0", 4.5),
        ("8/10", 4),
        ("I'd say 8 out of 10.", 4),
        ("The score ranges from 0 to 5. Score: 3", 3),
        ("1. right 2. polite. Score: 3", 3),
        ("Score: 4/5\nIt has 2 good points.", 4),
        ("a 4.", 4),
        ("四分", 4),
        ("四分半", 4.5),
        ("评分：四点五", 4.5),
        ("满分5分，我给4分", 4),
        ("评分：4.5分（满分5分）", 4.5),
        ("５", 5),
        ("五", 5),
        ("得分：三", 3),
        ("0 分", 0),
        ("总分：4分", 4),
        ("Score: 7", None),
        ("Score: -1", None),
        ("2024", None),
        ("Good.", None),
        ("", None),
        ("Between 3 and 4", None),
        ("十分好", None),
        ("4分，回答十分清楚。", 4),
        ("十分准确，得五分", 5),
        ("第一，正确；第二，简洁。", None),
        ("4,5", 4.5),
        ("Note: 4,5/5", 4.5),
        ("Score: 4,25", 4.25),
        ("评分：4,5分", 4.5),
        ("Score: 4\nIt did well in generating 3 ideas.", 4),
        ("4/5. Integrating 1 more example would help.", 4),
        ("Score: 5. An upgrade 2 would be nice.", 5),
        ("overall_score: 4, of 3 scores", 4),
        ("评分：4。回答给了3个建议。", 4),
        ("给了3个建议，4分", 4),
        ("我给它4分，比3分好", 4),
        ("我给4", 4),
        ("我给4\n\nIt has 2 points.", 4),
        ("我给出 3 个建议，得 4 分", 4),
        ("Score: .5", 0.5),
        (".5", 0.5),
        ("Score: .5/1", 2.5),
        ("评分……4", 4),
        ("Score [0,5]: 3", 3),
        ("Score [0, 5]: 3,5", 3.5),
        ("Score: 4/5. A perfect score of 5 would need sources.", 4),
        ("**Score: 2**\nA score of 5 is perfect.", 2),
        ("At first my score is 3.\nScore: 4", 4),
        ("Score: 3\nNo, wait.\nScore: 4", 4),
        ('{"score": 4, "why": "a score of 5 needs sources"}', 4),
        ('{"score": 4, "max_score": 5}', 4),
        ('{"max_score": 10, "score": 4}', 4),
    ],
)
def test_read_score(text, score):
    assert read_score(text) == score


def test_a_judge_that_thinks_aloud(tmp_path, llm, capsys):
    """Thoughts and cut answers never score."""
    replies = [
        "<think>Score: 1, but</think>Score: 4",
        ("<think>I would give Score: 1, but", "length"),
        ("Score: 3 since", "length"),
        "Score: 2",
    ]
    server = llm(lambda question, n: replies[number_of(question) % 4])
    run("score", write(tmp_path / "x.json", COMPLETIONS), out=tmp_path / "y.json", **asking(server))
    scores = {number_of(str(record)): record["score"] for record in read(tmp_path / "y.json")}
    assert scores == {n: [4, None, None, 2][n % 4] for n in range(24) if n % 4 in (0, 3)}
    assert len(read(tmp_path / "y_unscored.json")) == 12


def test_judge_in_place_of_an_llm(tmp_path, capsys):
    records = [
        {"user_input": "What is 1 plus 2?", "completion": text}
        for text in ("Sure! It is 3.", "4.", "")
    ]
    run(
        "score",
        write(tmp_path / "x.json", records),
        out=tmp_path / "y.json",
        judge=ROOT / "data_gen.py",
    )
    assert [r["score"] for r in read(tmp_path / "y.json")] == [5.0, 0.0, 0.0]
    foreign = write(tmp_path / "z.json", [*records, {"user_input": "Why?", "completion": "So."}])
    line = refused(
        capsys, lambda: run("score", foreign, out=tmp_path / "w.json", judge=ROOT / "data_gen.py")
    )
    assert "record 4" in line and "cannot judge it" in line
    none = write(tmp_path / "judge.py", "x = 1")
    assert "not a Python file with a function score" in refused(
        capsys, lambda: run("score", foreign, out=tmp_path / "w.json", judge=none)
    )


@pytest.mark.parametrize(
    "argv, said",
    [
        (["score", "x.json", "--out", "y.json"], "needs --model or --judge"),
        (["score", "x.json", "--out", "y.json", "--model", "m", "--judge", "j.py"], "not both"),
        (["score", "x.json", "--out", "x.json", "--model", "m"], "is the file that is read"),
        (["score", "x.json", "--out", "z.json", "--model", "m"], "already exists"),
        (
            ["score", "x.json", "--out", "y.json", "--model", "m", "--api_base", "localhost:8000"],
            "does not begin with http",
        ),
        (["score", "no.json", "--out", "y.json", "--model", "m"], "no such file"),
        (["prompts", "x.json"], "needs --model"),
    ],
)
def test_commands_that_cannot_run(tmp_path, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.json", COMPLETIONS)
    write(tmp_path / "z.json", "mine")
    assert said in refused(capsys, lambda: data_gen.main(argv))
    assert not (tmp_path / "y.json").exists() and (tmp_path / "z.json").read_text() == "mine"


def test_neither_the_input_nor_the_scores_of_another_are_replaced(tmp_path, capsys):
    judge = write(tmp_path / "j.py", "def score(user_input, completion): return 1.0")
    source = write(tmp_path / "y_unscored.json", COMPLETIONS)
    before = (tmp_path / "y_unscored.json").read_bytes()
    for overwrite in ([], ["--overwrite"]):
        line = refused(
            capsys, lambda: run("score", source, *overwrite, out=tmp_path / "y.json", judge=judge)
        )
        assert f"would replace {source}" in line
    mine = write(tmp_path / "z_unscored.json", "mine")
    line = refused(capsys, lambda: run("score", source, out=tmp_path / "z.json", judge=judge))
    assert f"{mine}: already exists" in line and not (tmp_path / "z.json").exists()
    os.remove(mine)
    run("score", source, out=tmp_path / "z.json", judge=judge)
    scored = (tmp_path / "z.json").read_bytes()
    other = write(tmp_path / "other.json", COMPLETIONS[:2])
    line = refused(capsys, lambda: run("score", other, out=tmp_path / "z.json", judge=judge))
    assert "was made of y_unscored.json" in line and (tmp_path / "z.json").read_bytes() == scored
    run("score", source, out=tmp_path / "z.json", judge=judge)  # again, of the same
    strict = write(tmp_path / "strict.py", "def score(user_input, completion): return 0.5")
    line = refused(capsys, lambda: run("score", source, out=tmp_path / "z.json", judge=strict))
    assert "was made with another judge" in line
    assert (tmp_path / "z.json").read_bytes() == scored
    run("score", other, "--overwrite", out=tmp_path / "z.json", judge=judge)
    assert len(read(tmp_path / "z.json")) == 2
    assert (tmp_path / "y_unscored.json").read_bytes() == before
