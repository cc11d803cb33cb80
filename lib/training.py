"""What a training step of every stage uses."""

import math

import torch


def autocast(args):
    """bf16 matrix products where --dtype says so; what is sensitive (norms, losses, softmax) stays
    float32."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16,
                          enabled=args.dtype == "bfloat16")


def numbers(tensors):
    """{name: scalar tensor} -> {name: number}, all at once: asking a GPU for a number waits until
    it has finished all that it was given."""
    values = torch.stack([x.detach().float() for x in tensors.values()]).tolist()
    return dict(zip(tensors, values))


def set_lr(optimizer, peak, step, steps, shape="cosine", floor=0.0):
    """Set and return the learning rate of step `step` (from 0) of `steps`.

    "cosine": a linear warm-up over the first 3 % of the steps, then half a cosine from `peak` down
    to the share `floor` of it (Loshchilov and Hutter 2017, eq. 5). "linear": from `peak` down to 0.
    """
    warmup = math.ceil(0.03 * steps)
    if shape == "linear":
        lr = peak * (1 - step / steps)
    elif step < warmup:
        lr = peak * (step + 1) / warmup
    else:
        turn = math.pi * (step - warmup) / max(1, steps - warmup)
        lr = peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(turn)))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
