"""What the three stages share: reading data, tokens and the chat format, loading LLaMA, the scalar head, LoRA, generation, the
run directory; then what a first reading can skip, speed on a CPU, many processes and the memory budget. The stages themselves
are sft.py, train_rm.py and ppo.py, each of which reads on its own. At the end: how to use what they made.

    python model.py runs/ppo                                  # a chat

    from model import load_llama, load_tokenizer, generate
    tokenizer = load_tokenizer("runs/ppo")
    model = load_llama("runs/ppo", tokenizer)
"""

import argparse
import atexit
import base64
import contextlib
import copy
import csv
import ctypes
import datetime
import functools
import glob
import gzip
import io
import itertools
import json
import logging
import math
import os
import re
import runpy
import shutil
import signal
import sys
import threading
import unicodedata
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, normalizers
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AttentionInterface, AutoConfig, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM,
                          LlamaForSequenceClassification, LlamaTokenizer, PreTrainedTokenizerFast)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()  # what matters is checked, and said, here
transformers_logging.disable_progress_bar()

# Which of how many processes this is, as torchrun sets it; without torchrun the first of one (see "Many processes")
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def stop(message, code=2):
    """End the program with one line on standard error. Exit code 2: the input is wrong; 1: the run went wrong."""
    tqdm.write(f"error: {message}", file=sys.stderr)  # not print: there may be a progress bar on the line
    raise SystemExit(code)


def first_line(error):
    """The first line of an error's message: an error here is told in one line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0][:300]


def settings(args, defaults, title):
    """Fill every option that the user left at None from `defaults`, and print what then applies."""
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if RANK == 0:
        print(f"{title}:", " ".join(f"{name}={value}" for name, value in vars(args).items()), flush=True)
    return args


# ---------------------------------------------------------------------------------------------------------------------
# Files

def write_whole(path, data):
    """Write bytes to `path` so that the file appears whole or not at all: beside it first, then renamed."""
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path + ".part", "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".part", path)
    except OSError as error:
        if os.path.exists(path + ".part"):
            os.remove(path + ".part")
        stop(f"{path}: cannot be written ({error.strerror})")


def read_values(path):
    """The JSON values of a file: an array, or one a line, whatever its name says; `.gz` of either."""
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        stop(f"{path}: no such file (python data_gen.py writes the built-in data sets to data/)")
    except (OSError, EOFError, zlib.error) as error:
        stop(f"{path}: cannot be read ({error})")
    except UnicodeDecodeError as error:
        stop(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
    number = 0
    try:
        if text.lstrip().startswith("["):
            return json.loads(text)
        values = []
        for number, line in enumerate((line for line in text.split("\n") if line.strip()), 1):
            values.append(json.loads(line))
        return values
    except (ValueError, RecursionError) as error:
        where = f"record {number}: not JSON" if number else "not JSON"
        stop(f"{path}: {where} ({first_line(error)}); a file holds an array of records, or one record a line")


def read_records(path, *fields):
    """The records of a data file (see `read_values`).

    `fields` names those that each record must have: "user_input" (a text, or a list of chat messages with "role" and
    "content" that ends with the user's), "completion" (a text), "score" (a finite number). Anything else ends the
    program with one line that names the file, the record (counted from 1) and the field.
    """
    records = read_values(path)
    if not records:
        stop(f"{path}: holds no records")
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            stop(f"{path}: record {number}: not a JSON object")
        for field in fields:
            if field not in record:
                stop(f"{path}: record {number}: field '{field}' is missing")
            if wrong := what_is_wrong(field, record[field]):
                stop(f"{path}: record {number}: field '{field}' {wrong}")
    return records


def half_character(text):
    """JSON can hold half of a character that is written in two, such as "\\ud83d" of an emoji cut in the middle."""
    return "holds half a character (a lone surrogate)" if any("\ud800" <= c <= "\udfff" for c in text) else None


def what_is_wrong(field, value):
    """Why `value` cannot stand in `field` of a data record, in words; None when it can."""
    if field == "score":
        good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
        return None if good else "must be a finite number"
    if isinstance(value, str):
        return half_character(value)
    if field == "completion":
        return "must be a text"
    if not isinstance(value, list) or not value:
        return "must be a text or a list of chat messages"
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            return "has a message that is not {\"role\": ..., \"content\": text}"
        if wrong := half_character(message["content"]):
            return wrong
        if message.get("role") not in ("system", "user", "assistant"):
            return f"has a message with role {message.get('role')!r}; roles are system, user and assistant"
    return None if value[-1]["role"] == "user" else "must end with a message of the user"


def load_judge(option, path):
    """The function `score(user_input, completion)` -> float of a Python file, such as data_gen.py."""
    try:
        score = runpy.run_path(path)["score"]
        if not callable(score):
            raise TypeError("score is not a function")
        return score
    except Exception as error:  # whatever the file raises when it is run
        stop(f"{option} {path}: not a Python file with a function score(user_input, completion) ({first_line(error)})")


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens

# For a checkpoint without a chat template of its own. The completion follows "Assistant:", and ends with </s>.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
LLAMA3_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
                  "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
                  "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(3, 248))]


class Llama3Converter(TikTokenConverter):
    """transformers' converter for LLaMA 3's `tokenizer.model`, a text file of `base64(token) rank` lines."""

    @staticmethod
    def load_tiktoken_bpe(path):
        with open(path, "rb") as file:
            return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in file if line.strip())}


def space_as_sentencepiece(backend):
    """sentencepiece puts a space before every text; transformers' own setting leaves it out where one is there already."""
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.pre_tokenizer = None


def read_tokenizer_model(path):
    """Meta's `tokenizer.model`: sentencepiece for LLaMA 1 and 2, tiktoken's text format for LLaMA 3."""
    with open(path, "rb") as file:
        is_text = file.read(64).split(b"\n")[0].split()[-1:] == [b"0"]
    if is_text:
        backend = Llama3Converter(path, extra_special_tokens=LLAMA3_SPECIAL).converted()
        return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=LLAMA3_SPECIAL[0], eos_token=LLAMA3_SPECIAL[1],
                                       pad_token=LLAMA3_SPECIAL[4])
    if os.path.getsize(path) == 0:
        raise ValueError("tokenizer.model is empty")
    backend = LlamaTokenizer.from_pretrained(os.path.dirname(path))._tokenizer
    space_as_sentencepiece(backend)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def read_tokenizer_gguf(path):
    """The tokenizer of a `.gguf` file as transformers builds it, less what it gets wrong: for LLaMA 1 and 2 spaces at the
    beginning of a text, for LLaMA 3 an <|endoftext|> more than the embedding has, and words that no merge makes."""
    theirs = AutoTokenizer.from_pretrained(os.path.dirname(path) or ".", gguf_file=os.path.basename(path))
    state = json.loads(theirs.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in vocab]
    is_sentencepiece = "<0x0A>" in vocab
    state["model"]["ignore_merges"] = not is_sentencepiece
    backend = Tokenizer.from_str(json.dumps(state))
    if is_sentencepiece:
        space_as_sentencepiece(backend)
    special = {role: token for role, token in theirs.special_tokens_map.items() if isinstance(token, str) and token in vocab}
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=theirs.chat_template, **special)


def load_tokenizer(path):
    """The tokenizer of a checkpoint (see `load_llama`), or of a folder that holds a `tokenizer.model`.

    It has a chat template, its own or CHAT_TEMPLATE, and a padding token that is not the end-of-sequence token: a
    reward model is read at the last token that is not padding, which is the end of sequence.
    """
    if path == "data/tokenizer" and not os.path.isdir(path):  # else it would be looked for on the hub
        stop(f"{path}: missing, and the demo's vocabulary with it; run python data_gen.py first, or name a model")
    try:
        if path.endswith(".gguf"):
            tokenizer = read_tokenizer_gguf(path)
        elif os.path.exists(os.path.join(path, "tokenizer.model")) and not os.path.exists(os.path.join(path, "tokenizer_config.json")):
            tokenizer = read_tokenizer_model(os.path.join(path, "tokenizer.model"))
        else:
            tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # the libraries raise anything from OSError to a bare Exception for a bad file
        stop(f"{path}: no tokenizer can be loaded from it ({first_line(error)})")
    if tokenizer.eos_token_id is None:
        stop(f"{path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        stop(f"{path}: the tokenizer has no token to pad with: set its pad_token to one that is not its eos_token")
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    # a token that the template writes is a control token, even where the checkpoint does not flag it as one
    unflagged = [t.content for t in tokenizer.added_tokens_decoder.values() if not t.special and t.content in str(tokenizer.chat_template)]
    tokenizer.backend_tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in unflagged])
    return tokenizer


def encode_text(tokenizer, text):
    """The tokens of a plain text. A "</s>" in it is four characters of text, never the control token."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def encode_prompt(tokenizer, user_input):
    """The tokens of a prompt in the chat format, up to where the assistant's answer begins.

    `user_input` is a text or a list of chat messages. The chat template writes control tokens around what people said;
    the same characters inside what they said are kept text, by a mark that only lives while the template is filled in.
    """
    messages = [{"role": "user", "content": user_input}] if isinstance(user_input, str) else user_input
    # transformers' all_special_tokens has only those with a role, such as eos_token: of LLaMA 3's, <|start_header_id|> has none
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    control = re.compile("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")")
    mark = next(chr(c) for c in range(0xE000, 0xF900) if not any(chr(c) in m["content"] for m in messages))
    marked = [{**m, "content": control.sub(lambda found: found[0][0] + mark + found[0][1:], m["content"])} for m in messages]
    try:
        text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template may refuse a dialogue, of two users in a row, say
        stop(f"the checkpoint's chat template refuses this dialogue ({first_line(error)}): {str(messages)[:200]}")
    tokens = []
    for i, part in enumerate(control.split(text)):
        if i % 2:
            tokens.append(tokenizer.convert_tokens_to_ids(part))
        elif part:
            tokens += encode_text(tokenizer, part.replace(mark, ""))
    return tokens


def encode_prompts(user_inputs, tokenizer, room, name):
    """The tokens of each prompt. Those longer than `room` lose their beginning; they are counted, and said."""
    prompts = [encode_prompt(tokenizer, user_input) for user_input in user_inputs]
    if cut := sum(len(prompt) > room for prompt in prompts):
        print(f"{name}: of {len(prompts)} prompts, {cut} cut on the left to {room} tokens")
    return [prompt[-room:] for prompt in prompts]


def encode_records(records, tokenizer, max_length, name):
    """[(prompt, completion, number of the record)] in tokens; the completion ends with end-of-sequence.

    What is longer than `max_length` tokens loses the beginning of its prompt; a completion that leaves no room for a
    prompt is dropped. Both are counted, and said.
    """
    examples, cut = [], 0
    for number, record in enumerate(records, 1):
        prompt = encode_prompt(tokenizer, record["user_input"])
        completion = encode_text(tokenizer, record["completion"]) + [tokenizer.eos_token_id]
        room = max_length - len(completion)
        if room > 0:
            cut += len(prompt) > room
            examples.append((prompt[-room:], completion, number))
    if cut or len(examples) < len(records):
        print(f"{name}: of {len(records)} records, {cut} prompts cut on the left and {len(records) - len(examples)} "
              f"completions dropped to fit {max_length} tokens")
    if not examples:
        stop(f"{name}: no completion fits {max_length} tokens")
    return examples


def collate(prompts, completions, pad_token_id, device="cpu"):
    """Lists of tokens -> `input_ids` (B, L): prompt, completion, padding; `is_completion` (B, L): True on the completion.

    Padding stands only on the right, where causal attention does not look, so no attention mask is needed.
    """
    length = max(len(p) + len(c) for p, c in zip(prompts, completions))
    input_ids = torch.full((len(prompts), length), pad_token_id)
    is_completion = torch.zeros(len(prompts), length, dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions)):
        input_ids[i, :len(prompt) + len(completion)] = torch.tensor([*prompt, *completion])
        is_completion[i, len(prompt):len(prompt) + len(completion)] = True
    return input_ids.to(device), is_completion.to(device)


def length_batches(lengths, batch_size, generator):
    """Shuffled batches of indices with similar lengths in a batch, so that little is padded: shuffle, sort within
    stretches of 16 batches, cut, shuffle the batches. Every index occurs once; the last batch may be smaller."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    stretch = 16 * batch_size
    order = [i for start in range(0, len(order), stretch) for i in sorted(order[start:start + stretch], key=lambda i: lengths[i])]
    batches = [order[start:start + batch_size] for start in range(0, len(order), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


# ---------------------------------------------------------------------------------------------------------------------
# Loading LLaMA

DEMO_MODEL = dict(hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=256, rms_norm_eps=1e-5, initializer_range=0.06, tie_word_embeddings=True)


def load_llama(path, tokenizer, dtype=torch.float32):
    """A `LlamaForCausalLM` in `dtype` from one of

    - a Hugging Face directory, or the name of a model on the hub;
    - Meta's own directory: `params.json` and `consolidated.NN.pth`, of LLaMA 1, 2 or 3;
    - a `.gguf` file, dequantized;
    - None: the tiny randomly initialized LLaMA of the demo (DEMO_MODEL), with the tokenizer's vocabulary.

    Ends the program with one line if `path` is none of these, is damaged, or has a smaller embedding than the tokenizer.
    """
    if path is None:
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **DEMO_MODEL))
    elif path.endswith(".gguf"):
        model = from_meta_names(*read_gguf(path), path, dtype)
    elif os.path.exists(os.path.join(path, "params.json")):
        model = from_meta_names(*read_meta(path), path, dtype)
    else:
        model = load_hugging_face(LlamaForCausalLM, path, dtype)
    if len(tokenizer) > model.config.vocab_size:
        stop(f"{path}: the tokenizer has {len(tokenizer)} tokens, the model's embedding only {model.config.vocab_size}: "
             "they do not belong together")
    for config in (model.config, model.generation_config):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(config, name, getattr(tokenizer, name))
    model.eval()  # LLaMA has no dropout; a checkpoint whose config asks for some gets none here, nor in training
    for parameter in model.parameters():  # and not the rotary frequencies, which bfloat16 cannot tell apart at long distances
        parameter.data = parameter.data.to(dtype)
    return with_linear(model)


def load_hugging_face(model_class, path, dtype):
    """`model_class.from_pretrained`, with every fault told in one line, and none of the weights made up."""
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        stop(f"{path}: neither a Hugging Face directory (no config.json) nor Meta's (no params.json)")
    if os.path.isfile(path):
        stop(f"{path}: a file, but not .gguf: name the directory of the checkpoint")
    try:
        config = AutoConfig.from_pretrained(path)
        if config.model_type != "llama":
            stop(f"{path}: a '{config.model_type}' model; only LLaMA's architecture is implemented here")
        model, info = model_class.from_pretrained(path, config=config, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except Exception as error:  # the libraries raise anything for a damaged file
        stop(f"{path}: cannot be loaded as a LLaMA checkpoint ({first_line(error)})")
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        stop(f"{path}: {len(wrong)} of the model's tensors are missing or of the wrong shape, such as {wrong[0]}")
    return model


def read_meta(path, device="cpu"):
    """(config, {Meta's name: tensor}) of Meta's directory, its shards merged. On device "meta" no weights are read.

    The shards are those of tensor parallelism: wq, wk, wv, w1, w3 and output are split by rows, wo and w2 by columns, the
    embedding by columns (LLaMA 1 and 2) or rows (3), the norms not at all.
    """
    try:
        with open(os.path.join(path, "params.json"), encoding="utf-8") as file:
            params = json.load(file)
        dim, heads = params["dim"], params["n_heads"]
        kv_heads, theta = params.get("n_kv_heads") or heads, float(params.get("rope_theta", 10000.0))
        config = dict(hidden_size=dim, num_hidden_layers=params["n_layers"], num_attention_heads=heads,
                      num_key_value_heads=kv_heads, rms_norm_eps=params["norm_eps"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        stop(f"{path}/params.json: not the parameters of a LLaMA model ({first_line(error)})")
    files = sorted(glob.glob(os.path.join(glob.escape(path), "consolidated.*.pth")))
    expected = [os.path.join(path, f"consolidated.{i:02d}.pth") for i in range(max(1, len(files)))]
    if missing := [file for file in expected if file not in files]:
        stop(f"{missing[0]}: this shard is missing")
    shards = []
    for file in files:
        try:
            shards.append(torch.load(file, map_location=device, weights_only=True, mmap=device == "cpu"))
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, ... for a damaged file
            stop(f"{file}: damaged, or not a file of weights ({first_line(error)})")
    try:
        if shards[0]["layers.0.attention.wq.weight"].shape[0] * len(shards) != dim:
            whole = dim // shards[0]["layers.0.attention.wq.weight"].shape[0]
            if len(shards) > whole:
                stop(f"{path}: {len(shards)} shards found, but its model has {whole}: some are of another model")
            stop(f"{path}: {len(shards)} of {whole} shards found: consolidated.{len(shards):02d}.pth is missing")
        vocab_size = shards[0]["output.weight"].shape[0] * len(shards)
        tensors = {}
        for name in shards[0]:
            parts = [shard[name] for shard in shards]
            if name == "rope.freqs":
                continue
            if parts[0].dim() == 1:
                tensors[name] = parts[0]
            else:
                by_rows = not name.endswith(("wo.weight", "w2.weight"))
                if "tok_embeddings" in name:
                    by_rows = parts[0].shape[0] * len(parts) == vocab_size
                tensors[name] = torch.cat(parts, dim=0 if by_rows else 1) if len(parts) > 1 else parts[0]
    except (KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        stop(f"{path}: the shards do not fit together ({first_line(error)})")
    # what params.json leaves out is in the tensors, or is the same for all of a generation
    config |= dict(vocab_size=vocab_size, intermediate_size=tensors["layers.0.feed_forward.w1.weight"].shape[0])
    rope = {"rope_type": "default", "rope_theta": theta}
    if params.get("use_scaled_rope"):  # LLaMA 3.1 and later; Meta's reference code has these as its constants
        # LLaMA 3.2's text models, 1B and 3B, were scaled by 32; their params.json does not say so, their size does
        factor = params.get("rope_scaling_factor") or (32.0 if dim <= 3072 else 8.0)
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                 "high_freq_factor": params.get("rope_high_freq_factor") or 4.0, "original_max_position_embeddings": 8192}
    # the context of LLaMA 3.1 and later, 3, 1 (it alone has this epsilon) and 2
    length = 131072 if params.get("use_scaled_rope") else 8192 if theta == 500000.0 else 2048 if params["norm_eps"] == 1e-6 else 4096
    try:
        return LlamaConfig(**config, rope_parameters=rope, max_position_embeddings=length, tie_word_embeddings=False), tensors
    except Exception as error:  # transformers raises anything from ZeroDivisionError to errors of its own
        stop(f"{path}/params.json: not the parameters of a LLaMA model ({first_line(error)})")


GGUF_NAMES = {"attn_q": "attention.wq", "attn_k": "attention.wk", "attn_v": "attention.wv", "attn_output": "attention.wo",
              "ffn_gate": "feed_forward.w1", "ffn_down": "feed_forward.w2", "ffn_up": "feed_forward.w3",
              "attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "token_embd": "tok_embeddings",
              "output_norm": "norm", "output": "output"}


def read_gguf(path):
    """(config, {Meta's name: tensor}) of a `.gguf` file: its tensors are Meta's under other names, often quantized."""
    try:
        import gguf
    except ImportError:
        stop(f"{path}: reading .gguf needs a package: pip install gguf")
    if not os.path.exists(path):
        stop(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        said = lambda key, default=None: reader.fields[key].contents() if key in reader.fields else default  # noqa: E731
        if said("general.architecture") != "llama":
            stop(f"{path}: a '{said('general.architecture')}' model; only LLaMA's architecture is implemented here")
        tensors = {}
        for tensor in reader.tensors:
            *block, name, _ = tensor.name.split(".")
            values = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
            tensors[(f"layers.{block[1]}." if block else "") + GGUF_NAMES.get(name, name) + ".weight"] = values
        dim, heads = said("llama.embedding_length"), said("llama.attention.head_count")
        rope = {"rope_type": "default", "rope_theta": said("llama.rope.freq_base", 10000.0)}
        if (factors := tensors.pop("rope_freqs.weight", None)) is not None:  # LLaMA 3.1's scaling, as divisors of the frequencies
            rope |= {"rope_type": "llama3", "factor": round(factors.max().item()), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192}
        config = LlamaConfig(
            vocab_size=tensors["tok_embeddings.weight"].shape[0], hidden_size=dim, num_attention_heads=heads,
            intermediate_size=said("llama.feed_forward_length"), num_hidden_layers=said("llama.block_count"),
            num_key_value_heads=said("llama.attention.head_count_kv", heads), head_dim=said("llama.attention.key_length", dim // heads),
            rms_norm_eps=said("llama.attention.layer_norm_rms_epsilon"), max_position_embeddings=said("llama.context_length"),
            rope_parameters=rope, tie_word_embeddings="output.weight" not in tensors)
    except Exception as error:  # the reader raises whatever its parsing of a damaged file runs into
        stop(f"{path}: damaged, or not a .gguf file ({first_line(error)})")
    return config, tensors


def from_meta_names(config, tensors, path, dtype):
    """A `LlamaForCausalLM` from tensors under Meta's names.

    Meta rotates the pairs (2i, 2i+1) of a head's dimensions, Hugging Face the pairs (i, i + d/2), so the rows of wq and wk
    change places: reshape to (heads, d/2, 2, dim), swap the middle axes.
    """
    def halves(weight, heads):
        return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)

    try:
        state = {"model.embed_tokens.weight": tensors["tok_embeddings.weight"], "model.norm.weight": tensors["norm.weight"]}
        state["lm_head.weight"] = tensors["tok_embeddings.weight" if config.tie_word_embeddings else "output.weight"]
        for i in range(config.num_hidden_layers):
            ours, meta = f"model.layers.{i}.", f"layers.{i}."
            state[ours + "self_attn.q_proj.weight"] = halves(tensors[meta + "attention.wq.weight"], config.num_attention_heads)
            state[ours + "self_attn.k_proj.weight"] = halves(tensors[meta + "attention.wk.weight"], config.num_key_value_heads)
            for name, theirs in {"self_attn.v_proj": "attention.wv", "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1",
                                 "mlp.down_proj": "feed_forward.w2", "mlp.up_proj": "feed_forward.w3",
                                 "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"}.items():
                state[ours + name + ".weight"] = tensors[meta + theirs + ".weight"]
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
        model.tie_weights()
        model.model.rotary_emb = type(model.model.rotary_emb)(config)  # computed, not stored
    except (KeyError, RuntimeError) as error:
        stop(f"{path}: its tensors are not those of its configuration ({first_line(error)})")
    return model.requires_grad_()


# ---------------------------------------------------------------------------------------------------------------------
# The scalar head: reward model and critic

class ScalarHead(nn.Module):
    """LLaMA's backbone with one number a token instead of a word distribution: v_t = w . h_t, float32, `(B, T)`.

    As a reward model it is read at the last token of the completion (Stiennon et al. 2020, section 3.4), as a critic at
    every token. Its two parts are named as those of `LlamaForSequenceClassification`, and so it is saved.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model  # a LlamaModel, that is, the LLaMA without its language-modelling head
        self.score = nn.Linear(model.config.hidden_size, 1, bias=False, dtype=model.dtype)
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(model.config.hidden_size + 1))  # as lm-human-preferences

    def forward(self, input_ids):
        """`input_ids` (B, T), padded on the right -> values (B, T)."""
        return self.read(self.model(input_ids, use_cache=False).last_hidden_state)

    def read(self, hidden):
        """The head alone: hidden states (..., d) -> values (...), float32 under autocast too: bf16 has 3 digits."""
        with torch.autocast(hidden.device.type, enabled=False):
            return F.linear(hidden.float(), self.score.weight.float()).squeeze(-1)

    @property
    def config(self):
        return self.model.config


def load_scalar_head(path, dtype=torch.float32):
    """A `ScalarHead` from a saved reward model or critic, or any `LlamaForSequenceClassification` with one label."""
    classifier = load_hugging_face(LlamaForSequenceClassification, path, dtype)
    if classifier.score.out_features != 1:
        stop(f"{path}: a reward model has one label, this one has {classifier.score.out_features}")
    scalar = ScalarHead(with_linear(classifier.model))
    scalar.score = classifier.score
    return scalar.eval()


# ---------------------------------------------------------------------------------------------------------------------
# LoRA: LLaMA stays as it is, and small matrices beside its own learn (Hu et al. 2021)

class LoRALinear(nn.Module):
    """A linear map W with an adapter of rank r beside it (Hu et al. 2021, section 4.1, eq. 3):

        y = W x + alpha / r  B A x          W (out, in) frozen;  A (r, in) Gaussian and B (out, r) zero at the start

    So y begins as W x exactly. A and B are float32; W may be bfloat16, and its product is then bfloat16 too.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale, self.on = linear.weight, linear.bias, alpha / rank, True
        out, into = linear.weight.shape
        self.A = nn.Parameter(torch.randn(rank, into, device=self.weight.device) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank, device=self.weight.device))

    def forward(self, x):
        y = linear(x, self.weight, self.bias)
        return y + (self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype) if self.on else y


def lora_options(parser):
    """The options of LoRA, the same in every stage."""
    group = parser.add_argument_group("LoRA (Hu et al. 2021)")
    group.add_argument("--lora_rank", type=whole, default=0, help="rank of the adapters; 0: without, every weight is trained")
    group.add_argument("--lora_alpha", type=positive, default=16, help="the adapters' output is scaled by this over the rank")
    group.add_argument("--lora_targets", default="q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
                       help="matrices of each layer that get one")
    group.add_argument("--base_dtype", choices=["float32", "bfloat16"], default="float32", help="of the frozen weights")


def add_lora(model, rank, alpha, targets, base_dtype="float32"):
    """Give the named linear maps of every layer an adapter, and freeze all else but a `ScalarHead`'s score -> the model.

    `model`: a `LlamaForCausalLM` or a `ScalarHead`, changed in place; `targets`: names with commas between; rank 0 changes
    nothing. Ends the program with one line if a name is not that of a linear map.
    """
    if rank == 0:
        if base_dtype != "float32":
            stop(f"--base_dtype {base_dtype} is of weights that are frozen: it needs --lora_rank")
        return model
    for name, parameter in model.named_parameters():
        if name != "score.weight":
            parameter.requires_grad_(False).data = parameter.data.to(getattr(torch, base_dtype))
    linears = {name for name, part in model.model.layers[0].named_modules() if isinstance(part, nn.Linear)}
    short = {name.rsplit(".", 1)[-1]: name for name in linears}
    for target in targets.split(","):
        if target not in short:
            stop(f"--lora_targets: {target!r} is not a linear map of a layer; there are {','.join(sorted(short))}")
        for layer in model.model.layers:
            layer.set_submodule(short[target], LoRALinear(layer.get_submodule(short[target]), rank, alpha))
    size, learns = sum(p.nbytes for p in model.parameters() if not p.requires_grad), sum(p.numel() for p in trainable(model))
    print(f"LoRA: {size / 1e6:.1f} MB of frozen weights; {learns} parameters are trained, "
          f"{16 * learns / 1e6:.1f} MB with gradient and Adam", flush=True)
    return model


def trainable(model):
    """The parameters that an optimizer gets: all, or with LoRA the adapters and a scalar head."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def adapters_off(model):
    """Inside, the model computes what it did before LoRA, exactly."""
    adapters = [part for part in model.modules() if isinstance(part, LoRALinear) and part.on]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


class AdaptersOff(nn.Module):
    """A LLaMA backbone as it was before LoRA, without a copy of it."""

    def __init__(self, llama):
        super().__init__()
        self.shared, self.config, self.dtype = [llama], llama.config, llama.dtype  # in a list: its weights are not ours

    def forward(self, *args, **options):
        with adapters_off(self.shared[0]):
            return self.shared[0](*args, **options)


def before_lora(model):
    """The frozen model that `model` was before LoRA, in the same memory: of an actor the reference policy, of a critic the
    reward model. To be taken before training: the scalar head, which learns, is copied."""
    if not isinstance(model, ScalarHead):
        return argparse.Namespace(model=AdaptersOff(model.model), lm_head=model.lm_head)
    before = ScalarHead(AdaptersOff(model.model))
    before.score = copy.deepcopy(model.score)
    return before.requires_grad_(False)


def merged(model):
    """{name: tensor} of the same function as a plain float32 model, with W + alpha / r B A in place of each adapter. With many
    processes all take part, and rank 0 has it whole. What is float32 and has no adapter is not copied."""
    tensors = {name: in_one_piece(tensor) for name, tensor in model.state_dict().items()}
    for name, part in model.named_modules():
        if isinstance(part, LoRALinear):
            a, b = tensors.pop(f"{name}.A"), tensors.pop(f"{name}.B")
            if RANK == 0:
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].float() + part.scale * b @ a
    if RANK > 0:
        return {}
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if "lm_head.weight" in tensors and model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Generation

def rotate(x, cos, sin):
    """Rotary positions (Su et al. 2021, eq. 34): with the halves (a, b) of a head's d numbers -> (a cos - b sin, b cos + a sin).
    `x` (B, n, heads, d); `cos` (B, n, 1, d), and `sin` with minus signs in its first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rms_norm(x, norm):
    """x / sqrt(mean(x^2) + eps) times the norm's weights (Zhang and Sennrich 2019, eq. 4), by PyTorch's own function. `x` (..., d)."""
    return F.rms_norm(x, x.shape[-1:], norm.weight.to(x.dtype), norm.variance_epsilon)


def is_sharded(layer):
    """Whether this process holds only its part of the layer now (see "Many processes")."""
    return isinstance(next(layer.parameters()), DTensor)


@(torch.inference_mode if WORLD == 1 else torch.no_grad)()  # the first saves a tenth of a step on CPU, but is not for FSDP
def next_token_logits(model, input_ids, position_ids, mask, cache, start):
    """LLaMA's forward pass for the n newest columns (B, n), with `start` others, padding included, before them -> logits (B, V)
    after the last, float32. Written out, since for one token a row it is all small calls, of which transformers' own makes more.
    (So hooks on whole layers, attention or norms see nothing of generation; those on linear maps and MLPs do.) Each layer:

        x = norm(h)    h <- h + W_o attention(rotate(W_q x), rotate(W_k x), W_v x)    h <- h + MLP(norm(h))

    `cache` (layers, 2, B, kv heads, length, d) holds the keys and values of all positions, and gets those of the new ones. It is
    laid out once: growing it by concatenation would copy all of it for every token. `mask` (B, 1, n, start + n): 0 where a
    token may look, a huge negative number where not.
    """
    llama, d, kv_heads = model.model, model.config.head_dim, model.config.num_key_value_heads
    (batch, n), groups = input_ids.shape, model.config.num_attention_heads // kv_heads
    new, end = slice(start, start + n), start + n
    hidden = llama.embed_tokens(input_ids)
    cos, sin = (x[:, :, None] for x in llama.rotary_emb(hidden, position_ids))
    sin = torch.cat((-sin[..., :d // 2], sin[..., d // 2:]), -1)
    mask, sharded = mask.repeat_interleave(groups, 2) if n > 1 else mask, is_sharded(llama.layers[0])
    for layer, (keys, values) in zip(llama.layers, cache):
        if sharded:
            layer.unshard()
        attend, x = layer.self_attn, rms_norm(hidden, layer.input_layernorm)
        q = rotate(attend.q_proj(x).view(batch, n, -1, d), cos, sin)
        keys[:, :, new] = rotate(attend.k_proj(x).view(batch, n, -1, d), cos, sin).transpose(1, 2)
        values[:, :, new] = attend.v_proj(x).view(batch, n, -1, d).transpose(1, 2)
        # query heads that share a key head look at it together, as if they were so many tokens more: no copy of the keys
        q = q.view(batch, n, kv_heads, -1).transpose(1, 2).reshape(batch, kv_heads, n * groups, d)
        seen = F.scaled_dot_product_attention(q, keys[:, :, :end], values[:, :, :end], mask, scale=attend.scaling)
        seen = seen.unflatten(2, (n, groups)).transpose(1, 2).reshape(batch, n, -1)  # whatever order the kernel left it in
        hidden = hidden + attend.o_proj(seen)
        hidden = hidden + layer.mlp(rms_norm(hidden, layer.post_attention_layernorm))
        if sharded:
            layer.reshard()
    return model.lm_head(rms_norm(hidden[:, -1], llama.norm)).float()


def sample(logits, temperature, top_k, top_p, generator):
    """One token a row from softmax(logits / temperature), cut to the `top_k` likeliest (0: all) and to the smallest set
    with probability `top_p` (Holtzman et al. 2020) -> tokens (B,), log probabilities (B,) under that distribution.
    Temperature 0 takes the likeliest token, with probability 1."""
    if temperature == 0:
        return logits.argmax(-1), torch.zeros(len(logits), device=logits.device)
    logits = logits / temperature
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], -math.inf)
    if top_p < 1:
        ordered, order = logits.softmax(-1).sort(descending=True)
        too_far = ordered.cumsum(-1) - ordered >= top_p  # the set was complete before this token
        logits = logits.masked_fill(too_far.scatter(-1, order, too_far), -math.inf)
    # The inverse of the cumulative distribution, one random number a row; torch.multinomial draws one for each word.
    # 1 - rand lies in (0, 1], so that the first entry that reaches it has a probability above 0.
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    uniform = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return tokens[:, 0], probabilities.gather(-1, tokens)[:, 0].log()


def similar(lengths):
    """Cut rows, sorted by length, into slices in which none is more than twice as long as another."""
    cuts = [0]
    for i, length in enumerate(lengths):
        if length > 2 * lengths[cuts[-1]]:
            cuts.append(i)
    return [slice(*ends) for ends in zip(cuts, cuts[1:] + [len(lengths)])]


@torch.no_grad()
def decode(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yields for each step the rows still being written (n,), their new tokens (n,) and log probabilities (n,).

    `input_ids`, `attention_mask` (B, P): prompts padded on the left; `max_new_tokens` at least 1. A row ends with
    `eos_token_id`, which is yielded. Rows come sorted by the length of their prompts, so each must be looked up in `rows`.
    """
    batch, length = input_ids.shape
    in_step, config = is_sharded(model.model.layers[0]), model.config
    device, blocked = input_ids.device, -1e30  # as good as -inf, which would give nan where all is blocked
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    rows = attention_mask.sum(1).argsort(stable=True)  # short prompts first
    input_ids, attention_mask = input_ids[rows], attention_mask[rows]
    # 0 where attention may look, a huge negative number on the padding; the first pass must not look ahead either
    padding = torch.zeros(batch, 1, 1, length + max_new_tokens, dtype=dtype, device=device)
    padding[:, 0, 0, :length].masked_fill_(attention_mask == 0, blocked)
    ahead = torch.full((length, length), blocked, dtype=dtype, device=device).triu(1)
    positions, lengths = (attention_mask.cumsum(-1) - 1).clamp(min=0), attention_mask.sum(1).clamp(min=1).tolist()
    # zeros: what is never written is read all the same, under the mask, and 0 times nan were nan
    cache = torch.zeros(config.num_hidden_layers, 2, batch, config.num_key_value_heads, length + max_new_tokens, config.head_dim,
                        dtype=dtype, device=device)
    logits = []
    # the prompts, those of similar length together; a sharded model needs all processes for every pass, so as many passes in each
    for part in [slice(0, batch)] if in_step else similar(lengths):
        first = length - lengths[part][-1]  # no row of this part has a token before it
        logits.append(next_token_logits(model, input_ids[part, first:], positions[part, first:],
                                        padding[part, ..., first:length] + ahead[first:, first:], cache[:, :, part, :, first:], 0))
    logits, positions = torch.cat(logits), positions[:, -1:]
    alive, living = torch.ones(batch, dtype=torch.bool, device=device), batch
    for start in range(length, length + max_new_tokens):
        tokens, logprobs = sample(logits, temperature, top_k, top_p, generator)
        yield (rows, tokens, logprobs) if living == len(rows) else (rows[alive], tokens[alive], logprobs[alive])
        alive = alive & (tokens != eos_token_id)
        living = int(alive.sum())
        # a sharded model needs all processes for every step, also those whose own rows have ended
        if (total(living) if in_step else living) == 0 or start == length + max_new_tokens - 1:
            return
        # dropping ended rows copies the cache, so wait until a quarter of the rows can go
        if 0 < living <= 0.75 * len(rows):
            rows, tokens, positions, padding, cache = rows[alive], tokens[alive], positions[alive], padding[alive], cache[:, :, alive]
            alive = alive[alive]
        positions = positions + 1
        logits = next_token_logits(model, tokens[:, None], positions, padding[..., :start + 1], cache, start)


@dataclass
class Generation:
    tokens: torch.Tensor    # (B, N) what was sampled; 0 after the end of a row
    logprobs: torch.Tensor  # (B, N) float32, log probability under the distribution that the token was sampled from
    mask: torch.Tensor      # (B, N) 1 on what was sampled, up to and including end-of-sequence; 0 after it


def generate(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Sample a response to each prompt -> `Generation`, N being the length of the longest response.

    `input_ids`, `attention_mask` (B, P): prompts padded on the left, each answered as if it stood alone. With temperature
    alone (no top_k, top_p), `logprobs` are what a training pass gives for the same tokens at that temperature.
    """
    with packed(model, len(input_ids)):
        steps = list(decode(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature, top_k, top_p, generator))
    rows, tokens, logprobs = (torch.cat(parts) for parts in zip(*steps))
    # the step at which each of these tokens was written
    columns = torch.arange(len(steps)).repeat_interleave(torch.tensor([len(part) for part, *_ in steps])).to(rows.device)
    out = Generation(*(x.new_zeros(len(input_ids), len(steps)) for x in (tokens, logprobs, logprobs)))
    out.tokens[rows, columns], out.logprobs[rows, columns], out.mask[rows, columns] = tokens, logprobs, 1.0
    return out


def left_pad(prompts, pad_token_id, device="cpu"):
    """Lists of tokens -> `input_ids`, `attention_mask` (B, P), padded on the left, as `generate` takes them."""
    length = max(map(len, prompts))
    rows = [[pad_token_id] * (length - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# The run directory

def open_run(folder, args):
    """Make the run directory. One that holds work is left alone unless --resume or --overwrite.

    Returns what `load_state` finds of the run to go on with; None for a run that begins.
    """
    holds = [name for name in ("metrics.csv", "config.json", "last") if os.path.exists(os.path.join(folder, name))]
    if args.resume and args.overwrite:
        stop("--resume goes on with a run, --overwrite begins it anew: give one of them")
    if holds and not (args.resume or args.overwrite):
        stop(f"{folder}: holds an earlier run; --resume goes on with it, --overwrite replaces it, --out names another")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        stop(f"{folder}: cannot be written ({error.strerror})")
    if args.resume and os.path.exists(os.path.join(folder, "last", "state.json")):
        return load_state(folder, args)
    if args.resume and "config.json" in holds:
        stop(f"{folder}/last: missing, so this run cannot go on; --overwrite begins it anew")
    return None  # also after --resume of a run that was interrupted before it saved anything


class Metrics:
    """`metrics.csv` of a run: a row a logged step, on disk at once. Fields that a step does not have stay empty.

    Made when all input is read and the run begins: only now does an earlier run in the folder end, with its config.json,
    which says that a folder holds a complete model. One that goes on keeps the rows up to its `state`, and no later ones.
    """

    def __init__(self, folder, columns, state=None):
        wait_for_all()  # until each has seen what the folder held
        path = os.path.join(folder, "metrics.csv") if RANK == 0 else os.devnull
        try:
            if RANK > 0:
                pass
            elif state is None:
                for name in ("config.json", "last/state.json"):
                    if os.path.exists(os.path.join(folder, name)):
                        os.remove(os.path.join(folder, name))
                for name in glob.glob(os.path.join(glob.escape(folder), "step-*")) + [os.path.join(folder, "last")]:
                    shutil.rmtree(name, ignore_errors=True)
            else:
                os.truncate(path, state["metrics_bytes"])
            self.file = open(path, "a" if state else "w", newline="", encoding="utf-8")
        except OSError as error:
            stop(f"{path}: cannot be written ({error.strerror})")
        self.writer = csv.DictWriter(self.file, columns)
        if state is None:
            self.writer.writeheader()
            self.file.flush()

    def log(self, **row):
        try:
            self.writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
            self.file.flush()
        except OSError as error:
            stop(f"{self.file.name}: cannot be written ({error.strerror}); --resume goes on from the last saved state", code=1)


# What --resume may change: nothing in the result depends on it
FREE_SETTINGS = {"out", "resume", "overwrite", "save_every", "keep", "device", "micro_batch_size", "dry_run", "processes",
                 "gradient_checkpointing", "shard_rollout"}


def save_state(folder, args, metrics, models, optimizers, generators, **progress):
    """Write `last/`: all that is needed to go on exactly as if the run had not been interrupted.

    `models`, `optimizers`, `generators`: {name: object}; `progress`: numbers, texts and lists. The tensors go into a new file,
    then state.json, which names that file, takes the place of the old one: at every moment one of the two states is whole.
    """
    last = os.path.join(folder, "last")
    tensors = {f"{name}.{key}": in_one_piece(p.detach()) for name, model in models.items()
               for key, p in model.named_parameters() if p.requires_grad}
    for name, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": in_one_piece(value) for key, value in entry.items()}
    if RANK > 0:
        return
    tensors |= {f"random.{name}": generator.get_state() for name, generator in generators.items()}
    tensors["random.torch"] = torch.get_rng_state()
    os.fsync(metrics.file.fileno())
    file = "state-a.safetensors"
    try:
        os.makedirs(last, exist_ok=True)
        if os.path.exists(os.path.join(last, "state.json")):
            with open(os.path.join(last, "state.json"), encoding="utf-8") as previous:
                file = "state-b.safetensors" if json.load(previous)["file"] == file else file
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, os.path.join(last, file))
        with open(os.path.join(last, file), "rb") as written:
            os.fsync(written.fileno())
    except (OSError, SafetensorError) as error:
        if os.path.exists(os.path.join(last, file)):
            os.remove(os.path.join(last, file))
        stop(f"{last}: cannot be written ({first_line(error)}); what was saved before stays", code=1)
    state = dict(file=file, metrics_bytes=os.path.getsize(metrics.file.name), settings=vars(args), **progress)
    write_whole(os.path.join(last, "state.json"), json.dumps(state).encode())
    for name in os.listdir(last):
        if name not in (file, "state.json"):
            os.remove(os.path.join(last, name))


def load_state(folder, args):
    """What `save_state` wrote, read and checked: the dict of state.json with the tensors under "tensors"."""
    path = os.path.join(folder, "last", "state.json")
    try:
        with open(path, encoding="utf-8") as file:
            state = json.load(file)
        before, tensors = state["settings"], os.path.join(folder, "last", state["file"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        stop(f"{path}: damaged ({first_line(error)}); --overwrite begins the run anew")
    for name, value in json.loads(json.dumps(vars(args))).items():
        if name not in FREE_SETTINGS and before.get(name) != value:
            stop(f"--{name} {value} contradicts the run in {folder}, which has {before.get(name)}; give it that, or --overwrite")
    try:
        state["tensors"] = load_file(tensors)
    except (OSError, SafetensorError) as error:
        stop(f"{tensors}: missing or damaged ({first_line(error)}); --overwrite begins the run anew")
    return state


def restore(state, folder, models, optimizers, generators):
    """Put a state that `load_state` read back into the objects that it was taken from."""
    tensors = state["tensors"]
    try:
        with torch.no_grad():
            for name, model in models.items():
                for key, p in model.named_parameters():
                    if p.requires_grad:  # not LoRA's frozen weights
                        p.copy_(as_held(tensors[f"{name}.{key}"], p))
        for name, optimizer in optimizers.items():
            entries = {}
            for key, value in tensors.items():
                if key.startswith(name + "."):
                    index, field = key.removeprefix(name + ".").split(".")
                    p = optimizer.param_groups[0]["params"][int(index)]
                    entries.setdefault(int(index), {})[field] = as_held(value, p) if value.shape == p.shape else value
            optimizer.load_state_dict({"state": entries, "param_groups": optimizer.state_dict()["param_groups"]})
        for name, generator in generators.items():
            generator.set_state(tensors[f"random.{name}"])
        torch.set_rng_state(tensors["random.torch"])
    except (KeyError, RuntimeError, ValueError) as error:
        stop(f"{folder}/last: not a state of this run ({first_line(error)}); --overwrite begins it anew")


class Signals:
    """Ctrl-C and SIGTERM let the step finish: after `agree`, `caught` is the signal, 0 without one. A second one ends the
    program at once."""

    def __init__(self):
        self.came = self.caught = 0
        in_main_thread = threading.current_thread() is threading.main_thread()  # only there can a handler be set
        self.before = {number: signal.signal(number, self.catch) for number in (signal.SIGINT, signal.SIGTERM) if in_main_thread}

    def catch(self, number, frame):
        self.came = number
        self.restore()

    def agree(self):
        """Signals reach each process at another moment, and all have to end after the same step."""
        self.caught = largest(self.came)

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def leave(self, folder):
        """The end of an interrupted run, its state being saved: exit code 128 + the number of the signal (130, 143)."""
        self.restore()
        tqdm.write(f"interrupted; saved in {folder}/last: the same command with --resume goes on", file=sys.stderr)
        raise SystemExit(128 + self.caught)


def keep_export(model, tokenizer, folder, step, keep):
    """Export the model to step-N beside the run's other results, and remove all such exports but the newest `keep`."""
    save_checkpoint(model, tokenizer, os.path.join(folder, f"step-{step}"))
    exports = glob.glob(os.path.join(glob.escape(folder), "step-*")) if RANK == 0 else []
    for old in sorted(exports, key=lambda name: int(name.rsplit("-", 1)[1]))[:-keep]:
        shutil.rmtree(old)


def save_checkpoint(model, tokenizer, folder):
    """Export a `LlamaForCausalLM` or a `ScalarHead` with its tokenizer as a plain Hugging Face directory, in float32, LoRA merged."""
    tensors = merged(model)
    if RANK > 0:
        return wait_for_all()
    part = os.path.join(folder, "export.part")
    with torch.device("meta"):  # the class that names the tensors and writes the files; its own weights are never made
        if isinstance(model, ScalarHead):
            one_label = model.config.to_dict() | {"num_labels": 1, "tie_word_embeddings": False}
            plain = LlamaForSequenceClassification(LlamaConfig.from_dict(one_label))
        else:
            plain = LlamaForCausalLM(model.config)
            plain.generation_config = model.generation_config
    try:
        os.makedirs(folder, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        plain.save_pretrained(part, state_dict=tensors)
        tokenizer.save_pretrained(part)
        for name in sorted(os.listdir(part), key=lambda name: name == "config.json"):  # the config last: it says 'complete'
            os.replace(os.path.join(part, name), os.path.join(folder, name))
        os.rmdir(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        stop(f"{folder}: the checkpoint cannot be written ({first_line(error)})")
    wait_for_all()  # the next stage may load it


def draw_curves(folder, panels):
    """`curves.png` from `metrics.csv`: a panel for each `(title, {label: column})` that has values, over the first column."""
    if RANK > 0:
        return
    try:
        import matplotlib
    except ImportError:
        print("no curves.png: pip install matplotlib")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    with open(os.path.join(folder, "metrics.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    step = next(iter(rows[0]))
    panels = [(title, lines) for title, lines in panels if any(row[column] for row in rows for column in lines.values())]
    columns = min(4, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(4 * columns, 3 * -(-len(panels) // columns)), squeeze=False)
    for axis, (title, lines) in zip(axes.flat, panels):
        for label, column in lines.items():
            points = [(float(row[step]), float(row[column])) for row in rows if row[column]]
            if points:
                axis.plot(*zip(*points), label=label, marker="." if len(points) < 30 else None)
        axis.set(title=title, xlabel=step)
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=8)
    for axis in list(axes.flat)[len(panels):]:
        axis.remove()
    figure.tight_layout()
    figure.savefig(os.path.join(folder, "curves.png"), dpi=110)
    plt.close(figure)


def autocast(args):
    """bf16 matrix products where --dtype says so; what is sensitive (norms, losses, softmax) stays float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16")


def positive(text):
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def whole(text):
    """argparse type: a whole number from 0."""
    return 0 if text == "0" else positive(text)


def usable_device(text):
    """argparse type: a device of PyTorch on which something can be computed. "cuda" with many processes: to each its own."""
    if WORLD > 1 and text == "cuda":
        text = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({first_line(error)})") from None
    return text


def common_options(parser):
    """The options that every stage has."""
    group = parser.add_argument_group("the run")
    group.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the matrix products; weights stay float32")
    group.add_argument("--gradient_checkpointing", action="store_true",
                       help="compute each layer anew in the backward pass: less memory, a third more time")
    group.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    group.add_argument("--save_every", type=positive, default=100,
                       help="optimizer steps (ppo.py: updates) between saved states, in --out/last")
    group.add_argument("--keep", type=whole, default=0, help="export the model with each saved state too, and keep the newest so many")
    group.add_argument("--dry_run", action="store_true", help="print what the run would need in memory and arithmetic, and stop")
    group.add_argument("--processes", type=positive, default=1, help="of --dry_run: among so many processes the layers are shared out")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")


# ---------------------------------------------------------------------------------------------------------------------
# Speed on a CPU: nothing here changes what is computed, beyond the order of sums

# glibc gives every large block back to the system as soon as it is freed, and the next one comes as pages that must first
# be zeroed: a tenth of a training step on CPU. Keep them instead: one arena, no mmap, no trimming.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)


def attention(module, query, key, value, mask, **options):
    """transformers' call of PyTorch's fused attention; on CPU in float32 where a backward pass follows, since that in bf16 takes
    up to nine times as long, in layers as LLaMA's. `query` (B, heads, T, d), `key`, `value` (B, kv heads, T, d)."""
    if query.device.type == "cpu" and torch.is_grad_enabled() and value.dtype == torch.bfloat16:
        with torch.autocast("cpu", enabled=False):
            output, weights = sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **options)
        return output.to(value.dtype), weights
    return sdpa_attention_forward(module, query, key, value, mask, **options)


AttentionInterface.register("sdpa", attention)  # in place of transformers' own


class OneDNNProduct(torch.autograd.Function):
    """y = x W^T in float32 on CPU by oneDNN, which PyTorch itself calls for bf16 only; of loss L, dL/dx = dL/dy W and
    dL/dW = (dL/dy)^T x over all rows. `x` (..., in), `weight` (out, in) -> (..., out)."""

    @staticmethod
    def product(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return OneDNNProduct.product(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), (of_x, of_weight) = ctx.saved_tensors, ctx.needs_input_grad
        return (OneDNNProduct.product(gradient, weight.t()) if of_x else None,
                gradient.flatten(0, -2).t() @ x.flatten(0, -2) if of_weight else None)  # by MKL, which is as fast here


NOT_SMALL = 2**17  # weights of a matrix


def for_onednn(weight):
    """Whether products with this matrix are oneDNN's: float32 on CPU, and not small, since the call itself costs more than MKL's."""
    return (weight.numel() >= NOT_SMALL and weight.device.type == "cpu" and weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cpu") and torch.backends.mkldnn.is_available())


def linear(x, weight, bias=None):
    """`F.linear`: `x` (..., in), `weight` (out, in) -> (..., out). In float32 on CPU it is MKL's, and oneDNN's is faster."""
    if for_onednn(weight) and x.dtype == torch.float32 and bias is None and x.numel():
        return OneDNNProduct.apply(x, weight) if torch.is_grad_enabled() else OneDNNProduct.product(x, weight)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, computed by `linear`, or with the copy of its weights that `packed` made."""

    packed = None

    def forward(self, x):
        return linear(x, self.weight, self.bias) if self.packed is None else OneDNNProduct.product(x, self.packed)


@contextlib.contextmanager
def packed(model, rows):
    """Inside, where no gradient is wanted: float32 matrices on CPU lie in memory a second time, in the order in which oneDNN
    multiplies `rows` rows with them. It would else bring them into that order anew for every token."""
    parts = [part for part in model.modules() if isinstance(part, Linear) and part.bias is None and for_onednn(part.weight)]
    try:
        for part in parts if WORLD == 1 and rows > 1 else []:  # FSDP takes the weights away; for one row it gains nothing
            part.packed = torch.ops.mkldnn._reorder_linear_weight(part.weight.detach(), rows)
        yield
    finally:
        for part in parts:
            part.packed = None


def with_linear(model):
    """Let every `nn.Linear` of a model that is not small compute by `linear` -> the model."""
    for part in model.modules():
        if type(part) is nn.Linear and part.weight.numel() >= NOT_SMALL:
            part.__class__ = Linear
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Many processes: torchrun --nproc_per_node=8 sft.py ... All of them run the same script on the same data, and draw the same
# batches. Each takes its share of the rows of a batch; losses, divided by the counts of the whole batch, and gradients are
# summed over the processes. With one process none of this does anything.

def start_processes(args):
    """Find the other processes that torchrun started. Only the first of them, rank 0, prints, and writes files.

    An error in one of them ends its process, upon which torchrun ends all. Half an hour without a word from one is an error.
    """
    if WORLD == 1 or dist.is_initialized():
        return
    device = torch.device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=30))
    atexit.register(dist.destroy_process_group)  # a thread of gloo that still runs at the end would abort the process
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # errors go to stderr, and are seen whoever has them


def place(model, args):
    """The model on --device; with many processes each holds an equal part of every layer's weights, gradients and
    optimizer state (FSDP2), and the layer is whole only while it computes.

    Embedding, final norm and head stay whole in every process, and their gradients are summed by hand (`clip_gradients`).
    FSDP gathers what is used inside the forward pass of a module that it wraps, but the stages call `model.model` and
    `lm_head` one after the other, decoding calls the parts of a layer, and embedding and lm_head may be the same tensor.
    """
    if args.gradient_checkpointing:
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        for layer in model.model.layers:
            layer.forward = functools.partial(recompute, layer.forward)
    if WORLD > 1:
        # float32 masters; with --dtype bfloat16 they are gathered in bf16, gradients are summed in float32, and activations
        # keep the precision that autocast gives them in one process
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else None  # None: as they are
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        mesh = dist.init_device_mesh(torch.device(args.device).type, (WORLD,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
            layer.set_gradient_divide_factor(1.0)  # the sum over the processes, where FSDP by itself takes the mean
            layer.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    return model.to(args.device)


def my_parts(rows, size):
    """This process's micro-batches of the batch `rows`, [(part, counts)]: every WORLD-th row, `size` at a time.

    A pass through the model needs all processes, so each has the same number of parts. One without rows left computes a
    row of another and throws it away: counts is 0, otherwise 1.
    """
    rows = list(rows)
    mine, passes = rows[RANK::WORLD], -(-len(rows) // (WORLD * size))
    parts = [mine[i * size:(i + 1) * size] for i in range(passes)]
    return [(part, 1) if part else (rows[:1], 0) for part in parts]


def total(x):
    """The sum over all processes of a number or a tensor. Where each fills in its rows of zeros, the sum is the whole."""
    if WORLD == 1:
        return x
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    summed = x.detach().to(device, copy=True) if torch.is_tensor(x) else torch.tensor(x, device=device, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.to(x.device) if torch.is_tensor(x) else summed.item()


def largest(x):
    """The largest over all processes of a number, or of anything else that can be compared."""
    if WORLD == 1:
        return x
    everyones = [None] * WORLD
    dist.all_gather_object(everyones, x)
    return max(everyones)


def wait_for_all():
    """Go on when all processes have come here."""
    total(0)


def clip_gradients(model, max_norm):
    """Scale the gradient down to length `max_norm` if it is longer -> its length before. With many processes, first add up
    the gradients of what every process holds whole; FSDP has done so for its shards."""
    if WORLD == 1:
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm).item()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    shards = [g.to_local() for g in gradients if isinstance(g, DTensor)]
    wholes = [g for g in gradients if not isinstance(g, DTensor)]
    for g in wholes:
        dist.all_reduce(g)
    norm = math.sqrt(total(sum(g.square().sum().item() for g in shards)) + sum(g.square().sum().item() for g in wholes))
    for g in shards + wholes:
        g.mul_(min(1.0, max_norm / (norm + 1e-6)))
    return norm


@contextlib.contextmanager
def gathered(model, wanted=True):
    """Inside, every process holds all layers whole: decoding goes through them once a token, and would gather as often."""
    layers = model.model.layers if WORLD > 1 and wanted else []
    for layer in layers:
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()


def in_one_piece(x):
    """A tensor with all its parts, for rank 0 to save. Every process takes part; the others have nothing to keep."""
    if not isinstance(x, DTensor):
        return x
    x = x.full_tensor()
    return x.cpu() if RANK == 0 else None


def as_held(x, p):
    """A whole tensor as the parameter `p` is held: this process's part of it if `p` is sharded. The reverse of `in_one_piece`."""
    return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None) if isinstance(p, DTensor) else x


# ---------------------------------------------------------------------------------------------------------------------
# The budget: what a step costs in memory and arithmetic, from the configuration alone (--dry_run)

def read_config(path, tokenizer=None):
    """The `LlamaConfig` of what `load_llama` loads, without its weights where the format allows it (not in .gguf)."""
    if path is None:
        return LlamaConfig(vocab_size=len(load_tokenizer(tokenizer or "data/tokenizer")), **DEMO_MODEL)
    if path.endswith(".gguf"):
        return read_gguf(path)[0]
    if os.path.exists(os.path.join(path, "params.json")):
        return read_meta(path, "meta")[0]
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:  # the libraries raise anything for a damaged file
        stop(f"{path}: no configuration of a LLaMA can be read from it ({first_line(error)})")
    if config.model_type != "llama":
        stop(f"{path}: a '{config.model_type}' model; only LLaMA's architecture is implemented here")
    return config


def parameters(config, lora_rank=0):
    """{"embedding", "layers", "norm", "head", "adapters"}: numbers of parameters, counted on the meta device. With d, I, Q, K,
    V for hidden and MLP width, width of the queries, of the keys, and vocabulary: V d, n (2 d Q + 2 d K + 3 d I + 2 d), d,
    and V d or, tied to the embedding, 0. LoRA of rank r on all linear layers of n layers: r (in + out) for each."""
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    return dict(embedding=size(model.model.embed_tokens), layers=size(model.model.layers), norm=size(model.model.norm),
                head=0 if config.tie_word_embeddings else size(model.lm_head),
                adapters=lora_rank * sum(m.in_features + m.out_features for m in linears))


def model_bytes(config, processes=1, lora_rank=0, lm_head=True, base_bytes=4):
    """(weights, gradients, optimizer) of a float32 model in training, bytes a process. Adam keeps two numbers a parameter.

    The decoder layers are shared out among the processes; embedding, norm and head stand whole in each. LoRA trains its
    adapters only, and the scalar head; a frozen weight takes `base_bytes`. `lm_head` False: a backbone with a scalar head.
    """
    n = parameters(config, lora_rank)
    ends = n["embedding"] + n["norm"] + (n["head"] if lm_head else config.hidden_size)
    if lora_rank:
        trained = n["adapters"] / processes + (0 if lm_head else config.hidden_size)
        return base_bytes * (ends + n["layers"] / processes) + 4 * n["adapters"] / processes, 4 * trained, 8 * trained
    weights = 4 * (ends + n["layers"] / processes)
    return weights, weights, 2 * weights


def activation_bytes(config, rows, length, projected, copies=3, lora_rank=0, checkpointing=False, bf16=False, device="cpu", buffered=True):
    """Bytes at the peak of a forward and backward pass over `rows` sequences, `projected` tokens of which get logits.

    What autograd keeps of a token in a layer, in float32 numbers: each of two norms its input, the normalized input (for
    the gradient of its weight) and its output (for that of the next matrices), 6 d; q, k, v and attention's output, 2 Q + 2 K;
    gate, silu(gate), up and their product, 4 I; a number a head and a norm, H + 2. After the layers 3 d.
    bf16 halves what enters a matrix product, but casts a norm's output for each matrix anew; and keeps bf16 weights.
    `checkpointing` keeps the input d of each layer, and all of one layer. The logits: `copies` of (projected, V) in float32.
    `buffered`: the gradient of the embedding waits beside the one that is accumulated; so does one more (d, I) matrix.
    """
    d, i, heads, tokens = config.hidden_size, config.intermediate_size, config.num_attention_heads, rows * length
    q, k = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norms = 4 * d if lora_rank else 6 * d  # a frozen norm needs no normalized input
    layer = 4 * (norms + 2 * q + 2 * k + 4 * i + heads + 2)
    if lora_rank:
        layer += 4 * 7 * lora_rank
    if bf16:
        inside = 10 * q + 8 * k if device == "cpu" else 4 * q + 4 * k  # on CPU in float32, see attention
        layer = 4 * (norms - 2 * d + heads + 2) + 10 * d + inside + 8 * i
    layers = config.num_hidden_layers
    kept = tokens * (layers * 4 * d + layer if checkpointing else layers * layer) + tokens * 12 * d
    if bf16:
        linear = parameters(config)["layers"] - 2 * layers * d  # norms stay float32
        kept += 2 * (linear + d * config.vocab_size * (projected > 0))
    logits = 4 * projected * config.vocab_size * copies + (2 * projected * config.vocab_size if bf16 else 0)
    waiting = 0 if lora_rank or not buffered else 4 * d * config.vocab_size * (projected > 0)
    return kept + max(logits, waiting + 4 * (3 * i * tokens + (0 if lora_rank else i * d)))


def rollout_bytes(config, rows, prompt, response, bf16=False):
    """Bytes for sampling: the cache, 2 layers K (P + N) numbers a row; beside it the prefill's three (tokens, I) in float32, its
    masks, or, when a quarter of the rows has ended, the copy of the other three quarters."""
    cache = (2 if bf16 else 4) * rows * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * (prompt + response)
    groups = config.num_attention_heads // config.num_key_value_heads
    prefill = 4 * rows * prompt * (3 * config.intermediate_size + 2 * config.hidden_size + (groups + 1) * prompt)
    return cache + max(prefill, 0.75 * cache)


def forward_flops(config, rows, length, projected):
    """FLOP of a forward pass: 2 for each weight and token, and 4 Q for each layer and pair of positions (QK^T and AV). The
    pairs that the causal mask hides are counted too, as torch.utils.flop_counter does."""
    linear = parameters(config)["layers"] - 2 * config.num_hidden_layers * config.hidden_size  # less the norms
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * rows * length**2
    return 2 * linear * rows * length + attention + 2 * config.hidden_size * config.vocab_size * projected


def training_flops(config, rows, length, projected, lora_rank=0, checkpointing=False):
    """Forward, and twice that backward: the gradients of the inputs, and those of the weights, which LoRA needs for its adapters
    only. Checkpointing computes the forward pass again."""
    forward = forward_flops(config, rows, length, projected)
    if not lora_rank:
        return (4 if checkpointing else 3) * forward
    attention = forward_flops(config, rows, length, 0) - forward_flops(config, 1, 1, 0) * rows * length  # no weights in it
    return (3 if checkpointing else 2) * forward + attention + 6 * parameters(config, lora_rank)["adapters"] * rows * length


def generation_flops(config, rows, prompt, response):
    """FLOP of sampling: the prompt once, then token after token with the cache, each attending to all before it."""
    q = config.num_attention_heads * config.head_dim
    step = forward_flops(config, rows, 1, rows) - 4 * config.num_hidden_layers * q * rows
    looked_at = sum(prompt + t for t in range(1, response))
    return forward_flops(config, rows, prompt, rows) + (response - 1) * step + 4 * config.num_hidden_layers * q * rows * looked_at


def budget(stage, config, args):
    """The budget of "sft", "rm" or "ppo" with the sizes in `args`, the largest that they allow: {"weights", "gradients",
    "optimizer", "activations", "rollout", "peak", "resident"} in bytes a process, and "flops" of an optimizer step (ppo: an update).

    In RM a prompt has 4 completions. `peak` adds what is there at the same time: the gradients are freed before a rollout.
    With several processes two whole layers and the gradient of one stand in each, gathered. `resident`: on CPU freed memory is
    kept (see the top of this file), and its holes add about 0.3 of what is in use; that is measured, by bench/budget.py.
    """
    bf16, rollout, processes, lora_rank = args.dtype == "bfloat16", 0, args.processes, args.lora_rank
    base_bytes = 2 if args.base_dtype == "bfloat16" else 4
    options = dict(lora_rank=lora_rank, checkpointing=args.gradient_checkpointing)
    kept = dict(options, bf16=bf16, device=torch.device(args.device).type, buffered=config.tie_word_embeddings or stage == "sft")
    share = -(-(args.minibatch_size if stage == "ppo" else args.batch_size) // processes)
    rows, context = min(args.micro_batch_size, share), config.max_position_embeddings
    trained = model_bytes(config, processes, lora_rank, stage != "rm", base_bytes)
    weights, gradients, optimizer = trained
    if stage == "sft":
        length = min(args.max_length, context)
        activations = activation_bytes(config, rows, length, rows * length, **kept)
        flops = training_flops(config, args.batch_size, length, args.batch_size * length, **options)
    elif stage == "rm":
        length = min(args.max_length, context)
        activations = activation_bytes(config, 4 * rows, length, 0, **kept)
        flops = training_flops(config, 4 * args.batch_size, length, 0, **options)
    else:
        prompt, response, batch = min(args.max_prompt_length, context - args.max_new_tokens), args.max_new_tokens, args.batch_size
        length, critic = prompt + response, model_bytes(config, processes, lora_rank, False, base_bytes)
        weights, gradients, optimizer = (a + b for a, b in zip(trained, critic))
        if not lora_rank:
            weights *= 2  # the reference and the reward model
        # logits, their log softmax and four more for the entropy stand side by side
        activations = activation_bytes(config, rows, length, rows * response, copies=6, **kept)
        rollout = rollout_bytes(config, -(-batch // processes), prompt, response, bf16)
        layers, head = parameters(config)["layers"], config.vocab_size * config.hidden_size
        if processes > 1 and not args.shard_rollout:  # the actor stands whole in each process
            rollout += (2 if bf16 else base_bytes) * layers
        if bf16:  # autocast keeps its casts of what is trained
            rollout += 0 if lora_rank else 2 * (layers + head)
        elif kept["device"] == "cpu" and processes == 1:  # see `packed`
            rollout += 4 * (head + (0 if lora_rank else layers))
        flops = generation_flops(config, batch, prompt, response) + forward_flops(config, batch, length, batch * response)
        flops += 2 * forward_flops(config, batch, length, 0)  # critic and reward model
        for projected in (batch * response, 0):  # actor, critic
            flops += args.ppo_epochs * training_flops(config, batch, length, projected, **options)
        if args.ptx_coef:
            flops += args.ppo_epochs * training_flops(config, batch, length, batch * length, **options)
            activations = max(activations, activation_bytes(config, rows, length, rows * length, copies=4, **kept))
    one_layer = 4 * parameters(config)["layers"] / config.num_hidden_layers
    gathered = (2 * one_layer + (0 if lora_rank else one_layer)) * (processes > 1)
    peak = weights + optimizer + gathered + max(gradients + activations, rollout)
    resident = peak * (1.3 if torch.device(args.device).type == "cpu" else 1)
    return dict(weights=weights, gradients=gradients, optimizer=optimizer, activations=activations, rollout=rollout, peak=peak,
                resident=resident, flops=flops)


def dry_run(stage, path, args):
    """--dry_run: print the model's size and the budget of the run, and end the program with exit code 0."""
    if path in ("runs/sft", "runs/rm") and not os.path.isdir(path):
        path = None  # the demo's, not yet trained
    config = read_config(path, getattr(args, "tokenizer", None))  # ppo.py has no --tokenizer
    for part, number in parameters(config, args.lora_rank).items():
        print(f"parameters, {part}: {number:,}")
    for name, value in budget(stage, config, args).items():
        if name == "flops":
            print(f"{'an update' if stage == 'ppo' else 'an optimizer step'}, all processes: {value:.3e} FLOP")
        else:
            print(f"{name}: {value / 2**30:.3f} GiB a process")
    raise SystemExit(0)


# ---------------------------------------------------------------------------------------------------------------------
# Using the result: python model.py runs/ppo

def parse_use(argv):
    parser = argparse.ArgumentParser(description="Talk to a checkpoint, or compare several.")
    parser.add_argument("models", nargs="+", metavar="checkpoint", help="whatever --model of the stages takes; with several, a table")
    group = parser.add_argument_group("what is asked")
    group.add_argument("--prompt", help="answer this, and end (default: the terminal is a chat; what is piped in is one prompt)")
    group.add_argument("--prompts", metavar="FILE", help="answer every record's user_input, in a table")
    group.add_argument("--out", help="where the table of --prompts goes: .md or .csv (default: printed)")
    group.add_argument("--reward", metavar="CHECKPOINT", help="a reward model, which scores the answers in the table")
    group = parser.add_argument_group("how it is answered")
    group.add_argument("--temperature", type=float, default=0.0, help="of the sampling; 0: always the likeliest token")
    group.add_argument("--top_p", type=float, default=1.0, help="sample from the smallest set of tokens with this probability")
    group.add_argument("--max_new_tokens", type=positive, help="tokens an answer at most (default: half of the context, 512 at most)")
    group.add_argument("--batch_size", type=positive, default=16, help="prompts of --prompts answered at once")
    group.add_argument("--seed", type=int, default=0, help="of the sampling")
    group = parser.add_argument_group("where it runs")
    group.add_argument("--quantize", choices=["8bit", "4bit"], help="of the checkpoints' linear layers; needs bitsandbytes and accelerate")
    group.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights, or of those not quantized")
    group.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < math.inf or not 0 < args.top_p <= 1:
        stop("--temperature must be a number from 0, and --top_p lie above 0 and not above 1")
    if args.prompt is not None and args.prompts:
        stop("--prompt or --prompts, not both")
    if args.out and not (args.prompts and args.out.endswith((".md", ".csv"))):
        stop("--out is for the table of --prompts, and ends with .md or .csv")
    return args


def weight_bytes(model):
    """Bytes of a model's weights, tied ones counted once; of quantized ones with their scales."""
    return sum({t.data_ptr(): t.nbytes for t in model.state_dict().values() if isinstance(t, torch.Tensor)}.values())


def quantize(model, bits, device="cpu"):
    """A copy of a `LlamaForCausalLM` on `device` whose linear layers have 8-bit weights (LLM.int8, Dettmers et al. 2022) or
    4-bit ones (NF4 with double quantization, Dettmers et al. 2023). The embedding, the head and the norms keep their type."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns at every product of two matrices
    nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=model.dtype)
    try:
        import accelerate  # noqa: F401
        import bitsandbytes  # noqa: F401
        how = BitsAndBytesConfig(load_in_8bit=bits == "8bit", load_in_4bit=bits == "4bit", **nf4)
        small = LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=model.dtype,
                                                 quantization_config=how, device_map={"": device}).eval()
        with torch.no_grad():
            small(torch.zeros(1, 1, dtype=torch.long, device=device))  # what cannot be done shows here
        return small
    except ImportError:
        stop("--quantize needs two more packages: pip install bitsandbytes accelerate")
    except Exception as error:  # bitsandbytes raises its own for a device or a shape that it cannot do
        stop(f"--quantize {bits}: this model cannot be quantized on {device} ({first_line(error)})")


def load_for_use(path, args):
    """Tokenizer, model and the most tokens that an answer may have."""
    tokenizer = load_tokenizer(path)
    model = load_llama(path, tokenizer, getattr(torch, args.dtype))
    context = model.config.max_position_embeddings
    limit = args.max_new_tokens or min(512, context // 2)
    if limit >= context:
        stop(f"--max_new_tokens {limit}: the context of {path} is {context} tokens, and the prompt needs some of them")
    if args.quantize:
        before, model = weight_bytes(model), quantize(model, args.quantize, args.device)
        after = weight_bytes(model)
        print(f"{path}: weights {before / 1e6:.1f} MB in {args.dtype}, {after / 1e6:.1f} MB in {args.quantize}", file=sys.stderr)
        return tokenizer, model, limit
    return tokenizer, model.to(args.device), limit


def text_of(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def text_pieces(tokenizer, tokens):
    """From tokens as they come, texts that join to what all of them decode to, and never end inside a character.

    What a token adds depends on those before it: a character may have several tokens, a space be left out at the
    beginning. So decode the tokens since the last piece but one, and yield what goes beyond the last piece. While that
    ends with U+FFFD, which stands for bytes that make no character, wait for the rest of it.
    """
    last, new = [], []
    for token in tokens:
        new.append(token)
        old_text, text = text_of(tokenizer, last), text_of(tokenizer, last + new)
        if len(text) > len(old_text) and not text.endswith("\ufffd"):
            yield text[len(old_text):]
            last, new = new, []
    if rest := text_of(tokenizer, last + new)[len(text_of(tokenizer, last)):]:
        yield rest  # cut in the middle of a character


def stream(tokenizer, model, prompt, limit, args, generator):
    """Print the answer to `prompt` (tokens) while it is written. Returns its text, and whether Ctrl-C stopped it."""
    text, stopped = "", False
    try:
        steps = decode(model, *left_pad([prompt], tokenizer.pad_token_id, args.device), limit, tokenizer.eos_token_id,
                       temperature=args.temperature, top_p=args.top_p, generator=generator)
        for piece in text_pieces(tokenizer, (tokens.item() for _, tokens, _ in steps)):
            piece = piece if text else piece.lstrip()
            text += piece
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(flush=True)
    return text.strip(), stopped


def chat(tokenizer, model, limit, args):
    """A dialogue in the terminal. When it outgrows the context, its oldest turns are forgotten."""
    generator, history, told = torch.Generator(args.device).manual_seed(args.seed), [], False
    room = model.config.max_position_embeddings - limit
    print(f"{args.models[0]}: /reset begins anew, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            said = input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
            continue
        if said == "/reset":
            history = []
        elif said and (wrong := half_character(said)):
            print(f"(your message {wrong}: is the terminal set to UTF-8?)")
        elif said:
            history.append({"role": "user", "content": said})
            while len(prompt := encode_prompt(tokenizer, history)) > room and len(history) > 1:
                history = history[2:]
                if not told:
                    print("(the conversation outgrows the context: its oldest turns are forgotten from now on)")
                    told = True
            if len(prompt) > room:
                print(f"(your message has {len(prompt)} tokens; there is room for {room})")
                history = []
            else:
                history.append({"role": "assistant", "content": stream(tokenizer, model, prompt, limit, args, generator)[0]})


def fitting_prompt(tokenizer, model, user_input, limit, where):
    """The tokens of a prompt that leaves room for an answer of `limit` tokens."""
    tokens, room = encode_prompt(tokenizer, user_input), model.config.max_position_embeddings - limit
    if len(tokens) > room:
        stop(f"{where}: {len(tokens)} tokens, where {room} fit beside an answer of {limit}: shorten it, or lower --max_new_tokens")
    return tokens


def answer_all(path, prompts, args):
    """A checkpoint's answers to all prompts -> [(text, whether it ended before the limit)]."""
    tokenizer, model, limit = load_for_use(path, args)
    tokens = [fitting_prompt(tokenizer, model, prompt, limit, f"{args.prompts}: record {number}" if args.prompts else "the prompt")
              for number, prompt in enumerate(prompts, 1)]
    generator, answers = torch.Generator(args.device).manual_seed(args.seed), [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(tokens[i]))  # similar lengths together: little padding
    for start in tqdm(range(0, len(order), args.batch_size), desc=path, unit="batch", disable=not args.prompts):
        rows = order[start:start + args.batch_size]
        out = generate(model, *left_pad([tokens[i] for i in rows], tokenizer.pad_token_id, args.device), limit, tokenizer.eos_token_id,
                       temperature=args.temperature, top_p=args.top_p, generator=generator)
        for i, written, mask in zip(rows, out.tokens, out.mask):
            written = written[mask.bool()].tolist()
            answers[i] = text_of(tokenizer, written), written[-1] == tokenizer.eos_token_id
    return answers


@torch.no_grad()
def reward_all(prompts, answers, args):
    """The reward model's score of each answer, as `answer_all` gives them, of each checkpoint -> [[score of prompt 1, ...], ...].

    The texts are put into the reward model's own tokens and chat format, whatever those of the checkpoint are. As in PPO,
    an answer that was cut has no end-of-sequence token, and is read at its last one. Equal answers get one and the same score.
    """
    tokenizer, reward_model = load_tokenizer(args.reward), load_scalar_head(args.reward, getattr(torch, args.dtype)).to(args.device)
    scores = {}
    for pair in dict.fromkeys((i, answer) for column in answers for i, answer in enumerate(column)):
        i, (text, ended) = pair
        tokens = encode_prompt(tokenizer, prompts[i]) + encode_text(tokenizer, text) + [tokenizer.eos_token_id] * ended
        tokens = tokens[-reward_model.config.max_position_embeddings:]
        scores[pair] = reward_model(torch.tensor([tokens], device=args.device))[0, -1].item()
    return [[scores[pair] for pair in enumerate(column)] for column in answers]


def cells(text):
    """The width of a text in cells of a terminal: a Chinese character takes two."""
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text if not unicodedata.combining(c))


def side_by_side(columns):
    """Print texts as columns next to each other, together as wide as the terminal. Chinese breaks anywhere, other text between words."""
    width, wrapped = max(20, (shutil.get_terminal_size().columns + 3) // len(columns) - 3), []
    for text in columns:
        wrapped.append([])
        for line in text.expandtabs(4).splitlines():
            wrapped[-1].append("")
            for word in re.findall(r"\s*(?:[!-\u024f]{1,20}|\S)", line):
                if cells(wrapped[-1][-1] + word) <= width:
                    wrapped[-1][-1] += word
                else:
                    wrapped[-1].append(word.lstrip())
    for row in itertools.zip_longest(*wrapped, fillvalue=""):
        print(" | ".join(cell + " " * (width - cells(cell)) for cell in row).rstrip())


def markdown_cell(value):
    """One cell of a Markdown table: what would be read as markup is escaped, a line break is <br>."""
    return "<br>".join(re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", line) for line in str(value).strip().splitlines())


def markdown_table(rows):
    lines = ["| " + " | ".join(map(markdown_cell, row)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]) + "\n"


def summary_rows(args, answers, scores):
    """A row a checkpoint: mean score, and win rate: the share of prompts on which it scores above the first, ties half."""
    rows = [["checkpoint", "answers", "cut at the limit"] + (["mean score", f"win rate against {args.models[0]}"] if scores else [])]
    for n, (path, column) in enumerate(zip(args.models, answers)):
        rows.append([path, len(column), sum(not ended for _, ended in column)])
        if scores:
            wins = sum((s > first) + (s == first) / 2 for s, first in zip(scores[n], scores[0])) / len(column)
            rows[-1] += [f"{sum(scores[n]) / len(column):.3f}", f"{wins:.3f}" if n else "-"]
    return rows


def compare(prompts, args):
    """The same prompts through every checkpoint, one loaded after the other: printed side by side, or as a table."""
    answers = [answer_all(path, prompts, args) for path in args.models]
    scores = reward_all(prompts, answers, args) if args.reward else []
    if not args.prompts:
        heads = [path + (f"  score {scores[n][0]:.3f}" if scores else "") for n, path in enumerate(args.models)]
        side_by_side(heads)
        print()
        return side_by_side([column[0][0].strip() for column in answers])
    rows = [["prompt"]]
    for path in args.models:
        rows[0] += [path] + ([f"score of {path}"] if scores else [])
    for i, prompt in enumerate(prompts):
        text = prompt if isinstance(prompt, str) else "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
        rows.append([text])
        for n, column in enumerate(answers):
            rows[-1] += [column[i][0].strip()] + ([f"{scores[n][i]:.3f}"] if scores else [])
    summary = markdown_table(summary_rows(args, answers, scores))
    if args.out and args.out.endswith(".csv"):
        file = io.StringIO()
        csv.writer(file).writerows(rows)
        write_whole(args.out, file.getvalue().encode())
    elif args.out:
        write_whole(args.out, (summary + "\n" + markdown_table(rows)).encode())
    else:
        print(markdown_table(rows))
    print(summary + (f"saved {args.out}" if args.out else ""))


def main(argv=None):
    args = parse_use(argv)
    if args.prompts:
        return compare([record["user_input"] for record in read_records(args.prompts, "user_input")], args)
    if args.prompt is None and not sys.stdin.isatty():
        try:
            args.prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            stop(f"standard input: not UTF-8 at byte {error.start}")
    if args.prompt is not None and (wrong := half_character(args.prompt) or (None if args.prompt.strip() else "is empty")):
        stop(f"the prompt {wrong}")
    if len(args.models) > 1 or args.reward:
        if args.prompt is None:
            stop("several checkpoints, or --reward, need a --prompt or --prompts to compare the answers to")
        return compare([args.prompt.strip()], args)
    tokenizer, model, limit = load_for_use(args.models[0], args)
    if args.prompt is None:
        return chat(tokenizer, model, limit, args)
    prompt = fitting_prompt(tokenizer, model, args.prompt.strip(), limit, "the prompt")
    if stream(tokenizer, model, prompt, limit, args, torch.Generator(args.device).manual_seed(args.seed))[1]:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
