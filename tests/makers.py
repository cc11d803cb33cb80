"""What several test files make: a LLaMA that hides nothing, in float64 with a loop over its heads;
tiny checkpoints of every format, written by hand; options and runs of the stages; slow references
of what the stages compute, one record at a time, without padding, with loops over tokens."""

import base64
import copy
import csv
import json
import math
import os
import re
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import lib.settings
import model
import ppo
from lib.data import encode_records, read_records
from lib.dialogue import encode_prompt
from lib.tokenizer import LLAMA3_SPECIAL
from model import Llama

ROOT = Path(__file__).resolve().parent.parent


def write(path, data):
    """Write a text, bytes, or anything else as JSON; return the path as text."""
    data = data if isinstance(data, (str, bytes)) else json.dumps(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(path)


def refused(capfd, function, *args, code=2):
    """Call what must end the program with this exit code and one line on standard error; return
    that line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        function(*args)
    err = capfd.readouterr().err
    assert end.value.code == code
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err


DIM, HEADS, FFN, LAYERS = 64, 4, 96, 2


def cut(path, keep):
    """Keep the first `keep` of a file: a number of bytes, or a part of it."""
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(keep * len(data))])


def dialogue(text):
    return [
        {"role": "system", "content": text},
        {"role": "user", "content": "hi " + text},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


# ------------------------------------------------------------------------------------------------
# A LLaMA that hides nothing


def plain_frequencies(theta=10000.0, head_dim=DIM // HEADS):
    return [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]


def scaled_frequencies(frequencies, factor, low=1.0, high=4.0, length=8192):
    """LLaMA 3.1: slow waves are slowed by `factor`, fast ones left alone, those between
    interpolated."""
    scaled = []
    for f in frequencies:
        wavelength = 2 * math.pi / f
        if wavelength < length / high:
            scaled.append(f)
        elif wavelength > length / low:
            scaled.append(f / factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * f / factor + smooth * f)
    return scaled


def plain_llama(weights, tokens, kv_heads, frequencies, eps=1e-5, pairs="interleaved", scale=1.0):
    """The logits (T, V) of one text `tokens` (T,), in float64, from tensors under Meta's names.
    Rotated queries and keys are `scale` times as long, which yarn wants.

    `pairs` says which dimensions of a head are turned together: (2i, 2i+1), as Meta has it, or
    "halves", (i, i + d/2).
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    d = DIM // HEADS
    angles = torch.arange(len(tokens)).double()[:, None] * torch.tensor(
        frequencies, dtype=torch.float64
    )
    turn = torch.polar(torch.full_like(angles, scale), angles)  # e^(i position frequency)

    def norm(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight

    def rotate(x):  # (T, d), one head
        if pairs == "interleaved":
            return torch.view_as_real(
                torch.complex(x[:, 0::2].contiguous(), x[:, 1::2].contiguous()) * turn
            ).reshape(x.shape)
        turned = torch.complex(x[:, : d // 2].contiguous(), x[:, d // 2 :].contiguous()) * turn
        return torch.cat([turned.real, turned.imag], -1)

    x = w["tok_embeddings.weight"][tokens]
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for i in range(LAYERS):
        layer = {
            name.removeprefix(f"layers.{i}."): tensor
            for name, tensor in w.items()
            if name.startswith(f"layers.{i}.")
        }
        h = norm(x, layer["attention_norm.weight"])

        def linear(x, name):
            return x @ layer[f"{name}.weight"].T + layer.get(f"{name}.bias", 0)

        queries, keys, values = (linear(h, f"attention.{name}") for name in ("wq", "wk", "wv"))
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // kv_heads)
            q, k, v = (
                queries[:, head * d :][:, :d],
                keys[:, group * d :][:, :d],
                values[:, group * d :][:, :d],
            )
            attention = (rotate(q) @ rotate(k).T / math.sqrt(d)).masked_fill(future, -math.inf)
            heads.append(attention.softmax(-1) @ v)
        x = x + linear(torch.cat(heads, -1), "attention.wo")
        h = norm(x, layer["ffn_norm.weight"])
        gate, up = linear(h, "feed_forward.w1"), linear(h, "feed_forward.w3")
        x = x + linear(gate * gate.sigmoid() * up, "feed_forward.w2")
    return norm(x, w["norm.weight"]) @ w["output.weight"].T


# ------------------------------------------------------------------------------------------------
# Tiny checkpoints of every format, written by hand


def random_weights(vocab, kv_heads=2, seed=0):
    """Random tensors under Meta's names, large enough that every part of the model matters."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows, columns):
        return torch.randn(rows, columns, generator=generator) * 1.5 / math.sqrt(columns)

    def gain():
        return 1 + 0.3 * torch.randn(DIM, generator=generator)

    kv_dim = DIM // HEADS * kv_heads
    weights = {
        "tok_embeddings.weight": matrix(vocab, DIM),
        "norm.weight": gain(),
        "output.weight": matrix(vocab, DIM),
    }
    for i in range(LAYERS):
        parts = {
            "attention.wq": matrix(DIM, DIM),
            "attention.wk": matrix(kv_dim, DIM),
            "attention.wv": matrix(kv_dim, DIM),
            "attention.wo": matrix(DIM, DIM),
            "feed_forward.w1": matrix(FFN, DIM),
            "feed_forward.w2": matrix(DIM, FFN),
            "feed_forward.w3": matrix(FFN, DIM),
            "attention_norm": gain(),
            "ffn_norm": gain(),
        }
        weights |= {f"layers.{i}.{name}.weight": tensor for name, tensor in parts.items()}
    return weights


def write_meta(folder, weights, params, tokenizer_model, shards=1, embedding="columns"):
    """Meta's directory, cut as tensor parallelism cuts it."""
    write(folder / "params.json", params)
    write(folder / "tokenizer.model", tokenizer_model)
    for rank in range(shards):
        shard = {"rope.freqs": torch.rand(8)}  # LLaMA 1 stores it; it must be ignored
        for name, tensor in weights.items():
            axis = 1 if "attention.wo" in name or "feed_forward.w2" in name else 0
            if "tok_embeddings" in name:
                axis = 1 if embedding == "columns" else 0
            shard[name] = tensor if tensor.dim() == 1 else tensor.chunk(shards, axis)[rank].clone()
        torch.save(shard, folder / f"consolidated.{rank:02d}.pth")
    return str(folder)


HUGGING_FACE_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "layers": "model.layers",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "output": "lm_head",
}


def rename(name, table):
    """Meta's tensor name, with each part that stands in `table` replaced; longest parts first."""
    for part in sorted(table, key=len, reverse=True):
        if name.startswith(part + ".") or f".{part}." in name:
            name = name.replace(part + ".", table[part] + ".", 1)
    return "model.norm.weight" if name == "norm.weight" and table is HUGGING_FACE_NAMES else name


def write_hugging_face(folder, weights, tokenizer, kv_heads=2, files=1, **config):
    """A Hugging Face directory, its heads in halves, in one or more safetensors files."""
    write(
        folder / "config.json",
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": len(weights["tok_embeddings.weight"]),
            "hidden_size": DIM,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "max_position_embeddings": 512,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": str(weights["norm.weight"].dtype).removeprefix("torch."),
        }
        | config,
    )
    tensors = {rename(name, HUGGING_FACE_NAMES): tensor for name, tensor in weights.items()}
    if files == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        where = {
            name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors"
            for i, name in enumerate(tensors)
        }
        for file in set(where.values()):
            save_file(
                {name: tensor for name, tensor in tensors.items() if where[name] == file},
                folder / file,
                metadata={"format": "pt"},
            )
        write(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    tokenizer.save_pretrained(folder)
    return str(folder)


GGUF_NAMES = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "layers": "blk",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
}


def write_gguf_sentencepiece(file, pieces):
    ids = range(len(pieces))
    kinds = gguf.TokenType
    file.add_tokenizer_model("llama")
    file.add_token_list([pieces.id_to_piece(i) for i in ids])
    file.add_token_scores([pieces.get_score(i) for i in ids])
    proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
    file.add_token_types([kinds(piece.type) for piece in proto.pieces])  # the same numbers
    file.add_unk_token_id(0)
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)


def write_gguf_llama3(file, pre):
    """LLaMA 3's vocabulary as llama.cpp keeps it: every byte as a printable character, pairs to
    merge, control tokens last."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    alphabet = {b: chr(b) for b in shown} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in shown)
    }

    def show(token):
        return "".join(alphabet[b] for b in token)

    file.add_tokenizer_model("gpt2")
    if pre:
        file.add_tokenizer_pre(pre)
    file.add_token_list([*map(show, RANKS), *LLAMA3_SPECIAL])
    file.add_token_types(
        [gguf.TokenType.NORMAL] * len(RANKS) + [gguf.TokenType.CONTROL] * len(LLAMA3_SPECIAL)
    )
    file.add_token_merges(
        [
            f"{show(token[:i])} {show(token[i:])}"
            for token in RANKS
            for i in range(1, len(token))
            if token[:i] in RANKS and token[i:] in RANKS
        ]
    )
    file.add_bos_token_id(len(RANKS))
    file.add_eos_token_id(len(RANKS) + 1)
    file.add_chat_template(LLAMA3_TEMPLATE)


def write_gguf(
    path,
    weights,
    pieces,
    kind=None,
    theta=10000.0,
    rope_factors=None,
    architecture="llama",
    pre="llama-bpe",
    **said,
):
    """A .gguf file of tensors under Meta's names (llama.cpp keeps Meta's order of the heads'
    dimensions), with the tokenizer of a sentencepiece model, or LLaMA 3's where `pieces` is None,
    which says that it splits texts as `pre`.
    `kind`: how to quantize the matrices. `said`: more keys, `_` for a point, of which the value's
    type tells the key's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = gguf.GGUFWriter(path, architecture)
    file.add_name("tiny")
    file.add_context_length(512)
    file.add_embedding_length(DIM)
    file.add_block_count(LAYERS)
    file.add_feed_forward_length(FFN)
    file.add_head_count(HEADS)
    file.add_head_count_kv(len(weights["layers.0.attention.wk.weight"]) * HEADS // DIM)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_dimension_count(said.pop("dimensions", DIM // HEADS))
    file.add_rope_freq_base(theta)
    for key, value in said.items():
        add = {str: file.add_string, int: file.add_uint32, float: file.add_float32}[type(value)]
        add(key.replace("__", "."), value)
    if pieces is None:
        write_gguf_llama3(file, pre)
    else:
        write_gguf_sentencepiece(file, pieces)
    if rope_factors:
        file.add_tensor("rope_freqs.weight", torch.tensor(rope_factors).numpy())
    for name, tensor in weights.items():
        values = tensor.numpy()
        if kind is not None and tensor.dim() == 2:
            file.add_tensor(rename(name, GGUF_NAMES), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            file.add_tensor(rename(name, GGUF_NAMES), values)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return str(path)


CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# LLaMA 3's kind of tokenizer: all bytes, the printable ones first, then what was merged.
# "unreachable" is no merge of two others, so it is found only as a whole piece, as tiktoken does.
BYTES = [b for b in range(256) if chr(b).isprintable()] + [
    b for b in range(256) if not chr(b).isprintable()
]
BYTES.remove(ord("!"))
RANKS = [
    bytes([ord("!")]),
    *(bytes([b]) for b in BYTES),
    b"th",
    b"he",
    b"the",
    b" the",
    b"in",
    b"ing",
    b" a",
    b"ll",
    b"hell",
    b"hello",
    b"12",
    b"123",
    b"\n\n",
    b"  ",
    "你".encode()[:2],
    "你".encode(),
    b" unreachable",
    b" th",
]
TIKTOKEN_MODEL = b"".join(
    base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(RANKS)
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def random_tokens(vocab, length, seed=1):
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed))


def logits_of(model, tokens):
    """(T, V) in float64, of ours or of transformers'."""
    with torch.no_grad():
        out = model(tokens[None])
        return (model.lm_head(out) if isinstance(model, Llama) else out.logits)[0].double()


def assert_close(a, b, tolerance):
    torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=tolerance)


# ------------------------------------------------------------------------------------------------
# The params.json of Meta's LLaMAs, small

LLAMA1 = {
    "dim": DIM,
    "multiple_of": 32,
    "n_heads": HEADS,
    "n_layers": LAYERS,
    "norm_eps": 1e-6,
    "vocab_size": -1,
}
LLAMA2 = LLAMA1 | {"norm_eps": 1e-5}
LLAMA2_GQA = LLAMA2 | {"n_kv_heads": 2, "ffn_dim_multiplier": 1.3}
LLAMA3 = {
    "dim": DIM,
    "n_layers": LAYERS,
    "n_heads": HEADS,
    "n_kv_heads": 2,
    "vocab_size": len(RANKS) + 256,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
LLAMA31 = LLAMA3 | {"use_scaled_rope": True, "rope_scaling_factor": 8.0}


# ------------------------------------------------------------------------------------------------
# The stages

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


# ------------------------------------------------------------------------------------------------
# Gradients, and slow references


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


def examples_of(path, tokenizer):
    """[(prompt, completion, number of the record)] of a data file."""
    return encode_records(
        read_records(str(path), "user_input", "completion"), tokenizer, 128, str(path)
    )


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


def in_file_order(lengths, batch_size, generator):
    return [
        list(range(start, min(start + batch_size, len(lengths))))
        for start in range(0, len(lengths), batch_size)
    ]


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
