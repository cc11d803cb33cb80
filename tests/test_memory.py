"""lib/memory.py: the micro-batch that a device has room for. (tests/test_budget.py compares the
predicted memory with what is measured.)"""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig

import sft
from lib import memory
from model import DEMO_MODEL, ScalarHead, random_llama

SIZES = dict(
    dtype="float32",
    base_dtype="float32",
    lora_rank=0,
    gradient_checkpointing=False,
    batch_size=48,
    minibatch_size=24,
    max_length=96,
    max_prompt_length=64,
    max_new_tokens=32,
    ptx_coef=0.0,
)


@pytest.fixture(scope="module")
def trained():
    llama = random_llama(LlamaConfig(vocab_size=300, **DEMO_MODEL))
    return {"actor": (llama, None), "critic": (ScalarHead(llama.model), None)}


def settings(**changed):
    return SimpleNamespace(**SIZES | dict(device="cuda:0", micro_batch_size=0) | changed)


@pytest.fixture
def gpu(monkeypatch):
    """Stands in for a GPU with so many bytes free."""

    def with_free(number):
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (number, 2 * number))

    return with_free


@pytest.mark.parametrize("stage, whole", [("sft", 48), ("rm", 48), ("ppo", 24)])
def test_all_rows_where_there_is_room(gpu, trained, capsys, stage, whole):
    gpu(2**40)
    assert memory.micro_batch(stage, trained, settings(), None) == whole
    assert f"--micro_batch_size {whole}" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
@pytest.mark.parametrize("wanted", [1, 3, 6, 12])
def test_the_largest_part_that_fits(gpu, trained, stage, wanted):
    """With room for `wanted` rows, the margin and what the optimizer will take, it takes these; with
    a little less, half of them."""
    args = settings(processes=1)
    config = trained["actor"][0].config
    learns = [sum(p.nbytes for p in model.parameters()) for model, _ in trained.values()]
    # Adam's two numbers, and the gradients of one model at a time
    later = 2 * sum(learns) + max(learns)
    needed = memory.step_bytes(stage, config, wanted, args, 4) / 0.8 + later
    gpu(needed + 1)
    assert memory.micro_batch(stage, trained, settings(), None, 4) == wanted
    gpu(needed - 1)
    assert memory.micro_batch(stage, trained, settings(), None, 4) == max(1, (wanted + 1) // 2)


def test_more_completions_take_more_room(gpu, trained):
    gpu(300 * 2**20)
    few, many = (memory.micro_batch("rm", trained, settings(), None, n) for n in (2, 16))
    assert few > many


def test_what_is_given_or_saved_stays(gpu, trained):
    gpu(2**40)
    state = {"settings": {"micro_batch_size": 7}}
    assert memory.micro_batch("ppo", trained, settings(micro_batch_size=5), state) == 5
    assert memory.micro_batch("ppo", trained, settings(), state) == 7
    assert memory.micro_batch("ppo", trained, settings(device="cpu"), None) == 4


def test_the_size_is_saved_with_the_run(tmp_path, monkeypatch, capsys):
    """A run that took 3 rows takes 3 again after --resume, on a device that has room for more."""
    from data_gen import train_tokenizer
    from lib.data import save
    from lib.tokenizer import load_tokenizer
    from model import save_checkpoint

    records = [{"user_input": f"Say {n}.", "completion": f"It is {n}."} for n in range(24)]
    save(str(tmp_path / "data.json"), records)
    (tmp_path / "llama").mkdir()
    texts = [record["user_input"] + record["completion"] for record in records]
    (tmp_path / "llama" / "tokenizer.model").write_bytes(train_tokenizer(texts, 280))
    tokenizer = load_tokenizer(str(tmp_path / "llama"))
    config = LlamaConfig(vocab_size=len(tokenizer), **DEMO_MODEL)
    save_checkpoint(random_llama(config), tokenizer, str(tmp_path / "llama"))
    argv = ["--model", f"{tmp_path}/llama", "--data", f"{tmp_path}/data.json", "--batch_size", "6"]
    argv += ["--epochs", "1", "--out", f"{tmp_path}/out", "--device", "cpu"]

    def rows():
        return json.loads((tmp_path / "out/last/state.json").read_text())["settings"]

    monkeypatch.setitem(memory.LAPTOP, "sft", 3)
    sft.main(argv)
    assert rows()["micro_batch_size"] == 3
    monkeypatch.setitem(memory.LAPTOP, "sft", 6)
    sft.main([*argv, "--resume", "--epochs", "2"])
    assert rows()["micro_batch_size"] == 3
