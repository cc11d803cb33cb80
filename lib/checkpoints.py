"""Checkpoints of every origin: Hugging Face's, Meta's, GGUF.

`read` hands over a configuration and the tensors under Hugging Face's names; `write` exports them.
"""

import contextlib
import glob
import json
import math
import os
import re
import shutil

import torch
from transformers import (AutoConfig, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from lib.errors import explain, first_line, stop


@contextlib.contextmanager
def quiet():
    """Inside, transformers says nothing: what matters is checked, and said, here."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


# ------------------------------------------------------------------------------------------------
# Weights

def is_meta(path):
    return os.path.exists(os.path.join(path, "params.json"))


def refuse_others(path):
    """End the program with one line at what is often taken for a checkpoint, and is none."""
    names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    for file in [os.path.join(path, name) for name in names] or [path]:
        if os.path.isfile(file) and os.path.getsize(file) < 1024:
            with open(file, "rb") as opened:
                if opened.read(40).startswith(b"version https://git-lfs"):
                    stop(f"{file}: a Git LFS pointer, not the file: run git lfs pull in its folder")
    if "adapter_config.json" in names:
        stop(f"{path}: a PEFT adapter: merge it into its base model first (merge_and_unload), "
             "and name the result")
    if "params.json" in names and "consolidated.safetensors" in names:
        stop(f"{path}: a Mistral model in its own format; only LLaMA's architecture is "
             "implemented here")


def read(path, dtype=torch.float32, scalar=False):
    """(LlamaConfig, {Hugging Face's name: tensor}, GenerationConfig or None) of

    - a Hugging Face directory, or the name of a model on the hub;
    - Meta's own directory: `params.json` and `consolidated.NN.pth`, of LLaMA 1, 2 or 3;
    - a `.gguf` file, dequantized.

    `scalar`: of a `LlamaForSequenceClassification` with one label, which only Hugging Face's format
    has. Ends the program with one line if `path` is none of these, or is damaged.
    """
    refuse_others(path)
    if scalar and (path.endswith(".gguf") or is_meta(path)):
        stop(f"{path}: a language model; a reward model is a Hugging Face directory")
    if path.endswith(".gguf"):
        return *read_gguf(path), None
    if is_meta(path):
        return *read_meta(path), None
    return read_hugging_face(path, dtype, scalar)


def read_config(path):
    """The `LlamaConfig` of what `read` reads, without its weights."""
    refuse_others(path)
    if path.endswith(".gguf"):
        return gguf_config(open_gguf(path), path)
    if is_meta(path):
        return read_meta(path, "meta")[0]
    with explain(f"{path}: no configuration of a LLaMA can be read from it"), quiet():
        config = AutoConfig.from_pretrained(path)
    if config.model_type != "llama":
        stop(f"{path}: a '{config.model_type}' model; only LLaMA's architecture is implemented "
             "here")
    return config


def read_hugging_face(path, dtype, scalar):
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        stop(f"{path}: neither a Hugging Face directory (no config.json) nor Meta's (no "
             "params.json)")
    if os.path.isfile(path):
        stop(f"{path}: a file, but not .gguf: name the directory of the checkpoint")
    config = read_config(path)
    if quantized := getattr(config, "quantization_config", None):
        stop(f"{path}: its weights are quantized ({dict(quantized).get('quant_method')}): "
             "dequantize the model first (in transformers: model.dequantize(), save_pretrained)")
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
    other = "ForCausalLM" if scalar else "ForSequenceClassification"
    if (config.architectures or [""])[0].endswith(other):
        stop(f"{path}: a {config.architectures[0]}, where a {'reward' if scalar else 'language'} "
             f"model is wanted, a {kind.__name__}")
    with explain(f"{path}: cannot be loaded as a LLaMA checkpoint"), quiet():
        model, info = kind.from_pretrained(path, config=config, dtype=dtype,
                                           output_loading_info=True, ignore_mismatched_sizes=True)
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        stop(f"{path}: {len(wrong)} of the model's tensors are missing or of the wrong shape, such "
             f"as {wrong[0]}")
    if unused := sorted(info["unexpected_keys"]):
        stop(f"{path}: {len(unused)} of its tensors have no place in this model, such as "
             f"{unused[0]}")
    if scalar and config.num_labels != 1:
        stop(f"{path}: a reward model has one label, this one has {config.num_labels}")
    return config, model.state_dict(), mended(getattr(model, "generation_config", None), path)


def mended(generation_config, path):
    """A generation_config.json as transformers writes it again. It refuses a temperature or top_p
    without do_sample, as LLaMA 2 chat and Vicuna have: these say how to sample."""
    try:
        if generation_config is not None:
            generation_config.validate(strict=True)
    except ValueError as error:
        print(f"{path}/generation_config.json: do_sample is set to true, since transformers would "
              f"not write it otherwise ({first_line(error)})")
        generation_config.do_sample = True
        with explain(f"{path}/generation_config.json: not valid"):
            generation_config.validate(strict=True)
    return generation_config


META_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj", "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm"}
GGUF_NAMES = {
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj",
    "ffn_up": "mlp.up_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


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
    elif params["norm_eps"] == 1e-6:  # LLaMA 1
        length = 2048
    with explain(not_a_llama):
        config = LlamaConfig(**sizes, vocab_size=vocab_size, rope_parameters=rope,
                             intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0],
                             max_position_embeddings=length, tie_word_embeddings=False)
    with explain(f"{path}: its tensors do not match its params.json"):
        return config, renamed(tensors, META_NAMES, config)


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


def add_older_keys(folder):
    """Let transformers 4 read what 5 has written, too: where only the newer keys stand, it would
    take rope theta for 10000 without a word, and not find the tokenizer's class."""
    def rewrite(name, change):
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            said = json.load(file)
        with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
            json.dump(change(said), file, indent=2, ensure_ascii=False)

    def older_config(said):
        scaling = dict(said["rope_parameters"])
        theta = scaling.pop("rope_theta")
        return said | dict(torch_dtype=said["dtype"], rope_theta=theta, rope_scaling=None
                           if scaling["rope_type"] == "default" else scaling)

    def older_tokenizer(said):
        if said["tokenizer_class"] == "TokenizersBackend":
            said["tokenizer_class"] = "PreTrainedTokenizerFast"
        if more := said.pop("extra_special_tokens", None):
            said["additional_special_tokens"] = more
        return said

    rewrite("config.json", older_config)
    rewrite("tokenizer_config.json", older_tokenizer)


def write(folder, config, tensors, tokenizer, generation_config=None, scalar=False):
    """A plain Hugging Face directory: every file whole or not there, config.json last.

    `tensors`: {Hugging Face's name: tensor}; `scalar`: as a `LlamaForSequenceClassification`.
    """
    part = os.path.join(folder, "export.part")
    ends = tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.end_ids[0]
    for described in (config, generation_config):
        if described is not None:
            described.pad_token_id = tokenizer.pad_token_id
            described.bos_token_id = tokenizer.bos_token_id
            described.eos_token_id = ends
    with torch.device("meta"):  # the class that writes the files; its own weights are never made
        if scalar:
            plain = LlamaForSequenceClassification(LlamaConfig.from_dict(config.to_dict() | dict(
                id2label={0: "score"}, label2id={"score": 0}, problem_type="regression",
                tie_word_embeddings=False)))
        else:
            plain = LlamaForCausalLM(config)
            if generation_config is not None:
                plain.generation_config = generation_config
    if not scalar and config.tie_word_embeddings:
        tensors = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    try:
        with explain(f"{folder}: the checkpoint cannot be written"), quiet():
            os.makedirs(folder, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            plain.save_pretrained(part, state_dict=tensors)
            tokenizer.save_pretrained(part)
            if model := getattr(tokenizer, "sentencepiece", None):
                with open(os.path.join(part, "tokenizer.model"), "wb") as file:
                    file.write(model)
            add_older_keys(part)
            for name in sorted(os.listdir(part), key=lambda name: name == "config.json"):
                os.replace(os.path.join(part, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(part, ignore_errors=True)
