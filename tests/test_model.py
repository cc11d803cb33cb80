"""LLaMA written once, against transformers' `LlamaForCausalLM`; the scalar head against its
`LlamaForSequenceClassification`."""

import json
import math
import runpy

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from lib.data import collate
from lib.dialogue import encode_prompt, encode_text
from makers import ROOT, assert_close, logits_of, random_tokens, refused
from model import Llama, last_token, load_llama, load_scalar_head, save_checkpoint

ROPES = {
    "default": dict(rope_type="default", rope_theta=100.0),
    "default, with a partial factor that transformers' LLaMA ignores too": dict(
        rope_type="default", rope_theta=100.0, partial_rotary_factor=0.5
    ),
    "linear": dict(rope_type="linear", rope_theta=100.0, factor=4.0),
    "dynamic": dict(rope_type="dynamic", rope_theta=100.0, factor=4.0),
    "yarn": dict(
        rope_type="yarn", rope_theta=100.0, factor=4.0, original_max_position_embeddings=16
    ),
    "llama3": dict(
        rope_type="llama3",
        rope_theta=100.0,
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=16,
    ),
}
SHAPES = {
    "MHA": dict(num_key_value_heads=4),
    "GQA": dict(num_key_value_heads=2),
    "MQA": dict(num_key_value_heads=1),
    "tied": dict(tie_word_embeddings=True),
    "a head of another size": dict(head_dim=10, rms_norm_eps=0.3),
    "attention bias": dict(attention_bias=True),
    "MLP bias": dict(mlp_bias=True),
    "gelu": dict(hidden_act="gelu"),
    **{f"rope {name}": dict(rope_parameters=rope) for name, rope in ROPES.items()},
}


def twins(shape):
    """The same random weights in transformers' LLaMA and in ours."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **dict(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            initializer_range=0.4,
            max_position_embeddings=24,
            tie_word_embeddings=False,
        )
        | shape
    )
    theirs = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if (
                "norm" in name or "bias" in name
            ):  # these begin at 1 and 0, which would hide a mistake
                p.add_(0.5 * torch.randn_like(p))
    ours = Llama(config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape):
    """Rows of 40 tokens, beyond the 24 positions after which dynamic rope changes, padded on the
    right and on the left."""
    theirs, ours = twins(shape)
    generator = torch.Generator().manual_seed(1)
    input_ids, lengths = torch.randint(50, (3, 40), generator=generator), torch.tensor([40, 31, 17])
    for side in ("right", "left"):
        places = torch.arange(40)
        seen = places < lengths[:, None] if side == "right" else places >= 40 - lengths[:, None]
        positions = (seen.cumsum(-1) - 1).clamp(min=0)
        expected = theirs(input_ids, attention_mask=seen.long(), position_ids=positions).logits
        if side == "right":
            # padding on the right needs no mask and no positions
            found = ours.lm_head(
                ours(input_ids)
            )
        else:
            blocked = ~seen[:, None, None, :] | (places[None, :] > places[:, None])
            found = ours.lm_head(
                ours(input_ids, positions, torch.zeros(3, 1, 40, 40).masked_fill(blocked, -1e30))
            )
        assert_close(found[seen], expected[seen], 1e-4)
        weights = torch.randn(3, 40, 50, generator=generator) * seen[..., None]
        for model, logits in ((theirs, expected), (ours, found)):
            model.zero_grad()
            (logits * weights).sum().backward()
        gradients = dict(ours.named_parameters())
        assert len(gradients) == len(dict(theirs.named_parameters()))
        for name, p in theirs.named_parameters():
            scale = p.grad.abs().max()
            assert scale > 0 and (gradients[name].grad - p.grad).abs().max() <= 1e-4 * scale, name


@pytest.mark.parametrize(
    "shape", [SHAPES["GQA"], SHAPES["rope llama3"]], ids=["GQA", "rope llama3"]
)
def test_bf16_is_transformers_within_its_rounding(shape):
    """Both are compared with float32: ours is off by no more than 1.5 times as much."""
    theirs, ours = twins(shape)
    input_ids = random_tokens(50, 20)
    exact = logits_of(theirs, input_ids)
    off = {
        model: (logits_of(model.to(torch.bfloat16), input_ids) - exact).square().mean().sqrt()
        for model in (theirs, ours)
    }
    assert 0 < off[ours] < 1.5 * off[theirs]


def test_gradient_checkpointing_gives_the_same_gradients():
    _, ours = twins(SHAPES["GQA"])
    found = []
    for recompute in (False, True):
        for layer in ours.model.layers:
            layer.recompute = recompute
        ours.zero_grad()
        ours.lm_head(ours(random_tokens(50, 20)[None])).square().sum().backward()
        found.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_the_row_of_the_padding_token_learns_like_any_other(tmp_path, tokenizer):
    """LLaMA 3's padding is often its BOS, with which every text begins."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, pad_token_id=7, tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    llama = load_llama(str(tmp_path), tokenizer)
    llama.lm_head(llama(torch.tensor([[7, 3, 9]]))).logsumexp(-1).sum().backward()
    learns = llama.model.embed_tokens.weight.grad.abs().sum(1) > 0
    assert learns.nonzero().flatten().tolist() == [3, 7, 9]


def test_the_self_test_of_the_model(capsys):
    runpy.run_path(str(ROOT / "model.py"), run_name="__main__")  # as `python model.py`
    assert "token for token" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# The scalar head


def test_scalar_head_is_llama_for_sequence_classification(tmp_path, tokenizer, reward_model):
    save_checkpoint(reward_model, tokenizer, str(tmp_path))
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    again = load_scalar_head(str(tmp_path))
    prompts = [
        encode_prompt(tokenizer, text)
        for text in ("the fox", "the quick brown fox jumps over the dog", "你好", "a")
    ]
    completions = [
        [*encode_text(tokenizer, text), tokenizer.eos_token_id]
        for text in ("and then", "sleeps", "大", "the day is long, the dog is lazy")
    ]
    input_ids, places = collate(list(zip(prompts, completions)), tokenizer.pad_token_id)
    with torch.no_grad():
        values = reward_model(input_ids)
        scores = last_token(values, places)
        lengths = torch.tensor([len(p + c) for p, c in zip(prompts, completions)])
        attention_mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).long()
        for more in ({}, {"attention_mask": attention_mask}):
            logits = theirs(input_ids, **more).logits
            assert logits.shape == (4, 1)
            assert_close(logits[:, 0], scores, 1e-5)
        alone = [theirs(torch.tensor([p + c])).logits.item() for p, c in zip(prompts, completions)]
        assert torch.equal(again(input_ids), values)
    assert values.shape == input_ids.shape and values.dtype == torch.float32 and scores.std() > 0.1
    assert_close(scores, torch.tensor(alone), 1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForSequenceClassification"]
    # the same names, none renamed
    assert set(load_file(tmp_path / "model.safetensors")) == set(
        reward_model.state_dict()
    )


def test_scalar_head_is_linear_in_the_last_hidden_state(tokenizer, reward_model):
    input_ids = random_tokens(400, 20)[None]
    with torch.no_grad():
        hidden = reward_model.model(input_ids)
        assert_close(reward_model(input_ids)[0], hidden[0] @ reward_model.score.weight[0], 1e-5)
    assert (
        0.5 < reward_model.score.weight.std() * math.sqrt(129) < 1.5
        and reward_model.score.bias is None
    )


def test_scalar_head_of_a_language_model_is_no_reward_model(tmp_path, tokenizer, capfd):
    """A language model has no `score`: none is made up."""
    save_checkpoint(load_llama(None, tokenizer), tokenizer, str(tmp_path))
    line = refused(capfd, load_scalar_head, str(tmp_path))
    assert "LlamaForCausalLM" in line and "reward model is wanted" in line


def test_two_labels_are_refused(tmp_path, tokenizer, capfd):
    model = load_llama(None, tokenizer)
    config = LlamaConfig.from_dict(
        model.config.to_dict() | {"num_labels": 2, "tie_word_embeddings": False}
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    line = refused(capfd, load_scalar_head, str(tmp_path))
    assert f"error: {tmp_path}: " in line and "one label" in line and "2" in line
