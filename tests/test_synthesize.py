"""`data_gen.py self-instruct` and `prompts`: new instructions by an LLM.

    pytest tests/test_synthesize.py
"""

import itertools
import json
import random

import pytest
from data_commands import EN, SEED, ZH, asking, lines, read, refused, run, write

from tools.data import synthesize


def naive_lcs(a, b):
    """The length of the longest of all subsequences of `a` that is one of `b`."""

    def is_within(part):
        rest = iter(b)
        return all(x in rest for x in part)

    return max(n for n in range(len(a) + 1) if any(map(is_within, itertools.combinations(a, n))))


def test_rouge_l():
    rng = random.Random(0)
    for _ in range(100):
        a = [rng.choice("abcde") for _ in range(rng.randrange(1, 10))]
        b = [rng.choice("abcde") for _ in range(rng.randrange(1, 30))]
        rouge = 2 * naive_lcs(a, b) / (len(a) + len(b))
        assert synthesize.rouge_l(a, b) == synthesize.rouge_l(b, a) == pytest.approx(rouge)
    assert synthesize.rouge_tokens("Name 3 birds, 请说出 OK!") == [
        "name",
        "3",
        "birds",
        "请",
        "说",
        "出",
        "ok",
    ]
    assert synthesize.rouge_l([], ["a"]) == 0


@pytest.mark.parametrize(
    "text, language, why",
    [
        ("List five rivers of Asia.", "en", None),
        ("Name a kind of bird!", "en", "too similar"),
        ("Go on.", "en", "too short or too long"),
        ("word " * 151, "en", "too short or too long"),
        ("Draw a bird with a long beak.", "en", "with a forbidden word"),
        ("Describe imagery in poetry.", "en", None),
        ("请画一只鸟的图片给我看", "zh", "with a forbidden word"),
        ("请写一首关于秋天的诗", "zh", None),
        ("请说出一种鱼。", "zh", "too similar"),
        ("请写一首关于秋天的诗", "en", "in the other language"),
        ("List five rivers of Asia.", "zh", "in the other language"),
    ],
)
def test_which_instructions_are_taken(text, language, why):
    pool = [synthesize.rouge_tokens(seed) for seed in (EN, ZH)]
    assert synthesize.why_unfit(text, language, pool, synthesize.FORBIDDEN) == why


def test_read_list():
    text = 'Sure!\n1. First thing\nwith two lines\n2) **"Second"**\n三、第三'
    assert synthesize.read_list({"text": text, "finish": "stop"}) == [
        "First thing\nwith two lines",
        'Second',
        "第三",
    ]
    # the last was cut off
    assert (
        synthesize.read_list({"text": text, "finish": "length"})[-1] == "Second"
    )
    for finish in ("stop", "length"):
        assert synthesize.read_list({"text": "I cannot.", "finish": finish}) is None


@pytest.mark.parametrize(
    "text, entries",
    [
        (
            "1. Plan a trip:\n   1. the route\n   2. the food\n2. Sing.",
            ["Plan a trip:\n   1. the route\n   2. the food", "Sing."],
        ),
        ("  1. One.\n  2. Two.\n\nI hope these help!", ["One.", "Two."]),
        ("1. One:\n\na text\n\n2. Two:\n\nanother", ["One:\n\na text", "Two:\n\nanother"]),
        (
            "1. **Translate:** the text\n2. **Sing a song**\n3. *Dance*",
            ["Translate: the text", "Sing a song", "Dance"],
        ),
        ("### 1. Sing\na song\n### 2. Dance", ["Sing\na song", "Dance"]),
        ("**1.** Sing.\n**2.** Dance.", ["Sing.", "Dance."]),
        ("1\\. Sing.\n2\\) Dance.", ["Sing.", "Dance."]),
        ("**Task 1:** Sing.\nTask 2: Dance.", ["Sing.", "Dance."]),
        ("任务1：唱歌\n任务 2：跳舞", ["唱歌", "跳舞"]),
        ("1、3个苹果\n2、5个梨", ["3个苹果", "5个梨"]),
        (
            "1. Sum up:\n10:30 Meeting\n2. Greet\n3.14 people",
            ["Sum up:\n10:30 Meeting", "Greet\n3.14 people"],
        ),
        ("1. Order:\nStep 1: boil\n2. Sing.", ["Order:\nStep 1: boil", "Sing."]),
        ('1. "Sing"\n2. Say "hello"\n3. "A" or "B"', ["Sing", 'Say "hello"', '"A" or "B"']),
    ],
)
def test_read_list_takes_the_outer_level_and_whole_markup(text, entries):
    assert synthesize.read_list({"text": text, "finish": "stop"}) == entries


def inventor(question, n):
    """New tasks, all different, of which some are to be refused; the first answer to each task is
    cut off."""
    rng = random.Random(question)
    if "numbered list" not in question:
        return (
            ("", "stop")
            if "zero" in question and n < 9
            else ("Half", "length") if n == 1 else (f"It is {question}", "stop")
        )
    if rng.random() < 0.3 and n == 1:
        return "Sorry."

    def word():
        return "".join(rng.choice("bcdfglmnprst") + rng.choice("aeiou") for _ in range(3))

    def sign():
        return chr(rng.randrange(0x4E00, 0x9FA0))

    new = [
        (
            "".join(sign() for _ in range(12))
            if "Chinese" in question
            else " ".join(word() for _ in range(7))
        )
        for _ in range(5)
    ]
    return "\n".join(
        f"{i}. {text}"
        for i, text in enumerate([*new, EN, "Too short", "Please draw me a red bird now"], 1)
    )


@pytest.mark.parametrize("language", ["en", "zh", "both"])
def test_self_instruct_on_a_faulty_server(tmp_path, llm, capsys, language):
    seeds = write(
        tmp_path / "seeds.jsonl",
        lines(
            [
                SEED,
                {"name": "y", "instruction": EN, "instances": [{"input": "", "output": "A crow."}]},
            ]
        ),
    )
    results = []
    for workers in (1, 16):
        server = llm(inventor, ["cut", 500, "garbage"])
        out = tmp_path / f"{workers}"
        run(
            "self-instruct",
            seeds,
            out=out,
            language=language,
            number=40,
            workers=workers,
            eval_share=0.1,
            **asking(server),
        )
        results.append(
            [
                (out / f"{name}_training_data{twin}.json").read_bytes()
                for name in ("actor", "rlhf")
                for twin in ("", "_eval")
            ]
        )
        answered = server.answered
        if workers == 16:  # everything is in the journal: the same again, without a question
            asked = len(server.requests)
            run(
                "self-instruct",
                seeds,
                out=out,
                language=language,
                number=40,
                workers=2,
                eval_share=0.1,
                **asking(server),
            )
            assert len(server.requests) == asked
    assert results[0] == results[1]
    records = [r for part in results[0][:2] for r in json.loads(part)]
    assert len(records) == 40 and all(
        r["completion"] == f"It is {r['user_input']}" for r in records
    )
    chinese = sum(bool(synthesize.CJK.search(r["user_input"])) for r in records)
    assert chinese == {"en": 0, "zh": 40}.get(language, chinese) and (
        language != "both" or 0 < chinese < 40
    )
    assert {r["user_input"] for r in records} == {
        r["user_input"] for part in results[0][2:] for r in json.loads(part)
    }
    # the cut answer, then the whole one, and no more
    assert all(
        answered[r["user_input"]] == 2 for r in records
    )
    said = capsys.readouterr().out
    assert "too short" in said and (
        language == "zh" or "too similar" in said and "with a forbidden word" in said
    )


def test_prompts_use_the_rlhf_template(tmp_path, llm):
    server = llm(inventor)
    templates = write(
        tmp_path / "t.json", json.dumps({"rlhf": "More like {examples}, {number}: a numbered list"})
    )
    run(
        "prompts",
        write(tmp_path / "x.jsonl", lines([{"instruction": EN}])),
        out=tmp_path,
        number=10,
        templates=templates,
        eval_share=0,
        **asking(server),
    )
    assert all(
        f"More like 1. {EN}, 8:" in body["messages"][0]["content"]
        or "1. " in body["messages"][0]["content"]
        for _, _, body in server.requests
    )
    assert (
        server.requests[0][2]["messages"][0]["content"] == f"More like 1. {EN}, 8: a numbered list"
    )
    assert (
        len(read(tmp_path / "rlhf_training_data.json")) == 10
        and not (tmp_path / "actor_training_data.json").exists()
    )


def test_what_other_seeds_made_is_not_replaced(tmp_path, llm, capsys):
    first, other = (
        write(tmp_path / name, lines([{"instruction": text}]))
        for name, text in (("a.jsonl", EN), ("b.jsonl", "List four trees of Europe."))
    )
    options = dict(out=tmp_path / "o", number=10, eval_share=0, **asking(llm(inventor)))
    for _ in range(2):  # the same command again only reads its journal
        run("prompts", first, **options)
    before = (tmp_path / "o" / "rlhf_training_data.json").read_bytes()
    line = refused(capsys, lambda: run("prompts", other, **options))
    assert "was made of ../a.jsonl" in line
    assert (tmp_path / "o" / "rlhf_training_data.json").read_bytes() == before
    run("prompts", other, "--overwrite", **options)
    for changed in (dict(seed=1), dict(language="zh")):
        line = refused(capsys, lambda: run("prompts", other, **options | changed))
        assert f"was made with another {min(changed)}" in line


def test_an_llm_that_invents_nothing(tmp_path, llm, capsys):
    server = llm(lambda question, n: "1. " + EN)
    seeds = write(tmp_path / "x.json", [{"instruction": EN}])
    line = refused(
        capsys,
        lambda: run("prompts", seeds, out=tmp_path / "o", number=10, **asking(server)),
        code=1,
    )
    assert "nothing usable in three rounds" in line
