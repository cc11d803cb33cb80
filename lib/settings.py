"""Settings: a table per script, a line each (name, the demo's value, a real model's, what it is),
and from it the options of the command line. Here are the rows that all stages share."""

import argparse
import contextlib
import math
import os
import re
import sys

import torch

from lib.distributed import RANK, WORLD
from lib.errors import first_line, stop


def positive(text):
    """argparse type: a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


def whole(text):
    """argparse type: a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def any_whole(text):
    """argparse type: a whole number, also one below 0, of 64 bits, as generators take it."""
    if not re.fullmatch(r"-?[0-9]+", text) or abs(int(text)) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of 64 bits")
    return int(text)


def number_type(what, fits):
    """argparse type: a number for which `fits` is true, in words `what`."""
    def read(text):
        with contextlib.suppress(ValueError):
            if fits(float(text)):
                return float(text)
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return read


at_least_0 = number_type("a finite number of at least 0", lambda x: 0 <= x < math.inf)
above_0 = number_type("a number above 0", lambda x: x > 0)  # also inf
finite_above_0 = number_type("a finite number above 0", lambda x: 0 < x < math.inf)
finite = number_type("a finite number", math.isfinite)


def usable_device(text):
    """argparse type: a device on which PyTorch computes. With many processes, "cuda" means a GPU
    for each."""
    if WORLD > 1 and text == "cuda":
        text = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be used ({first_line(error)})") from None
    if torch.device(text).type == "cuda":
        # cuDNN's attention, which PyTorch prefers on some GPUs, makes a plan for each new shape
        # (pytorch#191612), and here nearly every batch has one
        torch.backends.cuda.enable_cudnn_sdp(False)
    if torch.device(text).type == "mps":
        print("mps: untested here; bfloat16 and many processes are not supported")
    return text


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
COMMON = [
    "LoRA (Hu et al. 2021): a few weights learn beside frozen ones",
    ("lora_rank", 0, 0, "rank of the adapters; 0: no adapters, every weight is trained", whole),
    ("lora_alpha", 16, 16, "the adapters' output is scaled by this over the rank"),
    ("lora_targets", *2 * ["q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"],
     "linear maps of each layer that get an adapter"),
    ("base_dtype", *2 * ["float32"], "of the frozen weights", ["float32", "bfloat16"]),
    "the run",
    ("seed", 0, 0, "seed of every random choice", any_whole),
    ("dtype", *2 * ["float32"], "of the matrix products; weights stay float32",
     ["float32", "bfloat16"]),
    ("tf32", False, False, "on a GPU, faster float32 products, with mantissas of 10 bits, not 23"),
    ("gradient_checkpointing", False, False, "compute each layer again in the backward pass: less "
     "memory, a third more time"),
    # the demo's model is so small that a GPU has nothing to gain
    ("device", "cpu", DEVICE, "where to compute: cpu, cuda, cuda:1, mps", usable_device),
    ("save_every", 100, 100, "steps (ppo.py: updates) between saved states, in --out/last"),
    ("keep", 0, 0, "export the model with each saved state, and keep the newest N", whole),
    ("process_timeout", 30, 30, "minutes to wait for another process before that is an error"),
    ("resume", False, False, "continue an interrupted run in --out"),
    ("tensorboard", False, False, "write the metrics, and samples as text, to --out/tensorboard "
     "too"),
    ("accept_changed_data", False, False, "resume even if data or models have changed"),
    ("overwrite", False, False, "replace an earlier run in --out"),
]


def parse(script, doc, table, argv, real_if):
    """The settings of a run, from a script's table and the command line, printed a line each, those
    that the user changed first -> (args, whether it is the demo).

    A row of `table`: (name, the demo's value, a real model's value, what it is[, type or choices]);
    a text alone starts a group of the --help. The values of a real model apply if an option named
    in `real_if` is given. Without a type, that of the values counts; a whole number is then at
    least 1, any other number at least 0.
    """
    parser = argparse.ArgumentParser(prog=script, description=doc.split("\n\n")[0],
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    group, rows = parser, [row for row in table + COMMON if not isinstance(row, str)]
    for row in table + COMMON:
        if isinstance(row, str):
            group = parser.add_argument_group(row)
            continue
        name, demo, real, what, *kind = row
        value = real if demo is None else demo
        if isinstance(value, bool):
            group.add_argument(f"--{name}", action="store_true", help=what)
            continue
        default = f"demo {demo}" if demo != real else f"default {demo}"
        if demo != real and real is not None:
            default += f", real model {real}"
        kind = kind[0] if kind else str if value is None else type(value)
        options = dict(choices=kind) if isinstance(kind, list) else dict(
            type={int: positive, float: at_least_0}.get(kind, kind))
        about = what if value is None else f"{what} ({default})"
        group.add_argument(f"--{name}", help=about.replace("%", "%%"), **options)
    if "--dry_run" in (sys.argv if argv is None else argv):
        stop("--dry_run is a tool now: python -m tools.budget sft, rm or ppo, and the same options")
    args = parser.parse_args(argv)
    is_demo = all(getattr(args, name) is None for name in real_if)
    changed = [row[0] for row in rows
               if getattr(args, row[0]) is not None and getattr(args, row[0]) is not False]
    for name, demo, real, *_ in rows:
        if getattr(args, name) is None:
            value = demo if is_demo else real
            setattr(args, name, usable_device(value) if name == "device" else value)
    args = argparse.Namespace(**{row[0]: getattr(args, row[0]) for row in rows})  # in their order
    for name, default, *_ in rows if not args.lora_rank else []:
        if name in ("lora_alpha", "lora_targets", "base_dtype") and getattr(args, name) != default:
            stop(f"--{name} is for LoRA: it needs --lora_rank")
    if args.lora_rank and vars(args).get("resize_embedding"):
        stop("--resize_embedding adds rows, which --lora_rank would freeze as they are, all alike: "
             "train them without LoRA first")
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    if RANK == 0:
        whose = "the demo" if is_demo else "a real model's settings"
        print(f"{script}, {whose}: {len(changed)} changed")
        for name in changed + [row[0] for row in rows if row[0] not in changed]:
            mark = "*" if name in changed else " "
            print(f"  {mark} {name:<24}{getattr(args, name)}", flush=True)
    return args, is_demo
