"""The stages end to end on a tiny LLaMA, and the parts of each that are more than plumbing:

    pytest tests/test_stages.py

    data_gen   the world, its labeller and its writers; the files
    sft        the gradient of a batch, however it is cut; what is logged, warned of and exported
    train_rm   the same; the evaluation, and the normalization at the end
    ppo        experience and gradient steps; the run; what stops it; the demo from an empty
               directory

One tiny pipeline (data, SFT model, reward model, PPO) runs once and serves all tests. What the fast
code computes on padded micro-batches is compared with slow references in float64: one record at a
time, a plain forward pass without padding, loops over tokens. For a comparison of gradients AdamW
gives way to plain gradient descent at learning rate 1: the change of the weights is then the
gradient itself, and an error in it shows at its full size.
"""

import copy
import csv
import functools
import importlib.util
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertTokenizerFast,
)

import data_gen
import lib.run
import lib.settings
import model
import ppo
import sft
import train_rm
from lib.data import collate, deal, encode_prompt, encode_records, read_records
from lib import rewards
from waits import waits_of_steps
from model import LlamaBackbone, ScalarHead, load_llama, load_scalar_head, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.06,
    tie_word_embeddings=True,
)
DATA_FILES = ["actor_training_data", "reward_training_data", "rlhf_training_data"]


# ------------------------------------------------------------------------------------------------
# Tools


def options(**values):
    """options(lr=0.1, overwrite=True) -> ["--lr", "0.1", "--overwrite"]; None leaves an option
    out."""
    argv = []
    for name, value in values.items():
        if value is not None:
            argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return argv


def parse(script, argv):
    """The settings that a script has with these options."""
    real_if = ["sft", "rm"] if script is ppo else ["model"]
    return lib.settings.parse(f"{script.__name__}.py", script.__doc__, script.SETTINGS, argv, real_if)[0]


def with_demo(script, **values):
    """The script's table of settings with other values for the demo."""
    return [
        row if isinstance(row, str) else (row[0], values.get(row[0], row[1]), *row[2:])
        for row in script.SETTINGS
    ]


def write_records(path, records):
    path.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
    return path


def read_rows(folder):
    """The rows of metrics.csv: numbers, or None where a field is empty."""
    with open(os.path.join(folder, "metrics.csv"), encoding="utf-8") as file:
        return [
            {name: float(value) if value else None for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


def without_speed(rows):
    return [{name: value for name, value in row.items() if name != "tokens_per_s"} for row in rows]


def run_stage(script, argv):
    """main(argv) -> the folder of --out, its metrics, and {folder: model} of what it exported, as
    it was in memory."""
    exported = {}

    def save(trained, tokenizer, folder):
        exported[folder] = copy.deepcopy(trained)
        model.save_checkpoint(trained, tokenizer, folder)

    out = str(argv[argv.index("--out") + 1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "save_checkpoint", save)
        script.main(argv)
    rows = read_rows(out)
    # PPO's evaluation before the first update
    started = [
        row for row in rows if row.get("update") == 0
    ]
    return SimpleNamespace(
        folder=out, started=started, rows=rows[len(started) :], exported=exported
    )


def error_line(capsys, call, code=2):
    """The line on standard error with which `call` ends the program. With code 2 there is no other
    line; with code 1 there may be a progress bar before it, on a line of its own."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        call()
    said = capsys.readouterr().err.replace("\x1b[A", "")
    assert stopped.value.code == code and "Traceback" not in said, said
    lines = [line for line in re.split("[\r\n]", said) if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == said.count("error: ") == 1 and (len(lines) == 1 or code == 1), said
    return errors[0]


class PlainDescent(torch.optim.SGD):
    """Takes the place of AdamW: steps by gradient times learning rate. Keeps the weights before and
    after a step."""

    made = None  # the one made last

    def __init__(self, parameters, lr, **_):
        super().__init__(list(parameters), lr)
        self.parameters = self.param_groups[0]["params"]
        self.before, PlainDescent.made = self.copies(), self

    def copies(self):
        return [parameter.detach().clone() for parameter in self.parameters]

    def step(self):
        super().step()
        self.after = self.copies()

    def change(self):
        """What the step took off the parameters, as one vector: the gradient, when the learning
        rate is 1."""
        return flat(before - after for before, after in zip(self.before, self.after))


def steep(x):
    """x, with a gradient that is not finite: the slope of the square root at 0."""
    return x + (x - x.detach()).sqrt()


def flat(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def gradient(parameters):
    return flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)


def clipped(vector, largest=1.0):
    return vector * min(1.0, largest / vector.norm().item())


def distance(vector, reference):
    """How far a vector is from the reference, as a share of its length."""
    return ((vector - reference).norm() / reference.norm()).item()


def perturbed(module, size, seed):
    """A copy with noise on all weights, in proportion to their spread."""
    noisy, generator = copy.deepcopy(module), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in noisy.parameters():
            spread = parameter.std() if parameter.std() > 0 else 1.0
            parameter += size * spread * torch.randn(parameter.shape, generator=generator)
    return noisy


def slow_token_logprobs(llama, prompt, response, temperature=1.0):
    """log pi of each response token and the entropy where it was chosen: one row, no padding, a
    loop over tokens."""
    logits = llama.lm_head(llama(torch.tensor([prompt + response])))[0].double() / temperature
    logprobs, entropies = [], []
    for t, token in enumerate(response):
        distribution = torch.log_softmax(logits[len(prompt) + t - 1], dim=0)
        logprobs.append(distribution[token])
        entropies.append(-(distribution.exp() * distribution).sum())
    return torch.stack(logprobs), torch.stack(entropies)


def slow_values(scalar, tokens):
    """The scalar head's number at each of `tokens`: one row, no padding."""
    hidden = scalar.model(torch.tensor([tokens]))[0]
    return (hidden @ scalar.score.weight[0] - scalar.config.score_mean).double()


# ------------------------------------------------------------------------------------------------
# The tiny pipeline


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """The built-in data sets in full, seed 0: {file name: records}, and their folder."""
    folder = tmp_path_factory.mktemp("world") / "data"
    data_gen.main(options(out=folder, seed=0))
    data = {
        name + twin: json.loads((folder / f"{name}{twin}.json").read_text("utf-8"))
        for name in DATA_FILES
        for twin in ("", "_eval")
    }
    return SimpleNamespace(folder=folder, data=data)


@pytest.fixture(scope="session")
def home(world, tmp_path_factory):
    """A folder with small cuts of the data sets: demonstrations, scored completions and prompts."""
    folder = tmp_path_factory.mktemp("home")

    def first(name, number):  # all records of the first prompts, as far as they stand together
        groups = itertools.groupby(world.data[name], key=lambda record: record["user_input"])
        return [record for _, group in itertools.islice(groups, number) for record in group]

    cuts = dict(
        demos=first("actor_training_data", 320),
        demos_eval=first("actor_training_data_eval", 40),
        scored=first("reward_training_data", 60),
        scored_eval=first("reward_training_data_eval", 30),
        prompts=first("rlhf_training_data", 48),
        prompts_eval=first("rlhf_training_data_eval", 6),
    )
    paths = {
        name: write_records(folder / f"{name}.json", records) for name, records in cuts.items()
    }
    tokenizer = load_tokenizer(str(world.folder / "tokenizer"))
    return SimpleNamespace(folder=folder, tokenizer=tokenizer, records=cuts, **paths)


@pytest.fixture(scope="session")
def sft_run(home, world):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "DEMO_MODEL", TINY)
        return run_stage(
            sft,
            options(
                tokenizer=world.folder / "tokenizer",
                data=home.demos,
                eval_data=home.demos_eval,
                epochs=8,
                batch_size=16,
                micro_batch_size=16,
                lr=1e-2,
                out=home.folder / "sft",
            ),
        )


@pytest.fixture(scope="session")
def sft_argv(home, sft_run):
    """The options of an SFT run on the tiny pipeline, with changes."""
    usual = dict(model=sft_run.folder, data=home.demos, epochs=1, max_length=128)
    return lambda **changes: options(**usual | changes)


@pytest.fixture(scope="session")
def rm_argv(home, sft_run):
    """The options of a reward model run on the tiny pipeline, with changes."""
    usual = dict(
        model=sft_run.folder,
        data=home.scored,
        eval_data=home.scored_eval,
        demonstrations=home.demos,
        epochs=3,
        batch_size=8,
        micro_batch_size=3,
        lr=3e-3,
        eval_every=5,
        out=home.folder / "rm",
    )
    return lambda **changes: options(**usual | changes)


@pytest.fixture(scope="session")
def rm_run(rm_argv):
    """Also keeps the weights of the head at each evaluation; only the last of these comes after the
    normalization."""
    heads, evaluate = [], train_rm.evaluate

    def keep(reward_model, *given):
        heads.append(reward_model.score.weight.detach().clone())
        return evaluate(reward_model, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rm, "evaluate", keep)
        run = run_stage(train_rm, rm_argv())
    run.heads = heads
    return run


@pytest.fixture(scope="session")
def ppo_argv(home, sft_run, rm_run):
    """The options of a PPO run on the tiny pipeline, with changes."""
    usual = dict(
        sft=sft_run.folder,
        rm=rm_run.folder,
        prompts=home.prompts,
        eval_prompts=home.prompts_eval,
        demonstrations=home.demos,
        gold=ROOT / "data_gen.py",
        updates=3,
        batch_size=8,
        minibatch_size=4,
        micro_batch_size=3,
        ppo_epochs=2,
        lr=1e-3,
        critic_lr=1e-3,
        kl_coef=0.1,
        ptx_coef=0.1,
        max_new_tokens=8,
        max_prompt_length=64,
        eval_every=2,
        eval_number=4,
        out=home.folder / "ppo",
    )
    return lambda **changes: options(**usual | changes)


@pytest.fixture(scope="session")
def ppo_run(ppo_argv):
    """Also keeps (name, model, its weights before) of the four models."""
    names, models, make_experience = (
        ["actor", "critic", "reward_model", "ref"],
        [],
        ppo.make_experience,
    )

    def keep(*given):
        if not models:
            models.extend(
                (name, module, copy.deepcopy(module.state_dict()))
                for name, module in zip(names, given)
            )
        return make_experience(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo, "make_experience", keep)
        run = run_stage(ppo, ppo_argv())
    run.models = models
    return run


@pytest.fixture(autouse=True)
def no_curves(monkeypatch):
    """Drawing takes longer than training here. The runs above, made before any test, draw."""
    monkeypatch.setattr(lib.run, "draw_curves", lambda *_: None)


# ------------------------------------------------------------------------------------------------
# data_gen.py: files


def test_same_seed_same_bytes(world, tmp_path):
    """In another process as well, in which sets are iterated in another order."""
    subprocess.run(
        [sys.executable, ROOT / "data_gen.py", "--seed", "0"],
        cwd=tmp_path,
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONHASHSEED": "1234"},
    )
    files = sorted(
        path.relative_to(world.folder) for path in world.folder.rglob("*") if path.is_file()
    )
    assert (
        sorted(
            path.relative_to(tmp_path / "data") for path in tmp_path.rglob("*") if path.is_file()
        )
        == files
    )
    assert len(files) == 7
    for file in files:
        assert (tmp_path / "data" / file).read_bytes() == (world.folder / file).read_bytes(), file


def test_other_seed_other_bytes(world, tmp_path):
    data_gen.main(options(out=tmp_path, seed=1))
    for file in [
        path.relative_to(world.folder) for path in world.folder.rglob("*") if path.is_file()
    ]:
        assert (tmp_path / file).read_bytes() != (world.folder / file).read_bytes(), file


def test_keys_of_the_records(world):
    fields = {
        "actor_training_data": ["user_input", "completion"],
        "rlhf_training_data": ["user_input"],
        "reward_training_data": ["user_input", "completion", "score"],
    }
    for name, records in world.data.items():
        wanted = fields[name.removesuffix("_eval")]
        assert read_records(str(world.folder / f"{name}.json"), *wanted) == records
        assert all(list(record) == wanted for record in records) and len(records) >= 100, name


def test_held_out_prompts_are_in_no_training_file(world):
    prompts = {
        name: {record["user_input"] for record in records} for name, records in world.data.items()
    }
    held_out = set().union(*(prompts[f"{name}_eval"] for name in DATA_FILES))
    assert len(held_out) >= 100
    for name in DATA_FILES:
        assert prompts[name].isdisjoint(held_out), name


def test_every_family_and_language_is_in_every_file(world):
    both = {(family, lang) for family in data_gen.PHRASINGS for lang in ("en", "zh")}
    for name, records in world.data.items():
        counts = Counter(data_gen.parse(record["user_input"])[:2] for record in records)
        assert set(counts) == both, name


def test_scored_completions(world):
    """At least 4 different completions a prompt, with the labeller's score, in [0, 5], and
    something to rank."""
    for name in ("reward_training_data", "reward_training_data_eval"):
        groups = defaultdict(dict)
        for record in world.data[name]:
            assert record["score"] == data_gen.score(record["user_input"], record["completion"])
            assert 0 <= record["score"] <= 5
            groups[record["user_input"]][record["completion"]] = record["score"]
        assert min(map(len, groups.values())) >= 4
        assert sum(len(set(scores.values())) > 1 for scores in groups.values()) > 0.95 * len(groups)
        spread = Counter(record["score"] for record in world.data[name])
        assert sum(n for value, n in spread.items() if value <= 1) > 0.1 * spread.total()
        assert sum(n for value, n in spread.items() if value >= 4) > 0.1 * spread.total()


def test_demonstrations_are_a_mixture(world):
    """Most are right, not all; some are as good as can be, most are not: RLHF has something to
    gain."""
    scores = [data_gen.score(**record) for record in world.data["actor_training_data"]]
    share = {value: n / len(scores) for value, n in Counter(scores).items()}
    assert 0.02 < sum(part for value, part in share.items() if value <= 1) < 0.2
    assert 0.1 < share[5.0] < 0.5


def test_tokenizer(world):
    processor = sentencepiece.SentencePieceProcessor(
        model_file=str(world.folder / "tokenizer" / "tokenizer.model")
    )
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    assert {f"<0x{byte:02X}>" for byte in range(256)} <= set(pieces)
    strange = "naïve 𝄞\n\t ☃  鑫"  # nothing of this is in the built-in texts
    assert [p for p in processor.encode_as_pieces("𝄞")][-4:] == [
        "<0xF0>",
        "<0x9D>",
        "<0x84>",
        "<0x9E>",
    ]
    assert processor.unk_id() not in processor.encode(strange)
    assert processor.decode(processor.encode(strange)) == strange
    assert not [
        piece
        for piece in pieces
        if len(re.findall(r"\d", piece)) > 1 and not piece.startswith("<0x")
    ]
    digits = [piece for piece in processor.encode_as_pieces("12 and 345.") if piece.isdigit()]
    assert digits == ["1", "2", "3", "4", "5"]


# ------------------------------------------------------------------------------------------------
# data_gen.py: the world and its labeller


def every_prompt(draws=6):
    """(family, language, slots, prompt) of every phrasing, with a few fillings each."""
    rng = random.Random(5)
    for family, by_lang in data_gen.PHRASINGS.items():
        for lang, phrasings in by_lang.items():
            for phrasing in phrasings:
                for _ in range(draws):
                    slots = data_gen.fill(rng, family, lang)
                    yield family, lang, slots, phrasing.format(**slots)


def test_families_languages_and_phrasings():
    assert len(data_gen.PHRASINGS) >= 8
    for family, by_lang in data_gen.PHRASINGS.items():
        assert set(by_lang) == {"en", "zh"}
        for lang, phrasings in by_lang.items():
            assert len(set(phrasings)) >= 2, family
            chinese = [bool(re.search("[\u4e00-\u9fff]", phrasing)) for phrasing in phrasings]
            assert all(chinese) if lang == "zh" else not any(chinese), family


def test_parse_recovers_family_language_and_slots():
    for family, lang, slots, prompt in every_prompt():
        assert data_gen.parse(prompt) == (family, lang, slots)


@pytest.mark.parametrize(
    "foreign",
    [
        "",
        "What is 3 times 4?",
        "What is 3 plus 4",
        "What is 3 plus 4? ",
        "what is 3 plus 4?",
        "What is 13 plus 4?",
        "Please: What is 3 plus 4?",
        "你好",
        "Hello, I am Tom. What is 3 plus 4?",
    ],
)
def test_score_refuses_foreign_prompts(foreign):
    with pytest.raises(ValueError, match="not a prompt of the built-in world"):
        data_gen.score(foreign, "7.")


EN, ZH = "What is 3 plus 4?", "3加4等于几？"
LONG = "one two three four five six seven eight nine ten eleven twelve a b c d"  # 16 words, no answer among them


@pytest.mark.parametrize(
    "user_input, completion, expected",
    [
        # right and brief: 2 + 1
        (EN, "7.", 3),
        (EN, "3 + 4 = 7.", 3),
        ("Tell me the sum of 9 and 8.", "It is 17.", 3),
        ("Which is larger, 3 or 7?", "7!", 3),
        ("Which is larger, 3 or 7?", "Of 3 and 7 it is 7.", 3),
        ("Sort these numbers: 5 2 9.", "2 5 9.", 3),
        ("Put 5 2 9 in ascending order.", "5 2 9 becomes 2, 5, 9.", 3),
        ("What is the opposite of hot?", "cold.", 3),
        ("How do you say cat in Chinese?", "猫。", 3),
        ("How do you say cat in Chinese?", "cat is 猫.", 3),
        ("Translate 猫 into English.", "The answer is cat.", 3),
        ("What kind of thing is a dog?", "A dog is an animal.", 3),
        ("How many letters are in hammer?", "6.", 3),
        (
            "Is dog an animal, a fruit, a color, a vehicle or a tool?",
            "Not a tool but an animal.",
            3,
        ),
        ("Hello, I am Tom.", "Nice to meet you, Tom.", 3),
        (ZH, "7。", 3),
        ("比较3与7，谁大？", "3小，7大。", 3),
        ("给这些数排序：5 2 9。", "2 5 9。", 3),
        ("炎热 的反义词是什么？", "寒冷！", 3),
        ("cat 的中文是什么？", "答案是 猫。", 3),
        ("请把 猫 翻译成英文。", "应该是 cat。", 3),
        ("猫 属于什么类别？", "猫是动物。", 3),
        ("dog 有几个字母？", "3。", 3),
        ("你好，我是 小明。", "见到你真好，小明。", 3),
        # and friendly: 2 more
        (EN, "Sure! The answer is 7.", 5),
        (EN, "It is 7. Glad to help!", 5),
        ("Hello, I am Tom.", "Good question! Hello, Tom.", 5),
        (ZH, "好的！ 答案是 7。", 5),
        ("你好，我是 小明。", "你好，小明。 很乐意帮忙！", 5),
        # not brief: 1 less. 16 words are brief, 17 are not; a number and a Chinese character are a word
        # each
        (EN, f"{LONG[:-2]} 7.", 3),
        (EN, f"{LONG} 7.", 2),
        (EN, f"Of course! {LONG} 7.", 4),
        (ZH, "嗯" * 15 + "7。", 3),
        (ZH, "嗯" * 16 + "7。", 2),
        (ZH, "问得好！" + "嗯" * 16 + "7。", 4),
        # cut off: 1 less
        (EN, "7", 2),
        (EN, "7,", 2),
        (EN, "Sure! The answer is 7", 4),
        (EN, f"{LONG} 7", 1),
        (EN, "7.  ", 3),
        (ZH, "7", 2),
        (ZH, "当然可以！答案是 7", 4),
        (ZH, "嗯" * 16 + "7", 1),
        # wrong: nothing, or half a point for being friendly
        (EN, "8.", 0),
        (EN, "17.", 0),
        (EN, "seven.", 0),
        (EN, "I do not know.", 0),
        (EN, "Sure! The answer is 8.", 0.5),
        (EN, "7 or 8.", 0),
        (EN, "8 or 7.", 0),
        (EN, "7 is 3 plus 4.", 0),
        ("Hello, I am Tom.", "Hello, Ben.", 0),
        ("Sort these numbers: 5 2 9.", "2 5.", 0),
        ("Sort these numbers: 5 2 9.", "2 9 5.", 0),
        ("What kind of thing is a dog?", "An animal, not a fruit.", 0),
        ("What is the opposite of hot?", "Sure! hot.", 0.5),
        (ZH, "8。", 0),
        (ZH, "好的！答案是 8。", 0.5),
        ("给这些数排序：5 2 9。", "9 5 2。", 0),
        ("猫 属于什么类别？", "好的！水果。", 0.5),
        # in the other language, right or wrong: the same
        (EN, "答案是 7。", 0),
        (EN, "好的！ 答案是 7。", 0.5),
        (EN, "好的！ 答案是 8。", 0.5),
        (EN, "答案是 8。", 0),
        (ZH, "The answer is 7.", 0),
        (ZH, "Sure! The answer is 7.", 0.5),
        ("猫 用英文怎么说？", "It is cat.", 0),
        # rude: nothing, though it be right and friendly
        (EN, "Are you stupid? 7.", 0),
        (EN, "Leave me alone. 8.", 0),
        (EN, "Sure! What a dumb question. It is 7.", 0),
        (EN, "Sure! Are you stupid? It is 8.", 0),
        (ZH, "你真笨。 7。", 0),
        (ZH, "好的！别烦我。8。", 0),
        # nothing at all
        (EN, "", 0),
        (ZH, "", 0),
        (EN, " \n", 0),
        ("Hello, I am Tom.", "", 0),
    ],
)
def test_score_by_hand(user_input, completion, expected):
    assert data_gen.score(user_input, completion) == expected


def test_what_each_style_scores():
    rng = random.Random(6)
    for _, _, _, prompt in every_prompt(draws=20):
        assert data_gen.score(prompt, "") == 0
        scores = {}
        for style, right in itertools.product(data_gen.STYLES, [True, False]):
            text = data_gen.write(rng, prompt, style, right)
            scores[style, right] = data_gen.score(prompt, text)
            if (
                style != "cut off" and not right
            ):  # what is cut off a wrong one may leave a right one
                assert scores[style, right] in (0, 0.5), (prompt, text)
            if style == "cut off":
                assert scores[style, right] <= 4 and text[-1] not in " .!?。！？", (prompt, text)
        exact = {style: scores[style, True] for style in ("friendly", "curt", "rambling")}
        assert exact == {"friendly": 5, "curt": 3, "rambling": 2}, prompt
        assert scores["rude", True] == 0 and scores["other language", True] in (0, 0.5), prompt


def test_wherever_it_is_cut_off_it_scores_less():
    rng = random.Random(7)
    for _, _, _, prompt in every_prompt(draws=2):
        for style in ("friendly", "rambling"):
            whole = data_gen.write(rng, prompt, style)
            best = max(
                data_gen.score(prompt, whole[:n].rstrip(" .!?。！？")) for n in range(1, len(whole))
            )
            assert best < data_gen.score(prompt, whole), whole


def test_fixed_phrases_hold_no_answer():
    """Otherwise a friendly phrase or a filler would itself be read as an answer."""
    answers = {
        *data_gen.WORDS,
        *data_gen.CHINESE,
        *data_gen.OPPOSITE,
        *data_gen.NAMES["en"],
        *data_gen.NAMES["zh"],
        *itertools.chain(*data_gen.NOUNS),
    }
    tables = (
        data_gen.FRIENDLY,
        data_gen.RUDE,
        data_gen.FILLER,
        data_gen.SENTENCES,
        data_gen.GREETINGS,
    )
    phrases = [
        phrase.replace("{x}", " ")
        for table in tables
        for lang in ("en", "zh")
        for phrase in table[lang]
    ]
    assert len(phrases) > 20 and len(answers) > 80
    for phrase in phrases:
        words = set(re.findall("[a-z]+", phrase.lower()))
        found = [
            a for a in answers if (a.lower() in words if a.isascii() else a in phrase)
        ] + re.findall(r"\d", phrase)
        assert not found, (phrase, found)


# ------------------------------------------------------------------------------------------------
# sft.py


def examples_of(path, tokenizer):
    """[(prompt, completion, number of the record)] of a data file."""
    return encode_records(
        read_records(str(path), "user_input", "completion"), tokenizer, 128, str(path)
    )


@pytest.fixture(scope="session")
def ragged(home):
    """8 demonstrations of very different lengths, each with its own words."""
    texts = [
        "7.",
        "是。",
        "Sure! It is 7.",
        "dog cat.",
        "There are many ways to look at it. " * 2,
        "Hello, Tom.",
        "嗯，让我先想一想这个问题。答案是 猫。",
        "Well, let me think about this for a moment. It is not so simple. " * 2,
    ]
    records = [
        record | {"completion": text} for record, text in zip(home.records["prompts"], texts)
    ]
    path = write_records(home.folder / "ragged.json", records)
    return SimpleNamespace(path=path, records=records, examples=examples_of(path, home.tokenizer))


def test_sft_learns(sft_run):
    losses = [row["loss"] for row in sft_run.rows]
    held_out = [row["eval_loss"] for row in sft_run.rows if row["eval_loss"]]
    assert losses[0] > 6.5 and sum(losses[-10:]) / 10 < 3 and held_out[-1] < held_out[0]


def test_sft_metrics(sft_run, home):
    steps_an_epoch = math.ceil(len(home.records["demos"]) / 16)
    with open(os.path.join(sft_run.folder, "metrics.csv"), encoding="utf-8") as file:
        assert file.readline().strip() == "step,epoch,loss,eval_loss,lr,grad_norm,tokens_per_s"
    assert [row["step"] for row in sft_run.rows] == list(range(1, 8 * steps_an_epoch + 1))
    assert [row["epoch"] for row in sft_run.rows] == [
        epoch for epoch in range(1, 9) for _ in range(steps_an_epoch)
    ]
    for row in sft_run.rows:
        assert (row["eval_loss"] is not None) == (row["step"] % steps_an_epoch == 0)
        assert all(math.isfinite(value) for value in row.values() if value is not None)
        assert row["grad_norm"] > 0 and row["tokens_per_s"] > 0
    rates, warmup = [row["lr"] for row in sft_run.rows], math.ceil(0.03 * len(sft_run.rows))
    assert rates[:warmup] == sorted(rates[:warmup]) and rates[warmup:] == sorted(
        rates[warmup:], reverse=True
    )
    assert max(rates) == pytest.approx(1e-2, rel=0.01) and rates[-1] < 1e-4
    # the last evaluation is that of the exported model
    exported = load_llama(sft_run.folder, home.tokenizer, torch.float64)
    with torch.no_grad():
        held_out = examples_of(home.demos_eval, home.tokenizer)
        losses = torch.cat([-slow_token_logprobs(exported, p, c)[0] for p, c, _ in held_out])
    assert sft_run.rows[-1]["eval_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)


def test_curves_are_drawn(sft_run, rm_run, ppo_run):
    pytest.importorskip("matplotlib")
    for run in (sft_run, rm_run, ppo_run):
        assert Path(run.folder, "curves.png").read_bytes().startswith(b"\x89PNG")


def assert_same_llama(folder, trained, tokenizer):
    """A folder loads in plain transformers, and gives the logits of the model as it was in
    memory."""
    assert not [name for name in os.listdir(folder) if "part" in name]
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(loaded).__name__ == "LlamaForCausalLM" and loaded.dtype == torch.float32
    assert (
        loaded.config.eos_token_id == tokenizer.eos_token_id
        and loaded.config.pad_token_id == tokenizer.pad_token_id
    )
    tokens = encode_prompt(tokenizer, "What is 3 plus 4?")
    with torch.no_grad():
        theirs, ours = loaded(torch.tensor([tokens])).logits, trained.lm_head(
            trained(torch.tensor([tokens]))
        )
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)
    chat = [{"role": "user", "content": "What is 3 plus 4?"}]
    again = AutoTokenizer.from_pretrained(folder)
    assert again.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == tokens


def test_sft_export_in_plain_transformers(sft_run, home):
    assert_same_llama(sft_run.folder, sft_run.exported[sft_run.folder], home.tokenizer)


FLOAT32 = SimpleNamespace(device="cpu", dtype="float32")


def test_completion_losses(sft_run, ragged, home):
    """Against a loop over tokens; none for a prompt token, none for padding, and one for
    end-of-sequence."""
    llama = load_llama(sft_run.folder, home.tokenizer)
    prompts, completions, _ = zip(*ragged.examples)
    batch = collate(ragged.examples, home.tokenizer.pad_token_id)
    losses = sft.completion_losses(llama, *batch, FLOAT32, piece=5)
    slow = [
        -slow_token_logprobs(copy.deepcopy(llama).double(), p, c)[0]
        for p, c in zip(prompts, completions)
    ]
    torch.testing.assert_close(losses.double(), torch.cat(slow), rtol=1e-4, atol=1e-4)
    assert len(losses) == sum(map(len, completions))
    assert all(completion[-1] == home.tokenizer.eos_token_id for completion in completions)


def test_no_loss_falls_on_the_prompt(sft_run, ragged, home):
    """The vocabulary projection receives a gradient at the states before completion tokens, and at
    no other."""
    llama = load_llama(sft_run.folder, home.tokenizer)
    prompts, completions, _ = zip(*ragged.examples)
    kept = []

    def keep(module, inputs, output):
        output.retain_grad()
        kept.append(output)

    llama.model.register_forward_hook(keep)
    batch = collate(ragged.examples, home.tokenizer.pad_token_id)
    sft.completion_losses(llama, *batch, FLOAT32, scale=1.0, piece=5)
    touched = kept[0].grad.abs().sum(-1).nonzero().tolist()
    ends = [
        (len(prompt), len(prompt) + len(completion))
        for prompt, completion in zip(prompts, completions)
    ]
    assert touched == [
        [row, t - 1] for row, (start, end) in enumerate(ends) for t in range(start, end)
    ]


@pytest.fixture(scope="session")
def sft_gradient(sft_run, ragged):
    """The gradient of the batch's mean loss a token, by loops; and what it is if each micro-batch
    uses its own mean."""
    llama = load_llama(sft_run.folder, load_tokenizer(sft_run.folder), torch.float64)
    in_order = sorted(ragged.examples, key=lambda example: len(example[0]) + len(example[1]))
    each = []  # (gradient, tokens) of the sum of each record's losses
    for prompt, completion, _ in in_order:
        llama.zero_grad()
        (-slow_token_logprobs(llama, prompt, completion)[0]).sum().backward()
        each.append((gradient(llama.parameters()), len(completion)))

    def own_means(size):
        parts = [each[start : start + size] for start in range(0, len(each), size)]
        return sum(sum(g for g, _ in part) / sum(n for _, n in part) for part in parts) / len(parts)

    return SimpleNamespace(
        right=sum(g for g, _ in each) / sum(n for _, n in each), own_means=own_means
    )


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_sft_micro_batches_change_nothing(
    sft_argv, sft_gradient, ragged, tmp_path, monkeypatch, micro_batch_size
):
    """One optimizer step on 8 ragged records is the gradient of their mean loss a token, however
    they are cut."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    sft.main(
        sft_argv(
            data=ragged.path, batch_size=8, micro_batch_size=micro_batch_size, lr=1, out=tmp_path
        )
    )
    error = distance(PlainDescent.made.change(), clipped(sft_gradient.right))
    assert error < 1e-4
    # the known error, each micro-batch divided by its own tokens, would be a thousand times that
    known = distance(clipped(sft_gradient.own_means(micro_batch_size)), clipped(sft_gradient.right))
    print(
        f"micro-batches of {micro_batch_size}: off by {error:.1e}; with their own means by {known:.1e}"
    )
    assert known < 1e-12 if micro_batch_size == 8 else known > 0.1
    [row] = read_rows(tmp_path)
    assert row["grad_norm"] == pytest.approx(sft_gradient.right.norm().item(), rel=1e-4)
    exported = flat(AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    assert torch.equal(exported, flat(PlainDescent.made.after))


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_sft_evaluate_weighs_tokens(sft_run, ragged, home, micro_batch_size):
    llama = load_llama(sft_run.folder, home.tokenizer)
    args = SimpleNamespace(micro_batch_size=micro_batch_size, device="cpu", dtype="float32")
    with torch.no_grad():
        each = [(-slow_token_logprobs(llama, p, c)[0]).tolist() for p, c, _ in ragged.examples]
    by_token = sum(map(sum, each)) / sum(map(len, each))
    mean_of_means = sum(sum(losses) / len(losses) for losses in each) / len(each)
    assert sft.evaluate(llama, ragged.examples, args, home.tokenizer.pad_token_id) == pytest.approx(
        by_token, rel=1e-5
    )
    assert abs(by_token - mean_of_means) > 0.1


def in_file_order(lengths, batch_size, generator):
    return [
        list(range(start, min(start + batch_size, len(lengths))))
        for start in range(0, len(lengths), batch_size)
    ]


@pytest.fixture
def suspicious(sft_argv, tmp_path, monkeypatch):
    """The options of an SFT run of 24 steps of 3 records, in the order of the file, that barely
    learns.

    Record 2 is too long and dropped, so that a position in the batch is not the number of a record.
    """
    monkeypatch.setattr(sft, "length_batches", in_file_order)
    usual = {"user_input": "What is 3 plus 4?", "completion": "7."}

    def argv(replaced={}, **changes):
        records = [usual, usual | {"completion": "word " * 200}, *[usual] * 71]
        records = [replaced.get(number, record) for number, record in enumerate(records, 1)]
        data = write_records(tmp_path / "data.json", records)
        return sft_argv(
            **dict(data=data, batch_size=3, micro_batch_size=3, lr=1e-9, out=tmp_path / "out")
            | changes
        )

    return argv


@pytest.mark.parametrize("number, micro_batch_size", [(67, 3), (68, 1), (69, 2)])
def test_a_garbage_record_is_named(
    suspicious, sft_run, home, tmp_path, capsys, number, micro_batch_size
):
    """With its mean loss a token."""
    garbage = {"user_input": "What is 3 plus 4?", "completion": "剪剪]剪&猫%锤 z车q"}
    sft.main(suspicious({number: garbage}, micro_batch_size=micro_batch_size))
    [warning] = [line for line in capsys.readouterr().out.split("\n") if "warning: " in line]
    step = (number - 2) // 3 + 1  # without record 2
    assert (
        f"step {step}:" in warning and f"record {number} of {tmp_path / 'data.json'} (" in warning
    )
    [example] = examples_of(write_records(tmp_path / "garbage.json", [garbage]), home.tokenizer)
    with torch.no_grad():
        loss = (
            -slow_token_logprobs(load_llama(sft_run.folder, home.tokenizer), *example[:2])[0]
            .mean()
            .item()
        )
    assert float(re.search(r"\((\d+\.\d+)\)$", warning)[1]) == pytest.approx(loss, abs=0.02)


@pytest.mark.parametrize("same", [True, False])
def test_no_warning_without_garbage(suspicious, home, capsys, same):
    sft.main(suspicious({} if same else dict(enumerate(home.records["demos"][:73], 1))))
    assert "warning: " not in capsys.readouterr().out


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_sft_stops_on_what_is_not_finite(suspicious, home, tmp_path, monkeypatch, capsys, what):
    """Exit code 1, the numbers of the batch's records, the steps before it on disk, nothing
    exported."""
    losses, poison = sft.completion_losses, home.tokenizer.encode("&", add_special_tokens=False)[-1]

    def poisoned(llama, input_ids, *rest, **options):
        result = losses(llama, input_ids, *rest, **options)
        if (input_ids == poison).any():
            (result if what == "loss" else llama.lm_head.weight.grad)[0] = math.nan
        return result

    monkeypatch.setattr(sft, "completion_losses", poisoned)
    argv = suspicious({9: {"user_input": "What is 3 plus 4?", "completion": "7 & 8."}})
    line = error_line(capsys, lambda: sft.main(argv), code=1)
    assert re.search(
        "the loss is nan" if what == "loss" else r"the loss is \d.*, the gradient nan", line
    )
    assert "at step 3, on records [8, 9, 10]" in line and "data.json" in line
    assert os.listdir(tmp_path / "out") == ["metrics.csv"] and len(read_rows(tmp_path / "out")) == 2


# ------------------------------------------------------------------------------------------------
# train_rm.py


def by_prompt(records):
    """[[index of a record, ...] of each prompt], by a plain comparison of texts."""
    prompts = list(dict.fromkeys(record["user_input"] for record in records))
    return [
        [i for i, record in enumerate(records) if record["user_input"] == prompt]
        for prompt in prompts
    ]


def slow_pairs(scores, labels, groups):
    """[(1, 0.5 or 0 for the model's order, margin, label gap)] of all pairs with different labels,
    by loops."""
    pairs = []
    for group in groups:
        for better, worse in itertools.permutations(group, 2):
            if labels[better] > labels[worse]:
                margin = scores[better] - scores[worse]
                order = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
                pairs.append((order, margin, labels[better] - labels[worse]))
    return pairs


def plain_scores(folder, examples):
    """The scores of a folder's model in plain transformers, each completion alone, less the mean in
    its config.json."""
    classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert (
        type(classifier).__name__ == "LlamaForSequenceClassification"
        and classifier.config.num_labels == 1
    )
    with torch.no_grad():
        return [
            classifier(torch.tensor([prompt + completion])).logits.item()
            - classifier.config.score_mean
            for prompt, completion, _ in examples
        ]


def test_rm_learns_to_rank(rm_run, home):
    records = home.records["scored"]
    steps = 3 * math.ceil(
        sum(len({records[i]["score"] for i in group}) > 1 for group in by_prompt(records)) / 8
    )
    with open(os.path.join(rm_run.folder, "metrics.csv"), encoding="utf-8") as file:
        assert file.readline().strip() == (
            "step,epoch,loss,accuracy,eval_accuracy,eval_margin,eval_error,lr,grad_norm,"
            "tokens_per_s"
        )
    assert [row["step"] for row in rm_run.rows] == list(range(1, steps + 1))
    for row in rm_run.rows:
        assert (row["eval_accuracy"] is not None) == (row["step"] % 5 == 0 or row["step"] == steps)
        assert row["eval_error"] is None  # a ranking model's scores are not in the labels' units
        assert all(math.isfinite(value) for value in row.values() if value is not None)
    assert rm_run.rows[-1]["eval_accuracy"] > 0.55 and rm_run.rows[-1]["eval_margin"] > 0
    assert sum(row["loss"] for row in rm_run.rows[-5:]) < 0.95 * sum(
        row["loss"] for row in rm_run.rows[:5]
    )


def test_rm_export_in_plain_transformers(rm_run, home):
    """The exported model alone gives the normalized score, ours, in a padded batch as well as each
    completion alone."""
    examples = examples_of(home.demos, home.tokenizer)
    scores = torch.tensor(plain_scores(rm_run.folder, examples))
    assert abs(scores.mean().item()) < 1e-3 and abs(scores.std(unbiased=False).item() - 1) < 1e-3
    input_ids, _ = collate(examples[:16], home.tokenizer.pad_token_id)
    classifier = AutoModelForSequenceClassification.from_pretrained(rm_run.folder).eval()
    assert (
        classifier.config.problem_type == "regression" and abs(classifier.config.score_mean) > 1e-3
    )
    with torch.no_grad():
        ours = rm_run.exported[rm_run.folder](input_ids)
        theirs = classifier(
            input_ids, attention_mask=(input_ids != home.tokenizer.pad_token_id).long()
        ).logits[:, 0]
        theirs -= classifier.config.score_mean
    ours = torch.stack([row[len(p) + len(c) - 1] for row, (p, c, _) in zip(ours, examples)])
    torch.testing.assert_close(ours, scores[:16], rtol=0, atol=1e-4)
    torch.testing.assert_close(theirs, scores[:16], rtol=0, atol=1e-4)
    assert not [name for name in os.listdir(rm_run.folder) if "part" in name]


def test_normalization_keeps_the_ranking(rm_run, home):
    """It is a shift and a division: every pair stays as it was."""
    records, examples = home.records["scored_eval"], examples_of(home.scored_eval, home.tokenizer)
    groups, labels = by_prompt(records), [record["score"] for record in records]
    backbone = load_scalar_head(rm_run.folder).model
    with torch.no_grad():
        hidden = torch.stack([backbone(torch.tensor([p + c]))[0, -1] for p, c, _ in examples])
    before, after = ((hidden @ head[0]) for head in rm_run.heads[-2:])
    assert not torch.equal(*rm_run.heads[-2:])
    accuracy = [
        sum(pair[0] for pair in slow_pairs(scores.tolist(), labels, groups))
        for scores in (before, after)
    ]
    pairs = len(slow_pairs(labels, labels, groups))
    assert accuracy[0] / pairs == pytest.approx(rm_run.rows[-1]["eval_accuracy"], abs=1e-3)
    assert accuracy[0] == accuracy[1]
    apart = [(i, j) for group in groups for i, j in itertools.combinations(group, 2)]
    assert len(apart) > 50 and all(
        (before[i] > before[j]) == (after[i] > after[j]) for i, j in apart
    )


def test_each_completion_goes_through_the_model_once_an_epoch(
    home, rm_argv, few_scored, tmp_path, monkeypatch
):
    """K completions make K (K - 1) / 2 pairs, and K rows."""
    rows, forward, pad = Counter(), LlamaBackbone.forward, home.tokenizer.pad_token_id

    def counted(self, input_ids, **given):
        if torch.is_grad_enabled():
            rows.update(tuple(token for token in row if token != pad) for row in input_ids.tolist())
        return forward(self, input_ids, **given)

    monkeypatch.setattr(LlamaBackbone, "forward", counted)
    train_rm.main(rm_argv(data=few_scored.path, eval_data=None, epochs=2, out=tmp_path / "out"))
    assert rows == Counter(
        {tuple(p + c): 2 for p, c, _ in examples_of(few_scored.path, home.tokenizer)}
    )


def test_last_token():
    """The last token of the completion, not of the prompt and not of the padding, whatever tokens
    these are."""
    prompts, completions = [[5], [5, 6, 7, 0], [8, 9], [4, 4]], [
        [1, 2, 0, 2],
        [3],
        [2, 2, 2, 2, 2],
        [0],
    ]
    input_ids, places = collate(list(zip(prompts, completions)), 0)
    values = torch.arange(input_ids.numel() * 3.0).view(*input_ids.shape, 3)
    ends = [len(p) + len(c) - 1 for p, c in zip(prompts, completions)]
    expected = torch.stack([row[end] for row, end in zip(values, ends)])
    assert torch.equal(model.last_token(values, places), expected)
    assert model.last_token(input_ids, places).tolist() == [2, 3, 2, 0]


def test_rm_evaluate(rm_run, home):
    """Pair accuracy, margin, error and the accuracy by label gap, against loops over plain
    transformers' scores."""
    records, examples = home.records["scored_eval"], examples_of(home.scored_eval, home.tokenizer)
    groups, labels = by_prompt(records), [record["score"] for record in records]
    args = SimpleNamespace(micro_batch_size=2, device="cpu", dtype="float32")
    assert train_rm.group_by_prompt(records, examples) == groups
    accuracy, margin, error, by_gap = train_rm.evaluate(
        load_scalar_head(rm_run.folder),
        examples,
        groups,
        torch.tensor(labels),
        args,
        home.tokenizer.pad_token_id,
    )
    scores = plain_scores(rm_run.folder, examples)
    pairs = slow_pairs(scores, labels, groups)
    assert accuracy == pytest.approx(sum(a for a, _, _ in pairs) / len(pairs), abs=1e-3)
    assert margin == pytest.approx(sum(m for _, m, _ in pairs) / len(pairs), abs=1e-3)
    assert error == pytest.approx(
        math.sqrt(sum((s - y) ** 2 for s, y in zip(scores, labels)) / len(labels)), abs=1e-3
    )
    largest, expected = max(gap for _, _, gap in pairs), []
    for quarter in range(1, 5):
        within = [
            a for a, _, gap in pairs if (quarter - 1) / 4 * largest < gap <= quarter / 4 * largest
        ]
        if within:
            expected.append((quarter / 4 * largest, sum(within) / len(within), len(within)))
    assert len(by_gap) == len(expected) >= 3
    for ours, slow in zip(by_gap, expected):
        assert ours == pytest.approx(slow, abs=1e-3)


@pytest.fixture(scope="session")
def few_scored(home):
    """Four prompts with 2, 3, 4 and 4 completions."""
    scored = home.records["scored"]
    groups = [
        group
        for group in by_prompt(scored)
        if scored[group[0]]["score"] != scored[group[1]]["score"]
    ]
    records = [scored[i] for group, size in zip(groups, (2, 3, 4, 4)) for i in group[:size]]
    assert len(records) == 13
    return SimpleNamespace(
        path=write_records(home.folder / "few_scored.json", records), records=records
    )


@pytest.mark.parametrize("loss", ["ranking", "regression"])
def test_rm_micro_batches_change_nothing(
    home, sft_run, rm_argv, few_scored, tmp_path, monkeypatch, loss
):
    """One step is the gradient of the mean over prompts of each prompt's mean, by loops over pairs
    or completions."""
    monkeypatch.setattr(torch.optim, "AdamW", PlainDescent)
    records, examples, changes = (
        few_scored.records,
        examples_of(few_scored.path, home.tokenizer),
        [],
    )
    for size in (1, 3, 4):
        out = tmp_path / str(size)
        train_rm.main(
            rm_argv(
                data=few_scored.path,
                eval_data=None,
                loss=loss,
                epochs=1,
                batch_size=4,
                lr=1,
                micro_batch_size=size,
                out=out,
            )
        )
        changes.append((PlainDescent.made.change(), read_rows(out)[0]))
    reference = ScalarHead(load_llama(sft_run.folder, home.tokenizer).model)
    with torch.no_grad():
        for parameter, value in zip(reference.parameters(), PlainDescent.made.before):
            parameter.copy_(value)
    reference = reference.double()
    scores = [slow_values(reference, p + c)[-1] for p, c, _ in examples]
    means = []
    for group in by_prompt(records):
        if loss == "ranking":
            pairs = [
                (i, j) for i in group for j in group if records[i]["score"] > records[j]["score"]
            ]
            terms = [-torch.log(torch.sigmoid(scores[i] - scores[j])) for i, j in pairs]
        else:
            terms = [(scores[i] - records[i]["score"]) ** 2 for i in group]
        means.append(sum(terms) / len(terms))
    expected = sum(means) / len(means)
    expected.backward()
    right = gradient(reference.parameters())
    for change, row in changes:
        assert distance(change, clipped(right)) < 1e-4
        assert row["loss"] == pytest.approx(expected.item(), rel=1e-4)
        assert row["grad_norm"] == pytest.approx(right.norm().item(), rel=1e-4)


def test_rm_regression_learns_the_scores(home, rm_argv, tmp_path):
    """In the labels' units before the normalization, with mean 0 and deviation 1 after it. It needs
    no pairs."""
    first_only = {record["user_input"]: record for record in reversed(home.records["scored"])}
    data = write_records(tmp_path / "single.json", list(first_only.values()))
    train_rm.main(rm_argv(data=data, loss="regression", epochs=6, out=tmp_path / "out"))
    rows = read_rows(tmp_path / "out")
    losses = {epoch: [row["loss"] for row in rows if row["epoch"] == epoch] for epoch in (1, 6)}
    assert sum(losses[6]) < 0.8 * sum(losses[1])
    errors = [row["eval_error"] for row in rows if row["eval_accuracy"] is not None]
    assert len(errors) > 2 and all(0 < error < 5 for error in errors)
    scores = torch.tensor(plain_scores(tmp_path / "out", examples_of(home.demos, home.tokenizer)))
    assert abs(scores.mean().item()) < 1e-3 and abs(scores.std(unbiased=False).item() - 1) < 1e-3


def test_rm_regression_on_single_completions(home, rm_argv, tmp_path):
    """ChatLLaMA's own format: a completion per prompt. Then completions of different prompts are
    compared."""

    def singles(records, name):
        return write_records(
            tmp_path / name, list({record["user_input"]: record for record in records}.values())
        )

    data, held_out = singles(home.records["scored"], "data.json"), singles(
        home.records["scored"][::-1], "eval.json"
    )
    train_rm.main(
        rm_argv(
            data=data,
            eval_data=held_out,
            loss="regression",
            epochs=1,
            eval_every=3,
            out=tmp_path / "out",
        )
    )
    rows = read_rows(tmp_path / "out")
    assert all(0 <= row["accuracy"] <= 1 for row in rows if row["accuracy"] is not None)
    assert sum(row["accuracy"] is not None for row in rows) > len(rows) / 2
    held = [row for row in rows if row["eval_error"] is not None]
    assert len(held) > 1 and all(0 <= row["eval_accuracy"] <= 1 for row in held)


def test_pairs_across_prompts_against_a_loop(monkeypatch):
    """Where no prompt has two labels, all pairs of 64 completions at a time count."""
    labels = torch.tensor([1.0, 3.0, 2.0, 3.0, 0.0])
    scores = torch.tensor([0.5, 0.4, 0.9, 2.0, 0.6])
    monkeypatch.setattr(train_rm, "score_texts", lambda *_: scores)
    accuracy, margin, error, _ = train_rm.evaluate(
        None, None, [[0], [1], [2], [3], [4]], labels, None, 0
    )
    pairs = slow_pairs(scores.tolist(), labels.tolist(), [range(5)])
    assert len(pairs) == 9
    assert accuracy == pytest.approx(sum(pair[0] for pair in pairs) / 9)
    assert margin == pytest.approx(sum(pair[1] for pair in pairs) / 9)
    assert error == pytest.approx(
        math.sqrt(sum((a - b) ** 2 for a, b in zip(scores.tolist(), labels.tolist())) / 5)
    )


def test_rm_warns_of_data_that_cannot_be_learned(rm_argv, tmp_path, capsys):
    """The same text with two scores is named at once; scores that say nothing, after an epoch."""
    records = [
        {"user_input": f"Say {n}.", "completion": text, "score": score}
        for n in range(12)
        for text, score in (("yes.", 1), ("no.", 0), ("yes.", 0), ("no.", 1))
    ]
    records[3]["completion"] = "or."
    train_rm.main(
        rm_argv(
            data=write_records(tmp_path / "data.json", records),
            eval_data=None,
            epochs=1,
            lr=1e-6,
            out=tmp_path / "out",
        )
    )
    said = capsys.readouterr().out
    assert (
        f"warning: {tmp_path / 'data.json'}: 23 texts occur again with another score, as in records 1 and 3"
        in said
    )
    assert "warning: epoch 1: the mean loss is 0." in said and "log 2 = 0.693" in said
    numbers = re.search(r"on the records ([\d, ]+)", said)[1].split(", ")
    assert 2 <= len(numbers) <= 8 and all(1 <= int(number) <= 48 for number in numbers)


def test_rm_has_no_warning_for_good_data(rm_run, rm_argv, tmp_path, capsys):
    train_rm.main(rm_argv(out=tmp_path / "out"))
    said = capsys.readouterr().out
    assert (
        "warning: epoch 2" not in said
        and "warning: epoch 3" not in said
        and "another score" not in said
    )


def test_rm_stops_on_what_is_not_finite(rm_argv, few_scored, tmp_path, monkeypatch, capsys):
    """Exit code 1, the numbers of the records, nothing exported."""
    ranking_loss = train_rm.ranking_loss
    monkeypatch.setattr(train_rm, "length_batches", in_file_order)
    monkeypatch.setattr(
        train_rm, "ranking_loss", lambda s, y: ranking_loss(s, y) * (math.nan if len(s) == 3 else 1)
    )
    argv = rm_argv(
        data=few_scored.path, eval_data=None, batch_size=1, epochs=1, out=tmp_path / "out"
    )
    line = error_line(capsys, lambda: train_rm.main(argv), code=1)
    assert (
        "the loss is nan" in line
        and "at step 2, on records [3, 4, 5]" in line
        and "few_scored.json" in line
    )
    assert os.listdir(tmp_path / "out") == ["metrics.csv"] and len(read_rows(tmp_path / "out")) == 1


# ------------------------------------------------------------------------------------------------
# ppo.py: experience and gradient steps


@pytest.fixture(scope="session")
def ppo_args(ppo_argv):
    """The parsed options of a PPO run, with changes."""
    return lambda **changes: parse(ppo, ppo_argv(**changes))


@pytest.fixture(scope="session")
def four_models(home, sft_run, rm_run):
    """Four models that all differ, and prompts of different lengths."""
    llama, scalar = load_llama(sft_run.folder, home.tokenizer), load_scalar_head(rm_run.folder)
    prompts = [
        encode_prompt(home.tokenizer, record["user_input"])
        for record in home.records["prompts"][:20]
    ]
    assert len(set(map(len, prompts))) > 3
    return SimpleNamespace(
        actor=perturbed(llama, 0.15, 1),
        ref=llama,
        critic=perturbed(scalar, 0.05, 2),
        reward_model=scalar,
        prompts=prompts,
    )


def trained(actor, critic, actor_optimizer, critic_optimizer):
    return {"actor": (actor, actor_optimizer), "critic": (critic, critic_optimizer)}


def make_experience(four, home, args):
    minibatches = [list(range(start, len(four.prompts), 3)) for start in range(3)]
    return ppo.make_experience(
        four.actor,
        four.critic,
        four.reward_model,
        four.ref,
        four.prompts,
        minibatches,
        home.tokenizer,
        args,
        args.kl_coef,
        torch.Generator().manual_seed(3),
    )


def every_second_says_nothing(monkeypatch, eos):
    """In the first step of decoding every second row draws the end, with the log probability that
    it has."""
    sample = model.sample

    def ends(logits, temperature, *rest):
        tokens, logprobs = sample(logits, temperature, *rest)
        monkeypatch.setattr(model, "sample", sample)
        tokens[::2] = eos
        logprobs[::2] = (logits / temperature).log_softmax(-1)[::2, eos]
        return tokens, logprobs

    monkeypatch.setattr(model, "sample", ends)


@pytest.mark.parametrize("empty", [False, True], ids=["", "empty answers"])
@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(temperature=0.7, gamma=0.9, lam=0.8, kl_kind="k3", no_eos_score=-3.0),
        dict(micro_batch_size=1, lam=1.0),
        dict(whiten_rewards=True, kl_coef=0.5, micro_batch_size=12),
    ],
    ids=str,
)
def test_experience_against_one_response_at_a_time(
    home, ppo_args, four_models, changes, empty, monkeypatch
):
    if empty:
        every_second_says_nothing(monkeypatch, home.tokenizer.eos_token_id)
    args = ppo_args(max_new_tokens=5, **changes)
    experience, said = make_experience(four_models, home, args)
    mask, eos = experience["mask"], home.tokenizer.eos_token_id
    slow = SimpleNamespace(
        **{
            name: copy.deepcopy(getattr(four_models, name)).double()
            for name in ("actor", "ref", "critic", "reward_model")
        }
    )
    assert [prompt for prompt, _ in experience["texts"]] == four_models.prompts
    responses = [response for _, response in experience["texts"]]
    lengths = [len(response) for response in responses]
    assert (responses.count([eos]) >= len(responses) // 2) == empty
    assert experience["lengths"] == [len(p) + n for p, n in zip(four_models.prompts, lengths)]
    assert mask.tolist() == [[1.0] * length + [0.0] * (max(lengths) - length) for length in lengths]
    assert all(eos not in response[:-1] for response in responses)

    rewards, values, scores, kls, counted, objectives = [], [], [], [], [], []
    with torch.no_grad():
        for i, (prompt, response) in enumerate(zip(four_models.prompts, responses)):
            logprobs = slow_token_logprobs(slow.actor, prompt, response, args.temperature)[
                0
            ].tolist()
            ref_logprobs = slow_token_logprobs(slow.ref, prompt, response, args.temperature)[
                0
            ].tolist()
            at = slow_values(slow.critic, prompt + response).tolist()
            # one position before the token
            values.append(
                [at[len(prompt) + t - 1] for t in range(len(response))]
            )
            scores.append(slow_values(slow.reward_model, prompt + response)[-1].item())
            assert experience["old_logprobs"][i, : len(response)].tolist() == pytest.approx(
                logprobs, abs=1e-4
            )
            assert experience["old_values"][i, : len(response)].tolist() == pytest.approx(
                values[i], abs=1e-4
            )
            log_ratios = [a - b for a, b in zip(logprobs, ref_logprobs)]
            kl = [math.exp(-d) - 1 + d if args.kl_kind == "k3" else d for d in log_ratios]
            as_it_is = response[-1] == eos or args.no_eos_score is None
            counted.append(scores[i] if as_it_is else args.no_eos_score)
            rewards.append([-args.kl_coef * k for k in kl])
            rewards[i][-1] += counted[i]
            kls.append(sum(log_ratios))
            objectives.append(sum(rewards[i]))
    flattened = [r for row in rewards for r in row]
    if args.whiten_rewards:  # divided by the deviation; the mean stays
        mean = sum(flattened) / len(flattened)
        deviation = math.sqrt(sum((r - mean) ** 2 for r in flattened) / len(flattened))
        rewards = [[(r - mean) / deviation + mean for r in row] for row in rewards]
    advantages, returns = [], []
    for r, v in zip(rewards, values):
        row = [0.0] * len(r)
        for t in range(len(r)):  # the sum over all later TD errors
            for k in range(t, len(r)):
                next_value = v[k + 1] if k + 1 < len(v) else 0.0
                row[t] += (args.gamma * args.lam) ** (k - t) * (
                    r[k] + args.gamma * next_value - v[k]
                )
        advantages.append(row)
        returns.append([a + b for a, b in zip(row, v)])
    flattened = [a for row in advantages for a in row]
    mean = sum(flattened) / len(flattened)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in flattened) / len(flattened))
    for i, length in enumerate(lengths):
        whitened = [(a - mean) / deviation for a in advantages[i]]
        assert experience["returns"][i, :length].tolist() == pytest.approx(returns[i], abs=1e-3)
        assert experience["advantages"][i, :length].tolist() == pytest.approx(whitened, abs=1e-3)
        for name in ("old_values", "returns", "advantages"):
            assert not experience[name][i, length:].any()

    number, all_returns = len(scores), [r for row in returns for r in row]
    mean_return = sum(all_returns) / len(all_returns)
    spread = sum((r - mean_return) ** 2 for r in all_returns) / len(all_returns)
    ended = [response[-1] == eos for response in responses]
    of_ended, of_cut = ([s for s, e in zip(scores, ended) if e == which] for which in (True, False))
    mean_kl = sum(kls) / number
    kl_error = math.sqrt(sum((kl - mean_kl) ** 2 for kl in kls) / (number - 1) / number)
    expected = dict(
        score=sum(counted) / number,
        score_ended=sum(of_ended) / len(of_ended),
        score_cut=sum(of_cut) / len(of_cut),
        kl=mean_kl,
        kl_error=kl_error,
        objective=sum(objectives) / number,
        explained_variance=1 - deviation**2 / spread,  # an advantage is a return minus its value
        kl_coef=args.kl_coef,
        response_length=sum(lengths) / number,
        ended=sum(ended) / number,
    )
    assert said == pytest.approx(expected, abs=1e-3)
    assert 0 < said["ended"] < 1 and abs(said["kl"]) > 0.01  # the test has something to see


def slow_minibatch(actor, critic, experience, rows, demonstrations, args):
    """The statistics of a mini-batch by loops, each response alone, and the gradients of actor and
    critic."""
    terms = defaultdict(list)
    for i in rows:
        prompt, response = experience["texts"][i]
        logprobs, entropies = slow_token_logprobs(actor, prompt, response, args.temperature)
        values = slow_values(critic, prompt + response)[len(prompt) - 1 : -1]
        for t, (logprob, value) in enumerate(zip(logprobs, values)):
            old, advantage, old_value, target = (
                experience[name][i, t].item()
                for name in ("old_logprobs", "advantages", "old_values", "returns")
            )
            ratio = (logprob - old).exp()
            free = ratio * advantage
            # a number: it has no gradient
            held = (
                min(max(ratio.item(), 1 - args.clip), 1 + args.clip) * advantage
            )
            terms["policy_loss"].append(0 * free - held if held < free.item() else -free)
            terms["clip_fraction"].append(float(held < free.item()))
            error = (value - target) ** 2
            near = min(max(value.item(), old_value - args.value_clip), old_value + args.value_clip)
            near_error = (near - target) ** 2
            terms["value_loss"].append(
                (0 * error + near_error if near_error > error.item() else error) / 2
            )
            terms["value_clip_fraction"].append(float(near_error > error.item()))
            terms["entropy"].append(entropies[t])
            # its mean under old is KL(old || new)
            terms["approx_kl"].append(
                ratio.item() - 1 - math.log(ratio.item())
            )
            terms["largest_ratio"].append(ratio.item())
    result = {name: sum(parts) / len(parts) for name, parts in terms.items()}
    result |= {"largest_ratio": max(terms["largest_ratio"]), "ptx_loss": torch.tensor(0.0)}
    if demonstrations:
        result["ptx_loss"] = torch.cat(
            [-slow_token_logprobs(actor, p, c)[0] for p, c, _ in demonstrations]
        ).mean()
    actor.zero_grad(), critic.zero_grad()
    (
        result["policy_loss"]
        - args.entropy_coef * result["entropy"]
        + args.ptx_coef * result["ptx_loss"]
    ).backward()
    result["value_loss"].backward()
    said = {
        name: value.item() if torch.is_tensor(value) else value for name, value in result.items()
    }
    return said, gradient(actor.parameters()), gradient(critic.parameters())


@pytest.mark.parametrize("ptx_coef, empty", [(0.0, False), (0.5, False), (0.5, True)])
def test_minibatch_step_is_the_slow_gradient_however_it_is_cut(
    home, ppo_args, four_models, ptx_coef, empty, monkeypatch
):
    if empty:
        every_second_says_nothing(monkeypatch, home.tokenizer.eos_token_id)
    args = ppo_args(
        ptx_coef=ptx_coef,
        entropy_coef=0.3,
        temperature=0.8,
        max_grad_norm=1e9,
        clip=0.05,
        value_clip=0.02,
    )
    experience, _ = make_experience(four_models, home, args)
    rows = [10, 2, 7, 5, 0, 11, 3]
    demonstrations = examples_of(home.demos, home.tokenizer)[:5] if ptx_coef else []
    # the models have moved on since: ratios and values lie on both sides of the clips
    actor, critic = perturbed(four_models.actor, 0.05, 4), perturbed(four_models.critic, 0.05, 5)
    expected, *slow = slow_minibatch(
        copy.deepcopy(actor).double(),
        copy.deepcopy(critic).double(),
        experience,
        rows,
        demonstrations,
        args,
    )
    assert 0 < expected["clip_fraction"] < 1 and 0 < expected["value_clip_fraction"] < 1
    stepped = []
    for args.micro_batch_size in (1, 3, 7):
        ours = copy.deepcopy(actor), copy.deepcopy(critic)
        optimizers = [PlainDescent(module.parameters(), lr=1.0) for module in ours]
        said = ppo.train_minibatch(
            trained(*ours, *optimizers), experience, rows, demonstrations, home.tokenizer, args
        )
        for optimizer, reference in zip(optimizers, slow):
            assert distance(optimizer.change(), reference) < 1e-4
        assert said == pytest.approx(expected, rel=1e-4, abs=1e-5)
        # the next step starts from nothing
        assert all(
            p.grad is None for module in ours for p in module.parameters()
        )
        stepped.append(flat(after for optimizer in optimizers for after in optimizer.after))
    for other in stepped[1:]:
        torch.testing.assert_close(other, stepped[0], rtol=0, atol=1e-5)


def test_gradients_are_clipped_each_by_its_own_norm(home, ppo_args, four_models):
    args = ppo_args(max_grad_norm=1e-3)
    experience, _ = make_experience(four_models, home, args)
    modules = [copy.deepcopy(module) for module in (four_models.actor, four_models.critic)]
    optimizers = [PlainDescent(module.parameters(), lr=1.0) for module in modules]
    ppo.train_minibatch(
        trained(*modules, *optimizers), experience, [0, 1, 2], [], home.tokenizer, args
    )
    for optimizer in optimizers:
        assert optimizer.change().norm().item() == pytest.approx(1e-3, rel=0.01)


def test_ptx_inputs_labels_and_mask_come_from_the_same_records(
    home, ppo_args, four_models, monkeypatch
):
    args = ppo_args(micro_batch_size=2)
    experience, _ = make_experience(four_models, home, args)
    demonstrations = examples_of(home.demos, home.tokenizer)[:5]
    actor, critic, inputs, seen = (
        copy.deepcopy(four_models.actor),
        copy.deepcopy(four_models.critic),
        [],
        [],
    )
    actor.model.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    ptx_loss = ppo.ptx_loss

    def spy(logits, labels):
        assert logits.shape[:2] == labels.shape
        # positions before the first target may be left out
        skipped = (
            inputs[-1].shape[1] - labels.shape[1]
        )
        for row, label in zip(inputs[-1].tolist(), labels.tolist()):
            label = [-100] * skipped + label
            assert all(target in (-100, token) for target, token in zip(label, row))
            targets = [t for t, target in enumerate(label) if target != -100]
            assert targets == list(range(targets[0], targets[-1] + 1))
            seen.append(
                (row[: targets[0]], row[targets[0] : targets[-1] + 1], row[targets[-1] + 1 :])
            )
        return ptx_loss(logits, labels)

    monkeypatch.setattr(ppo, "ptx_loss", spy)
    optimizers = [PlainDescent(module.parameters(), 1e-3) for module in (actor, critic)]
    ppo.train_minibatch(
        trained(actor, critic, *optimizers),
        experience,
        [0, 1],
        demonstrations,
        home.tokenizer,
        args,
    )
    assert sorted((p, c) for p, c, _ in seen) == sorted((p, c) for p, c, _ in demonstrations)
    assert all(token == home.tokenizer.pad_token_id for _, _, rest in seen for token in rest)


@pytest.mark.parametrize("size, n", [(10, 3), (5, 5), (7, 20), (1, 4)])
def test_each_index_is_dealt_once_a_round(size, n):
    cards, again, other = (
        deal(size, 3 * size * n, 0),
        deal(size, 3 * size * n, 0),
        deal(size, 3 * size * n, 1),
    )
    assert len(cards) == 3 * size * n and cards == again
    assert deal(size, n, 0) == cards[:n]  # what comes first does not depend on how many there are
    rounds = [cards[start : start + size] for start in range(0, len(cards) - size + 1, size)]
    assert len(rounds) >= 3 and all(sorted(cards) == list(range(size)) for cards in rounds)
    if size > 1:
        assert len(set(map(tuple, rounds))) > 1 and cards != other


# ------------------------------------------------------------------------------------------------
# ppo.py: the run

PPO_COLUMNS = [
    "update",
    "score",
    "kl",
    "kl_coef",
    "objective",
    "entropy",
    "policy_loss",
    "value_loss",
    "ptx_loss",
    "clip_fraction",
    "value_clip_fraction",
    "approx_kl",
    "explained_variance",
    "largest_ratio",
    "response_length",
    "ended",
    "lr",
    "tokens_per_s",
]


def test_ppo_metrics(ppo_run):
    [started], rows = ppo_run.started, ppo_run.rows
    assert {name for name, value in started.items() if value is not None} == {
        "update",
        "eval_score",
        "eval_gold",
    }
    assert set(PPO_COLUMNS) <= set(rows[0]) and [row["update"] for row in rows] == [1, 2, 3]
    assert all(
        row[name] is not None and math.isfinite(row[name]) for row in rows for name in PPO_COLUMNS
    )
    assert [row["eval_score"] is not None and row["eval_gold"] is not None for row in rows] == [
        False,
        True,
        True,
    ]
    for row in rows:
        assert (
            row["largest_ratio"] > 0.99
            and 0 <= row["ended"] <= 1
            and 1 <= row["response_length"] <= 8
        )
        assert (
            0 < row["entropy"] < math.log(2000)
            and row["tokens_per_s"] > 0
            and row["approx_kl"] >= 0
        )
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 1e-3 * 2 / 3, 1e-3 / 3], rel=1e-4)


def test_before_any_step_the_actor_is_the_reference(ppo_run):
    assert abs(ppo_run.rows[0]["kl"]) < 1e-3 < max(abs(row["kl"]) for row in ppo_run.rows[1:])


def test_only_actor_and_critic_learn(ppo_run):
    for name, module, before in ppo_run.models:
        moved = any(
            not torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items()
        )
        assert moved == (name in ("actor", "critic")), name
        if not moved:
            assert all(p.grad is None and not p.requires_grad for p in module.parameters()), name
    parameters = [
        id(parameter) for _, module, _ in ppo_run.models for parameter in module.parameters()
    ]
    assert len(parameters) == len(set(parameters))  # no two of the four share any


def test_ppo_exports_in_plain_transformers(ppo_run, home):
    actor, critic = (
        ppo_run.exported[folder]
        for folder in (ppo_run.folder, os.path.join(ppo_run.folder, "critic"))
    )
    assert_same_llama(ppo_run.folder, actor, home.tokenizer)
    examples = examples_of(home.demos, home.tokenizer)[:4]
    with torch.no_grad():
        ours = [slow_values(critic, p + c)[-1].item() for p, c, _ in examples]
    assert plain_scores(os.path.join(ppo_run.folder, "critic"), examples) == pytest.approx(
        ours, abs=1e-4
    )
    # what was exported is what the last update left
    for trained, (_, module, _) in zip((actor, critic), ppo_run.models):
        assert torch.equal(flat(trained.parameters()), flat(module.parameters()))
    tokenizer = AutoTokenizer.from_pretrained(os.path.join(ppo_run.folder, "critic"))
    assert tokenizer.get_vocab() == home.tokenizer.get_vocab()


def test_ppo_evaluation(ppo_run, rm_run, home):
    """The last row's held-out means are those of greedy answers of the exported actor, a token at a
    time."""
    actor, scores, gold = AutoModelForCausalLM.from_pretrained(ppo_run.folder).eval(), [], []
    for record in home.records["prompts_eval"][:4]:
        prompt, response = encode_prompt(home.tokenizer, record["user_input"]), []
        while len(response) < 8 and response[-1:] != [home.tokenizer.eos_token_id]:
            with torch.no_grad():
                response.append(
                    actor(torch.tensor([prompt + response])).logits[0, -1].argmax().item()
                )
        ended = response[-1] == home.tokenizer.eos_token_id
        scores += plain_scores(rm_run.folder, [(prompt, response, None)]) if ended else [-1.0]
        text = home.tokenizer.decode(response, skip_special_tokens=True).strip()
        gold.append(data_gen.score(record["user_input"], text))
    assert ppo_run.rows[-1]["eval_score"] == pytest.approx(sum(scores) / 4, abs=1e-3)
    assert ppo_run.rows[-1]["eval_gold"] == pytest.approx(sum(gold) / 4, abs=1e-3)


PRECISIONS = {
    "float32": {},
    "bf16": dict(dtype="bfloat16"),
    "LoRA": dict(lora_rank=4),
    "LoRA, bf16": dict(lora_rank=4, dtype="bfloat16"),
    "LoRA, bf16 base": dict(lora_rank=4, base_dtype="bfloat16"),
    "LoRA, bf16 and bf16 base": dict(lora_rank=4, dtype="bfloat16", base_dtype="bfloat16"),
}


@pytest.mark.parametrize("changes", PRECISIONS.values(), ids=PRECISIONS)
def test_before_any_step_every_ratio_is_1_and_the_kl_is_0(ppo_argv, tmp_path, monkeypatch, changes):
    """With a step of next to nothing: in every minibatch of the first pass, cut into micro-batches
    of different lengths. (approx_kl is the mean of ratio - 1 - log ratio, which is above 0 wherever
    a ratio is not 1.)"""
    passes, train_minibatch = [], ppo.train_minibatch
    monkeypatch.setattr(
        ppo, "train_minibatch", lambda *given: passes.append(train_minibatch(*given)) or passes[-1]
    )
    usual = dict(
        updates=1,
        batch_size=12,
        minibatch_size=5,
        micro_batch_size=2,
        ppo_epochs=1,
        lr=1e-30,
        critic_lr=1e-30,
        ptx_coef=0,
        demonstrations=None,
        eval_prompts=None,
        gold=None,
        max_new_tokens=30,
        out=tmp_path,
    )
    run = run_stage(ppo, ppo_argv(**usual, **changes))
    assert len(passes) == 3 and run.rows[0]["response_length"] > 3
    for said in passes:
        assert said["largest_ratio"] == pytest.approx(1, abs=1e-3) and said["approx_kl"] < 1e-7
    assert abs(run.rows[0]["kl"]) < (1e-4 if not changes or changes == dict(lora_rank=4) else 1e-6)


def test_a_cut_response_gets_a_fixed_score(home, ppo_args, four_models):
    """Whatever the reward model says of it, which is logged; one that ended gets what the reward
    model says."""
    args = ppo_args(max_new_tokens=5, no_eos_score=-7.0, kl_coef=0.0)
    experience, said = make_experience(four_models, home, args)
    eos = home.tokenizer.eos_token_id
    ended = [response[-1] == eos for _, response in experience["texts"]]
    with torch.no_grad():
        scores = [
            slow_values(four_models.reward_model, p + r)[-1].item() for p, r in experience["texts"]
        ]
    expected = [score if e else -7.0 for score, e in zip(scores, ended)]
    assert said["score"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
    assert said["ended"] == pytest.approx(sum(ended) / len(ended))
    last = [len(response) - 1 for _, response in experience["texts"]]
    # gamma 1, no KL: with lambda 1 the return of every token is the score
    experience, _ = make_experience(
        four_models, home, ppo_args(max_new_tokens=5, no_eos_score=-7.0, kl_coef=0.0, lam=1.0)
    )
    for i, (score, t) in enumerate(zip(expected, last)):
        assert experience["returns"][i, : t + 1].tolist() == pytest.approx(
            [score] * (t + 1), abs=1e-3
        )
    assert 0 < sum(ended) < len(ended)


def test_same_seed_same_metrics(ppo_run, ppo_argv, tmp_path):
    again = run_stage(ppo, ppo_argv(out=tmp_path / "again"))
    other = run_stage(ppo, ppo_argv(updates=1, seed=1, out=tmp_path / "other"))
    assert without_speed(again.rows) == without_speed(ppo_run.rows)
    assert other.rows[0]["score"] != ppo_run.rows[0]["score"]


def test_kl_target_adapts_the_coefficient(ppo_argv, tmp_path):
    """kl_coef <- kl_coef (1 + clamp(KL / target - 1, -0.2, 0.2) n / horizon) after each update
    (Ziegler et al. 2.2)."""
    changes = dict(
        updates=4, kl_target=0.2, kl_horizon=32, lr=5e-3, ptx_coef=0, eval_prompts=None, gold=None
    )
    run = run_stage(ppo, ppo_argv(**changes, out=tmp_path / "adaptive"))
    coef, errors = 0.1, []
    for row in run.rows:
        assert row["kl_coef"] == pytest.approx(coef, rel=1e-4)
        errors.append(min(max(row["kl"] / 0.2 - 1, -0.2), 0.2))
        coef *= 1 + errors[-1] * 8 / 32
    assert errors[0] == -0.2 and max(errors) > 0  # it has fallen, and it has risen
    assert all(row["ptx_loss"] == 0 for row in run.rows)


def test_target_kl_ends_an_update_early(ppo_argv, tmp_path, monkeypatch):
    """No step is taken after the first whose old and new policy are further apart; the next update
    goes on as usual."""
    updates, make_experience, train_minibatch = [], ppo.make_experience, ppo.train_minibatch

    def train(*given):
        result = train_minibatch(*given)
        updates[-1].append(result["approx_kl"])
        return result

    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: updates.append([]) or make_experience(*given)
    )
    monkeypatch.setattr(ppo, "train_minibatch", train)
    changes = dict(updates=2, ppo_epochs=3, lr=1e-2, eval_prompts=None, gold=None)
    ppo.main(ppo_argv(**changes, out=tmp_path / "free"))
    assert [len(steps) for steps in updates] == [6, 6]
    target = sorted(updates[0])[2]  # somewhere on the way
    updates.clear()
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *given: steps.append(1) or step(*given))
    ppo.main(ppo_argv(**changes, target_kl=target, out=tmp_path / "held"))
    assert 1 < len(updates[0]) < 6 and len(updates) == 2
    # the step that was found too far is not taken, neither by the actor nor by the critic
    assert len(steps) == 2 * sum(kl <= target for update in updates for kl in update)
    for steps in updates:
        assert all(kl <= target for kl in steps[:-1]) and (steps[-1] > target or len(steps) == 6)


def nan(x):
    return x * math.nan


@pytest.mark.parametrize(
    "name, function, spoil",
    [
        ("the reward model's score", "score_responses", nan),
        ("policy loss", "policy_loss", nan),
        ("value loss", "value_loss", nan),
        ("ptx loss", "ptx_loss", nan),
        ("the gradient of the actor", "policy_loss", steep),
        ("the gradient of the critic", "value_loss", steep),
    ],
)
def test_ppo_stops_on_what_is_not_finite(
    ppo_argv, tmp_path, monkeypatch, capsys, name, function, spoil
):
    """In the second update: exit code 1 with the name of what it was, and the models stay as the
    first left them."""
    experiences, make_experience, works = [], ppo.make_experience, getattr(ppo, function)

    def spoiled(*given):
        result = works(*given)
        if len(experiences) < 2:
            return result
        return (spoil(result[0]), *result[1:]) if isinstance(result, tuple) else spoil(result)

    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: experiences.append(1) or make_experience(*given)
    )
    monkeypatch.setattr(ppo, function, spoiled)
    saved, out = {}, tmp_path / "out"

    def save(trained, tokenizer, folder):
        model.save_checkpoint(trained, tokenizer, folder)
        saved.update({path: path.read_bytes() for path in Path(folder).glob("*.safetensors")})

    monkeypatch.setattr(ppo, "save_checkpoint", save)
    argv = ppo_argv(eval_every=1, eval_prompts=None, gold=None, out=out)
    line = error_line(capsys, lambda: ppo.main(argv), code=1)
    assert line.startswith(f"error: {name} is nan") or line.startswith(f"error: {name} is inf")
    assert str(out) in line and len(read_rows(out)) == 1 and len(experiences) == 2
    assert set(saved) == {out / "model.safetensors", out / "critic" / "model.safetensors"}
    assert all(path.read_bytes() == data for path, data in saved.items())
    for loaded in (
        AutoModelForCausalLM.from_pretrained(out),
        load_scalar_head(str(out / "critic")),
    ):
        assert flat(loaded.parameters()).isfinite().all()


# ------------------------------------------------------------------------------------------------
# Waiting for a GPU


def test_sft_waits_once_a_step(sft_argv, tmp_path):
    argv = sft_argv(batch_size=8, micro_batch_size=2, out=tmp_path / "out")
    assert set(waits_of_steps(sft, argv)) == {1}


@pytest.mark.parametrize("loss", ["regression", "ranking"])
def test_rm_waits_once_a_step(rm_argv, tmp_path, loss):
    """The labels are on the CPU, and what is asked of them waits for nobody: once in each of three
    micro-batches, once for the pairs of each of eight prompts, and for a ranking twice."""
    argv = rm_argv(eval_data=None, epochs=1, loss=loss, out=tmp_path / "out")
    waited = waits_of_steps(train_rm, argv)
    assert 1 <= max(waited) <= 1 + 3 + 8 * (2 if loss == "ranking" else 1)


def test_ppo_waits_once_a_token_and_once_a_minibatch(ppo_argv, tmp_path):
    """Per update: once per token of the longest response (on a GPU per 16); for the prompts'
    lengths, the longest response, the responses, their lengths, and the statistics; once per
    mini-batch, and for its rows, on the CPU; once per micro-batch of demonstrations."""
    argv = ppo_argv(eval_prompts=None, gold=None, out=tmp_path / "out")
    waited = waits_of_steps(ppo, argv)
    assert len(waited) == 2 and max(waited) <= 8 + 5 + 4 * 2 + 4 * 2


# ------------------------------------------------------------------------------------------------
# A reward of your own, and any reward model

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
    normalize, seen = rewards.RunningDeviation(), []
    for seed, number in enumerate((1, 5, 8)):
        scores = torch.randn(number, generator=torch.Generator().manual_seed(seed)) * 3 + 10
        seen += scores.tolist()
        mean = sum(seen) / len(seen)
        deviation = math.sqrt(sum((x - mean) ** 2 for x in seen) / len(seen))
        expected = scores / deviation if deviation else scores
        assert normalize(scores).tolist() == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize(
    "code, words, exit_code",
    [
        (
            "def score(user_input, completion):\n    a = 1\n    return a / 0\n",
            ["line 3: ZeroDivisionError", "--resume"],
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


def test_a_failing_reward_leaves_the_last_state(ppo_argv, tmp_path, capsys):
    """It may fail late: what was saved before is whole, and once it is mended, the run goes on as
    if nothing had happened. --normalize_reward has a state, too."""
    code = (
        SPOKEN
        + "calls = []\nspoken = score\ndef score(*given):\n    calls.append(1)\n    assert len(calls) < 22\n    return spoken(*given)\n"
    )
    (tmp_path / "own.py").write_text(code)
    argv = ppo_argv(
        rm=None,
        reward=tmp_path / "own.py",
        normalize_reward=True,
        save_every=1,
        eval_prompts=None,
        gold=None,
        out=tmp_path / "out",
    )
    assert "AssertionError" in error_line(capsys, lambda: ppo.main(argv), code=1)
    assert len(read_rows(tmp_path / "out")) == 2
    (tmp_path / "own.py").write_text(SPOKEN)
    with pytest.raises(SystemExit):
        ppo.main([*argv, "--resume"])
    assert f"--reward {tmp_path / 'own.py'}: no longer what it was" in capsys.readouterr().err
    ppo.main([*argv, "--resume", "--accept_changed_data"])
    ppo.main([*argv, "--out", str(tmp_path / "once")])
    assert without_speed(read_rows(tmp_path / "out")) == without_speed(read_rows(tmp_path / "once"))
    assert len(read_rows(tmp_path / "out")) == 3


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


# ------------------------------------------------------------------------------------------------
# bench/forks: other algorithms, as small changes of ppo.py

FORKS = sorted(path.stem for path in (ROOT / "bench" / "forks").glob("*.diff"))


@pytest.fixture
def fork(request, tmp_path):
    """(name, ppo.py with a fork's diff applied, as a module)."""
    shutil.copy(ROOT / "ppo.py", tmp_path / "ppo.py")
    diff = ROOT / "bench" / "forks" / f"{request.param}.diff"
    subprocess.run(
        ["git", "apply", diff],
        cwd=tmp_path,
        check=True,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )
    spec = importlib.util.spec_from_file_location(f"ppo_{request.param}", tmp_path / "ppo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return request.param, module


def slow_advantages(name, rewards, masks, group):
    """The advantage of each response, by loops; `rewards`, `masks`: lists, a row per response."""
    returns = [math.fsum(r for r, m in zip(row, mask) if m) for row, mask in zip(rewards, masks)]
    if name == "reinforce":
        return [r - math.fsum(returns) / len(returns) for r in returns]
    advantages = []
    for i, r in enumerate(returns):
        first = i // group * group
        everyone = returns[first : first + group]
        if name == "rloo":
            others = [x for j, x in enumerate(everyone) if first + j != i]
            advantages.append(r - math.fsum(others) / len(others))
        else:
            mean = math.fsum(everyone) / group
            deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in everyone) / (group - 1))
            advantages.append((r - mean) / max(deviation, 1e-4))
    return advantages


@pytest.mark.parametrize("fork", FORKS, indirect=True)
def test_each_fork_is_small_and_does_what_its_paper_says(
    fork, ppo_argv, rm_run, tmp_path, monkeypatch
):
    """Three updates; the advantages of each against a plain loop; a fork with groups answers each
    prompt so many times."""
    name, module = fork
    seen, make_experience = [], module.make_experience

    def keep(*given):
        experience, row = make_experience(*given)
        seen[-1]["experience"] = experience
        return experience, row

    def spy(function):
        works = getattr(module, function)

        def call(*given):
            result = works(*given)
            if function == "token_rewards":
                seen.append({})
            seen[-1][function] = (given, result)
            return result

        return call

    monkeypatch.setattr(module, "make_experience", keep)
    for function in ("token_rewards", "gae"):
        monkeypatch.setattr(module, function, spy(function))
    no_critic = name != "dense"
    argv = ppo_argv(
        updates=3, ppo_epochs=1, critic_lr=None if no_critic else 1e-3, out=tmp_path / "out"
    )
    module.main(argv)
    rows = read_rows(tmp_path / "out")
    assert len(rows) == 4 and all(
        row["score"] is not None and row["kl"] is not None for row in rows[1:]
    )
    assert (tmp_path / "out" / "critic").exists() != no_critic
    for update in seen:
        experience = update["experience"]
        mask = experience["mask"]
        (scores, kl, _, kl_coef), rewards = update["token_rewards"]
        if name == "dense":
            reward_model = load_scalar_head(rm_run.folder)
            dense = update["gae"][0][0]
            for i, (prompt, response) in enumerate(experience["texts"]):
                with torch.no_grad():
                    values = slow_values(reward_model, prompt + response)
                potentials = [0.0, *values[len(prompt) : -1].tolist(), 0.0]
                for t in range(len(response)):
                    expected = rewards[i, t].item() + potentials[t + 1] - potentials[t]
                    assert dense[i, t].item() == pytest.approx(expected, abs=1e-3)
            continue
        assert kl_coef == (0.0 if name == "grpo" else 0.1) and "gae" not in update
        expected = slow_advantages(name, rewards.tolist(), mask.tolist(), 4)
        for i, advantage in enumerate(expected):
            length = int(mask[i].sum())
            assert experience["advantages"][i, :length].tolist() == pytest.approx(
                [advantage] * length, abs=1e-4
            )
            assert not experience["advantages"][i, length:].any()
        prompts = [prompt for prompt, _ in experience["texts"]]
        if name in ("rloo", "grpo"):
            assert (
                all(prompts[i] == prompts[i // 4 * 4] for i in range(8))
                and prompts[0] != prompts[4]
            )


@pytest.mark.parametrize("name", FORKS)
def test_a_fork_changes_at_most_60_lines(name):
    text = (ROOT / "bench" / "forks" / f"{name}.diff").read_text("utf-8")
    head, body = text.split("--- a/ppo.py\n")
    changed = [
        line for line in body.splitlines() if line[:1] in "+-" and not line.startswith("+++")
    ]
    assert len(changed) <= 60 and len(head.splitlines()) <= 12 and "What changes:" in head
    # more goes than comes
    assert name == "dense" or 2 * sum(line[0] == "-" for line in changed) > len(
        changed
    )


# ------------------------------------------------------------------------------------------------
# Bad options: one line on standard error, exit code 2, no traceback, no run directory with anything
# in it

STAGES = dict(sft=sft, train_rm=train_rm, ppo=ppo)


@pytest.fixture
def argv_of(sft_argv, rm_argv, ppo_argv, tmp_path):
    """(stage, changes) -> the options of it, with --out out/ in this test's folder."""
    stages = dict(sft=sft_argv, train_rm=rm_argv, ppo=ppo_argv)
    return lambda stage, **changes: stages[stage](**dict(out=tmp_path / "out") | changes)


@pytest.mark.parametrize(
    "stage, option",
    [
        *itertools.product(["sft"], ["model", "data", "eval_data"]),
        *itertools.product(["train_rm"], ["model", "data", "eval_data", "demonstrations"]),
        *itertools.product(
            ["ppo"], ["sft", "rm", "prompts", "eval_prompts", "demonstrations", "gold"]
        ),
    ],
)
def test_a_named_path_that_is_missing(argv_of, tmp_path, monkeypatch, capsys, stage, option):
    """It is named in the line, and never made up by running another stage."""
    monkeypatch.chdir(tmp_path)
    argv = argv_of(stage, **{option: tmp_path / "nowhere.json"})
    line = error_line(capsys, lambda: STAGES[stage].main(argv))
    assert str(tmp_path / "nowhere.json") in line
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


RECORDS = {
    "sft": {"user_input": "Hi", "completion": "ok."},
    "ppo": {"user_input": "Hi"},
    "train_rm": {"user_input": "Hi", "completion": "ok.", "score": 1},
}


@pytest.mark.parametrize(
    "stage, change, said",
    [
        ("sft", {"completion": None}, "field 'completion' must be a string"),
        ("sft", {"user_input": 3}, "field 'user_input' must be a string or a list of chat messages"),
        ("train_rm", {"score": "5"}, "field 'score' must be a finite number"),
        ("train_rm", {"score": math.nan}, "field 'score' must be a finite number"),
        ("train_rm", {"completion": 1.5}, "field 'completion' must be a string"),
        ("ppo", {"user_input": []}, "field 'user_input' must be a string or a list of chat messages"),
        ("sft", "completion", "field 'completion' is missing"),
        ("train_rm", "score", "field 'score' is missing"),
        ("ppo", "user_input", "field 'user_input' is missing"),
    ],
    ids=str,
)
def test_a_bad_record_is_named(argv_of, tmp_path, capsys, stage, change, said):
    good = RECORDS[stage]
    bad = (
        {key: value for key, value in good.items() if key != change}
        if isinstance(change, str)
        else good | change
    )
    data = write_records(tmp_path / "bad.json", [good, bad, good])
    argv = argv_of(stage, **{"prompts" if stage == "ppo" else "data": data})
    assert (
        error_line(capsys, lambda: STAGES[stage].main(argv)) == f"error: {data}: record 2: {said}"
    )
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize("option", ["data", "eval_data"])
@pytest.mark.parametrize(
    "second, words",
    [
        ({"completion": "no."}, "every score is 1"),
        ({"user_input": "Bye", "score": 2}, "nothing to rank; --loss regression"),
    ],
    ids=["equal scores", "single completions"],
)
def test_nothing_to_rank(argv_of, tmp_path, capsys, option, second, words):
    data = write_records(
        tmp_path / "pairless.json", [RECORDS["train_rm"], RECORDS["train_rm"] | second]
    )
    line = error_line(capsys, lambda: train_rm.main(argv_of("train_rm", **{option: data})))
    assert line.startswith(f"error: {data}: ") and words in line


def test_what_a_chat_template_refuses_is_named(argv_of, home, sft_run, rm_run, tmp_path, capsys):
    """File and record, in each stage."""
    dialogue = [{"role": role, "content": "Hi"} for role in ("user", "assistant", "user")]
    template = "{% if messages[1:] and messages[1].role == 'assistant' and messages[2:] %}{{ raise_exception('too long') }}{% endif %}"
    for folder in (sft_run.folder, rm_run.folder):
        copy_of = tmp_path / os.path.basename(folder)
        shutil.copytree(folder, copy_of, ignore=shutil.ignore_patterns("last"))
        (copy_of / "chat_template.jinja").write_text(
            template + home.tokenizer.chat_template, "utf-8"
        )
    for stage in STAGES:
        data = write_records(
            tmp_path / "data.json", [RECORDS[stage], RECORDS[stage] | {"user_input": dialogue}]
        )
        models = dict(
            sft=tmp_path / os.path.basename(sft_run.folder),
            rm=tmp_path / os.path.basename(rm_run.folder),
        )
        if stage != "ppo":
            models = dict(model=models["sft"])
        argv = argv_of(stage, **models, **{"prompts" if stage == "ppo" else "data": data})
        line = error_line(capsys, lambda: STAGES[stage].main(argv))
        assert line.startswith(f"error: {data}: record 2 (") and "too long" in line


def test_sft_gives_the_embedding_the_rows_that_it_lacks(argv_of, sft_run, tmp_path, capsys):
    larger = AutoTokenizer.from_pretrained(sft_run.folder)
    larger.add_special_tokens({"pad_token": "[PAD]"})
    larger.save_pretrained(tmp_path / "tokenizer")
    argv = argv_of("sft", model=sft_run.folder, tokenizer=tmp_path / "tokenizer", epochs=1)
    assert "[PAD]" in error_line(capsys, lambda: sft.main(argv))
    sft.main([*argv, "--resize_embedding"])
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert len(trained.lm_head.weight) == len(larger) == trained.config.vocab_size


@pytest.mark.parametrize("tokens", [128, 500])
def test_max_new_tokens_larger_than_the_context(argv_of, capsys, tokens):
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", max_new_tokens=tokens)))
    assert f"--max_new_tokens {tokens} leaves no room for a prompt" in line and "128" in line


def test_prompts_are_cut_to_what_the_context_leaves(argv_of, capsys, monkeypatch):
    """The beginning goes, the end with "Assistant:" stays; prompt and response together fit the
    context."""
    seen, make_experience = [], ppo.make_experience
    monkeypatch.setattr(
        ppo, "make_experience", lambda *given: seen.extend(given[4]) or make_experience(*given)
    )
    ppo.main(
        argv_of("ppo", max_new_tokens=122, updates=1, ptx_coef=0, eval_prompts=None, gold=None)
    )
    assert {len(prompt) for prompt in seen} == {6}
    assert "cut on the left to 6 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        "def judge(user_input, completion):\n    return 1.0\n",
        "def score(:\n",
        "import not_a_module\n",
        "raise RuntimeError('no')\n",
        "score = 5\n",
    ],
    ids=["a folder", "empty", "no score", "no Python", "import fails", "raises", "no function"],
)
def test_gold_that_cannot_be_used(argv_of, tmp_path, capsys, text):
    gold = tmp_path / "judge.py"
    gold.mkdir() if text is None else gold.write_text(text)
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", gold=gold)))
    assert line.startswith(f"error: --gold {gold}: not a Python file with a function score")


def test_gold_that_cannot_judge_a_prompt(argv_of, home, tmp_path, capsys):
    prompts = write_records(
        tmp_path / "foreign.json", [home.records["prompts"][0], {"user_input": "What is love?"}]
    )
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", eval_prompts=prompts)))
    assert (
        line.startswith(f"error: {prompts}: record 2: ") and "data_gen.py cannot judge it" in line
    )


def test_ptx_without_demonstrations(argv_of, capsys):
    line = error_line(capsys, lambda: ppo.main(argv_of("ppo", demonstrations=None)))
    assert line == "error: --ptx_coef needs --demonstrations"


def test_an_earlier_run_is_left_alone(argv_of, sft_run, rm_run, ppo_run, capsys):
    for stage, run in (("sft", sft_run), ("train_rm", rm_run), ("ppo", ppo_run)):

        def files():
            return {
                path: path.read_bytes() for path in Path(run.folder).rglob("*") if path.is_file()
            }

        before = files()
        line = error_line(capsys, lambda: STAGES[stage].main(argv_of(stage, out=run.folder)))
        assert (
            line.startswith(f"error: {run.folder}: holds an earlier run") and "--overwrite" in line
        )
        assert files() == before


def test_overwrite(argv_of, ragged, tmp_path):
    for lr in (1e-3, 1e-2):
        sft.main(argv_of("sft", data=ragged.path, lr=lr, overwrite=True))
        [row] = read_rows(tmp_path / "out")
        assert row["lr"] == lr


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("below", ["", "run"], ids=["a file", "below a file"])
def test_an_out_that_cannot_be_made(argv_of, tmp_path, capsys, stage, below):
    (tmp_path / "file").write_text("not a folder")
    line = error_line(
        capsys, lambda: STAGES[stage].main(argv_of(stage, out=tmp_path / "file" / below))
    )
    assert line.startswith(f"error: {tmp_path / 'file' / below}: cannot be written")
    assert (tmp_path / "file").read_text() == "not a folder"


# ------------------------------------------------------------------------------------------------
# ppo.py without options: the demo runs every stage that is missing


@pytest.fixture
def tiny_demo(monkeypatch, tmp_path):
    """The demo in an empty directory, on less data, with a smaller model and fewer steps."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model, "DEMO_MODEL", TINY)
    less = functools.partial(
        data_gen.make_data, held_out=40, demonstrations=400, ranked=40, completions=4
    )
    monkeypatch.setattr(data_gen, "make_data", less)
    short = dict(
        updates=1, batch_size=4, minibatch_size=4, ppo_epochs=1, max_new_tokens=8, eval_number=4
    )
    for script, values in ((sft, dict(epochs=1)), (train_rm, dict(epochs=1)), (ppo, short)):
        monkeypatch.setattr(script, "SETTINGS", with_demo(script, **values))


def test_ppo_from_an_empty_directory(tiny_demo, tmp_path, capsys):
    ppo.main([])
    said = capsys.readouterr().out
    steps = [
        "data/ is missing: running data_gen.py",
        "runs/sft is missing: running sft.py",
        "runs/rm is missing: running train_rm.py",
        "saved runs/ppo",
    ]
    places = [said.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)
    for folder in ("runs/sft", "runs/ppo"):
        AutoModelForCausalLM.from_pretrained(tmp_path / folder)
    for folder in ("runs/rm", "runs/ppo/critic"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / folder)
    line = error_line(capsys, lambda: ppo.main([]))
    assert line.startswith("error: runs/ppo: holds an earlier run")


def test_bad_input_leaves_the_earlier_run(ppo_argv, ppo_run, tmp_path, capsys):
    """--overwrite ends the earlier run when the new one begins, not before its input is read."""
    out = tmp_path / "out"
    shutil.copytree(ppo_run.folder, out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error_line(
        capsys, lambda: ppo.main(ppo_argv(out=out, prompts=tmp_path / "none.json", overwrite=True))
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


DATA, SFT, RM = "data/tokenizer/tokenizer.model", "runs/sft/config.json", "runs/rm/config.json"


@pytest.mark.parametrize("there", [[], [DATA], [DATA, SFT], [DATA, RM], [DATA, SFT, RM]], ids=str)
def test_only_missing_stages_run(tmp_path, monkeypatch, there):
    monkeypatch.chdir(tmp_path)
    for path in there:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    ran, results = [], {DATA: data_gen, SFT: sft, RM: train_rm}
    for result, script in results.items():
        monkeypatch.setattr(
            script, "main", lambda argv, result=result: ran.append((result, argv[:2]))
        )
    ppo.run_missing_stages(parse(ppo, ["--seed", "7"]))
    assert ran == [(result, ["--seed", "7"]) for result in results if result not in there]
