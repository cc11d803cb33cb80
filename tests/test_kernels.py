"""lib/kernels.py: the faster products are the plain ones."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from lib import kernels
from lib.kernels import attention, linear
from makers import ROOT, assert_close


@pytest.mark.parametrize(
    "rows, out",
    [((1,), 512), ((5,), 16500), ((2, 3), 16500), ((40,), 512), ((3, 50), 512), ((1, 70), 600)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("processor", ["AMD, AVX-512", "AMD, AVX2", "Intel"])
def test_linear_maps_and_their_gradients(rows, out, bias, processor, monkeypatch):
    """Against the products and their derivatives in float64, in every combination of what needs a
    gradient, by the rules for each processor."""
    monkeypatch.setattr(kernels, "AVX2_ONLY", "AVX2" in processor)
    monkeypatch.setattr(kernels, "INTEL", processor == "Intel")
    torch.manual_seed(0)
    weight, x, of_y = torch.randn(out, 260), torch.randn(*rows, 260), torch.randn(*rows, out)
    b = torch.randn(out) if bias else None
    y = torch.einsum("...i,oi->...o", x.double(), weight.double()) + (b.double() if bias else 0)
    of_x = torch.einsum("...o,oi->...i", of_y.double(), weight.double())
    of_weight = torch.einsum("no,ni->oi", of_y.double().flatten(0, -2), x.double().flatten(0, -2))
    for wanted in ((True, True), (True, False), (False, True), (False, False)):
        inputs = [t.clone().requires_grad_(needs) for t, needs in zip((x, weight), wanted)]
        found = linear(*inputs, b)
        assert found.is_contiguous()
        assert_close(found.double(), y, 1e-3)
        if any(wanted):
            found.backward(of_y)
        for t, expected, needs in zip(inputs, (of_x, of_weight), wanted):
            assert (t.grad is not None) == needs
            if needs:
                assert_close(t.grad.double(), expected, 2e-3)


def test_linear_of_no_rows_and_in_bf16():
    weight = torch.randn(512, 260)
    assert linear(torch.zeros(0, 260), weight).shape == (0, 512)
    assert linear(torch.zeros(40, 260).bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.zeros(40, 260), weight).dtype == torch.bfloat16


@pytest.mark.parametrize("T, masked", [(1, True), (20, True), (20, False)],
                         ids=["a new token", "prompts", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")),
])
def test_attention_is_one_fused_kernel(T, masked, dtype, device):
    """With the unfused path forbidden PyTorch ends in an error if no other takes these inputs."""
    generator = torch.Generator().manual_seed(0)
    shapes = (3, 9, T, 64), (3, 3, 32, 64), (3, 3, 32, 64)
    q, k, v = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    mask = None
    if masked:
        mask = torch.zeros(3, 1, T, 32, device=device, dtype=dtype)
        mask[1:, ..., 20:] = -1e30
    else:
        k, v = k[:, :, :T], v[:, :, :T]
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        found = attention(q, k, v, mask)
    scores = q.double() @ k.double().repeat_interleave(3, 1).mT / 8
    scores += (torch.full((T, T), -torch.inf, device=device).triu(1) if mask is None
               else mask.double())
    expected = scores.softmax(-1) @ v.double().repeat_interleave(3, 1)
    assert_close(found.double(), expected, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_between_blocks_in_use_is_returned():
    """Half of 64 blocks of 4 MB are freed, each beside one in use: 128 MB, in holes."""
    code = """if True:
        import torch
        from lib import kernels
        def resident():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 / 1e6
        kernels.keep_freed_memory()
        blocks = [torch.ones(1_000_000) for _ in range(64)]
        del blocks[::2]
        kept = resident()
        kernels.return_freed_memory()
        assert kept - resident() > 110, (kept, resident())
        assert all(block.sum() == 1_000_000 for block in blocks)
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
