"""What README.md and docs/ say, and which commands and options there are, for the tests of both."""

import contextlib
import importlib
import io
import re
import shlex
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    path: re.sub(r"<!--.*?-->", "", path.read_text("utf-8"), flags=re.S)
    for path in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
}
TEXTS = {path: re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S) for path, page in PAGES.items()}
SPANS = sorted(
    {" ".join(span.split()) for text in TEXTS.values() for span in re.findall(r"`([^`]+)`", text)}
)
SCRIPTS = ["data_gen", "sft", "train_rm", "ppo", "model"]
TOOLS = [
    f"tools.{path.stem}"
    for path in sorted(ROOT.glob("tools/*.py"))
    if "def main(" in path.read_text("utf-8")
]
BENCHES = [
    f"bench.{path.stem}"
    for path in sorted(ROOT.glob("bench/*.py"))
    if "def main(" in path.read_text("utf-8")
]
EXAMPLES = [f"docs.{path.stem}" for path in sorted(ROOT.glob("docs/*.py"))]


def shell(page):
    """The shell text of a page, a command per line."""
    return "\n".join(re.findall(r"^```sh\n(.*?)^```$", page, re.M | re.S)).replace("\\\n", " ")


def commands(text):
    """The commands of shell text -> [(words, words of the command that is piped into it)]; comments
    and separators are left out."""
    found = []
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, words, piped = True, [], None
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found += [(words, piped)] if words else []
                words, piped = [], words if word == "|" else None
            else:
                words.append(word)
    return found


def python(words):
    """(module, its options) of a command that runs one of ours by python or torchrun, else None."""
    if words[0] == "torchrun":
        words = [word for word in words if not word.startswith("--nproc_per_node=")]
    if words[:2] == ["python", "-m"]:
        return words[2], words[3:]
    if words[0] in ("python", "torchrun") and len(words) > 1:
        return words[1].removesuffix(".py").replace("/", "."), words[2:]
    return None


ALL = [(words, piped) for page in PAGES.values() for words, piped in commands(shell(page))]


@lru_cache
def options_of(module, *command):
    """The options in a script's --help; `command` is a subcommand's name, if it has some."""
    said, argv = io.StringIO(), sys.argv
    sys.argv = [module, *command, "--help"]
    try:
        with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
            importlib.import_module(module).main()
    finally:
        sys.argv = argv
    assert ended.value.code in (None, 0)
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", said.getvalue()))
