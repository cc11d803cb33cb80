"""Checkpoints of every origin: Hugging Face's here, Meta's and GGUF's in lib/formats.py.

`read` hands over a configuration and the tensors under Hugging Face's names; `write` exports them.
"""

import contextlib
import json
import os
import re
import shutil

import torch
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from lib.errors import explain, quiet, refuse_nan, stop
from lib.formats import gguf_config, is_meta, open_gguf, read_gguf, read_meta, unwrapped
from lib.generation_config import generation_config_of


def refuse_others(path):
    """End the program with one line if `path` is something that only looks like a checkpoint, or a
    local path, and no name of the hub, that does not exist."""
    is_local = path.startswith((".", "/", "~", "runs/", "data/")) or path.count("/") > 1
    if is_local and not os.path.exists(path):
        stop(f"{path}: no such file or folder")
    with explain(f"{path}: cannot be read"):
        names = sorted(os.listdir(path)) if os.path.isdir(path) else []
    for file in [os.path.join(path, name) for name in names] or [path]:
        if os.path.isfile(file) and os.path.getsize(file) < 1024:
            with explain(f"{file}: cannot be read"), open(file, "rb") as opened:
                if opened.read(40).startswith(b"version https://git-lfs"):
                    stop(f"{file}: a Git LFS pointer, not the file: run git lfs pull in its folder")
    if "adapter_config.json" in names:
        stop(f"{path}: a PEFT adapter: merge it into its base model first (merge_and_unload), "
             "and name the result")
    if "params.json" in names and "consolidated.safetensors" in names:
        stop(f"{path}: a Mistral model in its own format; only LLaMA's architecture is "
             "implemented here")


def read(path, dtype, scalar=False):
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
    rope = config.rope_parameters
    if rope["rope_type"] == "default" and "factor" in rope:
        stop(f"{path}: its rope_scaling has a factor, and no type that uses it")
    if rope["rope_type"] == "longrope":  # whose angles change while a text grows
        stop(f"{path}: rope_scaling of type longrope is not implemented")
    if rope.get("partial_rotary_factor", 1) != 1:
        stop(f"{path}: a partial_rotary_factor other than 1 is not implemented")
    if config.pad_token_id is not None and config.pad_token_id >= config.vocab_size:
        print(f"{path}: pad_token_id {config.pad_token_id} has no row in the embedding: ignored, "
              "the tokenizer's counts")
        config.pad_token_id = None  # transformers would not build the model
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
    generation_config = None if scalar else generation_config_of(path)

    def load(names=None):
        with explain(f"{path}: cannot be loaded as a LLaMA checkpoint"), quiet():
            return kind.from_pretrained(
                path, config=config, generation_config=generation_config, dtype=dtype,
                output_loading_info=True, ignore_mismatched_sizes=True, key_mapping=names)

    model, info = load()
    unused = sorted(info["unexpected_keys"])
    if adapters := [name for name in unused if ".lora_" in name]:
        stop(f"{path}: a PEFT adapter that is not merged, with tensors such as {adapters[0]}: "
             "merge it first (merge_and_unload), and save the result")
    if info["missing_keys"] and (names := unwrapped(unused, path)):
        model, info = load({f"^{re.escape(name)}$": plain for name, plain in names.items()})
    wrong = sorted(info["missing_keys"]) or sorted(str(key[0]) for key in info["mismatched_keys"])
    if wrong:
        stop(f"{path}: {len(wrong)} of the model's tensors are missing or of the wrong shape, such "
             f"as {wrong[0]}")
    if unused := sorted(info["unexpected_keys"]):
        stop(f"{path}: {len(unused)} of its tensors have no place in this model, such as "
             f"{unused[0]}")
    if scalar and config.num_labels != 1:
        stop(f"{path}: a reward model has one label, this one has {config.num_labels}")
    tensors = model.state_dict()
    if not scalar and config.tie_word_embeddings and not torch.equal(
            tensors["lm_head.weight"], tensors["model.embed_tokens.weight"]):
        print(f"{path}: tie_word_embeddings is set to false, since it has a head of its own")
        config.tie_word_embeddings = False
    return config, tensors, generation_config


def add_older_keys(folder):
    """Let transformers 4 read what 5 has written: without the older keys it would silently take
    10000 for rope theta, and not find the tokenizer's class."""
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


def match_embedding(path, config, tensors, tokenizer, resize):
    """End the program with one line if the tokenizer has more tokens than the embedding has rows;
    with `resize` give it the rows that it lacks, each the mean of the others."""
    ids = set(tokenizer.get_vocab().values())
    lacking = sorted(i for i in ids if i >= config.vocab_size)
    if not lacking:
        return
    if not resize:
        stop(f"{path}: the model's embedding of {config.vocab_size} rows lacks {len(lacking)} of "
             f"the tokenizer's {len(ids)} tokens, such as "
             f"{tokenizer.convert_ids_to_tokens(lacking[0])}; if they belong together, "
             "--resize_embedding of sft.py or train_rm.py adds rows for them")
    more = max(ids) + 1 - config.vocab_size
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & tensors.keys():
        mean = tensors[name].float().mean(0, keepdim=True).to(tensors[name].dtype)
        tensors[name] = torch.cat([tensors[name], mean.expand(more, -1)])
    print(f"{path}: {more} rows added to its embedding, for the tokens that it lacks")
    config.vocab_size += more


def fill(model, tensors, path, dtype):
    """Make these tensors, in `dtype`, the parameters of `model`, which is on the meta device; they
    are not copied. A tensor without a parameter, or the reverse, ends the program, and so does one
    that is not finite."""
    if getattr(model.config, "tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    names = {name for name, _ in model.named_parameters()}
    missing, unused = names - tensors.keys(), tensors.keys() - names
    for wrong, why in ((missing, "missing"), (unused, "of no use here")):
        if wrong:
            stop(f"{path}: {len(wrong)} tensors are {why}, such as {min(wrong)}")
    refuse_nan(path, tensors)
    with explain(f"{path}: its tensors do not match its configuration"):
        model.load_state_dict(tensors, strict=False, assign=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_()


def write(folder, config, tensors, tokenizer, generation_config, scalar):
    """A plain Hugging Face directory: every file whole or not there, config.json last.

    `tensors`: {Hugging Face's name: tensor}; `scalar`: as a `LlamaForSequenceClassification`.
    """
    refuse_nan(f"{folder}: not written", tensors, code=1)
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
        with explain(f"{folder}: the checkpoint cannot be written", "; when it can, --resume "
                     "continues the run", code=1), quiet():
            os.makedirs(folder, exist_ok=True)
            shutil.rmtree(part, ignore_errors=True)
            plain.save_pretrained(part, state_dict=tensors)
            tokenizer.save_pretrained(part)
            if model := getattr(tokenizer, "sentencepiece", None):
                with open(os.path.join(part, "tokenizer.model"), "wb") as file:
                    file.write(model)
            add_older_keys(part)
            if not model:  # there may be that of an earlier export, of another tokenizer
                with contextlib.suppress(FileNotFoundError):
                    os.remove(os.path.join(folder, "tokenizer.model"))
            for name in sorted(os.listdir(part), key=lambda name: name == "config.json"):
                # safetensors lets only their owner read its files
                shutil.copymode(os.path.join(part, "config.json"), os.path.join(part, name))
                os.replace(os.path.join(part, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(part, ignore_errors=True)
