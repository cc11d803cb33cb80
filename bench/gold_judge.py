"""The judge of bench/real_run.py, for `ppo.py --gold`: a reward model that PPO never sees, whose
folder the environment variable GOLD names."""

import functools
import os

import torch

from lib.dialogue import encode_completion
from model import load_scalar_head, load_tokenizer


@functools.cache
def judge():
    path = os.environ["GOLD"]
    return load_tokenizer(path), load_scalar_head(path)


@torch.no_grad()
def score(user_input, completion):
    """The score of one text, as if it had ended."""
    tokenizer, reward_model = judge()
    tokens = torch.tensor([sum(encode_completion(tokenizer, user_input, completion), [])])
    return reward_model(tokens)[0, -1].item()
