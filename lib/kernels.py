"""Which kernels compute attention and matrix products, and how freed memory is kept on a CPU.
Nothing here changes what is computed, beyond the order of sums."""

import ctypes
import os
import platform
import sys

import torch
import torch.nn.functional as F

AVX2_ONLY = torch.backends.cpu.get_cpu_capability() == "AVX2"  # no AVX-512


def is_intel():
    """Whether this is a processor of Intel's, as MKL is Intel's library."""
    if not os.path.exists("/proc/cpuinfo"):
        return "Intel" in platform.processor()
    with open("/proc/cpuinfo") as file:
        return "GenuineIntel" in file.read()


INTEL = is_intel()


def attention(q, k, v, mask):
    """softmax(q k / sqrt(h) + mask) v, several heads of q sharing one of k and v. `q` (B, heads, T,
    h), `k`, `v` (B, kv heads, S, h), `mask` (B, 1, T, S), or None: causal -> (B, heads, T, h)."""
    B, heads, T, h = q.shape
    group, on_cpu, half = heads // k.shape[1], q.device.type == "cpu", v.dtype != torch.float32
    if on_cpu and half and mask is None:
        # in float32: the backward pass of the bf16 kernel takes up to nine times as long
        with torch.autocast("cpu", enabled=False):
            seen = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True,
                                                  enable_gqa=True)
        return seen.to(v.dtype)
    if T == 1 and mask is not None and (half or not on_cpu):
        # One new token: the query heads that share a key head stand where query positions would.
        # Nothing is grouped then. Grouped heads have slow kernels here, or none that take a mask.
        folded = q.reshape(B, k.shape[1], group, h)
        return F.scaled_dot_product_attention(folded, k, v, mask).reshape(q.shape)
    if not on_cpu and (mask is not None or not half):
        # grouped, only flash attention is fused, which takes neither a mask nor float32
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def linear(x, weight, bias=None):
    """`F.linear`: `x` (..., in), `weight` (out, in) -> (..., out).

    In float32 on a CPU PyTorch gives products of matrices to MKL, and convolutions to oneDNN. On
    AMD's processors with AVX-512 the latter is twice as fast, in the backward pass too; on Intel's
    it is half as fast. (With AVX2 only it is slower, except for the few rows that are decoded at a
    time, and for matrices as long as the vocabulary.) A product is a convolution with a window of
    one pixel: one matrix is the image, a row per pixel, the other holds the filters. If one is much
    longer, it is the image, since oneDNN copies filters into a layout of its own.
    """
    rows, out = x.numel() // x.shape[-1], weight.shape[0]
    # oneDNN compiles a kernel for each new shape: more than it gains for a small matrix
    small = weight.numel() < 2**18 or rows == 0
    slower = INTEL or AVX2_ONLY and not 4 <= rows <= 64 and out <= 8 * max(weight.shape[1], rows)
    if (small or slower or x.device.type != "cpu" or x.dtype != torch.float32
            or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.is_available()):
        return F.linear(x, weight, bias)
    swap, shape = out > 8 * rows, x.shape[:-1]
    x = x.reshape(rows, -1)
    if swap and rows % 16:  # few rows, such as those that are decoded: let there be few shapes
        x = F.pad(x, (0, 0, 0, -rows % 16))
    image, filters = (weight, x) if swap else (x, weight)
    pixels = image[None, None].permute(0, 3, 1, 2)  # (1, in, 1, pixels), as it lies in memory
    y = F.conv2d(pixels, filters[:, :, None, None])[0, :, 0]  # (filters, pixels)
    y = (y if swap else y.t())[:rows].reshape(*shape, out)
    return (y if bias is None else y + bias).contiguous()


def keep_freed_memory():
    """Let glibc keep freed memory (mallopt(3)): by default it returns every large block to the
    system, and the next one comes as pages that must be zeroed first."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
        for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def return_freed_memory():
    """Give what `keep_freed_memory` keeps back to the system. Between large blocks of many sizes
    holes remain into which no other fits: a long run would hold half as much again as it uses."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
