"""The README says what is so:

    pytest tests/test_readme.py

    commands   each names a script that exists, and options that are in its --help; those that need neither the network, nor a
               terminal, nor much time are run as they stand, on small data in the places that they name
    names      each file, option, function and test that the README names exists; so does each heading that it links to
"""

import glob
import importlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest
import torch

import data_gen
import model

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
SCRIPTS = ["data_gen.py", "sft.py", "train_rm.py", "ppo.py", "model.py"]
SHELL = "\n".join(re.findall(r"^```sh\n(.*?)^```$", README, re.M | re.S)).replace("\\\n", " ")
TEXT = re.sub(r"^```.*?^```$", "", README, flags=re.M | re.S)
SPANS = sorted(set(re.findall(r"`([^`]+)`", TEXT)))


def commands(shell):
    """The commands of shell text -> [(words, words of the command that is piped into it)]; comments and separators are left out."""
    found = []
    for line in shell.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        lexer.whitespace_split, words, piped = True, [], None
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;"):
                found += [(words, piped)] if words else []
                words, piped = [], words if word == "|" else None
            else:
                words.append(word)
    return found


PYTHON = [(words[1:], piped) for words, piped in commands(SHELL) if words[0] == "python"]
RUNNABLE = {"sft.py": [], "train_rm.py": [], "ppo.py": ["--updates", "1"], "model.py": []}  # with what makes it short


@lru_cache
def options_of(script, *command):
    """The options in a script's --help; `command` is a subcommand's name, if it has some."""
    result = subprocess.run([sys.executable, ROOT / script, *command, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return set(re.findall(r"(?<![\w-])--[a-z]\w*(?:-\w+)*", result.stdout))


def subcommand(words):
    return [words[1]] if words[0] == "data_gen.py" and len(words) > 1 and not words[1].startswith("-") else []


def test_commands_are_found_in_shell_text():
    assert commands('pip install x && python a.py  # --no\necho "a | b" | python b.py "c d"') == [
        (["pip", "install", "x"], None), (["python", "a.py"], None), (["echo", "a | b"], None),
        (["python", "b.py", "c d"], ["echo", "a | b"])]


@pytest.mark.parametrize("words", [words for words, _ in PYTHON], ids=" ".join)
def test_scripts_and_options_of_commands_exist(words):
    given = {word.split("=")[0] for word in words if word.startswith("--")}
    assert (ROOT / words[0]).is_file()
    assert given <= options_of(words[0], *subcommand(words))


def test_the_demo_is_one_command_and_ci_runs_the_one_with_the_tests():
    found = [line for line in SHELL.splitlines() if line.startswith("pip install -r requirements.txt && ")]
    assert found == ["pip install -r requirements.txt && python ppo.py", "pip install -r requirements.txt && pytest"]
    # the line of .ci/run that looks for its command, run on this README
    (finder,) = re.findall(r"^command=\$\((.*)\)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.M)
    result = subprocess.run(["bash", "-euo", "pipefail", "-c", finder], capture_output=True, text=True, cwd=ROOT, check=True)
    assert result.stdout.splitlines() == [found[1]]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with what the commands name, small: a LLaMA, the runs of the demo, data of one's own and held-out prompts."""
    rng = random.Random(0)
    prompts = data_gen.draw_prompts(rng, 16)
    demos = [{"user_input": p, "completion": data_gen.write(rng, p, "friendly")} for p in prompts]
    scored = [dict(d, completion=text, score=score) for d in demos for text, score in ((d["completion"], 1), ("no", 0))]
    (tmp_path / "data").mkdir()
    for name, records in (("demos", demos), ("scored", scored), ("prompts", demos)):
        for twin in ("", "_eval"):
            (tmp_path / f"{name}{twin}.json").write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    for name in ("actor_training_data", "rlhf_training_data_eval"):
        (tmp_path / "data" / f"{name}.json").write_text(json.dumps(demos[:3], ensure_ascii=False), encoding="utf-8")
    (tmp_path / "tokenizer").mkdir()
    texts = [f"{d['user_input']} {d['completion']}" for d in demos]
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(data_gen.train_tokenizer(texts, 600))
    tokenizer = model.load_tokenizer(str(tmp_path / "tokenizer"))
    monkeypatch.setattr(model, "DEMO_MODEL", dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                  num_key_value_heads=2, max_position_embeddings=256))
    torch.manual_seed(0)
    llama = model.load_llama(None, tokenizer)
    for folder in ("path/to/llama", "runs/sft", "runs/ppo"):
        model.save_checkpoint(llama, tokenizer, str(tmp_path / folder))
    model.save_checkpoint(model.ScalarHead(llama.model), tokenizer, str(tmp_path / "runs" / "rm"))
    monkeypatch.setattr(model, "draw_curves", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_run_as_they_stand(places, monkeypatch, capsys):
    run = []
    for words, piped in PYTHON:
        script, *given = words
        inputs = [word for option, word in zip(words, given) if option != "--out" and re.fullmatch(r"\S*(/|\.json)\S*", word)]
        terminal = script == "model.py" and not piped and not {"--prompt", "--prompts"} & set(given)
        if script not in RUNNABLE or not inputs or terminal or "--quantize" in given or not all(map(os.path.exists, inputs)):
            continue
        if piped:
            assert piped[0] == "echo"
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(" ".join(piped[1:]).encode())))
        importlib.import_module(script[:-3]).main(given + RUNNABLE[script])
        for option, word in zip(given, given[1:]):
            assert option != "--out" or (places / word).exists()
        run.append(script)
    assert set(run) == set(RUNNABLE)  # something of each kind was run
    assert "saved runs/my_ppo" in capsys.readouterr().out


@pytest.mark.parametrize("span", [span for span in SPANS if re.search(r"(^| )--\w", span)])
def test_options_exist(span):
    """In a command that is named in the text those of its script, elsewhere those of any."""
    words = shlex.split(span)
    scripts = [words[1]] if words[0] == "python" else SCRIPTS + [str(Path(p).relative_to(ROOT)) for p in glob.glob(f"{ROOT}/bench/*.py")]
    known = set().union(*(options_of(script) for script in scripts))
    known |= {option for words, _ in PYTHON if subcommand(words) for option in options_of(words[0], *subcommand(words))}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


MODULES = "|".join(script[:-3] for script in SCRIPTS)


@pytest.mark.parametrize("span", [span for span in SPANS if re.fullmatch(rf"({MODULES})\.(?!py$|safetensors$)\w+(\(.*\))?", span)])
def test_functions_exist(span):
    module, name = span.split("(")[0].split(".")
    assert hasattr(importlib.import_module(module), name)


def test_tests_exist():
    sources = [path.read_text("utf-8") for path in [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]]
    named = {span for span in SPANS if re.fullmatch(r"test_\w+", span)}
    assert named and named <= {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.M)}


def test_files_exist():
    """Pictures and links; and what stands in the text as the name of a Python file, or as a path into docs, tests or bench."""
    links = {link for link in re.findall(r"\]\(([^)#\s]+)\)", TEXT) if "://" not in link}
    spans = {span for span in SPANS if re.fullmatch(r"[\w/]+\.py|(docs|tests|bench)/[\w./]*", span)} - {"judge.py"}  # one's own
    assert links and spans
    assert [name for name in sorted(links | spans) if not (ROOT / name).exists()] == []


def test_headings_that_are_linked_to_exist():
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", TEXT, re.M)}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors
