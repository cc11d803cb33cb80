"""`data_gen.py import`: the plain layouts, other files, splits, bad input; and that all three
stages take what it writes. What it reads beyond a name per part: test_layouts.py.

    pytest tests/test_import.py
"""

import json
import re
import sys
from collections import Counter

import pytest
from data_commands import (
    ANSWER,
    DIALOGUE,
    EN,
    MORE,
    SEED,
    SHP,
    USER,
    ZH,
    lines,
    pair,
    read,
    refused,
    run,
    write,
)

import ppo
import sft
import train_rm
from lib.health import warn_of_labels
from lib.scored import group_by_prompt
from makers import options
from tools.data import layouts

HH = f"\n\nHuman: {EN}\n\nAssistant: A crow.\n\nHuman: Another?\n\nAssistant: "


def gpt(text):
    return {"from": "gpt", "value": text}


LAYOUTS = [  # what a file holds, what the layout is called, the set, its records
    (
        {"instruction": "Sort.", "input": "2 1", "output": "1 2"},
        "instruction as prompt, input, output as completion",
        "actor",
        [{"user_input": "Sort.\n\n2 1", "completion": "1 2"}],
    ),
    (
        {"instruction": EN, "input": "<noinput>", "output": " A crow.\n"},
        "instruction as prompt, input, output as completion",
        "actor",
        [{"user_input": EN, "completion": "A crow."}],
    ),
    (
        {"instruction": "Another?", "output": "An owl.", "history": [[EN, "A crow."]]},
        "history, instruction as prompt, output as completion",
        "actor",
        [{"user_input": DIALOGUE, "completion": "An owl."}],
    ),
    ({"instruction": ZH}, "instruction as prompt", "rlhf", [{"user_input": ZH}]),
    (
        SEED,
        "self-instruct seed tasks",
        "actor",
        [
            {"user_input": "Sort.\n\n2 1", "completion": "1 2"},
            {"user_input": "Sort.", "completion": "Done."},
        ],
    ),
    (
        {"prompt": EN, "chosen": "Good.", "rejected": "Bad."},
        "prompt, chosen, rejected",
        "reward",
        pair(EN),
    ),
    (
        {
            "prompt": DIALOGUE,
            "chosen": [{"role": "assistant", "content": "Good."}],
            "rejected": [{"role": "assistant", "content": "Bad."}],
        },
        "prompt, chosen, rejected",
        "reward",
        pair(DIALOGUE),
    ),
    (
        {
            "prompt": EN,
            "chosen": [USER, {"role": "assistant", "content": "Good."}],
            "rejected": [USER, {"role": "assistant", "content": "Bad."}],
        },
        "prompt, chosen, rejected",
        "reward",
        pair(EN),
    ),
    (
        {"prompt": HH.rstrip(), "chosen": " Good.", "rejected": " Bad."},
        "prompt, chosen, rejected",
        "reward",
        pair(DIALOGUE),
    ),
    (
        {"chosen": HH + "Good.", "rejected": HH + "Bad."},
        "chosen, rejected",
        "reward",
        pair(DIALOGUE),
    ),
    (
        {
            "chosen": [USER, {"role": "assistant", "content": "Good."}],
            "rejected": [USER, {"role": "assistant", "content": "Bad."}],
        },
        "chosen, rejected",
        "reward",
        pair(EN),
    ),
    (SHP, "SHP", "reward", pair(EN, 2.0)),
    (
        SHP | {"labels": 1, "human_ref_A": "Good.", "human_ref_B": "Bad.", "score_ratio": 1.0},
        "SHP",
        "reward",
        pair(EN, 1.0),
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": EN},
                gpt("A crow."),
                {"from": "human", "value": "Another?"},
            ],
            "chosen": gpt("Good."),
            "rejected": gpt("Bad."),
        },
        "conversations as messages, chosen, rejected",
        "reward",
        pair(DIALOGUE),
    ),
    (
        {"conversations": [{"from": "human", "value": EN}, gpt("A crow.")]},
        "conversations as messages",
        "actor",
        [{"user_input": EN, "completion": "A crow."}],
    ),
    (
        {"messages": [*DIALOGUE, ANSWER]},
        "messages",
        "actor",
        [{"user_input": DIALOGUE, "completion": "A crow."}],
    ),
    (
        {"user_input": DIALOGUE, "completion": "Good.", "score": -2},
        "user_input as prompt, completion, score",
        "reward",
        [{"user_input": DIALOGUE, "completion": "Good.", "score": -2}],
    ),
]


@pytest.mark.parametrize("theirs, layout, name, ours", LAYOUTS)
@pytest.mark.parametrize("ending", ["json", "jsonl", "json.gz"])
def test_import_each_layout(tmp_path, capsys, theirs, layout, name, ours, ending):
    source = write(tmp_path / f"x.{ending}", lines([theirs]) if "l" in ending else [theirs])
    run("import", source, out=tmp_path / "out", eval_share=0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{name}_training_data.json"]
    assert read(tmp_path / f"out/{name}_training_data.json") == ours
    assert f"1 records, {layout}" in capsys.readouterr().out


def test_import_splits_by_prompt_and_drops_duplicates(tmp_path, capsys):
    pairs = [
        {"prompt": f"Prompt {i % 40}", "chosen": f"Good {i}", "rejected": "Bad"} for i in range(80)
    ]
    one, two = write(tmp_path / "1.jsonl", lines(pairs)), write(tmp_path / "2.json", pairs[:10])
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        run(
            "import",
            one,
            two,
            "--make",
            "actor",
            "reward",
            "rlhf",
            out=tmp_path / out,
            eval_share=0.2,
            seed=seed,
        )
    # all of the second file; "Bad" stands in both pairs of a prompt
    assert "20 exact duplicates dropped" in capsys.readouterr().out
    sides = [
        {
            r["user_input"]
            for name in ("actor", "reward", "rlhf")
            for r in read(tmp_path / f"a/{name}_training_data{twin}.json")
        }
        for twin in ("", "_eval")
    ]
    assert len(sides[0]) == 32 and len(sides[1]) == 8 and not sides[0] & sides[1]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read(tmp_path / "a/rlhf_training_data_eval.json") != read(
        tmp_path / "c/rlhf_training_data_eval.json"
    )
    records = read(tmp_path / "a/reward_training_data.json") + read(
        tmp_path / "a/reward_training_data_eval.json"
    )
    assert Counter((r["score"], r["comparison"]) for r in records) == dict.fromkeys(
        [(score, n) for score in (0.0, 1.0) for n in (1, 2)], 40)
    demonstrated = read(tmp_path / "a/actor_training_data.json")
    assert len(demonstrated) == 32 and all(
        r["completion"].startswith("Good") and "score" not in r for r in demonstrated
    )


def test_only_what_the_pairs_of_a_prompt_say_is_learned(tmp_path, capsys):
    """best > meh > bad: "meh" beats nothing else, "best" and "bad" are never compared, and the
    answer that is demonstrated is the one that never lost."""
    pairs = [{"prompt": "P", "chosen": better, "rejected": worse}
             for better, worse in (("meh", "bad"), ("best", "meh"))]
    lone = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    run("import", write(tmp_path / "x.json", [*pairs, lone]), "--make", "actor", "reward",
        out=tmp_path, eval_share=0)
    records = read(tmp_path / "reward_training_data.json")
    assert ["comparison" in r for r in records] == [True] * 4 + [False] * 2
    examples = [([], [], n) for n in range(1, 7)]
    warn_of_labels("x", records, examples)
    assert "again with another score" not in capsys.readouterr().out
    groups = group_by_prompt(records, examples)
    stated = [{(records[a]["completion"], records[b]["completion"])
               for a in group for b in group if records[a]["score"] > records[b]["score"]}
              for group in groups]
    assert stated == [{("meh", "bad")}, {("best", "meh")}, {("yes", "no")}]
    demonstrated = read(tmp_path / "actor_training_data.json")
    assert [r["completion"] for r in demonstrated] == ["best", "yes"]


def test_scored_answers_that_repeat_the_dialogue(tmp_path):
    asked = "Human: Q\n\nAssistant:"
    theirs = {"prompt": asked, "responses": [f"{asked} good", f"{asked} bad"], "scores": [2, 1]}
    run("import", write(tmp_path / "x.json", [theirs]), out=tmp_path, eval_share=0)
    assert read(tmp_path / "reward_training_data.json") == [
        {"user_input": "Q", "completion": text, "score": score}
        for text, score in (("good", 2), ("bad", 1))]


def test_import_leaves_out_what_is_no_pair_and_says_why(tmp_path, capsys):
    good = {"chosen": HH + "Good.", "rejected": HH + "Bad."}
    bad = [
        {"chosen": HH + "Good.", "rejected": HH.replace("bird", "fish") + "Bad."},
        {"chosen": HH + "Good.", "rejected": HH + "Good."},
        {"chosen": HH + "Good.\n\nHuman: Thanks", "rejected": HH + "Bad."},
    ]
    run("import", write(tmp_path / "x.json", [good, *bad]), out=tmp_path)
    assert read(tmp_path / "reward_training_data.json") == pair(DIALOGUE)
    said = capsys.readouterr().out
    for reason in (
        "1: its two sides answer different prompts (records 2)",
        "1: its completions are all the same (records 3)",
        "1: a side does not end with the assistant (records 4)",
    ):
        assert f"left out {reason}" in said
    tool = {
        "conversations": [
            {"from": "human", "value": EN},
            {"from": "function_call", "value": "{}"},
            gpt("A crow."),
        ]
    }
    run(
        "import",
        write(
            tmp_path / "t.json",
            [{"conversations": [{"from": "human", "value": EN}, gpt("A crow.")]}, tool],
        ),
        out=tmp_path,
    )
    assert "left out 1: a message is of 'function_call' (records 2)" in capsys.readouterr().out


def test_neighbours_of_one_role_become_one_message():
    messages = layouts.dialogue("\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three.")
    assert messages == [
        {"role": "user", "content": "One.\n\nTwo."},
        {"role": "assistant", "content": "Three."},
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ('[{"instruction": "x"', "not JSON"),
        ('{"instruction": "x"}\nnonsense\n', "record 2: not JSON"),
        ("[]", "holds no records"),
        ("", "holds no records"),
        (
            '[{"title": "x"}]',
            "none of the fields title is known as a prompt: say which plays which part, as in --map",
        ),
        ("[7, 8]", "x.json: holds no record that can be used: not a JSON object"),
        ('[{"instruction": "x", "output": 3}]', "no record is left"),
        ('[{"instruction": "x", "output": "\\ud83d"}]', "no record is left"),
        ('[{"instruction": " "}]', "no record is left"),
        ('[{"conversations": 3}]', "no record is left"),
        (json.dumps([SHP | {"score_ratio": None}]), "no record is left"),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "a Git LFS pointer"),
    ],
)
def test_import_of_bad_files(tmp_path, capsys, text, said):
    source = write(tmp_path / "x.json", text)
    line = refused(capsys, lambda: run("import", source, out=tmp_path / "out"))
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "out").exists()


ANSWERS = [{"user_input": EN, "completion": "A crow."}]
WITH_SYSTEM = [
    {"user_input": [{"role": "system", "content": "Be brief."}, USER], "completion": "A crow."}
]
OLDER = [{"user_input": DIALOGUE, "completion": "An owl."}]
TREE = {
    "message_tree_id": "t",
    "tree_state": "ready",
    "prompt": {
        "text": EN,
        "role": "prompter",
        "replies": [
            {"text": "Bad.", "role": "assistant", "rank": 1, "replies": []},
            {
                "text": "Good.",
                "role": "assistant",
                "rank": 0,
                "replies": [
                    {
                        "text": "Another?",
                        "role": "prompter",
                        "replies": [
                            {"text": "An owl.", "role": "assistant", "rank": None, "replies": []}
                        ],
                    }
                ],
            },
        ],
    },
}

PEOPLES = {  # name: (a record as people have it, ours of it, the fields of it that are not used)
    "Dolly": (
        {
            "instruction": "Who sings?",
            "context": "A crow sings.",
            "response": "A crow.",
            "category": "closed_qa",
        },
        [{"user_input": "Who sings?\n\nA crow sings.", "completion": "A crow."}],
        "category",
    ),
    "prompt, completion": ({"prompt": EN, "completion": " A crow."}, ANSWERS, ""),
    "prompt, response": ({"prompt": EN, "response": "A crow."}, ANSWERS, ""),
    "question, answer": ({"question": EN, "answer": "A crow."}, ANSWERS, ""),
    "query, response": ({"query": EN, "response": "A crow."}, ANSWERS, ""),
    "input, target": ({"input": EN, "target": "A crow."}, ANSWERS, ""),
    "OpenOrca": (
        {"id": "niv.1", "system_prompt": "Be brief.", "question": EN, "response": "A crow."},
        WITH_SYSTEM,
        "id",
    ),
    "orca_dpo_pairs": (
        {"system": "Be brief.", "question": EN, "chosen": "Good.", "rejected": "Bad."},
        pair(WITH_SYSTEM[0]["user_input"]),
        "",
    ),
    "a system beside messages": (
        {"system": "Be brief.", "messages": [USER, ANSWER]},
        WITH_SYSTEM,
        "",
    ),
    "a system beside ShareGPT": (
        {"system": "Be brief.", "conversations": [{"from": "human", "value": EN}, gpt("A crow.")]},
        WITH_SYSTEM,
        "",
    ),
    "developer": (
        {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                USER,
                {"role": "model", "content": "A crow."},
            ]
        },
        WITH_SYSTEM,
        "",
    ),
    "from, content": (
        {"messages": [{"from": "user", "content": EN}, {"from": "chatgpt", "content": "A crow."}]},
        ANSWERS,
        "",
    ),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": EN}]},
                {"role": "bot", "content": "A crow."},
            ]
        },
        ANSWERS,
        "",
    ),
    "tools": (
        {"messages": [USER, ANSWER], "tools": [{"name": "x"}], "images": ["a.png"], "empty": ""},
        ANSWERS,
        "images tools",
    ),
    "guanaco": (
        {"text": f"### Human: {EN}### Assistant: A crow.### Human: Another?### Assistant: An owl."},
        OLDER,
        "",
    ),
    "BELLE": (
        {
            "instruction": f"Human:{EN}\nAssistant:A crow.\nHuman:Another?\nAssistant:\n",
            "input": "",
            "output": "An owl.",
        },
        OLDER,
        "",
    ),
    "LIMA": (
        {"conversations": [EN, "A crow.", "Another?", "An owl."], "source": "x"},
        OLDER,
        "source",
    ),
    "UltraChat": ({"id": "0", "data": [EN, "A crow."]}, ANSWERS, "id"),
    "bare messages": ([USER, ANSWER], ANSWERS, ""),
    "KTO, good": ({"prompt": EN, "completion": "Good.", "label": True}, pair(EN)[:1], ""),
    "KTO, bad": (
        {"messages": [USER, {"role": "assistant", "content": "Bad."}], "kto_tag": False},
        pair(EN)[1:],
        "",
    ),
    "Alpaca pairs": (
        {"instruction": "Sort.", "input": "2 1", "chosen": "Good.", "rejected": "Bad."},
        pair("Sort.\n\n2 1"),
        "",
    ),
    "a pair with input": ({"input": EN, "chosen": "Good.", "rejected": "Bad."}, pair(EN), ""),
    "a pair with question": ({"question": EN, "chosen": "Good.", "rejected": "Bad."}, pair(EN), ""),
    "a pair with context": (
        {"context": HH, "chosen": "Good.", "rejected": "Bad."},
        pair(DIALOGUE),
        "",
    ),
    "Argilla": (
        {"instruction": EN, "chosen_response": "Good.", "rejected_response": "Bad."},
        pair(EN),
        "",
    ),
    "HelpSteer": (
        {"prompt": EN, "response": "Good.", "helpfulness": 1, "verbosity": 2},
        pair(EN)[:1],
        "verbosity",
    ),
    "PKU-SafeRLHF": (
        {
            "prompt": EN,
            "response_0": "Bad.",
            "response_1": "Good.",
            "better_response_id": 1,
            "safer_response_id": 0,
        },
        pair(EN)[::-1],
        "safer_response_id",
    ),
    "WebGPT": (
        {
            "question": {"full_text": EN},
            "answer_0": "Good.",
            "answer_1": "Bad.",
            "score_0": 1.0,
            "score_1": 0.0,
        },
        pair(EN),
        "",
    ),
    "summaries": (
        {
            "info": {"title": "Birds", "post": "A crow."},
            "summaries": [{"text": "Bad."}, {"text": "Good."}],
            "choice": 1,
            "split": "x",
        },
        pair("Birds\n\nA crow.")[::-1],
        "split",
    ),
    "UltraFeedback": (
        {
            "instruction": EN,
            "completions": [
                {"response": "Good.", "overall_score": 8.5},
                {"response": "Bad.", "overall_score": 2},
            ],
        },
        [
            {"user_input": EN, "completion": "Good.", "score": 8.5},
            {"user_input": EN, "completion": "Bad.", "score": 2.0},
        ],
        "",
    ),
    "Nectar": (
        {
            "prompt": f"\n\nHuman: {EN}\n\nAssistant: ",
            "answers": [{"answer": "Bad.", "rank": 2.0}, {"answer": "Good.", "rank": 1.0}],
        },
        [
            {"user_input": EN, "completion": "Bad.", "score": -2.0},
            {"user_input": EN, "completion": "Good.", "score": -1.0},
        ],
        "",
    ),
    "GPT-4-LLM": (
        {
            "user_input": EN,
            "completion_a": "Good.",
            "completion_b": "Bad.",
            "responses_and_scores": [
                {"response": "Good.", "score": 1.0},
                {"response": "Bad.", "score": 0.0},
            ],
        },
        pair(EN),
        "",
    ),
    "messages with more to them": (
        {
            "messages": [USER | {"name": "Ann"}, {"role": "assistant", "content": "Good."}],
            "tools": [{"type": "function"}],
        },
        [{"user_input": EN, "completion": "Good."}],
        "name tools",
    ),
    "UltraFeedback's annotations": (
        {
            "instruction": EN,
            "completions": [
                {"response": "Good.", "overall_score": 1, "critique": "Fine."},
                {"response": "Bad.", "overall_score": 0, "critique": None},
            ],
        },
        pair(EN),
        "critique",
    ),
    "OpenAI's preferences": (
        {
            "input": {"messages": [USER]},
            "preferred_output": [{"role": "assistant", "content": "Good."}],
            "non_preferred_output": [{"role": "assistant", "content": "Bad."}],
        },
        pair(EN),
        "",
    ),
    "OASST": (
        TREE,
        [
            {"user_input": EN, "completion": "Bad.", "score": 0.0},
            {"user_input": EN, "completion": "Good.", "score": 1.0},
            {
                "user_input": [USER, {"role": "assistant", "content": "Good."}, MORE],
                "completion": "An owl.",
            },
        ],
        "tree_state",
    ),
}


@pytest.mark.parametrize("name", PEOPLES)
def test_import_what_people_have(tmp_path, capsys, name):
    theirs, ours, unused = PEOPLES[name]
    run("import", write(tmp_path / "x.json", [theirs]), out=tmp_path / "out", eval_share=0)
    found = [
        record
        for path in sorted((tmp_path / "out").iterdir(), reverse=True)
        for record in read(path)
    ]
    assert found == ours
    said = capsys.readouterr().out
    lost = re.findall(r"([^ :,]+) \(in 1 records\)", said)
    assert sorted(lost) == unused.split() and ("all fields used" in said) == (not unused)


@pytest.mark.parametrize(
    "theirs, reason",
    [
        ({"question": EN, "answer": None}, "its answer is missing"),
        ({"question": None, "answer": "x"}, "there is no prompt"),
        ({"question": EN, "answer": ""}, "its completion is empty"),
        ({"question": EN}, "its answer is missing"),
        ({"question": 7, "answer": "x"}, "a dialogue is not a list of messages"),
        (7, "not a JSON object"),
        ({"question": EN, "answer": 3}, "a field that should be a string is not one"),
        (
            {"question": EN, "answer": "\ud83d"},
            "its completion holds half a character (a lone surrogate)",
        ),
    ],
)
def test_an_odd_record_does_not_end_an_import(tmp_path, capsys, theirs, reason):
    good = {"question": EN, "answer": "A crow."}
    run(
        "import",
        write(tmp_path / "x.json", [good, *[theirs] * 5]),
        out=tmp_path / "out",
        eval_share=0,
    )
    assert read(tmp_path / "out/actor_training_data.json") == ANSWERS
    assert f"  left out 5: {reason} (records 2, 3, 4, ...)\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    "messages, reason",
    [
        ([ANSWER], "there is no prompt"),
        ([ANSWER, MORE, ANSWER], "the dialogue begins with the assistant"),
        ([], "there is no prompt"),
        (
            [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}],
            "a message has no text",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER],
            "a message has a part that is no text",
        ),
        ([USER, {"role": "tool", "content": "x"}, ANSWER], "a message is of 'tool'"),
    ],
)
def test_an_odd_dialogue_does_not_end_an_import(tmp_path, capsys, messages, reason):
    run(
        "import",
        write(tmp_path / "x.json", [{"messages": [USER, ANSWER]}, {"messages": messages}]),
        out=tmp_path / "out",
        eval_share=0,
    )
    assert read(tmp_path / "out/actor_training_data.json") == ANSWERS
    assert f"left out 1: {reason} (records 2)" in capsys.readouterr().out


def test_import_maps_fields_by_hand(tmp_path, capsys):
    source = write(tmp_path / "x.json", [{"title": EN, "body": "A crow.", "prompt": "not this"}])
    run("import", source, out=tmp_path / "out", eval_share=0, map="prompt=title,completion=body")
    assert read(tmp_path / "out/actor_training_data.json") == ANSWERS
    assert (
        "title as prompt, body as completion" in (said := capsys.readouterr().out)
        and "not used: prompt (in 1 records)" in said
    )
    for wrong in ("prompt", "promt=title", "prompt=", "prompt=title,prompt=body"):
        assert f"--map {wrong}: " in refused(
            capsys, lambda: run("import", source, out=tmp_path / "y", map=wrong)
        )


@pytest.mark.parametrize("part", ["prompt", "system"])
def test_a_mapped_field_that_no_record_has_is_refused(tmp_path, capsys, part):
    source = write(tmp_path / "x.json", [{"question": EN, "answer": "A crow."}])
    line = refused(capsys, lambda: run("import", source, out=tmp_path, map=f"{part}=zzz"))
    assert f"--map {part}=zzz: no record of {source} has it; they have answer, question" in line


def test_what_stands_beside_the_records_is_named(tmp_path, capsys):
    file = {"data": ANSWERS, "rows": [{"question": ZH}], "version": "1.1", "split": ""}
    run("import", source := write(tmp_path / "x.json", json.dumps(file)), out=tmp_path)
    said = capsys.readouterr().out
    assert f"{source}: its records are those in data; not used: rows, version\n" in said


def test_an_empty_completion_is_no_demonstration(tmp_path, capsys):
    scored = [
        {"user_input": EN, "completion": "", "score": 4},
        {"user_input": EN, "completion": "A crow.", "score": 3},
        {"user_input": ZH, "completion": "An owl.", "score": 1},
    ]
    source = write(tmp_path / "x.json", scored)
    run("import", source, "--make", "actor", "reward", out=tmp_path, eval_share=0)
    assert read(tmp_path / "actor_training_data.json") == [
        {"user_input": ZH, "completion": "An owl."}
    ]
    assert read(tmp_path / "reward_training_data.json") == scored
    assert "1 empty completions, unscored or the best of" in capsys.readouterr().out
    replies = [{"text": text, "role": "assistant"} for text in ("A crow.", " ")]
    tree = {"message_tree_id": "t", "prompt": {"text": EN, "role": "prompter", "replies": replies}}
    run("import", write(tmp_path / "y.json", [tree]), out=tmp_path / "y", eval_share=0)
    assert read(tmp_path / "y/actor_training_data.json") == ANSWERS


def test_an_answer_that_is_labelled_as_bad_is_no_demonstration(tmp_path, capsys):
    labels = [("Name a fish.", "A crow.", False), (EN, "A stone.", False), (EN, "A crow.", True)]
    judged = [{"prompt": p, "completion": c, "label": label} for p, c, label in labels]
    tie = [{"prompt": ZH, "response": "Crow.", "score": 0}]  # the best that a score says
    files = write(tmp_path / "x.json", judged), write(tmp_path / "y.json", tie)
    run("import", *files, "--make", "actor", "reward", out=tmp_path, eval_share=0)
    assert read(tmp_path / "actor_training_data.json") == [
        *ANSWERS,
        {"user_input": ZH, "completion": "Crow."},
    ]
    assert read(tmp_path / "reward_training_data.json") == [
        {"user_input": "Name a fish.", "completion": "A crow.", "score": 0.0},
        {"user_input": EN, "completion": "A stone.", "score": 0.0},
        {"user_input": EN, "completion": "A crow.", "score": 1.0},
        {"user_input": ZH, "completion": "Crow.", "score": 0.0},
    ]
    said = capsys.readouterr().out
    assert "1 prompts have only answers that are labelled as bad" in said


def test_import_all_turns(tmp_path, capsys):
    source = write(
        tmp_path / "x.json",
        [{"messages": [*DIALOGUE, {"role": "assistant", "content": "An owl."}]}],
    )
    run("import", source, out=tmp_path / "one", eval_share=0)
    assert read(tmp_path / "one/actor_training_data.json") == OLDER
    assert (
        "1 answers of earlier turns are not used: --all_turns takes them" in capsys.readouterr().out
    )
    run("import", source, "--all_turns", out=tmp_path / "all", eval_share=0)
    assert read(tmp_path / "all/actor_training_data.json") == ANSWERS + OLDER
    assert "--all_turns" not in capsys.readouterr().out


def test_import_all_turns_of_a_dialogue_that_ends_with_the_user(tmp_path, capsys):
    source = write(tmp_path / "x.json", [{"messages": DIALOGUE}])
    assert DIALOGUE[-1]["role"] == "user"
    asked = [{"user_input": DIALOGUE}]
    run("import", source, out=tmp_path / "one", eval_share=0)
    assert read(tmp_path / "one/rlhf_training_data.json") == asked
    assert not (tmp_path / "one/actor_training_data.json").exists()
    assert "1 answers of earlier turns are not used: --all_turns" in capsys.readouterr().out
    run("import", source, "--all_turns", out=tmp_path / "all", eval_share=0)
    assert read(tmp_path / "all/actor_training_data.json") == ANSWERS
    assert asked[0] in read(tmp_path / "all/rlhf_training_data.json")


@pytest.mark.parametrize(
    "name, text",
    [
        ("x.csv", 'question,answer,source\n"Name a kind of bird.","A crow.",web\n'),
        ("x.tsv", "question\tanswer\tsource\nName a kind of bird.\tA crow.\tweb\n"),
        ("x.csv.gz", "\ufeffquestion,answer,source\r\nName a kind of bird.,A crow.,web\r\n"),
        ("x.json", json.dumps({"data": [ANSWERS[0] | {"source": "web"}]}, indent=1)),
        ("x.jsonl", json.dumps(ANSWERS[0] | {"source": "web"}, indent=1)),
    ],
)
def test_import_of_other_files(tmp_path, capsys, name, text):
    run("import", write(tmp_path / name, text), out=tmp_path / "out", eval_share=0)
    assert read(tmp_path / "out/actor_training_data.json") == ANSWERS
    assert "not used: source (in 1 records)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name, table, said",
    [
        ("x.csv", "prompt,response\n你好,好\n".encode("gbk"), "not UTF-8 at byte 16; save the file "
         "as UTF-8"),
        ("x.csv", b"prompt;response\nhi, you;ok\n", "its header is one column, 'prompt;response'; "
         "save the file with commas, not ';', between the columns"),
        ("x.csv", b"prompt\tresponse\nhi\tok\n", "save the file with commas, not '\\t', between"),
        ("x.tsv", b"prompt,response\nhi,ok\n", "save the file with tabs, not ',', between"),
    ],
)
def test_a_table_that_says_how_to_save_it(tmp_path, capsys, name, table, said):
    source = tmp_path / name
    source.write_bytes(table)
    line = refused(capsys, lambda: run("import", source, out=tmp_path / "out"))
    assert f"{source}: " in line and said in line and not (tmp_path / "out").exists()
    write(source, f"prompt\n{EN}\n")
    run("import", source, out=tmp_path / "out", eval_share=0)
    assert read(tmp_path / "out/rlhf_training_data.json") == [{"user_input": EN}]


def test_scores_of_a_table_are_numbers(tmp_path, capsys):
    run(
        "import",
        write(tmp_path / "x.csv", f"prompt,response,rating\n{EN},Good.,4.5\n{EN},Bad.,none\n"),
        out=tmp_path / "out",
        eval_share=0,
    )
    assert read(tmp_path / "out/reward_training_data.json") == [
        {"user_input": EN, "completion": "Good.", "score": 4.5}
    ]
    assert "left out 1: its score is not a number (records 2)" in capsys.readouterr().out


def test_parquet_without_its_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert "pip install pyarrow" in refused(
        capsys, lambda: run("import", write(tmp_path / "x.parquet", "PAR1"), out=tmp_path)
    )


def test_parquet(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([{"question": EN, "answer": "A crow.", "n": 1}]),
        tmp_path / "x.parquet",
    )
    run("import", tmp_path / "x.parquet", out=tmp_path / "out", eval_share=0)
    assert read(tmp_path / "out/actor_training_data.json") == ANSWERS


def test_import_overwrites_nothing_unasked(tmp_path, capsys):
    source = write(tmp_path / "x.json", [{"instruction": EN}, {"instruction": ZH}])
    write(tmp_path / "rlhf_training_data_eval.json", "mine")
    assert "rlhf_training_data_eval.json: already exists" in refused(
        capsys, lambda: run("import", source, out=tmp_path)
    )
    assert (tmp_path / "rlhf_training_data_eval.json").read_text() == "mine" and not (
        tmp_path / "rlhf_training_data.json"
    ).exists()
    run("import", source, "--overwrite", out=tmp_path)
    assert len(read(tmp_path / "rlhf_training_data_eval.json")) == 1


def test_held_out_prompts_are_not_in_both_files_unsaid(tmp_path, capsys):
    source = write(tmp_path / "x.json", [{"instruction": text} for text in (EN, ZH, "Three.")])
    run("import", source, out=tmp_path, eval_share=0.9)  # one is left to learn from
    assert len(read(tmp_path / "rlhf_training_data_eval.json")) == 2
    capsys.readouterr()
    run("import", source, "--overwrite", out=tmp_path, eval_share=0)
    twin = tmp_path / "rlhf_training_data_eval.json"
    assert f"{twin}: was there before; its prompts may be in" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["5", "null", '[{"instruction": "{{}}"}]', '[{"score": 1'
                                  + "0" * 400 + ', "user_input": "a", "completion": "b"}]'])
def test_what_json_allows_too(tmp_path, capsys, text):
    """It is refused in a line, or read."""
    try:
        run("import", write(tmp_path / "x.json", text), out=tmp_path, eval_share=0)
    except SystemExit as end:
        assert end.code == 2 and "error: " in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# All three stages take these files as they are


def test_the_stages_take_what_import_writes(tmp_path, hf, capsys):
    long = "word " * 3000
    demos = [
        {"user_input": p, "completion": c}
        for p in (EN, [USER, ANSWER, MORE], long)
        for c in ("A crow.", "")
    ] + [{"user_input": EN, "completion": long}]
    pairs = [
        {"prompt": p, "chosen": c, "rejected": ""}
        for p in (EN, [USER, ANSWER, MORE], long)
        for c in ("A crow.", "An owl.")
    ]
    pairs.append({"prompt": EN, "chosen": long, "rejected": "No."})
    run(
        "import",
        write(tmp_path / "demos.json", demos),
        write(tmp_path / "pairs.json", pairs),
        out=tmp_path,
        eval_share=0,
    )
    run(
        "import",
        write(tmp_path / "p.json", [{"instruction": EN}, {"instruction": long}]),
        out=tmp_path,
        eval_share=0,
    )
    prompts = read(tmp_path / "rlhf_training_data.json") + [
        {"user_input": EN},
        {"user_input": [USER, ANSWER, MORE]},
    ]
    actor, reward, rlhf = (
        str(tmp_path / f"{name}_training_data.json") for name in ("actor", "reward", "rlhf")
    )
    write(tmp_path / "rlhf_training_data.json", prompts)
    out = {stage: tmp_path / stage for stage in ("sft", "rm", "ppo")}
    sft.main(options(model=hf, data=actor, out=out["sft"], epochs=1))
    assert re.search(
        r"of 4 records, 1 prompts cut on the left and 1 completions dropped",
        capsys.readouterr().out,
    )
    train_rm.main(
        options(model=out["sft"], data=reward, demonstrations=actor, out=out["rm"], epochs=1)
    )
    assert re.search(
        r"\d+ prompts cut on the left and 1 completions dropped", capsys.readouterr().out
    )
    size = dict(updates=1, batch_size=4, minibatch_size=4, max_new_tokens=8)
    ppo.main(options(sft=out["sft"], rm=out["rm"], prompts=rlhf, out=out["ppo"], **size))
    assert "of 4 prompts, 1 cut on the left" in capsys.readouterr().out
    assert (tmp_path / "ppo/config.json").exists()
