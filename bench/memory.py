"""Memory as tools.budget predicts it, and as it is: peaks of random LLaMAs on this CPU (Linux).

    python bench/memory.py                      # the table
    python bench/memory.py --stages ppo --sizes 21M --lora_rank=8  # also with options of the stage

Each row is measured in a process of its own, since the peak counts; and each size twice: with freed
memory given back to the system, so that the peak is what was in use at one time, and kept, as the
stages keep it on a CPU. Ends with exit code 1 if a prediction is off by more than 15 %.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import ppo  # noqa: E402
import sft  # noqa: E402
import train_rm  # noqa: E402
from lib import kernels  # noqa: E402
from lib.data import collate  # noqa: E402
from lib.distributed import clip_gradients, to_device  # noqa: E402
from lib.lora import trainable  # noqa: E402
from lib.training import autocast  # noqa: E402
from model import last_token  # noqa: E402
from tools.budget import budget, networks, settings  # noqa: E402

CHECKED = {  # name: (model, rows of a micro-batch)
    "21M": (dict(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=10,
                 num_attention_heads=6, num_key_value_heads=2), 8),
    "135M": (dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                  num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True), 2),
}


def memory(field):
    """Bytes of this process on Linux: VmRSS now, VmHWM at its peak."""
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def measure(stage, name, freed, options):
    """Two optimizer steps (ppo: updates) of a random LLaMA in this process, printed as a row of the
    table -> whether the prediction is off by more than 15 %. Two, since only the second has Adam's
    state beside gradients and activations; each of two micro-batches."""
    if freed == "kept":
        kernels.keep_freed_memory()
    else:  # M_MMAP_THRESHOLD: larger blocks go back to the system as soon as they are freed
        ctypes.CDLL(None).mallopt(-3, 128 * 1024)
    (size, rows), sizes = CHECKED[name], dict(max_length=190)
    if stage == "rm":
        rows = max(1, rows // 4)
    elif stage == "ppo":
        sizes = dict(minibatch_size=2 * rows, ppo_epochs=1, max_prompt_length=127,
                     max_new_tokens=63)
    args = settings(stage, options, device="cpu", batch_size=2 * rows, micro_batch_size=rows,
                    **sizes)
    config, tokenizer = LlamaConfig(**size), SimpleNamespace(pad_token_id=0, end_ids=[-1])
    # the threads and libraries of a backward pass
    torch.randn(64, 64).requires_grad_().square().sum().backward()
    before = memory("VmRSS")
    models = [to_device(model, args) for model in networks(stage, config, args, "cpu")]
    optimizers = [torch.optim.AdamW(trainable(model), fused=True) for model in models[:2]]

    def text(n):
        return torch.randint(1, config.vocab_size, (n,)).tolist()

    def backward(model):
        """Of a micro-batch. One token is the prompt: the budget takes all for completion."""
        batch = [(text(1), text(args.max_length - 1)) for _ in range(rows)]
        if stage == "sft":
            return sft.completion_losses(model, *collate(batch, 0), args, scale=1.0)
        input_ids, places = collate(4 * batch, 0)
        with autocast(args):
            scores = last_token(model(input_ids), places)
        train_rm.ranking_loss(scores, torch.arange(len(scores))).backward()

    for _ in range(2):
        if stage == "ppo":
            (actor, critic, ref, reward_model), everyone = models, list(range(2 * rows))
            prompts = [text(args.max_prompt_length) for _ in everyone]
            experience, _ = ppo.make_experience(actor, critic, reward_model, ref, prompts,
                                                [everyone], tokenizer, args, args.kl_coef, None)
            trained = dict(actor=(actor, optimizers[0]), critic=(critic, optimizers[1]))
            ppo.train_minibatch(trained, experience, everyone, [], tokenizer, args)
            continue
        for _ in range(2):
            backward(models[0])
        clip_gradients(models[0], 1.0)
        optimizers[0].step()
        optimizers[0].zero_grad()
    found, measured = budget(stage, config, args), memory("VmHWM") - before
    predicted = found["resident" if freed == "kept" else "peak"]
    mib = " | ".join(f"{x / 2**20:.0f} MiB" for x in (found["activations"], predicted, measured))
    print(f"| {stage} | {name} | {freed} | {mib} | {predicted / measured:.2f} |", flush=True)
    return abs(predicted / measured - 1) > 0.15


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--stages", nargs="+", default=["sft", "rm", "ppo"])
    parser.add_argument("--sizes", nargs="+", default=CHECKED, choices=CHECKED)
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    args, options = parser.parse_known_args()
    if args.measure:
        raise SystemExit(measure(*args.measure, options))
    print("| stage | LLaMA | freed memory | activations | predicted | measured | ratio |\n"
          + "| --- " * 7 + "|", flush=True)
    off = [subprocess.call([sys.executable, __file__, "--measure", stage, name, freed, *options])
           for stage in args.stages for name in args.sizes for freed in ("returned", "kept")]
    raise SystemExit(any(off))


if __name__ == "__main__":
    main()
