"""tools/exercise.py: each exercise takes away what its test needs, and the suite catches each
planted bug.

    pytest tests/test_exercises.py
"""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from forked import forget_ours, fork, redirect
from tools import exercise

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(capfd):
    """Run an exercise -> whether its test passed, and what was said."""
    def run(number, out):
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            exercise.main([number, "--out", str(out)])
        return ended.value.code == 0, "".join(capfd.readouterr())
    return run


@pytest.mark.parametrize("number", exercise.WRITE)
def test_what_is_taken_away(number):
    """The function has its signature and its docstring, and raises; all else is as it was."""
    file, name, test = exercise.WRITE[number]
    before = (ROOT / file).read_text("utf-8")
    trees = [ast.parse(source) for source in (before, exercise.blanked(before, name))]
    whole, blank = (
        [node for node in tree.body if getattr(node, "name", None) == name] for tree in trees
    )
    assert ast.dump(whole[0].args) == ast.dump(blank[0].args)
    assert ast.get_docstring(whole[0]) == ast.get_docstring(blank[0])
    assert len(blank[0].body) == 2 and isinstance(blank[0].body[1], ast.Raise)
    rest = [
        [ast.dump(node) for node in tree.body if getattr(node, "name", None) != name]
        for tree in trees
    ]
    assert rest[0] == rest[1]
    path, function = test.split("::")
    assert re.search(rf"^def {function}\(", (ROOT / path).read_text("utf-8"), re.M)


def as_pytest(command, folder, log):
    """`python -m pytest ...` in a folder with a copy of the project."""
    redirect(log)
    forget_ours()
    os.chdir(folder)
    ours = {str(ROOT), str(ROOT / "tests")}
    sys.path[:] = ["", *(path for path in sys.path if path not in ours)]
    raise SystemExit(pytest.main(command))


@pytest.fixture
def forked_pytest(monkeypatch, tmp_path):
    """The tool's pytest as a fork; what else it starts, as ever."""
    starts = subprocess.run

    def run(command, cwd, **options):
        if command[:3] != [sys.executable, "-m", "pytest"]:
            return starts(command, cwd=cwd, **options)
        process = fork(as_pytest, command[3:], cwd, tmp_path / "log")
        process.join()
        print((tmp_path / "log").read_text())
        return subprocess.CompletedProcess(command, process.exitcode)

    monkeypatch.setattr(exercise.subprocess, "run", run)


def test_an_exercise_from_its_beginning_to_its_end(run, tmp_path, request):
    passed, said = run("8", tmp_path)
    assert not passed and "write gae in ppo.py" in said and "gae is yours to write" in said
    assert "not yet" in said
    shutil.copy(ROOT / "ppo.py", tmp_path / "8" / "ppo.py")  # the solution
    request.getfixturevalue("forked_pytest")
    passed, said = run("8", tmp_path)
    assert passed and "done: it is right" in said


@pytest.mark.parametrize("number", exercise.FIND)
def test_each_planted_bug_is_caught(run, forked_pytest, number, tmp_path):
    passed, said = run(number, tmp_path)
    assert not passed and re.search(r"\d+ failed", said) and "find the bug" in said


def test_an_exercise_that_does_not_exist(run, tmp_path):
    passed, said = run("13", tmp_path)
    assert not passed and said.startswith("error: 13: there is no such exercise")


def test_an_exercise_that_cannot_be_made_is_not_begun(run, tmp_path, monkeypatch):
    """As without git."""
    monkeypatch.setenv("PATH", str(tmp_path))
    for _ in range(2):
        passed, said = run("12b", tmp_path)
        assert not passed and "12b: cannot be made" in said and "done" not in said
