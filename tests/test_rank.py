"""`data_gen.py rank`: a person at the terminal.

    pytest tests/test_rank.py
"""

import os
import pty
import re
import select
import subprocess
import sys
from collections import Counter

import pytest
from data_commands import ROOT, read, run, write

from lib.data import read_records
from tools.data import rank


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
    assert "of 6 prompts, 1 left out, with one completion" in screen
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


def test_a_ranking_that_was_taken_back_does_not_stay(tmp_path, monkeypatch, capsys):
    records = [{"user_input": "Why?", "completion": letter} for letter in "ab"]
    source, out = write(tmp_path / "x.json", records), tmp_path / "y.json"

    def typed(*lines):
        lines = iter(lines)
        monkeypatch.setattr("builtins.input", lambda _: next(lines))
        run("rank", source, out=out)
        return capsys.readouterr().out

    typed("1>2")
    before = out.read_bytes()
    typed()  # looked at again
    assert out.read_bytes() == before
    write(tmp_path / "x.json", [*records, *[r | {"user_input": "How?"} for r in records]])
    said = typed("b", "s", "q")
    assert "0 prompts ranked, 1 skipped" in said and f"{out}: removed" in said
    assert not out.exists()
    typed("b", "1>2", "q")
    assert out.exists()
    before = out.read_bytes()
    other = write(tmp_path / "z.json", [r | {"user_input": "Who?"} for r in records])
    monkeypatch.setattr("builtins.input", lambda _: "q")
    run("rank", other, "--overwrite", out=out)  # nothing was typed: nothing is replaced
    assert out.read_bytes() == before


def test_where_a_completion_stands_does_not_tell_which_it_is(tmp_path, monkeypatch, capsys):
    records = [{"user_input": f"{i}?", "completion": letter} for i in range(40) for letter in "abc"]
    monkeypatch.setattr("builtins.input", lambda _: "s")
    run("rank", write(tmp_path / "x.json", records), out=tmp_path / "y.json")
    first = Counter(re.findall(r"^\[1\] (.)$", capsys.readouterr().out, re.M))
    assert sum(first.values()) == 40 and min(first[letter] for letter in "abc") >= 5
