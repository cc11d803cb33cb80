"""The commands of data_gen.py: other people's data, an LLM behind HTTP, completions of a checkpoint, a person at the terminal.

The built-in data of stage 0 is tested in test_stages.py.
"""

import gzip
import hashlib
import http.server
import json
import os
import pty
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
import sft
import train_rm

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
    data_gen.main([command, *map(str, argv), *(word for k, v in options.items() for word in (f"--{k}", str(v)))])


def read(path):
    return json.loads(Path(path).read_text())


def refused(capsys, call, code=2):
    """The one line that a call ends with."""
    with pytest.raises(SystemExit) as end:
        call()
    error = capsys.readouterr().err
    assert end.value.code == code and "Traceback" not in error
    return error.strip().split("\n")[-1]


# ---------------------------------------------------------------------------------------------------------------------
# import

USER, ANSWER, MORE = ({"role": role, "content": text} for role, text in (("user", EN), ("assistant", "A crow."), ("user", "Another?")))
HH = f"\n\nHuman: {EN}\n\nAssistant: A crow.\n\nHuman: Another?\n\nAssistant: "
SHP = {"history": EN, "human_ref_A": "Bad.", "human_ref_B": "Good.", "labels": 0, "score_ratio": 3.0, "domain": "x"}
SEED = {"name": "x", "instruction": "Sort.", "instances": [{"input": "2 1", "output": "1 2"}, {"input": "", "output": "Done."}]}
DIALOGUE = [USER, ANSWER, MORE]


def pair(prompt, better=1.0):
    return [{"user_input": prompt, "completion": "Good.", "score": better}, {"user_input": prompt, "completion": "Bad.", "score": 0.0}]


def gpt(text):
    return {"from": "gpt", "value": text}


LAYOUTS = [  # what a file holds, what the layout is called, the set, its records
    ({"instruction": "Sort.", "input": "2 1", "output": "1 2"}, "Alpaca", "actor", [{"user_input": "Sort.\n\n2 1", "completion": "1 2"}]),
    ({"instruction": EN, "input": "", "output": ""}, "Alpaca", "actor", [{"user_input": EN, "completion": ""}]),
    ({"instruction": "Another?", "output": "An owl.", "history": [[EN, "A crow."]]}, "Alpaca", "actor",
     [{"user_input": DIALOGUE, "completion": "An owl."}]),
    ({"instruction": ZH}, "instructions", "rlhf", [{"user_input": ZH}]),
    (SEED, "self-instruct seed tasks", "actor", [{"user_input": "Sort.\n\n2 1", "completion": "1 2"}, {"user_input": "Sort.", "completion": "Done."}]),
    ({"prompt": EN, "chosen": "Good.", "rejected": "Bad."}, "preference pairs", "reward", pair(EN)),
    ({"prompt": DIALOGUE, "chosen": [{"role": "assistant", "content": "Good."}], "rejected": [{"role": "assistant", "content": "Bad."}]},
     "preference pairs", "reward", pair(DIALOGUE)),
    ({"prompt": EN, "chosen": [USER, {"role": "assistant", "content": "Good."}], "rejected": [USER, {"role": "assistant", "content": "Bad."}]},
     "preference pairs", "reward", pair(EN)),
    ({"prompt": HH.rstrip(), "chosen": " Good.", "rejected": " Bad."}, "preference pairs", "reward",
     [record | {"completion": " " + record["completion"]} for record in pair(DIALOGUE)]),
    ({"chosen": HH + "Good.", "rejected": HH + "Bad."}, "HH", "reward", pair(DIALOGUE)),
    ({"chosen": [USER, {"role": "assistant", "content": "Good."}], "rejected": [USER, {"role": "assistant", "content": "Bad."}]}, "HH", "reward", pair(EN)),
    (SHP, "SHP", "reward", pair(EN, 2.0)),
    (SHP | {"labels": 1, "human_ref_A": "Good.", "human_ref_B": "Bad.", "score_ratio": 1.0}, "SHP", "reward", pair(EN, 1.0)),
    ({"conversations": [{"from": "human", "value": EN}, gpt("A crow."), {"from": "human", "value": "Another?"}], "chosen": gpt("Good."),
      "rejected": gpt("Bad.")}, "ShareGPT pairs", "reward", pair(DIALOGUE)),
    ({"conversations": [{"from": "human", "value": EN}, gpt("A crow.")]}, "ShareGPT conversations", "actor", [{"user_input": EN, "completion": "A crow."}]),
    ({"messages": [*DIALOGUE, ANSWER]}, "chat messages", "actor", [{"user_input": DIALOGUE, "completion": "A crow."}]),
    ({"user_input": DIALOGUE, "completion": "Good.", "score": -2}, "our own", "reward", [{"user_input": DIALOGUE, "completion": "Good.", "score": -2}]),
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
    pairs = [{"prompt": f"Prompt {i % 40}", "chosen": f"Good {i}", "rejected": "Bad"} for i in range(80)]
    one, two = write(tmp_path / "1.jsonl", lines(pairs)), write(tmp_path / "2.json", pairs[:10])
    for seed, out in ((0, "a"), (0, "b"), (1, "c")):
        run("import", one, two, "--make", "actor", "reward", "rlhf", out=tmp_path / out, eval_share=0.2, seed=seed)
    assert f"{40 + 20} exact duplicates dropped" in capsys.readouterr().out  # "Bad" once a prompt, and all of the second file
    sides = [{r["user_input"] for name in ("actor", "reward", "rlhf") for r in read(tmp_path / f"a/{name}_training_data{twin}.json")}
             for twin in ("", "_eval")]
    assert len(sides[0]) == 32 and len(sides[1]) == 8 and not sides[0] & sides[1]
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert len(names) == 6
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert read(tmp_path / "a/rlhf_training_data_eval.json") != read(tmp_path / "c/rlhf_training_data_eval.json")
    records = read(tmp_path / "a/reward_training_data.json") + read(tmp_path / "a/reward_training_data_eval.json")
    assert Counter(r["score"] for r in records) == {1.0: 80, 0.0: 40}
    demonstrated = read(tmp_path / "a/actor_training_data.json")
    assert len(demonstrated) == 32 and all(r["completion"].startswith("Good") and "score" not in r for r in demonstrated)


def test_import_leaves_out_what_is_no_pair_and_says_why(tmp_path, capsys):
    good = {"chosen": HH + "Good.", "rejected": HH + "Bad."}
    bad = [{"chosen": HH + "Good.", "rejected": HH.replace("bird", "fish") + "Bad."}, {"chosen": HH + "Good.", "rejected": HH + "Good."},
           {"chosen": HH + "Good.\n\nHuman: Thanks", "rejected": HH + "Bad."}]
    run("import", write(tmp_path / "x.json", [good, *bad]), out=tmp_path)
    assert read(tmp_path / "reward_training_data.json") == pair(DIALOGUE)
    said = capsys.readouterr().out
    for reason in ("1 whose two sides answer different prompts", "1 whose two completions are the same", "1 that do not end with the assistant"):
        assert reason in said
    tool = {"conversations": [{"from": "human", "value": EN}, {"from": "function_call", "value": "{}"}, gpt("A crow.")]}
    run("import", write(tmp_path / "t.json", [{"conversations": [{"from": "human", "value": EN}, gpt("A crow.")]}, tool]), out=tmp_path)
    assert "left out 1 with a message of 'function_call'" in capsys.readouterr().out


def test_neighbours_of_one_role_become_one_message():
    messages = data_gen.dialogue("\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three.", "chosen")
    assert messages == [{"role": "user", "content": "One.\n\nTwo."}, {"role": "assistant", "content": "Three."}]


@pytest.mark.parametrize("text, said", [
    ('[{"instruction": "x"', "neither a JSON array nor JSON Lines"),
    ('{"instruction": "x"}\nnonsense\n', "line 2"),
    ("[]", "holds no records"),
    ("", "holds no records"),
    ('[{"question": "x"}]', "the fields question are those of no layout"),
    ('[{"instruction": "x"}, 7]', "record 2: not a JSON object"),
    ('[{"instruction": "x", "output": "y"}, {"instruction": "x"}]', "record 2: field 'output' is missing"),
    ('[{"instruction": "x", "output": 3}]', "record 1: not what Alpaca demonstrations look like (field 'output' must be a text)"),
    ('[{"instruction": "x", "output": "\\ud83d"}]', "record 1: 'completion' holds half a character"),
    ('[{"instruction": " "}]', "no record is left"),
    ('[{"conversations": 3}]', "record 1: not what ShareGPT conversations look like"),
    (json.dumps([SHP | {"score_ratio": None}]), "field 'score_ratio' must be a number"),
])
def test_import_of_bad_files(tmp_path, capsys, text, said):
    source = write(tmp_path / "x.json", text)
    line = refused(capsys, lambda: run("import", source, out=tmp_path / "out"))
    assert line.startswith("error: ") and said in line
    assert not (tmp_path / "out").exists()


def test_import_overwrites_nothing_unasked(tmp_path, capsys):
    source = write(tmp_path / "x.json", [{"instruction": EN}, {"instruction": ZH}])
    write(tmp_path / "rlhf_training_data_eval.json", "mine")
    assert "rlhf_training_data_eval.json: is there already" in refused(capsys, lambda: run("import", source, out=tmp_path))
    assert (tmp_path / "rlhf_training_data_eval.json").read_text() == "mine" and not (tmp_path / "rlhf_training_data.json").exists()
    run("import", source, "--overwrite", out=tmp_path)
    assert len(read(tmp_path / "rlhf_training_data_eval.json")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# download: huggingface_hub itself, on files where its cache puts them, and on a hub that breaks off

def subprocess_run(argv, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    return subprocess.run([sys.executable, ROOT / "data_gen.py", *map(str, argv)], env=clean | env, capture_output=True, text=True, timeout=120)


def cached(home, repository, path, text):
    """A file as the hub's cache lays it out."""
    repo = home / f"datasets--{repository.replace('/', '--')}"
    write(repo / "refs/main", "0123456789abcdef")
    write(repo / "snapshots/0123456789abcdef" / path, text)


def test_download_from_the_cache(tmp_path):
    folders = data_gen.HUB["hh"][1]
    for folder in folders:
        cached(tmp_path / "hub", "Anthropic/hh-rlhf", f"{folder}/train.jsonl.gz",
               lines({"chosen": f"\n\nHuman: {folder} {i}\n\nAssistant: Good.", "rejected": f"\n\nHuman: {folder} {i}\n\nAssistant: Bad."} for i in range(20)))
    cached(tmp_path / "hub", "stanfordnlp/SHP", "askbaking/train.json", lines([SHP, SHP | {"history": ZH, "score_ratio": 7.0}]))
    env = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    hh = subprocess_run(["download", "hh", "--path", tmp_path / "hh", "--number_of_samples", 40, "--make", "reward", "rlhf"], **env)
    assert hh.returncode == 0, hh.stderr
    prompts = [r["user_input"] for twin in ("", "_eval") for r in read(tmp_path / f"hh/rlhf_training_data{twin}.json")]
    assert sorted(prompts) == sorted(f"{folder} {i}" for folder in folders for i in range(10))
    assert len(read(tmp_path / "hh/reward_training_data.json")) == 2 * 38
    shp = subprocess_run(["download", "shp", "--parts", "askbaking", "--path", tmp_path / "shp", "--eval_share", 0], **env)
    assert shp.returncode == 0, shp.stderr
    assert read(tmp_path / "shp/reward_training_data.json") == pair(EN, 2.0) + pair(ZH, 3.0)
    lacking = subprocess_run(["download", "shp", "--parts", "askvet", "--path", tmp_path / "x"], **env)
    assert lacking.returncode == 1 and len(lacking.stderr.strip().split("\n")) == 1
    assert "cannot be downloaded" in lacking.stderr and "data_gen.py import" in lacking.stderr
    unknown = subprocess_run(["download", "shp", "--parts", "askme", "--path", tmp_path / "x"], **env)
    assert unknown.returncode == 2 and "askbaking" in unknown.stderr and not (tmp_path / "x").exists()


class BrokenHub(http.server.BaseHTTPRequestHandler):
    """Serves one text under every name as the hub does, except `missing`; cuts the connection in the middle of the first `cuts`."""

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
            self.wfile.write(self.server.content[start:len(self.server.content) // 2 if self.server.cuts >= 0 else None])

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    """Starts servers of a handler class in threads, with attributes for the handler; yields a function -> the server."""
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
    records = [SHP | {"history": f"Question {i} {'x' * 8000}"} for i in range(3000)]  # the library writes 10 MB at a time
    hub = serve(BrokenHub, content=lines(records).encode(), cuts=1, missing="askhr", sent=[])
    argv = ["download", "shp", "--parts", "askvet", "askhr", "--path", tmp_path / "shp", "--eval_share", 0]
    env = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_DISABLE_XET": "1"}
    first = subprocess_run(argv, **env)
    assert first.returncode == 1 and "askhr/train.json: cannot be downloaded" in first.stderr and "Run this again" in first.stderr
    assert [part for part, _ in hub.sent] == ["askvet"] * 2 and hub.sent[1][1] >= 10_000_000  # not from 0
    assert not (tmp_path / "shp").exists()
    hub.missing = "nothing"
    again = subprocess_run(argv, **env)
    assert again.returncode == 0, again.stderr
    assert hub.sent[2:] == [("askhr", 0)]  # the first file is there
    assert len(read(tmp_path / "shp/reward_training_data.json")) == 2 * 3000
