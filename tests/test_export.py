"""What is saved: it loads again as it was, also in transformers 4.57; and an earlier export stays
whole when the next one fails."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig,
)

from lib.checkpoints import add_older_keys
from lib.dialogue import encode_prompt, encode_text
from lib.tokenizer import CHAT_TEMPLATE
from makers import (
    DIM, FFN, HEADS, LAYERS, LLAMA1, LLAMA2_GQA, LLAMA3, LLAMA31, TIKTOKEN_MODEL, assert_close,
    logits_of, random_tokens, random_weights, refused, write, write_hugging_face, write_meta,
)
from model import (
    DEMO_MODEL, ScalarHead, load_llama, load_tokenizer, random_llama, save_checkpoint,
)


@pytest.mark.parametrize(
    "params",
    [LLAMA1, LLAMA2_GQA, LLAMA3, LLAMA31],
    ids=["llama 1", "llama 2", "llama 3", "llama 3.1"],
)
def test_what_is_saved_is_what_was_loaded(tmp_path, sentencepiece_model, params):
    """Meta's layout -> load_llama -> save_checkpoint -> load_llama, and transformers alone: the
    same logits throughout."""
    is_3 = "rope_theta" in params
    weights = random_weights(params["vocab_size"] if is_3 else 400, params.get("n_kv_heads", HEADS))
    path = write_meta(
        tmp_path / "meta", weights, params, TIKTOKEN_MODEL if is_3 else sentencepiece_model
    )
    tokenizer = load_tokenizer(path)
    model = load_llama(path, tokenizer)
    out = str(tmp_path / "out")
    save_checkpoint(model, tokenizer, out)
    again = load_tokenizer(out)
    # llama.cpp's converter reads the scores there
    is_sentencepiece = "rope_theta" not in params
    assert os.path.exists(os.path.join(out, "tokenizer.model")) == is_sentencepiece
    if is_sentencepiece:
        assert open(os.path.join(out, "tokenizer.model"), "rb").read() == sentencepiece_model
    tokens = random_tokens(len(weights["tok_embeddings.weight"]), 60)
    expected = logits_of(model, tokens)
    assert torch.equal(logits_of(load_llama(out, again), tokens), expected)
    assert_close(logits_of(AutoModelForCausalLM.from_pretrained(out), tokens), expected, 1e-4)
    text = "the quick  fox\n\n 12 你好 </s>"
    assert encode_text(again, text) == encode_text(tokenizer, text)
    assert encode_prompt(again, text) == encode_prompt(tokenizer, text)
    assert AutoTokenizer.from_pretrained(out).chat_template == CHAT_TEMPLATE
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for role in ("bos_token_id", "pad_token_id"):
        assert getattr(again, role) == getattr(tokenizer, role) == config[role]
    assert again.end_ids == tokenizer.end_ids  # LLaMA 3 has several
    assert config["eos_token_id"] == (tokenizer.end_ids if is_3 else tokenizer.eos_token_id)
    assert not [
        name for name in os.listdir(out) if "part" in name or name.endswith((".bin", ".pth", ".pt"))
    ]


def test_the_demo_model_is_saved_with_its_tied_embedding(tmp_path, tokenizer):
    torch.manual_seed(0)
    model, out, tokens = load_llama(None, tokenizer), str(tmp_path / "out"), random_tokens(400, 30)
    save_checkpoint(model, tokenizer, out)
    again = load_llama(out, tokenizer)
    assert torch.equal(logits_of(again, tokens), logits_of(model, tokens))
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(os.path.join(out, "model.safetensors"))
    modes = {os.stat(os.path.join(out, name)).st_mode for name in os.listdir(out)}
    assert len(modes) == 1  # who may read one file may read all


def test_a_failed_export_leaves_the_earlier_one_whole(tmp_path, tokenizer, reward_model, capfd):
    torch.manual_seed(0)
    model, out, tokens = load_llama(None, tokenizer), str(tmp_path / "out"), random_tokens(400, 20)
    save_checkpoint(model, tokenizer, out)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    names = sorted(os.listdir(out))
    full_disk = SimpleNamespace(save_pretrained=full, end_ids=[2], pad_token_id=0, bos_token_id=1)
    refused(capfd, save_checkpoint, load_llama(None, tokenizer), full_disk, out, code=1)
    assert sorted(os.listdir(out)) == names
    assert torch.equal(
        logits_of(load_llama(out, load_tokenizer(out)), tokens), logits_of(model, tokens)
    )
    other = load_llama(None, tokenizer)  # the next export replaces it
    save_checkpoint(other, tokenizer, out)
    assert torch.equal(
        logits_of(load_llama(out, load_tokenizer(out)), tokens), logits_of(other, tokens)
    )
    assert sorted(os.listdir(out)) == names


def test_an_export_into_a_file_is_refused(tmp_path, tokenizer, capfd):
    path = write(tmp_path / "plain", "x")
    line = refused(capfd, save_checkpoint, load_llama(None, tokenizer), tokenizer, path, code=1)
    assert f"error: {path}: the checkpoint cannot be written" in line


def test_another_tokenizer_leaves_no_model_of_the_earlier(tmp_path, tokenizer, llama3_tokenizer):
    """llama.cpp's converter would read it."""
    for t, there in ((tokenizer, True), (llama3_tokenizer, False)):
        save_checkpoint(load_llama(None, t), t, str(tmp_path))
        assert (tmp_path / "tokenizer.model").exists() == there


# ------------------------------------------------------------------------------------------------
# In an older transformers


@pytest.fixture(scope="session")
def older_transformers(tmp_path_factory):
    """A folder with transformers 4.57 and what of its requirements 5 has in another version."""
    folder = tmp_path_factory.mktemp("transformers")
    wanted = ["transformers==4.57.*", "huggingface_hub>=0.34,<1", "tokenizers>=0.22,<0.23.1"]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--no-compile",  # of all its models; a few are imported
            "--target",
            folder,
            *wanted,
        ],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        pytest.skip(f"pip cannot install transformers 4.57: {done.stderr[-300:]}")
    return folder


OLDER = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
assert transformers.__version__.startswith("4.57"), transformers.__version__
for folder in sys.argv[1:]:
    asked = torch.load(folder + "/asked.pt")
    kind = AutoModelForSequenceClassification if asked["scalar"] else AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert next(model.parameters()).dtype == torch.float32
    with torch.no_grad():
        logits = model(asked["tokens"]).logits
    torch.save(dict(logits=logits, ids=[tokenizer(text, add_special_tokens=False).input_ids for text in asked["texts"]],
                    prompt=tokenizer.apply_chat_template([{"role": "user", "content": "the fox"}], tokenize=True,
                                                         add_generation_prompt=True),
                    special=[tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.all_special_tokens]), folder + "/found.pt")
"""


def test_exports_are_the_same_in_transformers_4(
    tmp_path, older_transformers, tokenizer, llama3_tokenizer, chatml_tokenizer
):
    """Logits, tokens, template. 4.57 reads other keys: without them LLaMA 3's rope would be
    another, without a word."""
    texts = ["the quick brown fox", "two  spaces\n\n你好 😀", "<|im_start|>a</s><|eot_id|>"]
    plain = {"rope_type": "default", "rope_theta": 500000.0}
    scaled = plain | {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    folders = []
    for n, (t, rope, scalar) in enumerate(
        [
            (tokenizer, plain, False),
            (llama3_tokenizer, scaled, False),
            (chatml_tokenizer, scaled, True),
            (tokenizer, plain, True),
        ]
    ):
        torch.manual_seed(n)
        config = LlamaConfig(
            vocab_size=len(t),
            hidden_size=DIM,
            intermediate_size=FFN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            rope_parameters=rope,
            initializer_range=0.3,
        )
        ours = random_llama(config)
        ours = (ScalarHead(ours.model) if scalar else ours).eval()
        folders.append(str(tmp_path / str(n)))
        save_checkpoint(ours, t, folders[-1])
        torch.save(
            dict(tokens=random_tokens(len(t), 200)[None], texts=texts, scalar=scalar),
            tmp_path / str(n) / "asked.pt",
        )
    done = subprocess.run(
        [sys.executable, "-c", OLDER, *folders],
        env=os.environ | {"PYTHONPATH": str(older_transformers)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for folder in folders:
        asked, found = (torch.load(f"{folder}/{name}.pt") for name in ("asked", "found"))
        kind = AutoModelForSequenceClassification if asked["scalar"] else AutoModelForCausalLM
        with torch.no_grad():
            expected = kind.from_pretrained(folder)(asked["tokens"]).logits
        assert_close(found["logits"], expected, 1e-4)
        t = AutoTokenizer.from_pretrained(folder)
        assert found["ids"] == [t(text, add_special_tokens=False).input_ids for text in texts]
        assert found["prompt"] == encode_prompt(load_tokenizer(folder), "the fox")
        assert found["special"] == [t.eos_token_id, t.pad_token_id, found["special"][2]]
        assert set(found["special"][2]) == set(t.all_special_tokens)


INSTRUCT = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("legacy", [None, True, False])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_an_export_has_the_tokens_of_the_training(tmp_path, tokenizer, pieces, kind, legacy):
    """Of a checkpoint as LLaMA 2's: where its class would build the splitting of texts again, the
    stretches after the first control token would lose the space that they had in training."""
    said = dict(tokenizer_class=kind, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "chat_template.jinja").unlink()
    said |= dict(chat_template=INSTRUCT) | ({} if legacy is None else dict(legacy=legacy))
    write(tmp_path / "in" / "tokenizer_config.json", said)
    t = load_tokenizer(str(tmp_path / "in"))
    llama = random_llama(LlamaConfig(vocab_size=len(t), **DEMO_MODEL))
    save_checkpoint(llama, t, str(tmp_path / "out"))
    dialogue = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": "dog"},
        {"role": "user", "content": "lazy"},
    ]
    ids = encode_prompt(t, dialogue)
    first, answer, last = "[INST] the fox [/INST]", "dog ", "[INST] lazy [/INST]"  # as Meta's code
    assert ids == [1, *pieces.encode(f"{first} {answer}"), 2, 1, *pieces.encode(last)]
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs.apply_chat_template(dialogue, add_generation_prompt=True)["input_ids"] == ids
    assert encode_prompt(load_tokenizer(str(tmp_path / "out")), dialogue) == ids


def test_older_keys_leave_the_newer_as_they_are(tmp_path, tokenizer):
    """What 5 reads of an export is the same configuration with and without them."""
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=DIM,
        num_attention_heads=HEADS,
        rope_parameters={"rope_type": "linear", "rope_theta": 1234.0, "factor": 2.0},
    )
    config.dtype = "float32"
    config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    before = LlamaConfig.from_pretrained(tmp_path)
    add_older_keys(str(tmp_path))
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["rope_theta"] == 1234.0 and said["rope_scaling"] == {
        "rope_type": "linear",
        "factor": 2.0,
    }
    again = LlamaConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == before.rope_parameters and again.vocab_size == 400


SAMPLING = [
    {"temperature": 0.9, "top_p": 0.6},
    {"temperature": 0.9, "top_p": 0.6, "do_sample": False},
    {"top_k": 30, "top_p": 0.9},
]


@pytest.mark.parametrize("said", SAMPLING, ids=["Vicuna", "LLaMA 2 chat", "no temperature"])
def test_a_generation_config_that_transformers_would_not_write_again(
    tmp_path, tokenizer, capsys, said
):
    path = write_hugging_face(tmp_path / "hf", random_weights(400), tokenizer)
    write(tmp_path / "hf" / "generation_config.json", {"eos_token_id": 2} | said)
    model = load_llama(path, tokenizer)
    assert f"{path}/generation_config.json: do_sample is set to true" in capsys.readouterr().out
    save_checkpoint(model, tokenizer, str(tmp_path / "out"))
    again = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert again["do_sample"] is True and {
        name: again[name] for name in said if name != "do_sample"
    } == {name: value for name, value in said.items() if name != "do_sample"}
    load_llama(str(tmp_path / "out"), tokenizer)
    assert "do_sample" not in capsys.readouterr().out
