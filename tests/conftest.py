"""What every test needs: the scripts importable from wherever pytest is started, no network, one
thread. And what several files use: tokenizers, tiny checkpoints, and one tiny pipeline (data, SFT
model, reward model, PPO), which runs once and serves all tests."""

import contextlib
import copy
import io
import itertools
import json
import os
import random
import sys
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that names a hub model finds it on disk, or nowhere
os.environ["OMP_NUM_THREADS"] = "1"  # in the processes that tests start, too
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import pytest
import sentencepiece
import torch

import data_gen
import lib.run
import model
import ppo
import sft
import train_rm
from data_commands import checkpoint, llm, serve  # noqa: F401: fixtures
from makers import (
    CHATML, DATA_FILES, LLAMA2_GQA, ROOT, TIKTOKEN_MODEL, TINY, examples_of, options,
    random_weights, run_stage, write, write_gguf, write_hugging_face, write_meta, write_records,
)
from model import ScalarHead, load_llama, load_tokenizer

torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------
# Tokenizers and tiny checkpoints


@pytest.fixture(scope="session")
def sentencepiece_model():
    """The bytes of a small sentencepiece model of LLaMA's kind."""
    words = "the quick brown fox jumps over a lazy dog and then sleeps all day long".split()
    rng = random.Random(0)
    texts = [
        f"User: {' '.join(rng.sample(words, 6))}?\nAssistant: {' '.join(rng.sample(words, 4))}, 12 + 7 = 19. "
        f"你好，{rng.choice('大小明红')}是什么？"
        for _ in range(60)
    ]
    return data_gen.train_tokenizer(texts, 400)


@pytest.fixture(scope="session")
def pieces(sentencepiece_model):
    return sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)


@pytest.fixture(scope="session")
def tokenizer(sentencepiece_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "tokenizer.model", sentencepiece_model)
    return load_tokenizer(str(folder))


@pytest.fixture
def meta(tmp_path, sentencepiece_model):
    folder = tmp_path / "meta"
    write_meta(folder, random_weights(400), LLAMA2_GQA, sentencepiece_model, shards=2)
    return folder


@pytest.fixture
def hf(tmp_path, tokenizer):
    folder = tmp_path / "hf"
    write_hugging_face(folder, random_weights(400), tokenizer)
    return folder


@pytest.fixture
def gguf_file(tmp_path, pieces):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, random_weights(400), pieces)
    return path


@pytest.fixture(scope="session")
def llama3_tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama3")
    write(folder / "tokenizer.model", TIKTOKEN_MODEL)
    return load_tokenizer(str(folder))


@pytest.fixture(scope="session")
def chatml_tokenizer(sentencepiece_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chatml")
    write(folder / "tokenizer.model", sentencepiece_model)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "saved")
    return load_tokenizer(str(folder / "saved"))


@pytest.fixture(scope="session")
def reward_model(tokenizer):
    torch.manual_seed(0)
    return ScalarHead(load_llama(None, tokenizer).model).eval()


# ------------------------------------------------------------------------------------------------
# The tiny pipeline


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Drawing takes longer than training here. test_ppo.py draws."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lib.run, "draw_curves", lambda *_: None)
        yield


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
    """Also keeps the weights of the head at each evaluation, of which only the last comes after the
    normalization, and what was printed."""
    heads, evaluate = [], train_rm.evaluate

    def keep(reward_model, *given):
        heads.append(reward_model.score.weight.detach().clone())
        return evaluate(reward_model, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rm, "evaluate", keep)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            run = run_stage(train_rm, rm_argv())
    run.heads, run.said = heads, said.getvalue()
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
