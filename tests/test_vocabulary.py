"""Logits a piece at a time: the same losses and gradients, in less memory."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from model import DEMO_MODEL, over_vocabulary, random_llama


def losses(logits, tokens):
    return F.cross_entropy(logits, tokens, reduction="none")


@pytest.mark.parametrize("number", [1, 7, 8, 9, 40])
def test_losses_and_gradients_are_those_of_plain_loops(number):
    torch.manual_seed(0)
    llama = random_llama(LlamaConfig(vocab_size=30, **DEMO_MODEL)).double()
    states = torch.randn(number, llama.config.hidden_size, dtype=torch.float64, requires_grad=True)
    tokens, weights = torch.randint(30, (number,)), torch.randn(number, dtype=torch.float64)
    found = over_vocabulary(llama, states, tokens, losses, piece=8)
    (found * weights).sum().backward()
    head = llama.lm_head.weight.detach()
    head_gradient = torch.zeros_like(head)
    for n in range(number):
        state = states[n].detach()
        logits = [sum(w * s for w, s in zip(row, state.tolist())) for row in head.tolist()]
        largest = max(logits)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in logits))
        assert abs(found[n].item() - (log_sum - logits[tokens[n]])) < 1e-9
        # d loss / d logit = probability - [the word is the token]
        slope = torch.tensor([math.exp(x - log_sum) - (v == tokens[n].item())
                              for v, x in enumerate(logits)], dtype=torch.float64) * weights[n]
        torch.testing.assert_close(states.grad[n], slope @ head, atol=1e-9, rtol=1e-7)
        head_gradient += torch.outer(slope, state)
    torch.testing.assert_close(llama.lm_head.weight.grad, head_gradient, atol=1e-9, rtol=1e-7)


def test_no_tensor_has_the_size_of_all_logits():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if torch.is_tensor(out):
                self.numel = max(self.numel, out.numel())
            return out

    llama = random_llama(LlamaConfig(vocab_size=500, **DEMO_MODEL))
    states, tokens = torch.randn(300, 128, requires_grad=True), torch.randint(500, (300,))
    found = {}
    for piece in (300, 20):
        with Largest() as largest:
            over_vocabulary(llama, states, tokens, losses, piece).sum().backward()
        found[piece] = largest.numel
    assert found[300] == 300 * 500
    assert found[20] == 500 * 128  # the head's weight and its gradient
