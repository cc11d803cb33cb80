"""How much of the learning rate does Adam's epsilon take at the first step?

Adam moves a weight by lr m / (sqrt(v) + epsilon), m and v being running means of its gradient and of
the square of that (Kingma and Ba 2015, algorithm 1). With an epsilon far below sqrt(v) a weight moves
by up to lr. The more weights a model has, the smaller is each entry of a gradient of length 1: the
root of its mean square is 1 / sqrt(weights).

    python bench/adam.py                      # the first step of random LLaMAs; 14 GB for the largest
    python bench/adam.py --sizes 21M
    python bench/real_run.py --steps data sft rm adam --seeds 0 1   # what comes of it in PPO
"""

import argparse
import os
import sys
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from bench.memory import CHECKED  # noqa: E402
from lib.data import collate  # noqa: E402
from model import random_llama  # noqa: E402
from ppo import masked_whiten, policy_loss, response_logprobs  # noqa: E402
from tools.budget import SIZES  # noqa: E402

RANDOM = {name: size for name, (size, _) in CHECKED.items()} | {"1.2B": SIZES["1B"]}
EPSILONS = [1e-5, 1e-8]


def gradient(size, rows=4, prompt=32, response=32):
    """The gradient of PPO's policy loss at its first step, for a random LLaMA: each parameter's, and
    the length of the whole."""
    torch.manual_seed(0)
    llama = random_llama(LlamaConfig(initializer_range=0.02, **size))
    prompts, responses = (torch.randint(llama.config.vocab_size, (rows, n)).tolist()
                          for n in (prompt, response))
    input_ids, places = collate(list(zip(prompts, responses)), 0)
    mask = torch.ones(rows, response)
    args = SimpleNamespace(temperature=1.0, entropy_coef=0.0)
    logprobs = response_logprobs(llama, input_ids, places, mask, args)
    advantages = masked_whiten(torch.randn(rows, response), mask)
    loss, _ = policy_loss(logprobs, logprobs.detach(), advantages, mask, 0.2)
    loss.backward()
    found = [p.grad for p in llama.parameters()]
    return found, torch.stack([x.norm() for x in found]).norm().item()


def step_length(gradients, scale, epsilon):
    """The mean length of Adam's first step, in learning rates: its m is then g, and its sqrt(v)
    |g|, so that is |g| / (|g| + epsilon), of the gradients times `scale`. Over the weights that have
    a gradient: the embeddings of words that do not occur have none."""
    total = sum((x.abs() * scale / (x.abs() * scale + epsilon)).sum(dtype=torch.float64).item()
                for x in gradients)
    return total / sum(x.count_nonzero().item() for x in gradients)


def first_steps(sizes):
    print("| LLaMA | weights | gradient's length | per weight, clipped to 1 | "
          + " | ".join(f"step, epsilon {epsilon:g}{kind}" for kind in (", clipped", ", as it is")
                       for epsilon in EPSILONS) + " |\n" + "| --- " * (4 + 2 * len(EPSILONS)) + "|")
    for name in sizes:
        found, length = gradient(RANDOM[name])
        number = sum(x.numel() for x in found)
        clipped = min(1.0, 1 / length)
        root = length * clipped / number ** 0.5
        cells = [f"{step_length(found, scale, epsilon):.2f}" for scale in (clipped, 1.0)
                 for epsilon in EPSILONS]
        print(f"| {name} | {number:,} | {length:.2f} | {root:.1e} | {' | '.join(cells)} |",
              flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=RANDOM, default=list(RANDOM))
    first_steps(parser.parse_args().sizes)


if __name__ == "__main__":
    main()
