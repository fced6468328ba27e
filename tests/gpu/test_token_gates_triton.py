"""The kernels of gates on the device: outputs and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import token_gates
from lizardzoo.kernels.token_gates import Gate
from lizardzoo.mixers import AttentionShape, Hybrid, MixerInputs

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OUTPUT = {torch.bfloat16: 2e-5, torch.float16: 2e-6, torch.float32: 2e-6}
"""Relative error of what is fp32; bf16's weights have 16 bits."""
STEP = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 4e-6}
"""What one rounding may change in the gradient of x."""


def draw(shape: tuple[int, ...], dtype: torch.dtype, heads: tuple[int, ...]) -> tuple[Tensor, list[Gate]]:
    x = torch.randn(shape, device="cuda", dtype=dtype)
    hidden = shape[-1]
    weights = [torch.randn(hidden, n, device="cuda") / hidden**0.5 for n in heads]
    return x, [Gate(w, 2 * torch.randn(w.shape[1], device="cuda"), not i) for i, w in enumerate(weights)]


def results(x: Tensor, gates: list[Gate], impl: str, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and the gradients of a fixed function of them: of x last."""
    x = (x if dtype is None else x.to(dtype)).detach().requires_grad_()
    leaves = [(t if dtype is None else t.to(dtype)).detach().requires_grad_() for gate in gates for t in gate[:2]]
    found = token_gates(
        x, [Gate(w, b, g.log_sigmoid) for w, b, g in zip(leaves[::2], leaves[1::2], gates)], impl=impl
    )  # fmt: skip
    generator = torch.Generator("cuda").manual_seed(1)
    dy = [torch.randn(y.shape, generator=generator, device="cuda").to(y) for y in found]
    return [*found, *torch.autograd.grad(found, [*leaves, x], dy)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "heads"),
    [
        ((2, 2048, 2048), (8, 8, 32)), ((16, 1, 2048), (8, 8, 32)), ((1, 77, 576), (3, 3, 9)), ((1, 1, 576), (9,)),
        ((3, 21, 100), (1, 5)),
        ((1, 4097, 4096), (32, 8, 32)), ((2, 300, 64), (100, 60, 70)), ((2, 300, 64), (60, 60, 7)),
    ],
)  # fmt: skip
def test_against_float64(shape: tuple[int, ...], heads: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gates = draw(shape, dtype, heads)
    exact = results(x, gates, "reference", torch.float64)
    *actual, d_x = results(x, gates, "triton")
    for found, expected in zip(actual, exact):
        assert (found.double() - expected).norm() <= OUTPUT[dtype] * expected.norm()
    assert (d_x.double() - exact[-1]).norm() <= STEP[dtype] * exact[-1].norm()


def test_gradients_are_the_same_every_time() -> None:
    x, gates = draw((2, 1000, 512), torch.bfloat16, (4, 4, 8))
    for a, b in zip(results(x, gates, "triton"), results(x, gates, "triton"), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_torch_compile_takes_the_whole_graph() -> None:
    x, gates = draw((2, 100, 64), torch.bfloat16, (4, 2))
    for a, b in zip(torch.compile(token_gates, fullgraph=True)(x, gates), token_gates(x, gates), strict=True):
        assert torch.equal(a, b)


def test_a_new_length_compiles_nothing() -> None:
    from lizardzoo.kernels.token_gates import triton as kernels

    def compiled() -> int:
        all_kernels = (kernels.forward_kernel, kernels.few_rows_kernel, kernels.gradient_kernel)
        return sum(len(cache[0]) for kernel in all_kernels for cache in kernel.device_caches.values())

    def run(count: int) -> None:
        results(*draw((2, count, 512), torch.bfloat16, (4, 2)), "triton")

    run(100)
    run(7)
    before = compiled()
    for count in (1, 16, 77, 333, 4096):
        run(count)
    assert compiled() == before


def test_auto_takes_the_kernels_and_a_mixer_uses_them() -> None:
    torch.manual_seed(0)
    x, gates = draw((2, 300, 512), torch.bfloat16, (2, 2))
    for a, b in zip(token_gates(x, gates), token_gates(x, gates, impl="triton"), strict=True):
        assert torch.equal(a, b)
    mixer = Hybrid(window=64).build(AttentionShape(512, 8, 2, 64, 0.125)).cuda()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    q, k, v = (torch.randn(2, 300, heads, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 2, 2))
    angles = torch.randn(1, 300, 64, device="cuda")
    inputs = MixerInputs(q, k, v, x, angles.cos().bfloat16(), angles.sin().bfloat16())
    y, _ = mixer(inputs)
    mixer.impl = "reference"
    expected, _ = mixer(inputs)
    assert (y - expected).norm() <= 2e-2 * expected.norm()
