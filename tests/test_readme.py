"""README.md and docs/ say what is so:

    pytest tests/test_readme.py

    commands   each names a script that exists, and options that are in its --help; those of the
               stages and the chat that need neither the network, nor a terminal, nor much time run
               as they stand, on small data in the places that they name
    names      each file, option, function, test, heading and link that a page names exists
"""

import contextlib
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
import lib.run
import model

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
# what runs as it stands, with what makes it short
RUNNABLE = {"sft": [], "train_rm": [], "ppo": ["--updates", "1"], "tools.chat": []}


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
PYTHON = [(python(words), piped) for words, piped in ALL if python(words)]
ALONE = [(python(words), piped) for words, piped in ALL if words[0] == "python"]
COMMANDED = {given[0] for (module, given), _ in PYTHON if module == "data_gen" and given}


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


def subcommand(module, given):
    return given[:1] if module == "data_gen" and not given[:1][0].startswith("-") else []


def test_commands_are_found_in_shell_text():
    assert commands('pip install x && python a.py  # --no\necho "a | b" | python b.py "c d"') == [
        (["pip", "install", "x"], None),
        (["python", "a.py"], None),
        (["echo", "a | b"], None),
        (["python", "b.py", "c d"], ["echo", "a | b"]),
    ]
    assert python(["python", "-m", "tools.chat", "--x"]) == ("tools.chat", ["--x"])
    assert python(["torchrun", "--nproc_per_node=8", "sft.py", "--x"]) == ("sft", ["--x"])
    assert python(["python", "bench/speed.py"]) == ("bench.speed", [])


@pytest.mark.parametrize(
    "module, given",
    [called for called, _ in PYTHON],
    ids=[" ".join([called[0], *called[1]]) for called, _ in PYTHON],
)
def test_scripts_and_options_of_commands_exist(module, given):
    named = {word.split("=")[0] for word in given if word.startswith("--")}
    assert module in SCRIPTS + TOOLS + BENCHES + EXAMPLES
    if named or subcommand(module, given or ["-"]):
        assert named <= options_of(module, *subcommand(module, given or ["-"]))


def test_the_demo_is_one_command_and_ci_runs_the_one_with_the_tests():
    found = [
        line
        for line in shell(PAGES[ROOT / "README.md"]).splitlines()
        if line.startswith("pip install")
    ]
    assert found == [
        "pip install -r requirements.txt && python ppo.py",
        "pip install -r requirements.txt -r tests/requirements.txt && pytest",
    ]
    # the line of .ci/run that looks for its command, run on this README
    ci = (ROOT / ".ci" / "run").read_text("utf-8")
    (finder,) = re.findall(r"^command=\$\((.*)\)$", ci, re.M)
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", finder],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert result.stdout.splitlines() == [found[1]]


def test_the_lesson_is_short():
    assert (ROOT / "README.md").stat().st_size <= 20 * 1024


@pytest.fixture
def places(tmp_path, monkeypatch):
    """A folder with what the commands name, small: a LLaMA, the runs of the demo, data of one's own
    and held-out prompts."""
    rng = random.Random(0)
    prompts = data_gen.draw_prompts(rng, 16)
    demos = [{"user_input": p, "completion": data_gen.write(rng, p, "friendly")} for p in prompts]
    scored = [
        dict(d, completion=text, score=score)
        for d in demos
        for text, score in ((d["completion"], 1), ("no", 0))
    ]
    files = {
        f"{name}{twin}": records
        for twin in ("", "_eval")
        for name, records in dict(demos=demos, scored=scored, prompts=demos).items()
    }
    files |= {
        f"data/{name}": demos[:3] for name in ("actor_training_data", "rlhf_training_data_eval")
    }
    (tmp_path / "data").mkdir()
    for name, records in files.items():
        text = json.dumps(records, ensure_ascii=False)
        (tmp_path / f"{name}.json").write_text(text, encoding="utf-8")
    (tmp_path / "tokenizer").mkdir()
    texts = [f"{d['user_input']} {d['completion']}" for d in demos]
    tokenizer_model = data_gen.train_tokenizer(texts, 600)
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(tokenizer_model)
    tokenizer = model.load_tokenizer(str(tmp_path / "tokenizer"))
    monkeypatch.setattr(
        model,
        "DEMO_MODEL",
        dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        ),
    )
    torch.manual_seed(0)
    llama = model.load_llama(None, tokenizer)
    for folder in ("path/to/llama", "runs/sft", "runs/ppo"):
        model.save_checkpoint(llama, tokenizer, str(tmp_path / folder))
    model.save_checkpoint(model.ScalarHead(llama.model), tokenizer, str(tmp_path / "runs" / "rm"))
    monkeypatch.setattr(lib.run, "draw_curves", lambda *given: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def can_run(module, given, piped):
    """Whether a command can run here: all that it reads is there, and it is no dialogue."""
    inputs = [
        word
        for option, word in zip([module, *given], given)
        if option != "--out" and re.fullmatch(r"\S*(/|\.json|\.py)\S*", word)
    ]
    dialogue = module == "tools.chat" and not piped and not {"--prompt", "--prompts"} & set(given)
    return (
        module in RUNNABLE
        and inputs
        and all(map(os.path.exists, inputs))
        and not dialogue
        and "--quantize" not in given
    )


def test_commands_run_as_they_stand(places, monkeypatch, capsys):
    run = set()
    for (module, given), piped in ALONE:
        if not can_run(module, given, piped):
            continue
        if piped:
            assert piped[0] == "echo"
            text = io.BytesIO(" ".join(piped[1:]).encode())
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
        importlib.import_module(module).main(given + RUNNABLE[module])
        for option, word in zip(given, given[1:]):
            assert option != "--out" or (places / word).exists()
        run.add(module)
    assert run == set(RUNNABLE)  # something of each kind was run
    assert "saved runs/my_ppo" in capsys.readouterr().out


@pytest.mark.parametrize("span", [span for span in SPANS if re.search(r"(^| )--\w", span)])
def test_options_exist(span):
    """In a command that is named in the text those of its script, elsewhere those of any."""
    words = shlex.split(span)
    if called := python(words):
        known = options_of(called[0])
    else:
        known = {"--quantization"}.union(*map(options_of, SCRIPTS[:-1] + TOOLS + BENCHES))
        known |= {option for command in COMMANDED for option in options_of("data_gen", command)}
    assert {word.split("=")[0] for word in words if word.startswith("--")} <= known


def module_of(span):
    """(module, name in it) of a span such as `ppo.gae` or `lib.data.collate`, else None."""
    found = re.fullmatch(r"((?:lib\.|tools\.)?\w+)\.(\w+)(\(.*\))?", span)
    if not found or found[2] == "py" or not (ROOT / f"{found[1].replace('.', '/')}.py").exists():
        return None
    return found[1], found[2]


NAMED = [module_of(span) for span in SPANS if module_of(span)]


@pytest.mark.parametrize("module, name", [n for n in NAMED if n != ("model", "safetensors")])
def test_functions_exist(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_tests_exist():
    sources = [
        path.read_text("utf-8") for path in [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    ]
    named = {span for span in SPANS if re.fullmatch(r"test_\w+", span)}
    assert named and named <= {
        name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.M)
    }


def test_files_exist():
    """What stands in the text as the name of a Python file, or as a path into a folder of ours; but
    the reader's own."""
    spans = {
        span
        for span in SPANS
        if re.fullmatch(r"[\w/]+\.py|(docs|tests|bench|lib|tools)/[\w./]*", span)
    } - {"judge.py", "my_reward.py"}
    assert spans
    assert [name for name in sorted(spans) if not (ROOT / name).exists()] == []


def anchors(text):
    """Of each heading, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[page]):
        if "://" in link:
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not heading or heading in anchors(TEXTS[target]), link


def test_every_page_and_picture_is_linked_to():
    linked = {
        (page.parent / link.partition("#")[0]).resolve()
        for page, text in TEXTS.items()
        for link in re.findall(r"\]\(([^)\s]+)\)", text)
        if "://" not in link
    }
    assert {path for path in ROOT.glob("docs/*")} <= linked
