"""How much memory and arithmetic a run needs, from the model's configuration alone.

    python -m tools.budget ppo --sft path/to/sft --processes 8
    python -m tools.budget                # a table: LLaMA of 1B to 70B, on 1, 8 and 64 processes

sft, rm (train_rm.py) and ppo take the options of the stage. All sizes are the largest that the
settings allow: every text is as long as it may be, and no response ends early.
"""

import argparse
import contextlib
import importlib
import os
import sys

import torch
from transformers import LlamaConfig

from lib.checkpoints import read_config
from lib.data import longest_prompt
from lib.errors import clean_exit, stop
from lib.flops import training_flops, update_flops
from lib.lora import add_lora, trainable
from lib.memory import LAPTOP, rollout_bytes, step_bytes
from lib.settings import parse
from model import DEMO_MODEL, Llama, LlamaBackbone, ScalarHead, load_tokenizer


# ------------------------------------------------------------------------------------------------
# Memory

def networks(stage, config, args, device="meta"):
    """The models of a stage: sft's, rm's, or ppo's actor, critic, reference and reward model. On
    the meta device a tensor has a shape, and takes no memory."""
    with torch.device(device), contextlib.redirect_stdout(None):
        if stage == "rm":
            return [add_lora(ScalarHead(LlamaBackbone(config)), args)]
        actor = add_lora(Llama(config), args)
        if stage == "sft":
            return [actor]
        critic = add_lora(ScalarHead(LlamaBackbone(config)), args)
        # as in ppo.py: what is frozen is what learns with its adapters off
        ref = actor if args.lora_rank else Llama(config).requires_grad_(False)
        shared = args.lora_rank and args.critic == "rm"
        scalar = None if shared else ScalarHead(LlamaBackbone(config)).requires_grad_(False)
        return [actor, critic, ref, critic if shared else scalar]


def parameters(model):
    """{part: number of parameters} of a `Llama` or a `ScalarHead`."""
    parts = {"embed_tokens": "embedding", "layers": "layers", "norm": "norm", "weight": "head"}
    count = dict.fromkeys([*parts.values(), "adapters"], 0)
    for name, parameter in model.named_parameters():
        part = "adapters" if name.endswith((".A", ".B")) else parts[name.split(".")[1]]
        count[part] += parameter.numel()
    return count


def budget(stage, config, args):
    """{"weights", "gradients", "optimizer", "activations", "rollout", "gathered", "peak",
    "resident"}, bytes per process, and "flops" of an optimizer step (ppo: of an update).

    A prompt of the reward model has 4 completions. "gathered": many processes share out all
    weights, but each holds whole the embedding, norm and head of every model, two layers, and the
    gradients of the actor's embedding, norm and head, and of one layer
    (lib.distributed.to_device). "gradients": of one model, since actor and critic step one after
    the other. "peak": what is there at one time; gradients are freed before a rollout. "resident":
    on a CPU freed memory is kept (lib.kernels.keep_freed_memory), and its holes add three quarters
    of the activations, as bench/memory.py measures, in two steps; more in a long run
    (docs/memory.md).
    """
    def size(parameters):
        return sum(p.nbytes for p in parameters)

    models, n = networks(stage, config, args), args.processes
    every = {id(p): (name, p) for model in models for name, p in model.named_parameters()}.values()
    weights = size(p for _, p in every) / n
    # Adam keeps two numbers per parameter; a model's gradients are freed before the next one's
    optimizer = 2 * size(p for _, p in every if p.requires_grad) / n
    gradients = max(size(trainable(model)) for model in models) / n
    layer = models[0].model.layers[0]
    gathered = rollout = 0
    if n > 1:
        ends = [p for name, p in models[0].named_parameters() if ".layers." not in name]
        gathered = (size(p for name, p in every if ".layers." not in name)
                    + size(p for p in ends if p.requires_grad)
                    + 2 * size(layer.parameters()) + size(trainable(layer)))
    batch, context = args.batch_size, config.max_position_embeddings
    rows = min(args.micro_batch_size or LAPTOP[stage],
               -(-(args.minibatch_size if stage == "ppo" else batch) // n))
    activations = step_bytes(stage, config, rows, args)
    if stage == "ppo":
        response = args.max_new_tokens
        prompt = longest_prompt([argparse.Namespace(config=config)], args)
        length = prompt + response
        flops = update_flops(config, batch * [(prompt, response)], args)
        if args.ptx_coef:
            flops += args.ppo_epochs * training_flops(config, batch * [length], batch * length,
                                                      args)
        rollout = rollout_bytes(config, -(-batch // n), prompt, response, args)
        if not (args.dtype == "float32" and n == 1 or args.shard_rollout):  # model.decoding_copy
            plain = sum(n for part, n in parameters(models[0]).items() if part != "adapters")
            rollout += plain * (2 if args.dtype == "bfloat16" else 4)
    else:
        length, texts = min(args.max_length, context), 4 if stage == "rm" else 1
        projected = batch * length if stage == "sft" else 0
        flops = training_flops(config, texts * batch * [length], projected, args)
    peak = weights + optimizer + gathered + max(gradients + activations, rollout)
    resident = peak + (0.75 * activations if torch.device(args.device).type == "cpu" else 0)
    return dict(weights=weights, gradients=gradients, optimizer=optimizer, activations=activations,
                rollout=rollout, gathered=gathered, peak=peak, resident=resident, flops=flops)


PROCESSES = ("processes", 1, 1, "that share the model")  # beside the settings of the stages
MODEL = dict(sft="model", rm="model", ppo="sft")  # the option that names a stage's LLaMA


def script_of(stage):
    return importlib.import_module("train_rm" if stage == "rm" else stage)


def predict(stage, options):
    """Print the size of the model, and the budget, of a run of this stage with these options."""
    script, real_if = script_of(stage), ["sft", "rm", "reward"] if stage == "ppo" else ["model"]
    args, _ = parse(f"tools.budget {stage}", script.__doc__, [*script.SETTINGS, PROCESSES], options,
                    real_if)
    path = getattr(args, MODEL[stage])
    if path is None or path == "runs/sft" and not os.path.isdir(path):  # the demo's, not trained
        tokenizer = load_tokenizer(args.tokenizer or "data/tokenizer")
        config = LlamaConfig(vocab_size=max(tokenizer.get_vocab().values()) + 1, **DEMO_MODEL)
    else:
        config = read_config(path)
        if (config.architectures or [""])[0].endswith("ForSequenceClassification"):
            stop(f"--{MODEL[stage]} {path}: a reward model, where a language model is wanted")
    found = budget(stage, config, args)
    for part, number in parameters(networks(stage, config, args)[0]).items():
        print(f"parameters, {part}: {number:,}")
    flops = found.pop("flops")
    for name, value in found.items():
        print(f"{name}: {value / 2**30:.3f} GiB per process")
    step = "an update" if stage == "ppo" else "an optimizer step"
    print(f"{step}, all processes: {flops:.3e} FLOP")


# ------------------------------------------------------------------------------------------------
# The table

LLAMA_2 = dict(vocab_size=32000, max_position_embeddings=4096)
SIZES = {  # Meta's: LLaMA 3.2 1B; LLaMA 2 7B, 13B and 70B
    "1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
               num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131072,
               tie_word_embeddings=True),
    "7B": dict(LLAMA_2, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
               num_attention_heads=32),
    "13B": dict(LLAMA_2, hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
                num_attention_heads=40),
    "70B": dict(LLAMA_2, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                num_attention_heads=64, num_key_value_heads=8),
}


def settings(stage, options, **more):
    """The settings of a stage for a real model, with `more` and the user's `options`."""
    more = [f"--{name}={value}" for name, value in more.items()]
    given = [f"--{MODEL[stage]}=-", *more, *options]
    with contextlib.redirect_stdout(None):
        return parse(stage, "", [*script_of(stage).SETTINGS, PROCESSES], given, [MODEL[stage]])[0]


def table(options):
    """Print what ppo.py needs with its settings for a real model, on GPUs."""
    columns = {f"{n} process{'es' * (n > 1)}{kind}":
               settings("ppo", options, lora_rank=8, processes=n)
               for kind in ("", ", LoRA") for n in (1, 8, 64)}
    for name, args in columns.items():
        args.device = "cuda"  # which this machine need not have
        if not name.endswith("LoRA"):  # the options of LoRA are for its own columns
            args.lora_rank, args.base_dtype = 0, "float32"
    rows = [f"| GiB per process | {' | '.join(columns)} | FLOP per update |", "| --- " * 8 + "|"]
    for name, size in SIZES.items():
        found = [budget("ppo", LlamaConfig(**size), args) for args in columns.values()]
        peaks = " | ".join(f"{one['peak'] / 2**30:,.0f}" for one in found)
        rows.append(f"| {name} | {peaks} | {found[0]['flops']:.1e} |")
    print("\n".join(rows))  # not row by row: a size may end the program


@clean_exit
def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in MODEL:
        return predict(argv[0], argv[1:])
    if argv and not argv[0].startswith("-"):
        stop(f"{argv[0]}: not a stage; name sft, rm or ppo, or none for the table")
    parser = argparse.ArgumentParser(prog="python -m tools.budget", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("processes", "lora_rank"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    given, options = parser.parse_known_args(argv)
    for name, value in vars(given).items():
        if value is not None:
            stop(f"--{name} {value}: the table has columns of its own for that; name a stage: "
                 f"python -m tools.budget ppo --{name} {value}")
    table(options)


if __name__ == "__main__":
    main()
