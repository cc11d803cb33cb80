"""What the three stages share: reading data, tokens and the chat format, loading LLaMA, the scalar head, generation,
and the run directory. The stages themselves are sft.py, train_rm.py and ppo.py, each of which reads on its own.

    from model import load_llama, load_tokenizer, generate
    tokenizer = load_tokenizer("runs/ppo")
    model = load_llama("runs/ppo", tokenizer)
"""

import argparse
import base64
import contextlib
import csv
import ctypes
import datetime
import functools
import glob
import gzip
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import zlib
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, normalizers
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification,
                          LlamaTokenizer, PreTrainedTokenizerFast)
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.utils import logging as transformers_logging

transformers_logging.set_verbosity_error()  # what matters is checked, and said, here
transformers_logging.disable_progress_bar()

# glibc gives every large block back to the system as soon as it is freed, and the next one comes as pages that must first
# be zeroed: a tenth of a training step on CPU. Keep them instead: one arena, no mmap, no trimming.
if hasattr(libc := ctypes.CDLL(None), "mallopt"):
    M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
        libc.mallopt(option, value)


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
# Many processes: torchrun --nproc_per_node=8 sft.py ... All of them run the same script on the same data, and draw the same
# batches. Each takes its share of the rows of a batch; losses, divided by the counts of the whole batch, and gradients are
# summed over the processes. With one process none of this does anything.

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # as torchrun sets them


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
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # errors go to stderr, and are seen whoever has them


def place(model, args):
    """The model on --device; with many processes each holds an equal part of every layer's weights, gradients and
    optimizer state (FSDP2), and the layer is whole only while it computes.

    Embedding, final norm and head stay whole in every process, and their gradients are summed by hand (`clip_gradients`).
    FSDP gathers what is used inside the forward pass of a module that it wraps, but the stages call `model.model` and
    `lm_head` one after the other, decoding calls the layers alone, and embedding and lm_head may be the same tensor.
    """
    if args.gradient_checkpointing:
        # what the backward pass recomputes has to be computed as in the forward pass, attention included
        recompute = functools.partial(checkpoint, use_reentrant=False, preserve_rng_state=False,
                                      context_fn=lambda: (contextlib.nullcontext(), attention_kernel(args)))
        for layer in model.model.layers:
            layer.forward = functools.partial(recompute, layer.forward)
    if WORLD > 1:
        # float32 masters; with --dtype bfloat16 they are gathered in bf16, gradients are summed in float32, and activations
        # keep the precision that autocast gives them in one process
        dtype = torch.bfloat16 if args.dtype == "bfloat16" else torch.float32
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
        layer.set_reshard_after_forward(False)
        layer.unshard()
    yield
    for layer in layers:
        layer.set_reshard_after_forward(True)
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


def read_records(path, *fields):
    """The records of a data file: a JSON array, or JSON Lines (`.jsonl`), or `.gz` of either.

    `fields` names those that each record must have: "user_input" (a text, or a list of chat messages with "role" and
    "content" that ends with the user's), "completion" (a text), "score" (a finite number). Anything else ends the
    program with one line that names the file, the record (counted from 1) and the field.
    """
    try:
        with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        stop(f"{path}: no such file (python data_gen.py writes the built-in data sets to data/)")
    except (OSError, EOFError, zlib.error) as error:
        stop(f"{path}: cannot be read ({error})")
    except UnicodeDecodeError as error:
        stop(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8")
    if path.removesuffix(".gz").endswith(".jsonl"):
        lines, records = [line for line in text.split("\n") if line.strip()], []
        for number, line in enumerate(lines, 1):
            try:
                records.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                stop(f"{path}: record {number}: not JSON ({first_line(error)})")
    else:
        try:
            records = json.loads(text)
        except (ValueError, RecursionError) as error:
            stop(f"{path}: not JSON ({first_line(error)}); a file with one object a line must be named .jsonl")
        if not isinstance(records, list):
            stop(f"{path}: holds no JSON array of records")
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
        config.pad_token_id, config.bos_token_id, config.eos_token_id = tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
    model.eval()  # LLaMA has no dropout; a checkpoint whose config asks for some gets none here, nor in training
    for parameter in model.parameters():  # and not the rotary frequencies, which bfloat16 cannot tell apart at long distances
        parameter.data = parameter.data.to(dtype)
    return model


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


def read_meta(path):
    """(config, {Meta's name: tensor}) of Meta's directory, its shards merged.

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
            shards.append(torch.load(file, map_location="cpu", weights_only=True, mmap=True))
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
              "attn_norm": "attention_norm", "ffn_norm": "ffn_norm", "token_embd": "tok_embeddings", "output_norm": "norm", "output": "output"}


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
    scalar = ScalarHead(classifier.model)
    scalar.score = classifier.score
    return scalar.eval()


# ---------------------------------------------------------------------------------------------------------------------
# Generation

class KVCache:
    """The keys and values of all positions so far, laid out once for `length` positions: each layer (B, heads, length, d).

    Growing them by concatenation would copy the whole cache for every token.
    """

    def __init__(self, config, batch, length, dtype, device):
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, length, config.head_dim)
        self.layers = [list(layer) for layer in torch.zeros(shape, dtype=dtype, device=device)]
        self.position = 0

    def update(self, keys, values, layer, **_):
        """What LLaMA's attention calls: stores the new (B, heads, n, d), returns all up to and including them."""
        end = self.position + keys.shape[2]
        for stored, new in zip(self.layers[layer], (keys, values)):
            stored[:, :, self.position:end] = new
        return [stored[:, :, :end] for stored in self.layers[layer]]

    def keep_rows(self, rows):
        """Drop all but the given rows of the batch: `rows` (B,) bool."""
        self.layers = [[stored[rows] for stored in layer] for layer in self.layers]


def next_token_logits(model, input_ids, position_ids, mask, cache):
    """LLaMA's forward pass for the n newest tokens (B, n), with the cache -> logits (B, V) after the last one, float32."""
    llama = model.model
    hidden = llama.embed_tokens(input_ids)
    rotary = llama.rotary_emb(hidden, position_ids)
    for layer in llama.layers:
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, cache=cache)
    cache.position += input_ids.shape[1]
    return model.lm_head(llama.norm(hidden[:, -1])).float()


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
    logprobs = logits.log_softmax(-1)
    # The inverse of the cumulative distribution, one random number a row; torch.multinomial draws one for each word.
    # 1 - rand lies in (0, 1], so that the first entry that reaches it has a probability above 0.
    cumulative = logprobs.exp().cumsum(-1)
    uniform = 1 - torch.rand(len(logits), 1, generator=generator, device=logits.device)
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:])
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


@torch.no_grad()
def decode(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Yields for each step the rows still being written (n,), their new tokens (n,) and log probabilities (n,).

    `input_ids`, `attention_mask` (B, P): prompts padded on the left. A row ends with `eos_token_id`, which is yielded.
    """
    batch, length = input_ids.shape
    in_step = isinstance(model.model.layers[0], FSDPModule)
    device, blocked = input_ids.device, -1e30  # as good as -inf, which would give nan where all is blocked
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else model.dtype
    cache = KVCache(model.config, batch, length + max_new_tokens, dtype, device)
    # 0 where attention may look, a huge negative number on the padding; the first pass must not look ahead either
    padding = torch.zeros(batch, 1, 1, length + max_new_tokens, dtype=dtype, device=device)
    padding[:, 0, 0, :length].masked_fill_(attention_mask == 0, blocked)
    ahead = torch.full((length, length), blocked, dtype=dtype, device=device).triu(1)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    logits = next_token_logits(model, input_ids, positions, padding[..., :length] + ahead, cache)
    rows, alive, positions = torch.arange(batch, device=device), torch.ones(batch, dtype=torch.bool, device=device), positions[:, -1:]
    for step in range(max_new_tokens):
        tokens, logprobs = sample(logits, temperature, top_k, top_p, generator)
        yield rows[alive], tokens[alive], logprobs[alive]
        alive = alive & (tokens != eos_token_id)
        living = int(alive.sum())
        # a sharded model needs all processes for every step, also those whose own rows have ended
        if (total(living) if in_step else living) == 0 or step == max_new_tokens - 1:
            return
        # dropping ended rows copies the cache, so wait until a quarter of the rows can go
        if 0 < living <= 0.75 * len(rows):
            rows, tokens, positions, padding = rows[alive], tokens[alive], positions[alive], padding[alive]
            cache.keep_rows(alive)
            alive = alive[alive]
        positions = positions + 1
        logits = next_token_logits(model, tokens[:, None], positions, padding[..., :cache.position + 1], cache)


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
    batch, device = len(input_ids), input_ids.device
    tokens = torch.zeros(batch, max_new_tokens, dtype=torch.long, device=device)
    logprobs, mask = torch.zeros(batch, max_new_tokens, device=device), torch.zeros(batch, max_new_tokens, device=device)
    steps = 0
    written = decode(model, input_ids, attention_mask, max_new_tokens, eos_token_id, temperature, top_k, top_p, generator)
    for rows, new_tokens, new_logprobs in written:
        tokens[rows, steps], logprobs[rows, steps], mask[rows, steps] = new_tokens, new_logprobs, 1.0
        steps += 1
    return Generation(tokens[:, :steps], logprobs[:, :steps], mask[:, :steps])


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
FREE_SETTINGS = {"out", "resume", "overwrite", "save_every", "keep", "device", "micro_batch_size", "gradient_checkpointing", "shard_rollout"}


def save_state(folder, args, metrics, models, optimizers, generators, **progress):
    """Write `last/`: all that is needed to go on exactly as if the run had not been interrupted.

    `models`, `optimizers`, `generators`: {name: object}; `progress`: numbers, texts and lists. The tensors go into a new file,
    then state.json, which names that file, takes the place of the old one: at every moment one of the two states is whole.
    """
    last = os.path.join(folder, "last")
    tensors = {f"{name}.{key}": in_one_piece(p.detach()) for name, model in models.items() for key, p in model.named_parameters()}
    for name, optimizer in optimizers.items():
        for index, entry in optimizer.state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": in_one_piece(value) for key, value in entry.items()}
    if RANK > 0:
        return
    tensors |= {f"random.{name}": generator.get_state() for name, generator in generators.items()}
    tensors["random.torch"] = torch.get_rng_state()
    metrics.file.flush()
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
    """Export a `LlamaForCausalLM` or a `ScalarHead` with its tokenizer as a plain Hugging Face directory."""
    if isinstance(model, ScalarHead):
        with torch.device("meta"):
            one_label = model.config.to_dict() | {"num_labels": 1, "tie_word_embeddings": False}
            classifier = LlamaForSequenceClassification(LlamaConfig.from_dict(one_label))
        classifier.model, classifier.score = model.model, model.score
        model = classifier
    part = os.path.join(folder, "export.part")
    tensors = {name: in_one_piece(tensor) for name, tensor in model.state_dict().items()}
    if RANK > 0:
        return wait_for_all()
    try:
        os.makedirs(folder, exist_ok=True)
        shutil.rmtree(part, ignore_errors=True)
        model.save_pretrained(part, state_dict=tensors)
        tokenizer.save_pretrained(part)
        for name in sorted(os.listdir(part), key=lambda name: name == "config.json"):  # the config last: it says 'complete'
            os.replace(os.path.join(part, name), os.path.join(folder, name))
        os.rmdir(part)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        stop(f"{folder}: the checkpoint cannot be written ({first_line(error)})")
    wait_for_all()  # the next stage may load it


def draw_curves(folder, panels):
    """`curves.png` from `metrics.csv`: a panel for each `(title, {label: column})`, over the first column."""
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


@contextlib.contextmanager
def autocast(args):
    """bf16 matrix products where --dtype says so; what is sensitive (norms, losses, softmax) stays float32."""
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        with attention_kernel(args):
            yield


def attention_kernel(args):
    """On CPU the backward pass of PyTorch's fused attention takes three times as long in bf16 as written out."""
    slow = args.dtype == "bfloat16" and torch.device(args.device).type == "cpu" and torch.is_grad_enabled()
    return sdpa_kernel(SDPBackend.MATH) if slow else contextlib.nullcontext()


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
    group.add_argument("--gradient_checkpointing", action="store_true", help="compute each layer anew in the backward pass: less memory, a third more time")
    group.add_argument("--device", type=usable_device, default="cuda" if torch.cuda.is_available() else "cpu", help="where to compute")
    group.add_argument("--save_every", type=positive, default=100, help="optimizer steps (ppo.py: updates) between saved states, in --out/last")
    group.add_argument("--keep", type=whole, default=0, help="export the model with each saved state too, and keep the newest so many")
    group.add_argument("--resume", action="store_true", help="go on with an interrupted run in --out")
    group.add_argument("--overwrite", action="store_true", help="replace an earlier run in --out")
