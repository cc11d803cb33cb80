"""What a Hugging Face checkpoint states of generation, and how much of it can be exported again."""

import contextlib
import json
import os

from huggingface_hub import hf_hub_download
from transformers import GenerationConfig, LlamaConfig

from lib.errors import explain, first_line, quiet


def stated(path):
    """{field: value} of what a Hugging Face checkpoint says of generation: in
    generation_config.json, or if there is none in config.json. Ends the program with one line if
    the former is no JSON object."""
    with contextlib.suppress(Exception):  # the hub has none
        name, file = "generation_config.json", os.path.join(path, "generation_config.json")
        if not os.path.isdir(path):
            file = hf_hub_download(path, name)
        if os.path.exists(file):
            with explain(f"{path}/{name}: damaged, not a JSON object"):
                with open(file, encoding="utf-8") as opened:
                    return dict(json.load(opened).items())
    config = {}
    with contextlib.suppress(Exception), quiet():  # a tokenizer's folder has none
        config, _ = LlamaConfig.get_config_dict(path)
    return {name: config[name] for name in GenerationConfig().to_dict() if name in config}


def writable(fields):
    """(GenerationConfig, {field: why}): of what is `stated`, all that transformers would write
    again together, and why not the others. It refuses a length_penalty without num_beams, a top_p
    without do_sample, a null where it compares."""
    taken, refused = {}, dict.fromkeys(fields, "")
    config, before = GenerationConfig(), None
    while len(refused) != before:  # a field may need one that stands after it
        before = len(refused)
        for name in list(refused):
            try:
                with quiet():
                    tried = GenerationConfig(**taken, **{name: fields[name]})
                    tried.validate(strict=True)
                    json.dumps(tried.to_dict(), allow_nan=False)
            except Exception as error:
                why = str(error).removeprefix("GenerationConfig is invalid: \n")
                refused[name] = first_line(why).removeprefix(f"- `{name}`: ")
            else:
                config, taken[name] = tried, fields[name]
                del refused[name]
    return config, refused


def generation_config_of(path):
    """The GenerationConfig to export with a model: what the checkpoint states, less what
    transformers would not write, which is printed."""
    fields, name = stated(path), f"{path}/generation_config.json"
    config, refused = writable(fields)
    # a temperature or top_p without do_sample, as LLaMA 2 chat and Vicuna have, says how to sample
    sampling, others = writable(fields | {"do_sample": True})
    if len(others) < len(refused):
        print(f"{name}: do_sample is set to true, since transformers would not write it otherwise "
              f"({refused[min(refused.keys() - others.keys())]})")
        config, refused = sampling, others
    if refused:
        print(f"{name}: not exported, since transformers would not write it: "
              + "; ".join(f"{field} ({why})" for field, why in refused.items()))
    return config
