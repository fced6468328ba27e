"""Laws of the Triton rotary kernel under Triton's interpreter; `test_rotary.py` runs them in another process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo.kernels import rotate
from lizardzoo.kernels.rotary import ops
from tests.kernels.cases import poison

assert ops.INTERPRETED
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]  # they would take minutes


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """q, k, cos, sin; the tables' halves differ, some are one for all sequences, some tensors are views."""
    batch, count, heads, kv_heads = (draw(st.integers(1, most)) for most in (3, 40, 5, 3))
    dim = 2 * draw(st.sampled_from([1, 3, 8, 40]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shapes = [(batch, count, heads, dim), (batch, count, kv_heads, dim)]
    tables = draw(st.sampled_from([1, batch]))
    q, k = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    cos, sin = (torch.randn(tables, count, dim, dtype=torch.float64) for _ in range(2))
    if draw(st.booleans()):
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        cos, sin = cos.expand(batch, -1, -1), sin.repeat_interleave(2, 2)[..., ::2]
    return q.requires_grad_(), k.requires_grad_(), cos, sin


@settings(phases=PHASES)
@given(inputs(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-6)]))
def test_equals_the_reference_with_its_gradients(
    drawn: tuple[Tensor, ...], precision: tuple[torch.dtype, float]
) -> None:
    q, k, cos, sin = drawn
    dtype, tolerance = precision
    expected = rotate(q, k, cos, sin, impl="reference")
    actual = rotate(q.to(dtype), k.to(dtype), cos.to(dtype), sin, impl="triton")
    assert all(y.dtype == dtype for y in actual)
    dy = [torch.randn_like(y) for y in expected]
    ours, theirs = (torch.autograd.grad(ys, (q, k), [d.to(ys[0]) for d in dy]) for ys in (actual, expected))
    for a, b in zip((*actual, *ours), (*expected, *theirs), strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_a_gradient_of_one_of_the_two_is_enough() -> None:
    q, k = (torch.randn(1, 3, heads, 4, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4).unbind()
    for index, x in enumerate((q, k)):
        rotated = [rotate(q, k, cos, sin, impl=impl)[index] for impl in ("triton", "reference")]
        actual, expected = (torch.autograd.grad(y.square().sum(), x)[0] for y in rotated)
        torch.testing.assert_close(actual, expected)


def test_expanded_gradients_are_read_rightly() -> None:
    q, k = (torch.randn(2, 3, heads, 4, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4).unbind()
    actual, expected = (
        torch.autograd.grad(sum(x.sum() for x in rotate(q, k, cos, sin, impl=impl)), (q, k))
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(actual, expected)


def test_the_op_keeps_what_torch_asks_of_it() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    q, k = (torch.randn(1, 3, heads, 4, requires_grad=True) for heads in (2, 1))
    cos, sin = torch.randn(2, 1, 3, 4).unbind()
    torch.library.opcheck(ops._rotate, (q, k, cos, sin, False))
