"""Using the result: chat, comparison of checkpoints, quantized weights, `transformers serve`.

    pytest tests/test_use.py

Tiny LLaMAs with random weights answer nonsense, but each always the same nonsense, so what the
terminal shows is compared with `generate`, and what the table says with transformers' own reading
of the reward model.
"""

import builtins
import csv
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import data_gen
from lib.data import left_pad
from lib.dialogue import encode_prompt, encode_text
from model import ScalarHead, generate, load_llama, load_tokenizer, random_llama, save_checkpoint
from tools import chat, tables
from tools import quantize as quantization
from tools.texts import text_of, text_pieces

TEXTS = [
    f"User: what is {a} plus {b}?\nAssistant: it is {a + b}, of course. "
    f"你好，{a}加{b}是{a + b}。"
    for a in range(8)
    for b in range(8)
]


def tiny_llama(vocab, seed):
    torch.manual_seed(seed)
    return random_llama(
        LlamaConfig(
            vocab_size=vocab,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
        )
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """LLaMA 1 and 2's kind, with bytes for what is not in the vocabulary, and LLaMA 3's, made of
    bytes."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.model").write_bytes(data_gen.train_tokenizer(TEXTS, vocab_size=330))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=330,
            show_progress=False,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bpe = PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    return {"sentencepiece": load_tokenizer(str(folder)), "bytes": bpe}


@pytest.fixture(scope="module")
def home(tokenizers, tmp_path_factory):
    """Two checkpoints and a reward model."""
    folder = tmp_path_factory.mktemp("runs")
    tokenizer, paths = tokenizers["sentencepiece"], {}
    for seed, name in enumerate(["sft", "ppo", "rm"]):
        llama = tiny_llama(len(tokenizer), seed)
        # never a single byte: how broken characters are shown is another matter
        llama.lm_head.weight.data[3:259] = 0
        paths[name] = str(folder / name)
        save_checkpoint(ScalarHead(llama.model) if name == "rm" else llama, tokenizer, paths[name])
    return SimpleNamespace(tokenizer=tokenizer, **paths)


def greedy(path, messages, limit=12):
    """What `generate` answers, and whether it ended."""
    tokenizer = load_tokenizer(path)
    prompt = left_pad([encode_prompt(tokenizer, messages)], 0)
    out = generate(load_llama(path, tokenizer), *prompt, limit, tokenizer.end_ids, temperature=0)
    return text_of(tokenizer, out.tokens[0]), out.tokens[0, -1].item() in tokenizer.end_ids


def refused(capfd, *argv):
    """The one line on standard error with which the program ends, with exit code 2."""
    with pytest.raises(SystemExit) as end:
        chat.main(list(argv))
    out, err = capfd.readouterr()
    assert end.value.code == 2 and not out, out
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ------------------------------------------------------------------------------------------------
# Streaming


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
@pytest.mark.parametrize(
    "text",
    ["it is 4, of course.", "你好，饕餮😀 is  it\n\n two  spaces?", " 👩‍👩‍👧 é\t", "饕", ""],
)
def test_pieces_join_to_the_text_and_hold_whole_characters(tokenizers, kind, text):
    tokens = encode_text(tokenizers[kind], text)
    pieces = list(text_pieces(tokenizers[kind], iter(tokens)))
    assert "".join(pieces) == text_of(tokenizers[kind], tokens) == text
    assert all(pieces) and "\ufffd" not in "".join(pieces) and len(pieces) >= len(text) / 4


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_a_piece_is_shown_as_soon_as_its_last_token_is_there(tokenizers, kind):
    tokens, given = encode_text(tokenizers[kind], "it 饕 it"), []
    coming = (given.append(token) or token for token in tokens)
    for piece in text_pieces(tokenizers[kind], coming):
        if "饕" in piece:
            assert text_of(tokenizers[kind], given).endswith("饕")
            return
    pytest.fail("the character was never shown")


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_broken_bytes_do_not_hold_up_what_follows(tokenizers, kind):
    """A character that is cut in the middle of the answer becomes U+FFFD; at the end too, when
    nothing more comes."""
    tokenizer = tokenizers[kind]
    cut = encode_text(tokenizer, "it 饕")[:-1]
    more = encode_text(tokenizer, "x") + encode_text(tokenizer, " of course")[-3:]
    pieces = list(text_pieces(tokenizer, iter(cut + more)))
    assert "\ufffd" in "".join(pieces) and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces[-2:])
    pieces = list(text_pieces(tokenizer, iter(cut)))
    assert "".join(pieces) == text_of(tokenizer, cut)
    assert not any("\ufffd" in piece for piece in pieces[:-1])


# ------------------------------------------------------------------------------------------------
# One answer, and the chat


@pytest.fixture
def terminal(monkeypatch):
    """terminal(line, ...): what the user types; then Ctrl-D."""

    def type_in(*lines):
        lines = iter(lines)

        def typed(prompt):
            line = next(lines, None)
            if line is None:
                raise EOFError
            return line

        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr(builtins, "input", typed)

    return type_in


@pytest.fixture
def asked(monkeypatch):
    """The prompts (tokens) that the model is given from now on; and after how many tokens of an
    answer Ctrl-C is pressed."""
    seen, decode = SimpleNamespace(prompts=[], ctrl_c=None), chat.decode

    def spy(llama, input_ids, *rest, **options):
        seen.prompts.append(input_ids[0].tolist())
        for step, row in enumerate(decode(llama, input_ids, *rest, **options)):
            if step == seen.ctrl_c:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(chat, "decode", spy)
    return seen


@pytest.mark.parametrize("piped", ["utf-8", "utf-8-sig", None], ids=["piped", "BOM", "--prompt"])
def test_one_prompt_is_answered_without_decoration(home, capfd, monkeypatch, piped):
    argv = [home.ppo, "--max_new_tokens", "12"]
    if piped:
        bytes_in = io.BytesIO("what is 2 plus 3? 你好\n".encode(piped))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(bytes_in, "ascii"))
    else:
        argv += ["--prompt", "what is 2 plus 3? 你好"]
    chat.main(argv)
    answer = greedy(home.ppo, "what is 2 plus 3? 你好")[0].lstrip()
    assert capfd.readouterr() == (answer + "\n", "")


def test_an_empty_answer_is_shown_as_such(home, tmp_path, capfd):
    llama = load_llama(home.ppo, home.tokenizer)
    llama.lm_head.weight.data.zero_()
    llama.model.norm.weight.data.zero_()
    silent, prompts = str(tmp_path / "silent"), tmp_path / "prompts.json"
    prompts.write_text(json.dumps([{"user_input": "it is 4"}]))
    # all logits are equal, so the likeliest token is the first: <unk>, which is not shown
    save_checkpoint(llama, home.tokenizer, silent)
    chat.main([silent, "--prompt", "it is 4", "--max_new_tokens", "4"])
    assert capfd.readouterr().out == "(empty)\n"
    chat.main([silent, silent, "--prompt", "it is 4", "--max_new_tokens", "4"])
    assert capfd.readouterr().out == 2 * f"{silent}\n(empty)\n\n"
    chat.main([silent, "--prompts", str(prompts), "--max_new_tokens", "4"])
    assert "| it is 4 | (empty) |" in capfd.readouterr().out


def test_sampling_follows_the_seed_and_the_temperature(home, capfd):
    def said(*options):
        chat.main([home.ppo, "--prompt", "what is 2 plus 3?", "--max_new_tokens", "20", *options])
        return capfd.readouterr().out

    warm = [said("--temperature", "1.5", "--seed", seed) for seed in "001"]
    assert warm[0] == warm[1] != warm[2] and said() == said("--seed", "1") != warm[0]
    # the smallest set is the likeliest token alone
    assert said("--temperature", "1.5", "--top_p", "1e-6") == said()


def test_chat_sees_its_history_until_reset(home, terminal, asked, capfd):
    terminal("it is 4", "你好", "/reset", "  ", "is it 5")
    chat.main([home.ppo, "--max_new_tokens", "6"])
    prompts = list(asked.prompts)
    user = [{"role": "user", "content": text} for text in ["it is 4", "你好", "is it 5"]]
    first = {"role": "assistant", "content": greedy(home.ppo, "it is 4", 6)[0].strip()}
    dialogues = [user[:1], [user[0], first, user[1]], user[2:]]
    assert prompts == [encode_prompt(home.tokenizer, dialogue) for dialogue in dialogues]
    assert first["content"] in capfd.readouterr().out


def test_ctrl_c_stops_the_answer_and_not_the_chat(home, terminal, asked, capfd):
    asked.ctrl_c = 3
    terminal("it is 4", "and 5")
    chat.main([home.ppo, "--max_new_tokens", "9"])
    begun = {"role": "assistant", "content": greedy(home.ppo, "it is 4", 3)[0].strip()}
    dialogue = [{"role": "user", "content": "it is 4"}, begun, {"role": "user", "content": "and 5"}]
    assert asked.prompts[1] == encode_prompt(home.tokenizer, dialogue)
    with pytest.raises(SystemExit) as end:
        chat.main([home.ppo, "--prompt", "it is 4"])
    assert end.value.code == 130


def test_chat_that_outgrows_the_context_forgets_its_oldest_turns(home, terminal, asked, capfd):
    terminal(*[f"{n} plus {n}" for n in range(9)], "long " * 99, "it is 4")
    chat.main([home.ppo, "--max_new_tokens", "16"])
    out = capfd.readouterr().out
    assert out.count("oldest turns are forgotten") == 1 and "and 112 fit: it is dropped" in out
    assert len(asked.prompts) == 10 and max(map(len, asked.prompts)) <= 112  # 128 - 16
    texts = [text_of(home.tokenizer, prompt) for prompt in asked.prompts]
    assert "0 plus 0" in texts[1] and "0 plus 0" not in texts[8] and "8 plus 8" in texts[8]
    assert all(text.lstrip().startswith("User:") for text in texts)
    assert all(text.count("User:") >= text.count("Assistant:") for text in texts)
    # what is too long is dropped, and nothing else for it
    assert "8 plus 8" in texts[9] and "long" not in texts[9]


# ------------------------------------------------------------------------------------------------
# Several checkpoints

PROMPTS = [
    "what is 2 plus 3?",
    "a | b\n<b>*你好*</b> `x`",
    "你好，饕餮",
    "4",
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "it is"}],
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps([{"user_input": prompt} for prompt in PROMPTS]))
    return str(path)


def reference_score(path, prompt, text, ended):
    """transformers' own reading: the tokens of the dialogue, without the last, which ends it, if
    the answer was cut."""
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = {"role": "assistant", "content": text.strip()}
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenizer.apply_chat_template([*asked, answer])["input_ids"]
    tokens = tokens if ended else tokens[:-1]
    with torch.no_grad():
        theirs = AutoModelForSequenceClassification.from_pretrained(path)
        return theirs(torch.tensor([tokens])).logits.item()


def test_a_file_of_prompts_as_csv(home, prompts, tmp_path, capfd):
    out = tmp_path / "answers.csv"
    paths = [home.sft, home.ppo, home.sft]
    chat.main(
        [
            *paths,
            "--reward",
            home.rm,
            "--prompts",
            prompts,
            "--max_new_tokens",
            "12",
            "--batch_size",
            "2",
            "--out",
            str(out),
        ]
    )
    rows = list(csv.reader(io.StringIO(out.read_bytes().decode())))
    assert rows[0] == ["prompt", *(head for path in paths for head in [path, f"score of {path}"])]
    assert [row[0] for row in rows[1:]] == [*PROMPTS[:-1], "System: be brief\n\nUser: it is"]
    expected = []
    for row, prompt in zip(rows[1:], PROMPTS):
        for column, path in zip([1, 3, 5], paths):
            text, ended = greedy(path, prompt)
            assert row[column] == text.strip()  # the same, whatever it was batched with
            expected.append(reference_score(home.rm, prompt, text, ended))
            assert float(row[column + 1]) == pytest.approx(expected[-1], abs=2e-3)
    first, second = expected[0::3], expected[1::3]
    table = [
        line.strip("| ").replace("\\", "").split(" | ")
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert table[0][3:] == ["mean score", f"win rate against {home.sft}"]
    wins = sum(b > a for a, b in zip(first, second)) / len(PROMPTS)
    assert table[3][0] == home.ppo and float(table[3][4]) == pytest.approx(wins, abs=1e-3)
    assert float(table[3][3]) == pytest.approx(sum(second) / len(PROMPTS), abs=2e-3)
    # against itself all are ties, however the batches fell
    assert table[4][0] == home.sft and table[4][4] == "0.500"


def test_win_rate_counts_a_tie_half():
    answers = [[("x", True)] * 4, [("y", True), ("y", False), ("y", True), ("y", True)]]
    rows = tables.summary_rows(["a", "b"], answers, [[1.0, 2.0, 3.0, 4.0], [1.5, 2.0, 0.0, 1.5]])
    assert rows[1:] == [["a", 4, 0, "2.500", "-"], ["b", 4, 1, "1.250", "0.375"]]


def test_a_file_of_prompts_as_markdown(home, prompts, tmp_path, capfd):
    out = tmp_path / "answers.md"
    chat.main(
        [home.sft, home.ppo, "--prompts", prompts, "--max_new_tokens", "8", "--out", str(out)]
    )
    summary, table = out.read_text(encoding="utf-8").split("\n\n")
    lines = table.splitlines()
    assert len(summary.splitlines()) == 4 and len(lines) == 2 + len(PROMPTS)
    for line in lines:  # cells are where GitHub sees them: at the bars that are not escaped
        assert len(re.findall(r"(?<!\\)\|", line)) == 4
    assert lines[3].startswith(r"| a \| b<br>\<b\>\*你好\*\</b\> \`x\` | ")
    capfd.readouterr()
    chat.main([home.sft, home.ppo, "--prompts", prompts, "--max_new_tokens", "8"])
    assert table in capfd.readouterr().out and os.listdir(tmp_path).count("answers.md.part") == 0


def test_one_prompt_through_two_checkpoints(home, capfd):
    chat.main(
        [home.sft, home.ppo, "--reward", home.rm, "--prompt", "你好", "--max_new_tokens", "40"]
    )
    shown = capfd.readouterr().out
    for path in [home.sft, home.ppo]:
        text, ended = greedy(path, "你好", 40)
        head, score = shown.split("\n", 1)[0].split(", score ")
        assert head == path
        assert float(score) == pytest.approx(
            reference_score(home.rm, "你好", text, ended), abs=2e-3
        )
        block = f"{path}, score {score}\n{text.strip()}\n\n"
        assert shown.startswith(block)
        shown = shown[len(block) :]
    assert not shown


# ------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--temperature", "-1"], "--temperature"),
        (["--temperature", "nan"], "--temperature"),
        (["--top_p", "0"], "--top_p"),
        (["--prompt", "x", "--prompts", "y.json"], "not both"),
        (["--prompt", "x", "--out", "a.md"], "--out"),
        (["--prompts", "y.json", "--out", "a.txt"], ".md or .csv"),
        (["--prompts", "nowhere.json"], "nowhere.json: no such file"),
        (["--prompt", " \n"], "empty"),
        (["--prompt", "\ud83d"], "half a character"),
        (["--prompt", "it is " * 90], "shorten it"),
        (["--prompt", "x", "--max_new_tokens", "128"], "the context"),
        (["--prompt", "x", "--reward", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_ends_with_one_line(home, capfd, options, reason):
    assert reason in refused(capfd, home.ppo, *options)


def test_bad_input_of_several_kinds(home, capfd, terminal, monkeypatch, tmp_path):
    terminal()
    assert "--prompt" in refused(capfd, home.sft, home.ppo)
    monkeypatch.setattr(sys, "stdin", None)  # as for a service
    assert "standard input is closed" in refused(capfd, home.ppo)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    assert "standard input: not UTF-8" in refused(capfd, home.ppo)
    path, out = tmp_path / "p.json", tmp_path / "a.csv"
    path.write_text(json.dumps([{"user_input": "x"}, {"user_input": "it is " * 90}]))
    line = refused(capfd, home.ppo, "--prompts", str(path), "--out", str(out))
    assert f"{path}: record 2" in line and not out.exists()
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # it is missed before a model is loaded
    missing = str(tmp_path / "missing")
    line = refused(capfd, missing, "--prompt", "x", "--quantize", "4bit")
    assert "pip install bitsandbytes" in line
    with pytest.raises(SystemExit):
        quantization.main([missing])
    assert "pip install bitsandbytes" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# Quantized, and served


@pytest.mark.parametrize("bits, bytes_per_weight, error", [("8bit", 1.1, 0.1), ("4bit", 0.9, 0.6)])
def test_quantized_weights_are_those_of_transformers(home, capfd, bits, bytes_per_weight, error):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("accelerate")
    full = load_llama(home.ppo, home.tokenizer)
    weights = sum(
        part.weight.numel()
        for part in full.model.layers.modules()
        if isinstance(part, torch.nn.Linear)
    )
    before = quantization.weight_bytes(full)
    ids, mask = left_pad([encode_prompt(home.tokenizer, "what is 2 plus 3?")], 0)
    how = BitsAndBytesConfig(
        load_in_8bit=bits == "8bit",
        load_in_4bit=bits == "4bit",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    theirs = LlamaForCausalLM.from_pretrained(
        home.ppo, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=how
    ).eval()
    capfd.readouterr()
    with torch.no_grad():
        exact = full.lm_head(full(ids))
        after = quantization.quantize(full, bits)
        logits = full.lm_head(full(ids))
        assert torch.allclose(logits, theirs(ids).logits, atol=1e-4)
    assert weights * (4 - bytes_per_weight) < before - after < weights * 4
    assert 0 < (logits - exact).square().mean().sqrt() / exact.std() < error
    answer = theirs.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    chat.main(
        [home.ppo, "--prompt", "what is 2 plus 3?", "--max_new_tokens", "12", "--quantize", bits]
    )
    assert capfd.readouterr() == (
        text_of(home.tokenizer, answer).lstrip() + "\n",
        f"{home.ppo}: weights {before / 1e6:.1f} MB in float32, {after / 1e6:.1f} MB in {bits}\n",
    )


def test_what_quantization_does_is_measured(home, capfd):
    pytest.importorskip("bitsandbytes")
    quantization.main([home.ppo, "--max_new_tokens", "4"])
    table = [
        line.strip("| ").split(" | ")
        for line in capfd.readouterr().out.splitlines()
        if line.startswith("|")
    ]
    assert [row[0] for row in table[2:]] == ["float32", "8bit", "4bit"]
    per_weight, moved = ([float(row[column]) for row in table[3:]] for column in (2, 3))
    assert 4 > per_weight[0] > per_weight[1] > 0.5 and 0 < moved[0] < moved[1]


def test_transformers_serve_gives_the_same_greedy_answer(home, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"  # `transformers`
    command = [
        sys.executable,
        "-c",
        program,
        "serve",
        home.ppo,
        "--device",
        "cpu",
        "--port",
        str(port),
    ]
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        dialogue = [
            {"role": "user", "content": "what is 2 plus 3? 你好"},
            {"role": "assistant", "content": "it is 5."},
            {"role": "user", "content": "and 4?"},
        ]
        body = json.dumps(
            {"model": home.ppo, "messages": dialogue, "temperature": 0, "max_tokens": 16}
        ).encode()
        request = urllib.request.Request(
            f"http://localhost:{port}/v1/chat/completions",
            body,
            {"Content-Type": "application/json"},
        )
        for _ in range(200):  # until it listens
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                with urllib.request.urlopen(request, timeout=20) as reply:
                    content = json.load(reply)["choices"][0]["message"]["content"]
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode()[:500])
            except urllib.error.URLError:
                time.sleep(0.2)
        else:
            pytest.fail((tmp_path / "log").read_text()[-2000:])
        assert content == greedy(home.ppo, dialogue, 16)[0]
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(10)
