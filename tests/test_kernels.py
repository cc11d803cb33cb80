"""lib/kernels.py: the faster products are the plain ones."""

import pytest
import torch

from lib import kernels
from lib.kernels import linear
from makers import assert_close


@pytest.mark.parametrize(
    "rows, out",
    [((1,), 512), ((5,), 16500), ((2, 3), 16500), ((40,), 512), ((3, 50), 512), ((1, 70), 600)],
)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("avx2_only", [False, True])
def test_linear_maps_and_their_gradients(rows, out, bias, avx2_only, monkeypatch):
    """Against the products and their derivatives in float64, in every combination of what needs a
    gradient, by the rules for either processor."""
    monkeypatch.setattr(kernels, "AVX2_ONLY", avx2_only)
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
