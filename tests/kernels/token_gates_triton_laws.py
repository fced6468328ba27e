"""Laws of the Triton kernels of gates under Triton's interpreter; `test_triton.py` runs them in another process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lizardzoo.kernels import token_gates
from lizardzoo.kernels.token_gates import Gate, ops
from tests.kernels.cases import poison

assert ops.INTERPRETED
PHASES = [phase for phase in Phase if phase not in (Phase.shrink, Phase.explain)]  # they would take minutes


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, list[Gate]]:
    """x, a view at times, and one to three gates; few and many rows (their kernels differ), sizes off the tiles'."""
    batch, count = draw(st.sampled_from([(1, 1), (2, 5), (3, 16), (1, 65), (3, 40), (2, 0)]))
    hidden = draw(st.sampled_from([4, 16, 37]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(batch, count, 2 * hidden if draw(st.booleans()) else hidden)[..., :hidden]
    heads = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    return x, [Gate(2 * torch.randn(hidden, n), 9 * torch.randn(n), draw(st.booleans())) for n in heads]


def results(x: torch.Tensor, gates: list[Gate], impl: str, wants_x: bool) -> list[torch.Tensor]:
    """Outputs, and the gradients of a random function of them."""
    leaves = [t.clone().requires_grad_() for gate in gates for t in gate[:2]]
    given = [Gate(*pair, gate.log_sigmoid) for pair, gate in zip(zip(leaves[::2], leaves[1::2]), gates)]
    x = x.detach().requires_grad_(wants_x)
    found = token_gates(x, given, impl=impl)
    generator = torch.Generator().manual_seed(1)
    dy = [torch.randn(y.shape, generator=generator).to(y) for y in found]
    return [*found, *torch.autograd.grad(found, [*leaves, *[x] * wants_x], dy)]


@settings(phases=PHASES)
@given(cases(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans())
def test_equals_the_reference_with_its_gradients(
    case: tuple[torch.Tensor, list[Gate]], dtype: torch.dtype, wants_x: bool
) -> None:
    x, gates = case
    x = x.to(dtype)
    wide = [Gate(gate.weight.double(), gate.bias.double(), gate.log_sigmoid) for gate in gates]
    expected = results(x.double(), wide, "reference", wants_x)
    actual = results(x, gates, "triton", wants_x)
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        tolerance = 8e-3 if a.dtype == torch.bfloat16 else 2e-6  # the interpreter cuts bits off
        assert (a.double() - b).norm() <= tolerance * b.norm() + 1e-30


def test_what_is_nearly_nothing_is_exact() -> None:
    """A decay of 0.999999: its logarithm and the gradient through it have all their digits."""
    gates = [Gate(torch.zeros(4, 8), torch.tensor([-50.0, -9, -1, 0, 1, 5, 9, 14]), True)]
    wide = [Gate(gates[0].weight.double(), gates[0].bias.double(), True)]
    x = torch.randn(1, 1, 4)
    (y, _, d_b), (expected, _, exact) = (
        results(t, g, impl, False) for t, g, impl in ((x, gates, "triton"), (x.double(), wide, "reference"))
    )
    torch.testing.assert_close(y.double(), expected, rtol=5e-7, atol=0)
    torch.testing.assert_close(d_b.double(), exact, rtol=2e-6, atol=0)


def test_the_op_keeps_what_torch_asks_of_it() -> None:
    """Schema, fake tensors and autograd registration, as torch.compile relies on them."""
    x, weights = torch.randn(5, 6, requires_grad=True), [torch.randn(6, n, requires_grad=True) for n in (2, 3)]
    biases = [torch.randn(n, requires_grad=True) for n in (2, 3)]
    torch.library.opcheck(ops._operator, (x, weights, biases, 1))
