"""A reward function of the user's: what it is given, and what counts as a score. Any reward model in
PPO."""

import json
import math
import re
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification,
    BertTokenizerFast, GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast,
)

import data_gen
import model
import ppo
from lib import rewards
from lib.data import read_records
from lib.dialogue import encode_completion, encode_prompt
from lib.judge import Judge
from makers import TINY, error_line, parse, read_rows, refused, without_speed
from model import ScalarHead, last_token, load_scalar_head, load_tokenizer

RECORDS = [dict(user_input="1 + 1?", answer=2, level="easy"), dict(user_input="2 + 3?", answer=5)]
ANSWERS, ENDED = ["It is 2.", "It is 6."], [True, False]


@pytest.fixture
def judge(tmp_path):
    """A `Judge` of a file with this text."""
    def make(text):
        (tmp_path / "own.py").write_text(text)
        return Judge("--reward", str(tmp_path / "own.py"))
    return make


@pytest.mark.parametrize("text, expected", [
    ("def score(user_input, completion): return len(completion)", [8, 8]),
    ("def score(user_input, completion, answer): return float(str(answer) in completion)", [1, 0]),
    ("def score(user_input, completion, answer, level='none'): return len(level)", [4, 4]),
    ("def score(user_input, completion, **record): return record['answer']", [2, 5]),
    ("def score(prompt, text, answer): return answer + len(prompt)", [8, 11]),
    ("def score(user_input, completion, ended): return 1.5 if ended else 0", [1.5, 0]),
    ("def scores(user_inputs, completions, answer): return [2 * a for a in answer]", [4, 10]),
    ("def scores(user_inputs, completions, ended): return [int(e) for e in ended]", [1, 0]),
])
def test_what_the_function_names_it_gets(judge, text, expected):
    found = judge(text)
    found.check("prompts.json", RECORDS)
    assert found(RECORDS, ANSWERS, ENDED) == expected


@pytest.mark.parametrize("score", [1.5, numpy.float32(1.5), numpy.array(1.5), torch.tensor(1.5)],
                         ids=["float", "numpy scalar", "numpy array", "torch"])
def test_scalars_of_numpy_and_torch_are_numbers(judge, score):
    found = judge("def score(user_input, completion): return VALUE")
    found.function.__globals__["VALUE"] = score
    assert found(RECORDS[:1], ANSWERS[:1], ENDED[:1]) == [1.5]


@pytest.mark.parametrize("value, told", [
    ("None", "None"), ("'3'", "'3'"), ("float('nan')", "nan"), ("float('inf')", "inf"),
    ("[1.0]", "[1.0] (list)")])
def test_what_is_no_number_is_refused_with_what_it_is(judge, capsys, value, told):
    found = judge(f"def score(user_input, completion): return {value}")
    with pytest.raises(SystemExit) as end:
        found(RECORDS, ANSWERS, ENDED)
    line = capsys.readouterr().err
    assert end.value.code == 1 and line.count("\n") == 1
    assert f"the score is {told}, which is not a finite number" in line


def test_a_field_that_a_record_lacks_is_named(judge, capsys):
    with pytest.raises(SystemExit) as end:
        judge("def score(user_input, completion, level): return 0").check("prompts.json", RECORDS)
    line = capsys.readouterr().err
    assert end.value.code == 2 and "prompts.json: record 2: field 'level' is missing" in line


def said_in(record):
    """The two numbers of a task, the number of the answer to it, and the answers to it that are
    right and wrong, as sum and as comparison: {answer: is it right?}."""
    a, b = (int("".join(digits)) for digits in numbers_of(record["user_input"]))
    said, = numbers_of(record.get("answer", record.get("completion", "")))
    # the right ones last: where nothing comes of a slip, both are the same
    sums = {(a // 10 + b // 10) * 10 + (a % 10 + b % 10) % 10: False, a + b: True}
    larger = {max((a % 10, a), (b % 10, b))[1]: False, max(a, b): True}
    return a, b, int("".join(said)), sums, larger


@pytest.mark.parametrize("mistakes", [0.0, 0.6])
def test_sums_are_right_but_for_the_slips_and_no_pair_of_numbers_comes_twice(tmp_path, mistakes):
    data_gen.main(["sums", "--out", str(tmp_path), "--prompts", "300", "--demonstrations", "300",
                   "--mistakes", str(mistakes)])
    pairs, slips = [], []
    for name in ("actor_training_data", "actor_training_data_eval", "rlhf_training_data",
                 "rlhf_training_data_eval"):
        for record in json.loads((tmp_path / f"{name}.json").read_text("utf-8")):
            a, b, said, sums, larger = said_in(record)
            is_sum = said not in (a, b)
            answers = sums if is_sum else larger
            assert said in answers, record
            if name.startswith("rlhf"):
                assert answers[said], record
            elif len(answers) == 2:
                slips.append(not answers[said])
            pairs.append((is_sum, min(a, b), max(a, b)))
    assert len(pairs) == 1200 and len(set(pairs)) == len(pairs)
    assert {is_sum for is_sum, *_ in pairs} == {True, False}
    assert len(slips) > 150 and abs(sum(slips) / len(slips) - mistakes) < 0.1
    assert (tmp_path / "tokenizer" / "tokenizer.model").exists()


def numbers_of(text):
    """The runs of digits of a text, character by character."""
    runs, before = [], ""
    for character in text:
        if character.isdigit():
            if not before.isdigit():
                runs.append([])
            runs[-1].append(character)
        before = character
    return runs


# ------------------------------------------------------------------------------------------------
# In PPO

SPOKEN = "def score(user_input, completion):\n    return float(len(completion.split()) - 0.25 * len(user_input))\n"
BATCHED = "def scores(user_inputs, completions):\n    return [len(c.split()) - 0.25 * len(u) for u, c in zip(user_inputs, completions)]\n"


def seen_by_ppo(argv, monkeypatch):
    """Run PPO -> [(prompt, response, score)] in tokens, of what was scored, and whether it had
    ended."""
    seen, score_responses = [], ppo.score_responses

    def keep(reward_model, texts, *given):
        scores, ended = score_responses(reward_model, texts, *given)
        seen.extend((*text, score) for text, score in zip(texts, scores.tolist()))
        return scores, ended

    monkeypatch.setattr(ppo, "score_responses", keep)
    ppo.main(argv)
    return seen


@pytest.mark.parametrize("code", [SPOKEN, BATCHED], ids=["score", "scores"])
def test_a_reward_of_your_own(ppo_argv, home, tmp_path, monkeypatch, capsys, code):
    """What the file says of the texts is what PPO learns from; the critic begins as the SFT
    model."""
    (tmp_path / "own.py").write_text(code)
    argv = ppo_argv(rm=None, reward=tmp_path / "own.py", updates=1, out=tmp_path / "out")
    seen = seen_by_ppo(argv, monkeypatch)
    assert "own.py scores texts: the critic begins as the SFT model" in capsys.readouterr().out
    asked = {
        tuple(encode_prompt(home.tokenizer, r["user_input"])): r["user_input"]
        for r in read_records(str(home.prompts), "user_input")
        + read_records(str(home.prompts_eval), "user_input")
    }
    for prompt, response, score in seen:
        text = home.tokenizer.decode(response, skip_special_tokens=True).strip()
        assert score == pytest.approx(len(text.split()) - 0.25 * len(asked[tuple(prompt)]))
    assert len(seen) == 8 + 2 * 4  # a batch, and two evaluations


def test_the_running_deviation():
    deviation_of, seen = rewards.RunningDeviation(), []
    for seed, number in enumerate((1, 5, 8)):
        scores = torch.randn(number, generator=torch.Generator().manual_seed(seed)) * 3 + 10
        seen += scores.tolist()
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        assert deviation_of(scores) == pytest.approx(deviation or 1, rel=1e-5)
    assert rewards.RunningDeviation(wanted=False)(scores) == 1


@pytest.mark.parametrize(
    "code, words, exit_code",
    [
        (
            "def score(user_input, completion):\n    a = 1\n    return a / 0\n",
            ["line 3: ZeroDivisionError"],
            1,
        ),
        (
            "def score(user_input, completion):\n    return float('nan')\n",
            ["is nan, which is not a finite number"],
            1,
        ),
        (
            "def score(user_input, completion):\n    return 'good'\n",
            ["is 'good', which is not a finite number"],
            1,
        ),
        ("def scores(user_inputs, completions):\n    return [1.0]\n", ["1 scores for 4 texts"], 1),
        ("def score(:\n", ["not a Python file with a function score(user_input, completion)"], 2),
        ("x = 1\n", ["not a Python file with a function score(user_input, completion)"], 2),
    ],
)
def test_a_reward_that_fails_is_told_in_one_line(
    ppo_argv, tmp_path, capsys, code, words, exit_code
):
    (tmp_path / "own.py").write_text(code)
    argv = ppo_argv(rm=None, reward=tmp_path / "own.py", out=tmp_path / "out")
    line = error_line(capsys, lambda: ppo.main(argv), code=exit_code)
    assert "own.py" in line and all(word in line for word in words)
    if exit_code == 1 and "scores for" not in line:
        assert "a response to '" in line


def test_a_failing_reward_loses_no_update(ppo_argv, tmp_path, capsys):
    """It may fail late, when nothing had been saved: once it is mended, the run goes on as if
    nothing had happened. --normalize_reward has a state, too."""
    code = (
        SPOKEN
        + "calls = []\nspoken = score\ndef score(*given):\n    calls.append(1)\n    assert len(calls) < 22\n    return spoken(*given)\n"
    )
    (tmp_path / "own.py").write_text(code)
    argv = ppo_argv(
        rm=None,
        reward=tmp_path / "own.py",
        normalize_reward=True,
        save_every=100,
        eval_prompts=None,
        gold=None,
        out=tmp_path / "out",
    )
    assert "AssertionError" in error_line(capsys, lambda: ppo.main(argv), code=1)
    assert (tmp_path / "out/last/state.json").exists() and len(read_rows(tmp_path / "out")) == 2
    (tmp_path / "own.py").write_text(SPOKEN)
    with pytest.raises(SystemExit):
        ppo.main([*argv, "--resume"])
    assert f"--reward {tmp_path / 'own.py'}: no longer what it was" in capsys.readouterr().err
    ppo.main([*argv, "--resume", "--accept_changed_data"])
    ppo.main([*argv, "--out", str(tmp_path / "once")])
    assert without_speed(read_rows(tmp_path / "out")) == without_speed(read_rows(tmp_path / "once"))
    assert len(read_rows(tmp_path / "out")) == 3
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("out", "once")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_a_gold_judge_that_fails_ends_no_training(ppo_argv, tmp_path, capsys):
    """It fails in one evaluation, after update 2: that one is missing, and nothing else differs
    from a run without a gold judge."""
    code = (
        SPOKEN
        + "calls = []\nspoken = score\ndef score(*given):\n    calls.append(1)\n    assert len(calls) != 10\n    return spoken(*given)\n"
    )
    (tmp_path / "own.py").write_text(code)  # asked 4 times at the start, 4 times per evaluation
    ppo.main(ppo_argv(gold=tmp_path / "own.py", out=tmp_path / "judged"))
    out, said = capsys.readouterr()
    assert said.count("error: ") == 1 and "own.py: line 7: AssertionError" in said
    assert out.count("warning: update 2 is not evaluated; the training goes on") == 1
    ppo.main(ppo_argv(gold=None, out=tmp_path / "alone"))
    rows = [read_rows(tmp_path / name) for name in ("judged", "alone")]
    judged = [row["update"] for row in rows[0] if row["eval_gold"] is not None]
    assert judged == [row["update"] for row in rows[0] if row["eval_score"] is not None] == [0, 3]
    for row in sum(rows, []):
        del row["eval_gold"], row["eval_score"]
    assert without_speed(rows[0]) == without_speed(rows[1])
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "judged" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    # at the beginning it ends the run
    (tmp_path / "own.py").write_text(code.replace("10", "6"))
    argv = ppo_argv(gold=tmp_path / "own.py", out=tmp_path / "never")
    assert "AssertionError" in error_line(capsys, lambda: ppo.main(argv), code=1)


def test_reward_and_rm_at_once(ppo_argv, tmp_path, capsys):
    assert "give one of them" in error_line(
        capsys, lambda: ppo.main(ppo_argv(reward=tmp_path / "own.py"))
    )


def other_llama(folder, texts):
    """A LLaMA reward model with another vocabulary and another chat template."""
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(data_gen.train_tokenizer(texts, vocab_size=500))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '[' + m['role'] + ']\\n' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
    )
    torch.manual_seed(5)
    config = model.LlamaConfig(vocab_size=len(tokenizer), **TINY)
    model.save_checkpoint(ScalarHead(model.random_llama(config).model), tokenizer, str(folder))


ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("changed", ["template", "padding"])
def test_a_llama_from_elsewhere_is_read_where_transformers_reads_it(
    rm_run, tmp_path, changed
):
    """Its template goes on after the end of an answer, or the end is its padding; even where its
    tokens and its template are the policy's. One of ours is read at the end."""
    folder = tmp_path / "rm"
    shutil.copytree(rm_run.folder, folder)
    if changed == "template":
        (folder / "chat_template.jinja").write_text(ZEPHYR)
    tokenizer = load_tokenizer(str(folder))  # the policy's
    args = SimpleNamespace(device="cpu", micro_batch_size=3)
    given = str(folder), tokenizer, args, load_scalar_head, last_token
    assert rewards.from_model(*given) is None
    config = json.loads((folder / "config.json").read_text())
    del config["score_mean"]
    if changed == "padding":
        config["pad_token_id"] = tokenizer.eos_token_id
    (folder / "config.json").write_text(json.dumps(config))
    asked, answers = ["2 + 3", "a dog?", "4"], ["5.", "yes, it is", "4 is 4"]
    found = rewards.from_model(*given).function([{"user_input": said} for said in asked], answers, None)
    theirs = AutoTokenizer.from_pretrained(folder)
    alone = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for said, answer, score in zip(asked, answers, found):
        messages = [dict(role="user", content=said), dict(role="assistant", content=answer)]
        text = theirs.apply_chat_template(messages, tokenize=False)
        batch = theirs(text, add_special_tokens=False, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(alone(**batch).logits.item(), abs=1e-4)
    ours = encode_completion(tokenizer, asked[0], answers[0])
    with torch.no_grad():
        end = load_scalar_head(str(folder))(torch.tensor([sum(ours, [])]))[0, -1].item()
    assert abs(end - found[0]) > 1e-3


def other_bert(folder, texts):
    """A BERT with one label, whose words are those of the texts."""
    folder.mkdir()
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *sorted({word for text in texts for word in re.findall(r"\w", text.lower())}),
    ]
    (folder / "vocab.txt").write_text("\n".join(words), "utf-8")
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(5)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=1,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    BertForSequenceClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("make", [other_llama, other_bert])
def test_any_reward_model_scores_in_ppo_as_it_does_alone(
    ppo_argv, home, tmp_path, monkeypatch, capsys, make
):
    texts = [
        f"{record['user_input']} {record.get('completion', '')}"
        for record in home.records["scored"]
    ]
    make(tmp_path / "rm", texts)
    seen = seen_by_ppo(ppo_argv(rm=tmp_path / "rm", updates=1, out=tmp_path / "out"), monkeypatch)
    assert "scores texts: the critic begins as the SFT model" in capsys.readouterr().out
    asked = {
        tuple(encode_prompt(home.tokenizer, r["user_input"])): r["user_input"]
        for r in read_records(str(home.prompts), "user_input")
        + read_records(str(home.prompts_eval), "user_input")
    }
    theirs, alone = (
        AutoTokenizer.from_pretrained(tmp_path / "rm"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval(),
    )
    different = set()
    for prompt, response, score in seen:
        said, text = (
            asked[tuple(prompt)],
            home.tokenizer.decode(response, skip_special_tokens=True).strip(),
        )
        if make is other_llama:
            ids = theirs.apply_chat_template(
                [{"role": "user", "content": said}, {"role": "assistant", "content": text}],
                return_dict=False,
            )
            batch = {"input_ids": torch.tensor([ids])}
        else:
            batch = theirs([said], [text], truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            assert score == pytest.approx(alone(**batch).logits.item(), abs=1e-4)
        different.add(round(score, 3))
    assert len(different) > 4


def test_too_long_a_text_for_a_llama_reward_model(home, tmp_path):
    """It loses the beginning of its text, not what the template writes before that, also where the
    completion alone is too long."""
    folder = str(tmp_path / "rm")
    other_llama(tmp_path / "rm", [record["user_input"] for record in home.records["scored"]])
    tokenizer, scalar = load_tokenizer(folder), load_scalar_head(folder)
    args = SimpleNamespace(device="cpu", micro_batch_size=2)
    reward = rewards.from_model(folder, home.tokenizer, args, load_scalar_head, last_token)
    long = "2 + 3 = " * 60
    prompt, completion = encode_completion(tokenizer, long, "5.")
    one, other = (encode_prompt(tokenizer, text) for text in "ab")
    head = next(i for i in range(len(one)) if one[i] != other[i])
    rest = TINY["max_position_embeddings"] - len(completion) - head
    texts = [prompt[:head] + prompt[-rest:] + completion]
    texts.append(prompt[:head] + encode_completion(tokenizer, "2", long)[1][head - 128:])
    assert head > 2 and len(texts[0]) == len(texts[1]) == 128
    with torch.no_grad():
        expected = [scalar(torch.tensor([text]))[0, -1].item() for text in texts]
    found = reward.function([{"user_input": long}, {"user_input": "2"}], ["5.", long], None)
    assert found == pytest.approx(expected, abs=1e-4)


def other_gpt(folder):
    """A GPT-2 with one label, a chat template, a token per letter, 64 positions and no token to pad
    with."""
    letters = ["<|endoftext|>", *map(chr, range(32, 127))]
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>",
                            chat_template=template).save_pretrained(folder)
    torch.manual_seed(5)
    config = GPT2Config(vocab_size=len(letters), n_embd=32, n_layer=2, n_head=2, n_positions=64,
                        num_labels=1, initializer_range=0.5)
    GPT2ForSequenceClassification(config).save_pretrained(folder)


def test_a_long_prompt_leaves_the_answer_whole(home, tmp_path):
    """Cut at the right, all answers would score alike."""
    other_gpt(tmp_path)
    args = SimpleNamespace(device="cpu", micro_batch_size=3)
    reward = rewards.from_model(str(tmp_path), home.tokenizer, args, load_scalar_head, last_token)
    alone = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    prompts, answers = ["a b c " * 20, "a b c " * 20, "a"], ["good", "bad", "good"]
    found = reward.function([{"user_input": text} for text in prompts], answers, None)
    for prompt, answer, score in zip(prompts, answers, found):
        ids = [ord(letter) - 31 for letter in f"{prompt} {answer} "[-64:]]
        with torch.no_grad():
            assert score == pytest.approx(alone(torch.tensor([ids])).logits.item(), abs=1e-4)
    assert len(set(found)) == 3


def test_a_reward_model_with_a_template_of_its_own_is_asked_in_it(ppo_argv, rm_run, tmp_path):
    """Though its tokens are the policy's."""
    for template in ("", "{{ messages[0]['content'] }}"):
        folder = tmp_path / f"rm{len(template)}"
        shutil.copytree(rm_run.folder, folder)
        if template:
            (folder / "chat_template.jinja").write_text(
                template + "{{ messages[1]['content'] + eos_token if messages[1:] }}")
        args = parse(ppo, ppo_argv(rm=folder))
        tokenizer = load_tokenizer(args.sft)
        found = rewards.reward_of_texts(args, tokenizer, None, load_scalar_head, last_token)
        assert isinstance(found, rewards.TextReward) == bool(template)


def test_random_numbers_of_a_judge_move_nothing_of_the_run(judge):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws = judge("import torch\ndef score(user_input, completion): return torch.rand(1).item()")
    first, second = draws(RECORDS, ANSWERS, ENDED)
    assert first != second and torch.equal(torch.rand(3), expected)


def test_nor_do_those_it_draws_when_it_is_loaded_and_tried(tmp_path):
    (tmp_path / "own.py").write_text("import torch\ntorch.manual_seed(5)\ntorch.rand(9)\n"
                                     "def score(user_input, completion): return torch.rand(1).item()")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    args = SimpleNamespace(reward=None, gold=str(tmp_path / "own.py"), eval_prompts="prompts.json")
    assert rewards.judges(args, [], RECORDS)[1] and torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("number", [2])
def test_a_reward_model_with_several_labels_is_refused(ppo_argv, home, tmp_path, capsys, number):
    other_bert(tmp_path / "rm", ["a b c"])
    BertForSequenceClassification(
        BertConfig(
            vocab_size=8,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            num_labels=number,
        )
    ).save_pretrained(tmp_path / "rm")
    assert "2 labels, not one" in error_line(
        capsys, lambda: ppo.main(ppo_argv(rm=tmp_path / "rm", out=tmp_path / "out"))
    )


@pytest.mark.parametrize("options, said", [
    (["--digits", "1"], "two numbers of 1 digits make 72"),
    (["--prompts", "3411"], "8011 tasks are asked for, and two numbers of 2 digits make 8010"),
    (["--demonstrations", "1"], "--demonstrations 1: too few to train a tokenizer on"),
])
def test_sums_that_cannot_be_made(tmp_path, capfd, options, said):
    assert said in refused(capfd, data_gen.main, ["sums", "--out", str(tmp_path), *options])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option, value, said", [
    ("demonstrations", "0", "0 is not a whole number of at least 1"),
    ("prompts", "-1", "-1 is not a whole number of at least 1"),
    ("digits", "0", "0 is not a whole number of at least 1"),
    ("mistakes", "1", "1 is not a number from 0 to below 1"),
])
def test_numbers_of_sums_that_are_out_of_range(tmp_path, capfd, option, value, said):
    with pytest.raises(SystemExit) as end:
        data_gen.main(["sums", "--out", str(tmp_path), f"--{option}", value])
    assert end.value.code == 2 and f"--{option}: {said}" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_sums_that_are_there_stay(tmp_path, capfd):
    argv = ["sums", "--out", str(tmp_path), "--prompts", "30", "--demonstrations", "300"]
    data_gen.main(argv)
    before = (tmp_path / "rlhf_training_data.json").read_bytes()
    assert "already exists" in refused(capfd, data_gen.main, [*argv, "--seed", "1"])
    assert (tmp_path / "rlhf_training_data.json").read_bytes() == before
    data_gen.main([*argv, "--seed", "1", "--overwrite"])
    assert (tmp_path / "rlhf_training_data.json").read_bytes() != before


def reward_of(folder, home):
    """What scores texts by the reward model in `folder`."""
    args = SimpleNamespace(device="cpu", micro_batch_size=3)
    return rewards.from_model(str(folder), home.tokenizer, args, load_scalar_head, last_token)


def test_a_reward_model_whose_head_is_missing_is_refused(home, tmp_path, capsys):
    """transformers would make one up."""
    other_bert(tmp_path / "rm", ["a b c"])
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if not name.startswith("classifier")}
    save_file(kept | {"other": torch.zeros(1)}, tmp_path / "rm" / "model.safetensors",
              {"format": "pt"})
    line = error_line(capsys, lambda: reward_of(tmp_path / "rm", home))
    assert "2 of its tensors are missing, such as classifier.bias" in line
    save_file(tensors | {"other": torch.zeros(1)}, tmp_path / "rm" / "model.safetensors",
              {"format": "pt"})
    reward_of(tmp_path / "rm", home)
    assert "1 of its tensors are not used, such as other" in capsys.readouterr().out


def test_a_reward_model_in_bf16_computes_in_float32(home, tmp_path):
    other_bert(tmp_path / "rm", ["a b c"])
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    saved.to(torch.bfloat16).save_pretrained(tmp_path / "rm")
    alone = saved.float().eval()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "rm")
    answers = ["a", "b", "a b c"]
    found = reward_of(tmp_path / "rm", home).function([{"user_input": "a"}] * 3, answers, None)
    for answer, score in zip(answers, found):
        with torch.no_grad():
            expected = alone(**theirs(["a"], [answer], return_tensors="pt")).logits.item()
        assert score == pytest.approx(expected, abs=1e-5)


def test_an_encoder_gets_the_whole_dialogue(home, tmp_path):
    other_bert(tmp_path / "rm", ["a b c"])
    said = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"},
            {"role": "user", "content": "a"}]
    records = [{"user_input": said}, {"user_input": "b\n\nc\n\na"}, {"user_input": "a"}]
    reward = reward_of(tmp_path / "rm", home)
    whole, joined, last = reward.function(records, ["b"] * 3, None)
    assert whole == joined != last
    # where it is too long for 64 positions, what was asked last stays
    long = [{"user_input": [{"role": "user", "content": "b " * 200}, {"role": "assistant",
             "content": "c"}, {"role": "user", "content": text}]} for text in ("a", "b")]
    first, second = reward.function(long, ["b"] * 2, None)
    assert first != second


def test_a_reward_model_with_fewer_rows_than_tokens_is_refused(
    ppo_argv, rm_run, tmp_path, capsys
):
    shutil.copytree(rm_run.folder, tmp_path / "rm")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "rm")
    theirs.add_special_tokens({"pad_token": "[PAD]"})
    theirs.save_pretrained(tmp_path / "rm")
    line = error_line(capsys, lambda: ppo.main(ppo_argv(rm=tmp_path / "rm", out=tmp_path / "out")))
    assert f"{tmp_path / 'rm'}: its tokenizer has the token" in line
