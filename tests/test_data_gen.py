"""The commands of data_gen.py: other people's data, an LLM behind HTTP, completions of a
checkpoint, a person at the terminal.

The built-in data of stage 0 is tested in test_world.py.
"""

import email.utils
import gzip
import hashlib
import http.server
import itertools
import json
import os
import pty
import random
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import data_gen
import model
import ppo
import sft
import train_rm
from lib.data import encode_prompt, left_pad, read_records
from tools.data import download, layouts, rank, sets, synthesize, templates
from tools.data.llm import retry_after, without_thoughts
from tools.data.score import read_score

ROOT = Path(__file__).parents[1]
EN, ZH = "Name a kind of bird.", "请说出一种鸟。"


def write(path, value):
    """A list as JSON, a text as it is; `.gz` where the name says so."""
    text = value if isinstance(value, str) else json.dumps(value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def run(command, *argv, **options):
    data_gen.main(
        [
            command,
            *map(str, argv),
            *(word for k, v in options.items() for word in (f"--{k}", str(v))),
        ]
    )


def read(path):
    return json.loads(Path(path).read_text())


def refused(capsys, call, code=2):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as end:
        call()
    error = capsys.readouterr().err
    assert end.value.code == code and "Traceback" not in error
    return error.strip().split("\n")[-1]


# ------------------------------------------------------------------------------------------------
# import

USER, ANSWER, MORE = (
    {"role": role, "content": text}
    for role, text in (("user", EN), ("assistant", "A crow."), ("user", "Another?"))
)
HH = f"\n\nHuman: {EN}\n\nAssistant: A crow.\n\nHuman: Another?\n\nAssistant: "
SHP = {
    "history": EN,
    "human_ref_A": "Bad.",
    "human_ref_B": "Good.",
    "labels": 0,
    "score_ratio": 3.0,
    "domain": "x",
}
SEED = {
    "name": "x",
    "instruction": "Sort.",
    "instances": [{"input": "2 1", "output": "1 2"}, {"input": "", "output": "Done."}],
}
DIALOGUE = [USER, ANSWER, MORE]


def pair(prompt, better=1.0):
    return [
        {"user_input": prompt, "completion": "Good.", "score": better},
        {"user_input": prompt, "completion": "Bad.", "score": 0.0},
    ]


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
    # "Bad" once a prompt, and all of the second file
    assert (
        f"{40 + 20} exact duplicates dropped" in capsys.readouterr().out
    )
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
    assert Counter(r["score"] for r in records) == {1.0: 80, 0.0: 40}
    demonstrated = read(tmp_path / "a/actor_training_data.json")
    assert len(demonstrated) == 32 and all(
        r["completion"].startswith("Good") and "score" not in r for r in demonstrated
    )


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
        ('[7, 8]', "none of the fields"),
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
    for wrong in ("prompt", "promt=title", "prompt="):
        assert f"--map {wrong}: " in refused(
            capsys, lambda: run("import", source, out=tmp_path / "y", map=wrong)
        )


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


# ------------------------------------------------------------------------------------------------
# download: huggingface_hub itself, on files where its cache puts them, and on a hub that breaks off


def subprocess_run(argv, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run(
        [sys.executable, ROOT / "data_gen.py", *map(str, argv)],
        env=clean | env,
        capture_output=True,
        text=True,
        timeout=120,
    )


def cached(home, repository, path, text):
    """A file as the hub's cache lays it out."""
    repo = home / f"datasets--{repository.replace('/', '--')}"
    write(repo / "refs/main", "0123456789abcdef")
    write(repo / "snapshots/0123456789abcdef" / path, text)


def test_download_from_the_cache(tmp_path):
    folders = download.HUB["hh"][1]
    for folder in folders:
        cached(
            tmp_path / "hub",
            "Anthropic/hh-rlhf",
            f"{folder}/train.jsonl.gz",
            lines(
                {
                    "chosen": f"\n\nHuman: {folder} {i}\n\nAssistant: Good.",
                    "rejected": f"\n\nHuman: {folder} {i}\n\nAssistant: Bad.",
                }
                for i in range(20)
            ),
        )
    cached(
        tmp_path / "hub",
        "stanfordnlp/SHP",
        "askbaking/train.json",
        lines([SHP, SHP | {"history": ZH, "score_ratio": 7.0}]),
    )
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    hh = subprocess_run(
        [
            "download",
            "hh",
            "--path",
            tmp_path / "hh",
            "--number_of_samples",
            40,
            "--make",
            "reward",
            "rlhf",
        ],
        **env,
    )
    assert hh.returncode == 0, hh.stderr
    prompts = [
        r["user_input"]
        for twin in ("", "_eval")
        for r in read(tmp_path / f"hh/rlhf_training_data{twin}.json")
    ]
    assert sorted(prompts) == sorted(f"{folder} {i}" for folder in folders for i in range(10))
    assert len(read(tmp_path / "hh/reward_training_data.json")) == 2 * 38
    shp = subprocess_run(
        ["download", "shp", "--parts", "askbaking", "--path", tmp_path / "shp", "--eval_share", 0],
        **env,
    )
    assert shp.returncode == 0, shp.stderr
    assert read(tmp_path / "shp/reward_training_data.json") == pair(EN, 2.0) + pair(ZH, 3.0)
    lacking = subprocess_run(
        ["download", "shp", "--parts", "askvet", "--path", tmp_path / "x"], **env
    )
    assert lacking.returncode == 1 and len(lacking.stderr.strip().split("\n")) == 1
    assert "cannot be downloaded" in lacking.stderr and "data_gen.py import" in lacking.stderr
    unknown = subprocess_run(
        ["download", "shp", "--parts", "askme", "--path", tmp_path / "x"], **env
    )
    assert (
        unknown.returncode == 2 and "askbaking" in unknown.stderr and not (tmp_path / "x").exists()
    )


class BrokenHub(http.server.BaseHTTPRequestHandler):
    """Serves one text under every name as the hub does, except `missing`; cuts the connection in
    the middle of the first `cuts`."""

    def do_HEAD(self):
        content, start = self.server.content, 0
        if "/resolve/" not in self.path or self.server.missing in self.path:
            return self.send_error(404)
        if wanted := re.match(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{hashlib.sha256(self.path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0123456789abcdef0123456789abcdef01234567")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        return start

    def do_GET(self):
        if (start := self.do_HEAD()) is not None:
            self.server.sent.append((self.path.split("/")[-2], start))
            self.server.cuts -= 1
            self.wfile.write(
                self.server.content[
                    start : len(self.server.content) // 2 if self.server.cuts >= 0 else None
                ]
            )

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts servers of a handler class in threads, with attributes for the handler; yields a
    function -> the server."""
    servers = []

    def start(handler, **attributes):
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        vars(server).update(attributes, address=f"http://127.0.0.1:{server.server_address[1]}")
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_download_goes_on_where_it_broke_off(tmp_path, serve):
    # the library writes 10 MB at a time
    records = [
        SHP | {"history": f"Question {i} {'x' * 8000}"} for i in range(3000)
    ]
    hub = serve(BrokenHub, content=lines(records).encode(), cuts=1, missing="askhr", sent=[])
    argv = [
        "download",
        "shp",
        "--parts",
        "askvet",
        "askhr",
        "--path",
        tmp_path / "shp",
        "--eval_share",
        0,
    ]
    env = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": "1",
    }
    first = subprocess_run(argv, **env)
    assert (
        first.returncode == 1
        and "askhr/train.json: cannot be downloaded" in first.stderr
        and "Run this again" in first.stderr
    )
    assert [part for part, _ in hub.sent] == ["askvet"] * 2 and hub.sent[1][
        1
    ] >= 10_000_000  # not from 0
    assert not (tmp_path / "shp").exists()
    hub.missing = "nothing"
    again = subprocess_run(argv, **env)
    assert again.returncode == 0, again.stderr
    assert hub.sent[2:] == [("askhr", 0)]  # the first file is there
    assert len(read(tmp_path / "shp/reward_training_data.json")) == 2 * 3000


# ------------------------------------------------------------------------------------------------
# The LLM: a server that does everything wrong that servers do, and whose answers are known


class Faulty(http.server.BaseHTTPRequestHandler):
    """Answers `reply(question, n)` to the nth asking; every other request meets the next of
    `faults`. Counts what it answered."""

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with server.lock:
            server.requests.append((time.monotonic(), self.headers.get("Authorization"), body))
            fault = (
                server.faults[len(server.requests) // 2 % len(server.faults)]
                if server.faults and len(server.requests) % 2
                else None
            )
        if fault == "slow":
            time.sleep(0.5)
            self.close_connection = True
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "garbage":
            self.answer(200, b"<html>busy</html>")
        elif fault == "no choices":
            self.answer(200, b'{"choices": []}')
        elif fault:
            self.answer(fault, b'{"error": "no"}')
        else:
            with server.lock:
                server.answered[question] += 1
                reply = server.reply(question, server.answered[question])
            wants = [key for key in getattr(server, "wants", {}) if key in body]
            if wants:
                return self.answer(400, server.wants[wants[0]])
            if isinstance(reply, bytes):
                return self.answer(200, reply)
            if isinstance(reply, int):
                return self.answer(reply, f"no: {self.headers.get('Authorization')}".encode())
            text, finish = reply if isinstance(reply, tuple) else (reply, "stop")
            self.answer(
                200,
                json.dumps(
                    {
                        "choices": [{"message": {"content": text}, "finish_reason": finish}],
                        "usage": {"total_tokens": 7},
                    }
                ).encode(),
            )

    def answer(self, code, body):
        self.send_response(code)
        if code == 429:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def llm(serve):
    def start(reply, faults=()):
        return serve(
            Faulty,
            reply=reply,
            faults=faults,
            requests=[],
            answered=Counter(),
            lock=threading.Lock(),
        )

    return start


def asking(server, **more):
    return (
        dict(api_base=f"{server.address}/v1", model="m", backoff=0.001, timeout=0.25, retries=30)
        | more
    )


COMPLETIONS = [{"user_input": f"Question {i}?", "completion": f"Answer <{i}>."} for i in range(24)]


def number_of(question):
    return int(re.search(r"<(\d+)>", question)[1])


def judge(question, n):
    """Of every ten answers, 5 are usable at once, 4 the second time, one never."""
    i = number_of(question)
    return (
        f"Score: {i % 6}/5" if i % 2 == 0 or (n == 2 and i % 10 != 9) else "I would rather not say."
    )


@pytest.mark.parametrize("workers", [1, 4, 32])
def test_score_on_a_faulty_server(tmp_path, llm, capsys, workers):
    server = llm(judge, ["cut", 500, "slow", "garbage", 503, "no choices"])
    before = (
        COMPLETIONS[:3]
        + [{"user_input": "Q", "completion": "A", "score": 1.5}]
        + COMPLETIONS[3:]
        + COMPLETIONS[:1]
    )
    source = write(tmp_path / "x.json", before)
    run("score", source, out=tmp_path / "y.json", workers=workers, **asking(server))
    scored = [
        r if "score" in r else r | {"score": float(number_of(r["completion"]) % 6)} for r in before
    ]
    assert read(tmp_path / "y.json") == [
        r for r in scored if not re.fullmatch(r"Answer <\d?9>.", r["completion"])
    ]
    assert read(tmp_path / "y_unscored.json") == [COMPLETIONS[9], COMPLETIONS[19]]
    times = {number_of(question): n for question, n in server.answered.items()}
    assert times == {i: 1 if i % 2 == 0 else 3 if i % 10 == 9 else 2 for i in range(24)}
    answered = sum(times.values())
    said = capsys.readouterr().out
    assert f"24 questions, 2 without a usable answer, 0 unanswered, {7 * answered} tokens" in said
    asked = len(server.requests)
    # all of it is in the journal
    run(
        "score", source, "--overwrite", out=tmp_path / "y.json", **asking(server)
    )
    assert len(server.requests) == asked


def test_retry_after_is_honoured(tmp_path, llm):
    server = llm(judge, [429])
    run(
        "score",
        write(tmp_path / "x.json", COMPLETIONS[:1]),
        out=tmp_path / "y.json",
        **asking(server),
    )
    (first, _, _), (second, _, _) = server.requests
    assert second - first >= 1.0


def test_retry_after_dates():
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert 28 < retry_after(soon) <= 30
    assert [
        retry_after(value) for value in (None, "7", "soon", "Wed, 21 Oct 2015 07:28:00 GMT")
    ] == [0, 7, 0, 0]


def test_a_half_written_journal(tmp_path, llm):
    server = llm(lambda question, n: f"{number_of(question) % 6}")
    source, journal = write(tmp_path / "x.json", COMPLETIONS), tmp_path / "y.json.journal.jsonl"
    run("score", source, out=tmp_path / "y.json", workers=1, **asking(server))
    whole, result, answers = (
        journal.read_bytes(),
        (tmp_path / "y.json").read_bytes(),
        sum(server.answered.values()),
    )
    entries = whole.split(b"\n")
    # one damaged line, and a half one
    journal.write_bytes(
        b"\n".join([*entries[:10], b"\0\0", *entries[11:-2], entries[-2][:20]])
    )
    (tmp_path / "y.json").unlink()
    run("score", source, out=tmp_path / "y.json", workers=1, **asking(server))
    assert sum(server.answered.values()) == answers + 2
    assert (tmp_path / "y.json").read_bytes() == result
    # whole lines, the damaged one included
    assert journal.read_bytes().count(b"\n") == len(
        entries
    )


def test_ctrl_c_loses_nothing(tmp_path, llm):
    def slowly(question, n):
        time.sleep(0.05)
        return "4"

    server = llm(slowly)
    source = write(tmp_path / "x.json", COMPLETIONS)
    argv = [
        sys.executable,
        ROOT / "data_gen.py",
        "score",
        source,
        "--out",
        tmp_path / "y.json",
        "--workers",
        "3",
        *(word for k, v in asking(server, timeout=5).items() for word in (f"--{k}", str(v))),
    ]
    # a shell's background jobs ignore Ctrl-C, and so would this one
    first = subprocess.Popen(
        argv,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(server.answered) < 5:
        time.sleep(0.01)
        assert first.poll() is None
    first.send_signal(signal.SIGINT)
    error = first.communicate(timeout=60)[1]
    assert first.returncode == 1 and "run this again to continue" in error and "Traceback" not in error
    assert not (tmp_path / "y.json").exists() and len(server.answered) < 24
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    assert set(server.answered.values()) == {1} and len(server.answered) == 24
    assert read(tmp_path / "y.json") == [r | {"score": 4.0} for r in COMPLETIONS]


@pytest.mark.parametrize(
    "code, said", [(401, "HTTP 401"), (404, "HTTP 404"), (400, "HTTP 400"), (500, "HTTP 500")]
)
def test_a_server_that_refuses(tmp_path, llm, capsys, monkeypatch, code, said):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    server = llm(lambda question, n: "5" if number_of(question) < 10 else code)
    source = write(tmp_path / "x.json", COMPLETIONS)
    options = dict(out=tmp_path / "y.json", workers=1, retries=1)
    line = refused(capsys, lambda: run("score", source, **asking(server, **options)), code=1)
    assert said in line and "10 of 24 questions are answered" in line
    assert server.requests[0][1] == "Bearer sk-very-secret"
    assert "secret" not in line and "secret" not in (tmp_path / "y.json.journal.jsonl").read_text()
    server.reply = lambda question, n: "5"
    run("score", source, **asking(server, **options))
    assert [
        server.answered[question] for question in server.answered if number_of(question) < 10
    ] == [1] * 10
    assert len(read(tmp_path / "y.json")) == 24


def test_one_question_that_the_server_refuses(tmp_path, llm, capsys):
    server = llm(lambda question, n: 400 if number_of(question) == 3 else "5")
    run("score", write(tmp_path / "x.json", COMPLETIONS), out=tmp_path / "y.json", **asking(server))
    assert "1 unanswered (the last: HTTP 400: no" in capsys.readouterr().out
    assert (
        read(tmp_path / "y_unscored.json") == [COMPLETIONS[3]]
        and len(read(tmp_path / "y.json")) == 23
    )


def test_nobody_answers(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    line = refused(
        capsys,
        lambda: run(
            "score",
            write(tmp_path / "x.json", COMPLETIONS),
            out=tmp_path / "y.json",
            api_base=base,
            model="m",
            backoff=0,
            retries=1,
        ),
        code=1,
    )
    assert base in line and "0 of 24 questions are answered" in line


# ------------------------------------------------------------------------------------------------
# score


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
        ("第一，正确；第二，简洁。", None),
        ("4,5", 4.5),
        ("Note: 4,5/5", 4.5),
        ("Score: 4,25", 4.25),
        ("评分：4,5分", 4.5),
    ],
)
def test_read_score(text, score):
    assert read_score(text) == score


@pytest.mark.parametrize(
    "text, rest",
    [
        ("<think>I would give Score: 1, but</think>\n\nScore: 4", "Score: 4"),
        ("<think>I would give Score: 1, but", ""),
        ("Hm, Score: 1.\n</think>Score: 4", "Score: 4"),
        ("<thinking>1</thinking> 4 <think>2", "4"),
        ("Score: 4", "Score: 4"),
        ("<think>a</think>b<think>c</think>Score: 4", "Score: 4"),
        ("I think 4 < 5 > 3", "I think 4 < 5 > 3"),
    ],
)
def test_thoughts_are_no_answer(text, rest):
    assert without_thoughts(text) == rest


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


def test_thoughts_become_neither_instructions_nor_answers(tmp_path, llm, capsys):
    def reply(question, n):
        if "numbered list" in question:
            return "<think>1. Draw me a map of it.\n2. Say nothing at all, please.</think>1. Name the rivers of Asia.\n2. How do birds fly south?"
        return f"<think>What is {question}?</think>An answer."

    server = llm(reply)
    run(
        "self-instruct",
        write(tmp_path / "seeds.json", [{"instruction": EN}]),
        out=tmp_path / "new",
        eval_share=0,
        number=2,
        per_request=2,
        **asking(server),
    )
    assert read(tmp_path / "new/actor_training_data.json") == [
        {"user_input": text, "completion": "An answer."}
        for text in ("Name the rivers of Asia.", "How do birds fly south?")
    ]


def test_a_server_that_wants_the_question_in_another_form(tmp_path, llm, capsys):
    """max_completion_tokens, and no temperature: said once each, then every question has that form
    at once."""
    server = llm(lambda question, n: "5")
    server.wants = {
        "max_tokens": b"Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
        "temperature": b"Unsupported value: 'temperature' does not support 0.1 with this model.",
    }
    run(
        "score",
        write(tmp_path / "x.json", COMPLETIONS),
        out=tmp_path / "y.json",
        **asking(server, workers=1, retries=0),
    )
    said = capsys.readouterr()
    assert len(read(tmp_path / "y.json")) == 24
    assert (
        (said.out + said.err).count("wants max_completion_tokens")
        == (said.out + said.err).count("allows no temperature")
        == 1
    )
    assert len(server.requests) == 26 and set(server.requests[-1][2]) == {
        "model",
        "messages",
        "stream",
        "max_completion_tokens",
    }


ODD_REPLIES = {  # what comes with code 200: what is said of it, None: it is an answer that scores nothing
    b'{"error": {"message": "model is loading"}}': "the server says: model is loading",
    b'{"error": "busy"}': "the server says: busy",
    b"<!DOCTYPE html><html>Welcome</html>": "a web page, not JSON: is /v1 missing",
    b"ok": "the reply is not JSON: b'ok'",
    b"[]": "the reply holds no choices",
    b'{"choices": [{"message": {"content": null, "refusal": "No."}, "finish_reason": "stop"}]}': None,
}


@pytest.mark.parametrize("reply", ODD_REPLIES)
def test_odd_replies_are_told_in_plain_words(tmp_path, llm, capsys, reply):
    server, said = llm(lambda question, n: reply), ODD_REPLIES[reply]
    line = refused(
        capsys,
        lambda: run(
            "score",
            write(tmp_path / "x.json", COMPLETIONS),
            out=tmp_path / "y.json",
            **asking(server, retries=1, workers=1),
        ),
        code=1,
    )
    assert (said or "not one record got a score") in line and "Error" not in line


def test_a_missing_v1_is_suspected(tmp_path, llm, capsys):
    server = llm(lambda question, n: 404)
    line = refused(
        capsys,
        lambda: run(
            "score",
            write(tmp_path / "x.json", COMPLETIONS),
            out=tmp_path / "y.json",
            **asking(server),
        ),
        code=1,
    )
    assert "HTTP 404" in line and "is /v1 missing" in line


def test_content_in_parts_and_usage_as_text(tmp_path, llm, capsys):
    reply = {
        "choices": [
            {
                "message": {
                    "content": [{"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}]
                },
                "finish_reason": "stop",
            }
        ],
        "usage": "7 tokens",
    }
    server = llm(lambda question, n: json.dumps(reply).encode())
    run("score", write(tmp_path / "x.json", COMPLETIONS), out=tmp_path / "y.json", **asking(server))
    assert {record["score"] for record in read(tmp_path / "y.json")} == {4}


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


def test_templates(tmp_path, llm, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    server, source = llm(lambda question, n: "5"), write(
        tmp_path / "x.json", [{"user_input": [USER], "completion": "{user_input} <1>"}]
    )

    def question(out, *argv):
        run("score", source, *argv, out=tmp_path / out, **asking(server))
        return server.requests[-1][2]["messages"][0]["content"]

    assert "A bird: {user_input}" not in question("a.json")
    write(tmp_path / "templates.json", json.dumps({"reward": "Q {user_input} A {completion} {x}"}))
    # filled in once, other braces stay
    assert (
        question("b.json") == f"Q User: {EN} A {{user_input}} <1> {{x}}"
    )
    plain = write(tmp_path / "plain.txt", "{completion}|{user_input}")
    assert question("c.json", "--reward_template", plain) == f"{{user_input}} <1>|User: {EN}"
    for name, template, slot in (
        ("reward", "{completion}", "{user_input}"),
        ("actor", "none", "{examples}"),
        ("rlhf", "none", "{examples}"),
    ):
        bad = write(tmp_path / "bad.json", json.dumps({name: template}))
        command = {"reward": "score", "actor": "self-instruct", "rlhf": "prompts"}[name]
        line = refused(
            capsys,
            lambda: run(command, source, out=tmp_path / "bad", templates=bad, **asking(server)),
        )
        assert f"template '{name}' lacks its placeholder {slot}" in line


@pytest.mark.parametrize(
    "argv, said",
    [
        (["score", "x.json", "--out", "y.json"], "needs --model or --judge"),
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


# ------------------------------------------------------------------------------------------------
# self-instruct and prompts


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


def test_an_llm_that_invents_nothing(tmp_path, llm, capsys):
    server = llm(lambda question, n: "1. " + EN)
    seeds = write(tmp_path / "x.json", [{"instruction": EN}])
    line = refused(
        capsys,
        lambda: run("prompts", seeds, out=tmp_path / "o", number=10, **asking(server)),
        code=1,
    )
    assert "nothing usable in three rounds" in line


# ------------------------------------------------------------------------------------------------
# A real server, and a checkpoint of ours


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """The demo's LLaMA with its tokenizer, trained to answer whatever it is asked with one of a few
    numbered lists."""
    folder = tmp_path_factory.mktemp("checkpoint")
    lists = [
        f"1. {a} a long list of {b} for me\n2. {a} some words about {b}, please\n3. Score: 4"
        for a in ("Write", "Tell", "Make")
        for b in ("birds", "tools")
    ]
    demos = [{"user_input": f"Say {i}.", "completion": text} for i, text in enumerate(8 * lists)]
    demos += [
        {"user_input": fill, "completion": text}
        for text in lists
        for fill in templates.TEMPLATES.values()
    ]
    (folder / "tokenizer").mkdir()
    texts = [f"User: {d['user_input']}\nAssistant: {d['completion']}" for d in demos]
    (folder / "tokenizer/tokenizer.model").write_bytes(data_gen.train_tokenizer(texts, 420))
    sft.main(
        [
            "--data",
            write(folder / "d.json", demos),
            "--eval_data",
            write(folder / "e.json", demos[:8]),
            "--tokenizer",
            str(folder / "tokenizer"),
            "--out",
            str(folder / "run"),
            "--epochs",
            "25",
            "--batch_size",
            "16",
        ]
    )
    return str(folder / "run")


@pytest.fixture
def transformers_serve(checkpoint, tmp_path):
    pytest.importorskip("fastapi", reason="pip install 'transformers[serving]'")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen(
            [
                Path(sys.executable).with_name("transformers"),
                "serve",
                "--port",
                str(port),
                "--device",
                "cpu",
            ],
            stdout=log,
            stderr=log,
        )
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert server.poll() is None, (tmp_path / "server.log").read_text()
        time.sleep(0.1)
    yield server, dict(api_base=f"http://localhost:{port}/v1", model=checkpoint, workers=2)
    server.terminate()
    server.wait(30)


def test_the_llm_commands_on_transformers_serve(tmp_path, transformers_serve, capsys):
    server, options = transformers_serve
    records = [{"user_input": f"Say {i}.", "completion": "So."} for i in range(4)]
    source, seeds = write(tmp_path / "x.json", records), write(
        tmp_path / "seeds.json", [{"instruction": "Sing a song of sixpence."}]
    )

    def commands():
        run("score", source, "--overwrite", out=tmp_path / "y.json", max_tokens=60, **options)
        run(
            "self-instruct",
            seeds,
            out=tmp_path / "new",
            number=3,
            max_tokens=60,
            eval_share=0,
            **options,
        )
        run(
            "prompts",
            seeds,
            out=tmp_path / "more",
            number=2,
            max_tokens=60,
            eval_share=0,
            **options,
        )

    commands()
    said = capsys.readouterr().out
    assert "score: 4 questions" in said and re.search(r"[1-9]\d* tokens", said)
    assert read(tmp_path / "y.json") == [r | {"score": 4.0} for r in records]
    new, more = read(tmp_path / "new/actor_training_data.json"), read(
        tmp_path / "more/rlhf_training_data.json"
    )
    assert 1 <= len(new) <= 3 and 1 <= len(more) <= 2  # as many as this model had answers for
    assert all(r["user_input"] and r["completion"] for r in new) and any(
        word in str(new + more) for word in ("birds", "tools")
    )
    server.terminate()
    server.wait(30)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    commands()  # every answer is on disk: no server is needed
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}


def test_sample(tmp_path, checkpoint, capsys):
    prompts = [{"user_input": f"Say {i}."} for i in range(9)] + [
        {"user_input": DIALOGUE},
        {"user_input": "Say 0."},
        {"user_input": "long " * 3000},
    ]
    source = write(tmp_path / "x.json", prompts)
    options = dict(model=checkpoint, k=4, max_new_tokens=12, batch_size=16, temperature=1.5)
    run("sample", source, out=tmp_path / "a.json", **options)
    said = capsys.readouterr().out
    assert "of 11 prompts, 1 cut on the left" in said
    records = read(tmp_path / "a.json")
    assert list(dict.fromkeys(sets.prompt_key(r["user_input"]) for r in records)) == [
        sets.prompt_key(p["user_input"]) for p in prompts if p is not prompts[10]
    ]
    assert (
        len(records)
        == 11 * 4 - int(re.search(r"(\d+) that a prompt has", said)[1])
        == len({json.dumps(r) for r in records})
        > 22
    )
    # a run that was stopped goes on with the same result
    journal = (tmp_path / "a.json.journal.jsonl").read_bytes().split(b"\n")
    (tmp_path / "b.json.journal.jsonl").write_bytes(b"\n".join(journal[:6]))
    run("sample", source, out=tmp_path / "b.json", **options)
    assert read(tmp_path / "b.json") == records
    run("sample", source, out=tmp_path / "c.json", seed=1, **options)
    assert read(tmp_path / "c.json") != records
    greedy = dict(options, temperature=0, k=2, batch_size=3)
    run("sample", source, out=tmp_path / "d.json", **greedy)
    tokenizer = model.load_tokenizer(checkpoint)
    llama = model.load_llama(checkpoint, tokenizer)
    ids, mask = left_pad([encode_prompt(tokenizer, "Say 3.")], tokenizer.pad_token_id)
    tokens = model.generate(llama, ids, mask, 12, tokenizer.eos_token_id, temperature=0).tokens[0]
    assert [r["completion"] for r in read(tmp_path / "d.json") if r["user_input"] == "Say 3."] == [
        tokenizer.decode(tokens, skip_special_tokens=True).strip()
    ]


# ------------------------------------------------------------------------------------------------
# rank


@pytest.mark.parametrize(
    "text, levels",
    [
        ("2>1=3", {1: 0, 0: 1, 2: 1}),
        (" 3 > 2 > 1 ", {2: 0, 1: 1, 0: 2}),
        ("1=2=3", {0: 0, 1: 0, 2: 0}),
        ("２＞１＝３", {1: 0, 0: 1, 2: 1}),
    ],
)
def test_read_order(text, levels):
    assert rank.read_order(text, 3) == levels


@pytest.mark.parametrize(
    "text", ["", "2>1", "2>1>2", "1>2>4", "2>1>three", "2>>1=3", "0>1>2>3", "213"]
)
def test_what_is_no_order(text):
    with pytest.raises(ValueError):
        rank.read_order(text, 3)


class Terminal:
    """`rank` behind a pseudo-terminal, as a person has it."""

    def __init__(self, *argv):
        self.end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, ROOT / "data_gen.py", "rank", *argv],
            stdin=other,
            stdout=other,
            stderr=other,
            close_fds=True,
        )
        os.close(other)

    def screen(self, until="order: "):
        """What appears until the prompt."""
        seen = b""
        while not seen.decode(errors="ignore").endswith(until):
            assert select.select([self.end], [], [], 60)[0], seen
            seen += os.read(self.end, 4096)
        return seen.decode().replace("\r\n", "\n")

    def type(self, text):
        os.write(self.end, text.encode())

    def rest(self):
        seen = b""
        try:
            while part := os.read(self.end, 4096):
                seen += part
        except OSError:  # the other side is closed
            pass
        assert self.process.wait(30) == 0, seen
        return seen.decode()


def order_of(screen, *levels):
    """The order to type so that the completions have the given levels: lists of texts, the best
    first."""
    number = {text: n for n, text in re.findall(r"^\[(\d)\] (.*)$", screen, re.M)}
    return ">".join("=".join(number[text] for text in level) for level in levels) + "\n"


def test_rank_at_a_terminal(tmp_path):
    records = [
        {"user_input": f"Question {i}?", "completion": f"{i}{letter}"}
        for i in range(4)
        for letter in "abc"
    ]
    records += [
        {"user_input": "Alone?", "completion": "x"},
        {"user_input": "Coloured?", "completion": "\x1b[31mred"},
        {"user_input": "Coloured?", "completion": ""},
    ]
    argv = write(tmp_path / "x.json", records), "--out", str(tmp_path / "y.json")
    first = Terminal(*argv)
    screen = first.screen()
    assert "1 of 5" in screen and "Question 0?" in screen
    first.type(order_of(screen, ["0b"], ["0a", "0c"]))
    assert "Question 1?" in (screen := first.screen())
    for wrong in ("2>1\n", "nonsense\n", "\n", "1>1>2\n"):
        first.type(wrong)
        screen = first.screen()
        assert "an order" in screen and "Question 1?" in screen
    first.type("s\n")
    assert "Question 2?" in (screen := first.screen())
    first.type(order_of(screen, ["2a"], ["2b"], ["2c"]))
    first.screen()
    first.type("b\n")
    assert "Question 2?" in (screen := first.screen())
    first.type(order_of(screen, ["2c"], ["2b"], ["2a"]))  # thought better of it
    assert "Question 3?" in first.screen()
    first.process.kill()  # the terminal is closed: what was typed is saved
    first.process.wait(30)

    again = Terminal(*argv)
    assert "4 of 5" in (screen := again.screen()) and "Question 3?" in screen
    again.type("q\n")
    assert "2 prompts ranked, 1 skipped, 2 to go" in again.rest()
    scores = {"0b": 5.0, "0a": 0.0, "0c": 0.0, "2c": 5.0, "2b": 2.5, "2a": 0.0}
    assert {r["completion"]: r["score"] for r in read(tmp_path / "y.json")} == scores

    last = Terminal(*argv)
    last.type(order_of(last.screen(), ["3a", "3b", "3c"]))
    screen = last.screen()
    # shown, not obeyed
    assert (
        "\x1b[31m" not in screen and r"\x1b[31mred" in screen and "(empty)" in screen
    )
    last.type(order_of(screen, ["(empty)"], [r"\x1b[31mred"]))
    assert "4 prompts ranked, 1 skipped, 0 to go" in last.rest()
    scores |= {"3a": 2.5, "3b": 2.5, "3c": 2.5, "\x1b[31mred": 0.0, "": 5.0}
    assert {
        r["completion"]: r["score"]
        for r in read_records(str(tmp_path / "y.json"), "user_input", "completion", "score")
    } == scores


def test_where_a_completion_stands_does_not_tell_which_it_is(tmp_path, monkeypatch, capsys):
    records = [{"user_input": f"{i}?", "completion": letter} for i in range(40) for letter in "abc"]
    monkeypatch.setattr("builtins.input", lambda _: "s")
    run("rank", write(tmp_path / "x.json", records), out=tmp_path / "y.json")
    first = Counter(re.findall(r"^\[1\] (.)$", capsys.readouterr().out, re.M))
    assert sum(first.values()) == 40 and min(first[letter] for letter in "abc") >= 5


# ------------------------------------------------------------------------------------------------
# All three stages take these files as they are


def test_the_stages_take_what_import_writes(tmp_path, checkpoint, capsys):
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
    sft.main(
        ["--model", checkpoint, "--data", actor, "--out", str(tmp_path / "sft"), "--epochs", "1"]
    )
    assert re.search(
        r"of 4 records, 1 prompts cut on the left and 1 completions dropped",
        capsys.readouterr().out,
    )
    train_rm.main(
        [
            "--model",
            str(tmp_path / "sft"),
            "--data",
            reward,
            "--demonstrations",
            actor,
            "--out",
            str(tmp_path / "rm"),
            "--epochs",
            "1",
        ]
    )
    assert re.search(
        r"\d+ prompts cut on the left and 1 completions dropped", capsys.readouterr().out
    )
    ppo.main(
        [
            "--sft",
            str(tmp_path / "sft"),
            "--rm",
            str(tmp_path / "rm"),
            "--prompts",
            rlhf,
            "--out",
            str(tmp_path / "ppo"),
            "--updates",
            "1",
            "--batch_size",
            "4",
            "--minibatch_size",
            "4",
            "--max_new_tokens",
            "8",
        ]
    )
    assert "of 4 prompts, 1 cut on the left" in capsys.readouterr().out
    assert (tmp_path / "ppo/config.json").exists()
