"""tools/data/llm.py and the journal of what was answered: an LLM behind HTTP that does everything
wrong that servers do, and transformers' server with a checkpoint of ours.

    pytest tests/test_llm.py
"""

import argparse
import email.utils
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from data_commands import COMPLETIONS, EN, ROOT, asking, number_of, read, refused, run, write

from tools.data.llm import Unanswered, chat, retry_after, without_thoughts


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


@pytest.mark.parametrize(
    "seconds, said", [("7200", "HTTP 429: asks for a wait of 7200 seconds\n"), ("60", "")]
)
def test_a_long_wait_is_told(llm, capsys, seconds, said):
    server = llm(lambda question, n: 429)
    server.retry_after = seconds
    options = asking(server, temperature=0, max_tokens=9)
    stopped = threading.Event()
    stopped.set()  # as by Ctrl-C: the wait is over at once
    with pytest.raises(Unanswered, match="HTTP 429: no"):
        chat(argparse.Namespace(**options), "Why?", stopped, set())
    assert capsys.readouterr().out == (said and f"{server.address}/v1: {said}")


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
    assert first.returncode == 1 and "run this again to continue" in error
    assert "Traceback" not in error
    assert not (tmp_path / "y.json").exists() and len(server.answered) < 24
    subprocess.run(argv, check=True, capture_output=True, timeout=60)
    assert set(server.answered.values()) == {1} and len(server.answered) == 24
    assert read(tmp_path / "y.json") == [r | {"score": 4.0} for r in COMPLETIONS]


@pytest.mark.parametrize(
    "code, said", [(401, "HTTP 401"), (404, "HTTP 404"), (500, "HTTP 500")]
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


@pytest.mark.parametrize("code", [400, 413, 422])
def test_many_questions_that_the_server_refuses(tmp_path, llm, capsys, code):
    """They come one after the other, also in the run that continues, which asks only them again."""
    server = llm(lambda question, n: "5" if number_of(question) < 10 else code)
    source = write(tmp_path / "x.json", COMPLETIONS)
    for requests in (24, 14):
        before = len(server.requests)
        run("score", source, out=tmp_path / "y.json", **asking(server, workers=1))
        assert len(server.requests) == before + requests
        assert f"14 unanswered (the last: HTTP {code}: no" in capsys.readouterr().out
        assert read(tmp_path / "y.json") == [r | {"score": 5.0} for r in COMPLETIONS[:10]]
        assert read(tmp_path / "y_unscored.json") == COMPLETIONS[10:]


def test_the_first_questions_of_a_run_that_continues_are_refused(tmp_path, llm):
    server = llm(lambda question, n: "5" if number_of(question) > 5 else 400)
    # answered first: the journal has them before any is refused
    source = write(tmp_path / "x.json", COMPLETIONS[::-1])
    options = dict(out=tmp_path / "y.json", **asking(server, workers=1))
    run("score", source, **options)
    write(tmp_path / "x.json", COMPLETIONS)
    run("score", source, **options)
    assert read(tmp_path / "y.json") == [r | {"score": 5.0} for r in COMPLETIONS[6:]]
    assert len(server.requests) == 24 + 6


def test_a_server_that_refuses_every_question(tmp_path, llm, capsys):
    server = llm(lambda question, n: 400)
    source = write(tmp_path / "x.json", COMPLETIONS)
    options = dict(out=tmp_path / "y.json", **asking(server, workers=1))
    line = refused(capsys, lambda: run("score", source, **options), code=1)
    assert "HTTP 400" in line and "0 of 24 questions are answered" in line


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


def test_thoughts_become_neither_instructions_nor_answers(tmp_path, llm, capsys):
    def reply(question, n):
        if "numbered list" in question:
            return (
                "<think>1. Draw me a map of it.\n2. Say nothing at all, please.</think>"
                "1. Name the rivers of Asia.\n2. How do birds fly south?"
            )
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


# what comes with code 200: what is said of it; None: it is an answer that scores nothing
ODD_REPLIES = {
    b'{"error": {"message": "model is loading"}}': "the server says: model is loading",
    b'{"error": "busy"}': "the server says: busy",
    b"<!DOCTYPE html><html>Welcome</html>": "a web page, not JSON: is /v1 missing",
    b"ok": "the reply is not JSON: b'ok'",
    b"[]": "the reply holds no choices",
    b'{"choices": [{"message": {"content": null, "refusal": "No."}, '
    b'"finish_reason": "stop"}]}': None,
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


# ------------------------------------------------------------------------------------------------
# A real server


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
