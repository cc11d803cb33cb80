"""LoRA: the model is frozen, and small matrices beside its linear maps are trained."""

import contextlib
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib import kernels
from lib.distributed import RANK, named_wholes
from lib.errors import stop


class LoRALinear(nn.Module):
    """A linear map W with an adapter of rank r beside it (Hu et al. 2021, section 4.1, eq. 3):

        y = W x + alpha / r  B A x

    W (out, in) is frozen; A (r, in) is Gaussian and B (out, r) zero at the start.

    So y begins as W x exactly. A and B are float32; W may be bfloat16, and its product is then
    bfloat16 too.
    """

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.weight, self.bias, self.scale, self.on = linear.weight, linear.bias, alpha / rank, True
        out, into = linear.weight.shape
        self.A = nn.Parameter(torch.randn(rank, into, device=self.weight.device) / math.sqrt(into))
        self.B = nn.Parameter(torch.zeros(out, rank, device=self.weight.device))

    def forward(self, x):
        y = kernels.linear(x, self.weight, self.bias)
        if not self.on:
            return y
        return y + (self.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)).to(y.dtype)


def add_lora(model, args):
    """Give the linear maps of every layer that --lora_targets names an adapter, and freeze all else
    but a scalar head -> the model, a `Llama` or a `ScalarHead`, changed in place. --lora_rank 0
    changes nothing. Ends the program with one line if a name is not that of a linear map."""
    if args.lora_rank == 0:
        return model
    base_dtype = getattr(torch, args.base_dtype)
    for name, parameter in model.named_parameters():
        if name != "score.weight":
            parameter.requires_grad_(False).data = parameter.data.to(base_dtype)
    if hasattr(model, "score"):
        model.before = model.score.weight.detach().clone()
    linears = [name for name, part in model.model.layers[0].named_modules()
               if isinstance(part, nn.Linear)]
    names = {name.rsplit(".", 1)[-1]: name for name in linears}
    for target in args.lora_targets.split(","):
        if target not in names:
            stop(f"--lora_targets: {target!r} is not a linear map of a layer; there are "
                 f"{','.join(sorted(names))}")
        for layer in model.model.layers:
            linear = layer.get_submodule(names[target])
            layer.set_submodule(names[target], LoRALinear(linear, args.lora_rank,
                                                          args.lora_alpha))
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    learns = sum(p.numel() for p in trainable(model))
    print(f"LoRA: {frozen / 1e6:.1f} MB of frozen weights; {learns} parameters are trained, "
          f"{16 * learns / 1e6:.1f} MB with gradient and Adam", flush=True)
    return model


def trainable(model):
    """The parameters that an optimizer gets: all, or with LoRA the adapters and a scalar head."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextlib.contextmanager
def adapters_off(model):
    """A context in which the model computes exactly what it did before LoRA. Without LoRA nothing
    changes."""
    parts = [part for part in model.modules() if getattr(part, "on", False)]
    for part in parts:
        part.on = False
    try:
        yield
    finally:
        for part in parts:
            part.on = True


def merged(model, dtype=torch.float32, everywhere=False):
    """{name: tensor} of the same function as a plain model in `dtype`, with W + alpha / r B A in
    place of each adapter. With many processes all take part, and rank 0 gets it, or with
    `everywhere` each."""
    adapted = {name: part for name, part in model.named_modules() if isinstance(part, LoRALinear)}
    tensors = {}
    for name, whole in named_wholes(model, everywhere):
        if RANK == 0 or everywhere:  # cast at once, so that few are whole in float32 at a time
            tensors[name] = whole if name.rpartition(".")[0] in adapted else whole.to(dtype)
    if not tensors:
        return {}
    for name, part in adapted.items():
        a, b = tensors.pop(f"{name}.A"), tensors.pop(f"{name}.B")
        whole = tensors[f"{name}.weight"].float() + part.scale * b @ a
        tensors[f"{name}.weight"] = whole.to(dtype)
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}
