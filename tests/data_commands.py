"""What the tests of data_gen.py's commands share: running one, records, servers, a checkpoint."""

import gzip
import http.server
import json
import re
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import data_gen
import model
import sft
from makers import options
from tools.data import templates

ROOT = Path(__file__).parents[1]
EN, ZH = "Name a kind of bird.", "请说出一种鸟。"
USER, ANSWER, MORE = (
    {"role": role, "content": text}
    for role, text in (("user", EN), ("assistant", "A crow."), ("user", "Another?"))
)
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
# Servers, and an LLM that does everything wrong that servers do and whose answers are known


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
            self.send_header("Retry-After", getattr(self.server, "retry_after", "1"))
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


# ------------------------------------------------------------------------------------------------
# A checkpoint of ours


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small LLaMA with its tokenizer, trained to answer whatever it is asked with one of a few
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
    usual = dict(tokenizer=folder / "tokenizer", out=folder / "run", lr=3e-3, batch_size=16)
    small = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "DEMO_MODEL", model.DEMO_MODEL | small)
        sft.main(options(data=write(folder / "d.json", demos), eval_data="", epochs=30, **usual))
    return str(folder / "run")
