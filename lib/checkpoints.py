"""Checkpoints and tokenizers of every origin: Hugging Face's, Meta's, GGUF.

`read` hands over a configuration and the tensors under Hugging Face's names; `write` exports them;
`load_tokenizer` reads the tokenizer beside any of them.
"""

import base64
import contextlib
import glob
import json
import os
import re
import shutil

import torch
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import (AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig,
                          LlamaForCausalLM, LlamaForSequenceClassification, LlamaTokenizer,
                          PreTrainedTokenizerFast)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging

from lib.data import encode_completion
from lib.run import explain, stop


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


def read(path, dtype=torch.float32, scalar=False):
    """(LlamaConfig, {Hugging Face's name: tensor}, GenerationConfig or None) of

    - a Hugging Face directory, or the name of a model on the hub;
    - Meta's own directory: `params.json` and `consolidated.NN.pth`, of LLaMA 1, 2 or 3;
    - a `.gguf` file, dequantized.

    `scalar`: of a `LlamaForSequenceClassification` with one label, which only Hugging Face's format
    has. Ends the program with one line if `path` is none of these, or is damaged.
    """
    if scalar and (path.endswith(".gguf") or is_meta(path)):
        stop(f"{path}: a language model; a reward model is a Hugging Face directory")
    if path.endswith(".gguf"):
        return *read_gguf(path), None
    if is_meta(path):
        return *read_meta(path), None
    return read_hugging_face(path, dtype, scalar)


def read_config(path):
    """The `LlamaConfig` of what `read` reads, without its weights."""
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
    kind = LlamaForSequenceClassification if scalar else LlamaForCausalLM
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
    return config, model.state_dict(), getattr(model, "generation_config", None)


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
    with explain(f"{path}: its tensors are not those of its params.json"):
        return config, renamed(tensors, META_NAMES, config)


def open_gguf(path):
    try:
        import gguf
    except ImportError:
        stop(f"{path}: reading .gguf needs a package: pip install gguf")
    if not os.path.exists(path):
        stop(f"{path}: no such file")
    with explain(f"{path}: damaged, or not a .gguf file"):
        return gguf.GGUFReader(path)


def gguf_config(reader, path):
    def said(key, default=None):
        return reader.fields[key].contents() if key in reader.fields else default

    with explain(f"{path}: damaged, or not a .gguf file"):
        if said("general.architecture") != "llama":
            stop(f"{path}: a '{said('general.architecture')}' model; only LLaMA's architecture is "
                 "implemented here")
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        dim, heads = said("llama.embedding_length"), said("llama.attention.head_count")
        rope = {"rope_type": "default", "rope_theta": said("llama.rope.freq_base", 10000.0)}
        if "rope_freqs.weight" in tensors:  # LLaMA 3.1's scaling, as divisors of the frequencies
            factor = float(max(tensors["rope_freqs.weight"].data))
            rope |= {"rope_type": "llama3", "factor": round(factor), "low_freq_factor": 1.0,
                     "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return LlamaConfig(
            vocab_size=int(tensors["token_embd.weight"].shape[1]), hidden_size=dim,
            num_attention_heads=heads, intermediate_size=said("llama.feed_forward_length"),
            num_hidden_layers=said("llama.block_count"),
            num_key_value_heads=said("llama.attention.head_count_kv", heads),
            head_dim=said("llama.attention.key_length", dim // heads),
            rms_norm_eps=said("llama.attention.layer_norm_rms_epsilon"),
            max_position_embeddings=said("llama.context_length"), rope_parameters=rope,
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
        return config, renamed(tensors, GGUF_NAMES, config)


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
            for name in sorted(os.listdir(part), key=lambda name: name == "config.json"):
                os.replace(os.path.join(part, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(part, ignore_errors=True)


# ------------------------------------------------------------------------------------------------
# Tokenizers

# For a checkpoint without a chat template. The completion follows "Assistant:", and ends with </s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")
LLAMA3_SPECIAL = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>", "<|python_tag|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]


class Llama3Converter(TikTokenConverter):
    """transformers' converter for LLaMA 3's `tokenizer.model`, whose lines are `base64(token)
    rank`."""

    @staticmethod
    def load_tiktoken_bpe(path):
        with open(path, "rb") as file:
            pairs = [line.split() for line in file if line.strip()]
        return {base64.b64decode(token): int(rank) for token, rank in pairs}


def space_as_sentencepiece(backend):
    """sentencepiece puts a space before every text; transformers leaves it out where there is
    one."""
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                               normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def read_tokenizer_model(path):
    """Meta's `tokenizer.model`: sentencepiece for LLaMA 1 and 2, tiktoken's text format for LLaMA
    3."""
    with open(path, "rb") as file:
        is_text = file.read(64).split(b"\n")[0].split()[-1:] == [b"0"]
    if is_text:
        backend = Llama3Converter(path, extra_special_tokens=LLAMA3_SPECIAL).converted()
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=LLAMA3_SPECIAL[0],
                                       eos_token=LLAMA3_SPECIAL[1], pad_token=LLAMA3_SPECIAL[4])
    if os.path.getsize(path) == 0:
        raise ValueError("tokenizer.model is empty")
    backend = LlamaTokenizer.from_pretrained(os.path.dirname(path)).backend_tokenizer
    space_as_sentencepiece(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>")


def read_tokenizer_gguf(path):
    """The tokenizer of a `.gguf` file as transformers builds it, less what it gets wrong: for LLaMA
    1 and 2 spaces at the beginning of a text, for LLaMA 3 an <|endoftext|> more than the embedding
    has, and words that no merge makes."""
    theirs = AutoTokenizer.from_pretrained(os.path.dirname(path) or ".",
                                           gguf_file=os.path.basename(path))
    state = json.loads(theirs.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in vocab]
    is_sentencepiece = "<0x0A>" in vocab
    state["model"]["ignore_merges"] = not is_sentencepiece
    backend = Tokenizer.from_str(json.dumps(state))
    if is_sentencepiece:
        space_as_sentencepiece(backend)
    special = {role: token for role, token in theirs.special_tokens_map.items()
               if isinstance(token, str) and token in vocab}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=theirs.chat_template,
                                   **special)


def load_tokenizer(path):
    """The tokenizer of a checkpoint (see `read`), or of a folder that holds a `tokenizer.model`.

    Its `end_ids` are the tokens that end an answer, first the one with which the template does so.
    It has a chat template, its own or CHAT_TEMPLATE, and a padding token that is not the
    end-of-sequence token: a reward model is read at the last token that is not padding, which is
    the end of sequence.
    """
    if path == "data/tokenizer" and not os.path.isdir(path):  # else it would be sought on the hub
        stop(f"{path}: missing, and the demo's vocabulary with it; run python data_gen.py first, "
             "or name a model")
    with explain(f"{path}: no tokenizer can be loaded from it"), quiet():
        metas, theirs = (os.path.join(path, name)
                         for name in ("tokenizer.model", "tokenizer_config.json"))
        if path.endswith(".gguf"):
            tokenizer = read_tokenizer_gguf(path)
        elif os.path.exists(metas) and not os.path.exists(theirs):
            tokenizer = read_tokenizer_model(metas)
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.eos_token_id is None:
        stop(f"{path}: the tokenizer has no end-of-sequence token")
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    # a token that the template writes is a control token, even where it is not flagged as one
    unflagged = [token.content for token in tokenizer.added_tokens_decoder.values()
                 if not token.special and token.content in str(tokenizer.chat_template)]
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in unflagged])
    tokenizer.end_ids = list(dict.fromkeys([
        encode_completion(tokenizer, "a", "b")[1][-1], tokenizer.eos_token_id, *stated_ends(path)]))
    if tokenizer.pad_token_id in (None, *tokenizer.end_ids):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token_id in (None, *tokenizer.end_ids):
        stop(f"{path}: the tokenizer has no token to pad with: set its pad_token to one that does "
             "not end an answer")
    return tokenizer


def stated_ends(path):
    """The end-of-sequence ids that a Hugging Face checkpoint states beside its tokenizer's, such as
    LLaMA 3's three: those of generation_config.json, else of config.json. (Its class would make one
    up.)"""
    if path.endswith(".gguf") or is_meta(path):
        return []
    for read_ends in (lambda: GenerationConfig.from_pretrained(path).eos_token_id,
                      lambda: LlamaConfig.get_config_dict(path)[0].get("eos_token_id")):
        with contextlib.suppress(Exception), quiet():  # a folder of a tokenizer alone has neither
            ids = read_ends()
            if ids is not None:
                return ids if isinstance(ids, list) else [ids]
    return []
