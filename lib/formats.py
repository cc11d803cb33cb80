"""Meta's and GGUF's formats: a configuration, and the tensors under Hugging Face's names."""

import glob
import json
import math
import os
import re

import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lib.errors import explain, stop


def renamed(tensors, names, config):
    """The tensors of Meta or GGUF under Hugging Face's names; an unknown name stays as it is.

    Meta and GGUF rotate the pairs (2i, 2i+1) of a head's dimensions, Hugging Face the pairs (i, i +
    h/2), so the rows of q_proj and k_proj change places: (heads, h/2, 2) -> (heads, 2, h/2).
    """
    result = {}
    for name, tensor in tensors.items():
        block, part, kind = re.fullmatch(r"(?:(?:layers|blk)\.(\d+)\.)?(.+)\.(\w+)", name).groups()
        part = names.get(part, part)
        if part.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            if part.endswith("k_proj"):
                heads = config.num_key_value_heads
            pairs = tensor.view(heads, -1, 2, *tensor.shape[1:])
            tensor = pairs.transpose(1, 2).reshape(tensor.shape)
        result[f"model.layers.{block}.{part}.{kind}" if block else f"{part}.{kind}"] = tensor
    return result


WRAPPERS = "module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module"


def unwrapped(names, path):
    """{name: plain name} of tensors whose names hold more than the model's own: what wrappers put
    in front of a part (DDP, torch.compile, FSDP), or one prefix before all, as PEFT's. A line says
    so. {} if there is nothing to remove."""
    plain = {name: re.sub(rf"(^|\.)(?:(?:{WRAPPERS})\.)+", r"\1", name) for name in names}
    for name in list(plain.values()):
        if prefix := re.fullmatch(r"(.+\.)(?:model\.embed_tokens|tok_embeddings)\.weight", name):
            plain = {name: bare.removeprefix(prefix[1]) for name, bare in plain.items()}
    plain = {name: bare for name, bare in plain.items() if bare != name}
    if not plain or len(set(plain.values()) | (set(names) - plain.keys())) < len(names):
        return {}
    name = min(plain)
    print(f"{path}: the prefixes of {len(plain)} tensors are removed: {name} is {plain[name]}")
    return plain


# ------------------------------------------------------------------------------------------------
# Meta

META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}


def is_meta(path):
    return os.path.exists(os.path.join(path, "params.json"))


def read_meta(path, device="cpu"):
    """(config, tensors) of Meta's directory, its shards merged. On "meta" no weights are read.

    The shards are those of tensor parallelism: wq, wk, wv, w1, w3 and output are split by rows, wo
    and w2 by columns, the embedding by columns (LLaMA 1 and 2) or rows (3), the norms not at all.
    """
    not_a_llama = f"{path}/params.json: not the parameters of a LLaMA model"
    with explain(not_a_llama):
        with open(os.path.join(path, "params.json"), encoding="utf-8") as file:
            params = json.load(file)
        dim, heads = params["dim"], params["n_heads"]
        theta = float(params.get("rope_theta", 10000.0))
        sizes = dict(hidden_size=dim, num_hidden_layers=params["n_layers"],
                     num_attention_heads=heads, rms_norm_eps=params["norm_eps"],
                     num_key_value_heads=params.get("n_kv_heads") or heads)
    files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
    for i in range(max(1, len(files))):
        if (file := os.path.join(path, f"consolidated.{i:02d}.pth")) not in files:
            stop(f"{file}: this shard is missing")
    shards = []
    for file in files:
        with explain(f"{file}: damaged, or not a file of weights"):
            shards.append(torch.load(file, map_location=device, weights_only=True,
                                     mmap=device == "cpu"))
    with explain(f"{path}: the shards do not fit together"):
        if names := unwrapped(shards[0], path):
            shards = [{names.get(name, name): x for name, x in shard.items()} for shard in shards]
        whole = dim // shards[0]["layers.0.attention.wq.weight"].shape[0]
        if len(shards) > whole:
            stop(f"{path}: {len(shards)} shards found, but its model has {whole}: some are of "
                 "another model")
        if len(shards) < whole:
            stop(f"{path}: {len(shards)} of {whole} shards found: "
                 f"consolidated.{len(shards):02d}.pth is missing")
        vocab_size, tensors = shards[0]["output.weight"].shape[0] * whole, {}
        for name in shards[0].keys() - {"rope.freqs"}:
            parts = [shard[name] for shard in shards]
            by_rows = not name.endswith(("wo.weight", "w2.weight"))
            if "tok_embeddings" in name:
                by_rows = parts[0].shape[0] * whole == vocab_size
            if parts[0].dim() == 1 or whole == 1:
                tensors[name] = parts[0]
            else:
                tensors[name] = torch.cat(parts, dim=0 if by_rows else 1)
    # what params.json leaves out is in the tensors, or is the same for all of a generation
    rope, length = {"rope_type": "default", "rope_theta": theta}, 4096
    if params.get("use_scaled_rope"):  # LLaMA 3.1 and later; constants of Meta's reference code
        # 3.2's text models, 1B and 3B, were scaled by 32; params.json does not say so, their size
        # does
        factor = params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0)
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                 "high_freq_factor": params.get("rope_high_freq_factor") or 4.0,
                 "original_max_position_embeddings": 8192}
        length = 131072
    elif theta == 500000.0:  # LLaMA 3
        length = 8192
    elif params["norm_eps"] == 1e-6 or dim == 8192 and not params.get("n_kv_heads"):
        # LLaMA 1, whose 65B has 1e-5, like LLaMA 2
        length = 2048
    with explain(not_a_llama):
        config = LlamaConfig(**sizes, vocab_size=vocab_size, rope_parameters=rope,
                             intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
                             max_position_embeddings=length, tie_word_embeddings=False)
    with explain(f"{path}: its tensors do not match its params.json"):
        return config, renamed(tensors, META_NAMES, config)


# ------------------------------------------------------------------------------------------------
# GGUF

GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def open_gguf(path):
    try:
        import gguf
    except ImportError:
        stop(f"{path}: reading .gguf needs a package: pip install gguf")
    if not os.path.exists(path):
        stop(f"{path}: no such file")
    with explain(f"{path}: damaged, or not a .gguf file"):
        reader = gguf.GGUFReader(path)
    if (parts := said_in(reader, "split.count", 1)) > 1:
        stop(f"{path}: one of {parts} parts: merge them first (llama-gguf-split --merge)")
    return reader


def said_in(reader, key, default=None):
    """The value of a key of a `.gguf` file."""
    return reader.fields[key].contents() if key in reader.fields else default


def gguf_rope(said, head_dim, divisors, path):
    """The rotary positions that a `.gguf` file states, as transformers' `rope_parameters`.
    `divisors` of the frequencies: LLaMA 3.1's way to state its scaling."""
    rope = {"rope_type": "default", "rope_theta": said("rope.freq_base", 10000.0)}
    kind, factor = said("rope.scaling.type", "none"), said("rope.scaling.factor", 1.0)
    if factor == 1 and said("rope.scale_linear"):  # as older files have it
        kind, factor = "linear", said("rope.scale_linear")
    if said("rope.dimension_count", head_dim) != head_dim:
        stop(f"{path}: only {said('rope.dimension_count')} of {head_dim} dimensions of a head are "
             "rotated, which no LLaMA does")
    if kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        # llama.cpp scales the attention by this, times what the file states
        attention = (1 + 0.1 * math.log(factor)) * said("rope.scaling.attn_factor", 1.0)
        length = said("rope.scaling.original_context_length") or said("context_length")
        rope |= {"rope_type": "yarn", "factor": factor, "attention_factor": attention,
                 "beta_fast": said("rope.scaling.yarn_beta_fast", 32.0),
                 "beta_slow": said("rope.scaling.yarn_beta_slow", 1.0),
                 "original_max_position_embeddings": length}
    elif kind not in ("none", "linear"):
        stop(f"{path}: rope scaling of kind {kind!r}, which is not implemented here")
    if divisors is not None:
        rope |= {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(
            head_dim=head_dim, rope_parameters=rope), "cpu")
        plain = rope["rope_theta"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        if kind != "none" or not torch.allclose(plain / scaled, divisors.float(), rtol=1e-3):
            stop(f"{path}: rope_freqs.weight is not LLaMA 3's scaling, the only one of this kind "
                 "that is implemented here")
    return rope


def gguf_config(reader, path):
    def said(key, default=None):
        return said_in(reader, f"llama.{key}", default)

    with explain(f"{path}: damaged, or not a .gguf file"):
        if (kind := said_in(reader, "general.architecture")) != "llama":
            stop(f"{path}: a '{kind}' model; only LLaMA's architecture is implemented here")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        dim, heads = said("embedding_length"), said("attention.head_count")
        head_dim = said("attention.key_length", dim // heads)
        divisors = None
        if "rope_freqs.weight" in tensors:
            divisors = torch.from_numpy(tensors["rope_freqs.weight"].data.copy())
        return LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=dim,
            num_attention_heads=heads, intermediate_size=said("feed_forward_length"),
            num_hidden_layers=said("block_count"), head_dim=head_dim,
            num_key_value_heads=said("attention.head_count_kv", heads),
            rms_norm_eps=said("attention.layer_norm_rms_epsilon"),
            max_position_embeddings=said("context_length"),
            rope_parameters=gguf_rope(said, head_dim, divisors, path),
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            tie_word_embeddings="output.weight" not in tensors)


def read_gguf(path):
    """(config, tensors) of a `.gguf` file: often quantized, always under names of its own."""
    reader = open_gguf(path)
    config = gguf_config(reader, path)
    import gguf
    with explain(f"{path}: damaged, or not a .gguf file"):
        tensors = {}
        for tensor in reader.tensors:
            if tensor.name != "rope_freqs.weight":
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
                tensors[tensor.name] = torch.from_numpy(values.copy())
        if config.attention_bias:  # of all four maps in transformers' LLaMA; of three in some files
            for i in range(config.num_hidden_layers):
                tensors.setdefault(f"blk.{i}.attn_output.bias", torch.zeros(config.hidden_size))
        return config, renamed(tensors, GGUF_NAMES, config)
