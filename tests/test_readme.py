"""The commands of README.md and docs/: each names a script that exists, and options that are in its
--help; those of the stages and the chat that need neither the network, nor a terminal, nor much
time run as they stand, on small data in the places that they name. (What the pages name in their
text: test_house.py.)

    pytest tests/test_readme.py
"""

import importlib
import io
import json
import os
import random
import re
import subprocess
import sys

import pytest
import torch
from pages import ALL, BENCHES, EXAMPLES, PAGES, ROOT, SCRIPTS, TOOLS
from pages import commands, options_of, python, shell

import data_gen
import model

# what runs as it stands, with what makes it short
RUNNABLE = {"sft": [], "train_rm": [], "ppo": ["--updates", "1"], "tools.chat": []}
PYTHON = [(python(words), piped) for words, piped in ALL if python(words)]
ALONE = [(python(words), piped) for words, piped in ALL if words[0] == "python"]


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
        "pip install -r requirements.txt -r tests/requirements.txt && pytest -n 2 --dist worksteal",
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
