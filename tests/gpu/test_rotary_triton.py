"""The rotary kernel on the device: outputs and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import rotate
from tests.kernels.test_rotary import tables

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-23}
"""What one rounding may change, relative; two of them for fp32, in which it is also computed."""


def draw(batch: int, count: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q with 6 heads, k with 2, and the tables, on the device."""
    q, k = (torch.randn(batch, count, heads, dim, device="cuda", dtype=dtype).requires_grad_() for heads in (6, 2))
    return q, k, *tables(torch.arange(count, device="cuda")[None], dim, dtype)


def results(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, impl: str) -> list[Tensor]:
    """Both outputs, and both gradients of a fixed function of them."""
    outputs = rotate(q, k, cos, sin, impl=impl)
    generator = torch.Generator("cuda").manual_seed(1)
    dy = [torch.randn(y.shape, generator=generator, device="cuda").bfloat16().to(y.dtype) for y in outputs]
    return [*outputs, *torch.autograd.grad(outputs, (q, k), dy)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("batch", "count", "dim"), [(2, 2048, 64), (3, 77, 128), (1, 1, 80), (2, 5, 256), (1, 9, 2)])
def test_against_float64(batch: int, count: int, dim: int, dtype: torch.dtype) -> None:
    q, k, cos, sin = draw(batch, count, dim, dtype)
    wide = [x.detach().double().requires_grad_() for x in (q, k)]
    exact = results(*wide, cos.double(), sin.double(), "reference")
    for actual, expected in zip(results(q, k, cos, sin, "triton"), exact, strict=True):
        assert actual.dtype == dtype
        assert (actual.double() - expected).norm() <= STEP[dtype] * expected.norm()


def test_views_and_one_table_for_all_sequences() -> None:
    q, k, cos, sin = draw(4, 300, 64, torch.bfloat16)
    viewed = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in (q, k)]
    expected = results(q, k, cos, sin, "triton")
    for a, b in zip(results(*viewed, cos.expand(4, -1, -1), sin, "triton"), expected, strict=True):
        assert torch.equal(a, b)


def test_auto_takes_the_kernel() -> None:
    q, k, cos, sin = draw(1, 50, 64, torch.bfloat16)
    for a, b in zip(rotate(q, k, cos, sin), rotate(q, k, cos, sin, impl="triton"), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_more_than_2_to_the_31_numbers() -> None:
    """Heads lie far apart in memory, as transformers has them: 20 heads x 2^20 tokens x 128."""
    count = 2**20
    k = torch.randn(1, 20, count, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert k.numel() > 2**31
    cos, sin = tables(torch.arange(count, device="cuda")[None], 128, torch.bfloat16)
    _, rotated = rotate(k[:, :, :1], k, cos, sin, impl="triton")
    last = slice(count - 8, count)
    _, expected = rotate(k[:, last], k[:, last], cos[:, last], sin[:, last], impl="triton")
    assert torch.equal(rotated[:, last], expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_torch_compile_takes_the_whole_graph() -> None:
    q, k, cos, sin = draw(2, 100, 64, torch.bfloat16)
    compiled = torch.compile(rotate, fullgraph=True)(q, k, cos, sin)
    for a, b in zip(compiled, rotate(q, k, cos, sin), strict=True):
        assert torch.equal(a, b)


def test_a_new_length_compiles_nothing() -> None:
    from lizardzoo.kernels.rotary import triton as kernels

    def compiled() -> int:
        return sum(len(cache[0]) for cache in kernels.rotate_kernel.device_caches.values())

    results(*draw(2, 100, 64, torch.bfloat16), "triton")
    before = compiled()
    for count in (1, 16, 77, 4097):
        results(*draw(2, count, 64, torch.bfloat16), "triton")
    assert compiled() == before
