"""The tokenizer of a checkpoint of any origin: Hugging Face's, Meta's, GGUF's."""

import base64
import contextlib
import json
import os
import re

from huggingface_hub import try_to_load_from_cache
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

from lib.checkpoints import refuse_others
from lib.dialogue import check_template, encode_completion, in_template
from lib.errors import explain, quiet, stop
from lib.formats import is_meta, open_gguf, said_in
from lib.generation_config import stated
from lib.sentencepieces import is_markup, read_sentencepiece, sentencepiece_model

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


def is_tiktoken(model):
    """Whether a `tokenizer.model` is in tiktoken's text format, as LLaMA 3's."""
    return model[:64].split(b"\n")[0].split()[-1:] == [b"0"]


def read_tokenizer_model(path):
    """Meta's `tokenizer.model`: sentencepiece for LLaMA 1 and 2, tiktoken's text format for LLaMA
    3."""
    with open(path, "rb") as file:
        model = file.read()
    if is_tiktoken(model):
        backend = Llama3Converter(path, extra_special_tokens=LLAMA3_SPECIAL).converted()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token=LLAMA3_SPECIAL[0], eos_token=LLAMA3_SPECIAL[1],
            pad_token=LLAMA3_SPECIAL[4])
        tokenizer.ends_of_turns = ["<|eot_id|>", "<|eom_id|>"]  # Meta's code stops there too
        return tokenizer
    return made_from(model, "", dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>"))


def read_tokenizer_gguf(path):
    """The tokenizer of a `.gguf` file. One of byte pairs is built by transformers, and four errors
    of its versions are mended: an <|endoftext|> that the embedding lacks, words that no merge
    makes, where a text is split before merging, and a space lost at its beginning."""
    reader = open_gguf(path)

    def said(key, default=None):
        return said_in(reader, f"tokenizer.{key}", default)

    if said("ggml.model") == "llama":
        pieces = said("ggml.tokens")
        model = sentencepiece_model(pieces, said("ggml.scores"), said("ggml.token_type"),
                                    said("ggml.add_space_prefix", True))
        names = dict(unk_token="unknown", bos_token="bos", eos_token="eos", pad_token="padding")
        ids = {role: said(f"ggml.{name}_token_id") for role, name in names.items()}
        return made_from(model, said("chat_template"),
                         {role: pieces[i] for role, i in ids.items() if i is not None})
    theirs = AutoTokenizer.from_pretrained(os.path.dirname(path) or ".",
                                           gguf_file=os.path.basename(path))
    state = json.loads(theirs.backend_tokenizer.to_str())
    vocab = state["model"]["vocab"]
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in vocab]
    state["model"]["ignore_merges"] = True
    special = {role: token for role, token in roles_of(theirs).items() if token in vocab}
    backend = Tokenizer.from_str(json.dumps(state))
    splits = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)],
              "llama-bpe": [pre_tokenizers.Split(Regex(TikTokenConverter().pattern), "isolated")]}
    if (kind := said("ggml.pre")) not in splits:
        stop(f"{path}: how its tokenizer splits texts, {kind or 'which it does not say'}, is not "
             f"known here, only {', '.join(splits)}: name the model's Hugging Face directory")
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits[kind], pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=kind != "llama-bpe")])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=theirs.chat_template,
                                   **special)


def read_tokenizer_hugging_face(path):
    """As its tokenizer.json says, whatever its class: some of transformers 5 build the splitting of
    texts again, as GPT2Tokenizer, by which SmolLM2's digits are no longer split off, or add tokens.
    Where there is only sentencepiece's model, which transformers would convert with its merges in
    the order of ids, it is converted here."""
    def content(name):
        file = os.path.join(path, name)
        if not os.path.isdir(path):
            file = try_to_load_from_cache(path, name)
        if not isinstance(file, str) or not os.path.exists(file):
            return b""
        with open(file, "rb") as opened:
            return opened.read()

    theirs = AutoTokenizer.from_pretrained(path)  # of a hub name, it fetches the files
    model = content("tokenizer.model")
    model = b"" if is_tiktoken(model) else model
    if content("tokenizer.json"):
        theirs = PreTrainedTokenizerFast.from_pretrained(path)
    elif model:
        added = [token for _, token in sorted(theirs.added_tokens_decoder.items())]
        return made_from(model, theirs.chat_template, roles_of(theirs), added)
    theirs.sentencepiece = model
    return theirs


def made_from(model, template, roles, added=()):
    """The tokenizer of a sentencepiece model and tokens that were `added`, in the order of their
    ids. It keeps the model's bytes: it is exported with them, since llama.cpp's converter reads the
    scores there."""
    backend = read_sentencepiece(model, template)
    for token in added:
        if token.special:
            backend.add_special_tokens([token])
        elif token.content not in backend.get_vocab():  # else the model's own user-defined piece
            backend.add_tokens([token])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template or None,
                                        **roles)
    tokenizer.sentencepiece = model
    return tokenizer


def roles_of(tokenizer):
    """{"eos_token": "</s>", ...}"""
    return {role: token for role, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)}


def load_tokenizer(path, model=None):
    """The tokenizer of a checkpoint (see `lib.checkpoints.read`), or of a folder that holds a
    `tokenizer.model`. `model`: the checkpoint that it is for, if that is another.

    Its `end_ids` are the tokens that end an answer, first the one with which the template does so.
    It has a chat template, its own or CHAT_TEMPLATE, and a padding token that does not end an
    answer: a reward model is read at the last token that is not padding, which is such an end.
    """
    if path == "data/tokenizer" and not os.path.isdir(path):  # else it would be sought on the hub
        stop(f"{path}: missing, and the demo's vocabulary with it; run python data_gen.py first, "
             "or name a model")
    refuse_others(path)
    folders = [path, os.path.dirname(os.path.abspath(path))] if is_meta(path) else [path]
    metas = next((file for folder in folders
                  if os.path.exists(file := os.path.join(folder, "tokenizer.model"))), None)
    with explain(f"{path}: no tokenizer can be loaded from it"), quiet():
        if path.endswith(".gguf"):
            tokenizer = read_tokenizer_gguf(path)
        elif metas and not os.path.exists(os.path.join(path, "tokenizer_config.json")):
            tokenizer = read_tokenizer_model(metas)
        else:
            tokenizer = read_tokenizer_hugging_face(path)
    # an earlier program may have left them in tokenizer.json: texts would be cut, or filled up
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    # whether a text has LLaMA 2's space at the beginning of a whole dialogue only
    tokenizer.one_space = getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme",
                                  "") == "first"
    if tokenizer.eos_token_id is None:
        stop(f"{path}: the tokenizer has no end-of-sequence token")
    if not tokenizer.chat_template:
        tokenizer.chat_template = CHAT_TEMPLATE
    template = str(tokenizer.chat_template)
    if "strftime_now" in template and "date_string" not in template:
        print(f"{path}: its chat template writes the time, so prompts depend on it; a run that is "
              "resumed on another day may differ")
    # a token that the template writes is a control token, even where it is not flagged as one
    unflagged = [token.content for token in tokenizer.added_tokens_decoder.values()
                 if not token.special and is_markup(token.content, tokenizer.chat_template)]
    tokenizer.backend_tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in unflagged])
    vocab_size, ends = rows_and_ends(path)
    ends += map(tokenizer.convert_tokens_to_ids, getattr(tokenizer, "ends_of_turns", []))
    if model and model != path:
        vocab_size, its_own = rows_and_ends(model)
        ends += [end for end in its_own if end < len(tokenizer)]
    with explain(path):
        check_template(tokenizer)
        end = encode_completion(tokenizer, "a", "b")[1][-1]
    tokenizer.end_ids = list(dict.fromkeys([end, tokenizer.eos_token_id, *ends]))
    tokenizer.pad_token = padding_token(tokenizer, vocab_size, path)
    return tokenizer


def rows_and_ends(path):
    """What a Hugging Face checkpoint states of its tokens beside the tokenizer: the rows of its
    embedding, 0 if unknown, and the ids that end a text, such as LLaMA 3's three: those of
    generation_config.json, else of config.json. (transformers' classes would make them up.)"""
    if path.endswith(".gguf") or is_meta(path):
        return 0, []
    config, ends = {}, stated(path).get("eos_token_id")
    with contextlib.suppress(Exception), quiet():  # a folder of a tokenizer alone has none
        config, _ = LlamaConfig.get_config_dict(path)
    if ends is None:
        ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends]
    return config.get("vocab_size", 0), [end for end in ends if type(end) is int and end >= 0]


def padding_token(tokenizer, vocab_size, path):
    """A token to pad with: the tokenizer's own unless that may end an answer, else one that no text
    holds: one named so, the unknown one, any other control token that has no part in the template,
    the beginning of a text; or a new one, if the embedding of `vocab_size` rows has room for it."""
    said = [dict(role=role, content="a") for role in ("system", "user", "assistant")]
    written = str(tokenizer.chat_template) + in_template(tokenizer, said[1:])
    with contextlib.suppress(Exception):  # some templates refuse a system message
        written += in_template(tokenizer, said)
    control = [token.content for token in tokenizer.added_tokens_decoder.values()
               if token.special and token.content not in written]
    named = [token for token in control if re.search("pad|reserved|unused", token, re.IGNORECASE)]
    roles = roles_of(tokenizer).values()
    idle = [token for token in control if token not in roles]
    for token in (tokenizer.pad_token, *named, tokenizer.unk_token, *idle, tokenizer.bos_token):
        if token and tokenizer.convert_tokens_to_ids(token) not in tokenizer.end_ids:
            return token
    if len(tokenizer) < vocab_size and "<pad>" not in tokenizer.get_vocab():
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
        return "<pad>"
    stop(f"{path}: no token to pad with, since each of its control tokens may end an answer: set "
         "pad_token in its tokenizer_config.json to another token, one that no text holds")
