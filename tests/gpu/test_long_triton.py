"""131,072 tokens on the device: one call, and the same in pieces, whose last tokens the reference computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import hybrid_attention, window_and_heavy_attention
from tests.gpu import test_heavy_triton as heavy
from tests.gpu import test_hybrid_triton as hybrid

pytestmark = pytest.mark.gpu
TOKENS = 131_072
CUTS = [0, 50_000, TOKENS - 300, TOKENS]
IMPLS = ["triton", "triton", "reference"]


def assert_pieces_are_the_whole(
    call: Callable[..., tuple[Any, ...]], leaves: Sequence[Tensor], floor: float, start: tuple[Any, ...]
) -> None:
    """call(begin, end, *state, impl=) gives y, log_mass and the state, through which gradients come as well."""
    whole = hybrid.gradients(*call(0, TOKENS, *start, impl="triton")[:2], list(leaves))
    outputs, state = [], start
    for impl, (begin, end) in zip(IMPLS, itertools.pairwise(CUTS), strict=True):
        y, log_mass, *after = call(begin, end, *state, impl=impl)
        outputs.append((y, log_mass))
        state = tuple(after)
    y, log_mass = (torch.cat(x, 1) for x in zip(*outputs, strict=True))
    pieces = hybrid.gradients(y, log_mass, list(leaves))
    assert whole[2].all()
    largest = max(x.norm() for x in whole[3:])
    for n, (a, b) in enumerate(zip(whole, pieces, strict=True)):
        scale = b.norm() if n < 3 else max(b.norm(), largest)
        assert (a - b).norm() <= 4 * floor * scale, f"{n}: {(a - b).norm() / scale:.1e}"
    last = slice(TOKENS - 300, TOKENS)  # the reference's own, that no error of the first 130,000 outweighs
    for a, b in zip(whole[:2], pieces[:2], strict=True):
        assert (a[:, last] - b[:, last]).norm() <= 4 * floor * b[:, last].norm()


def test_window_and_heavy_attention() -> None:
    inputs = heavy.draw(TOKENS, heads=8, kv_heads=2).each(torch.bfloat16)

    def call(begin: int, end: int, past: Any, state: Any, impl: str) -> tuple[Any, ...]:
        tokens = [x[:, begin:end] for x in inputs]
        return window_and_heavy_attention(
            *tokens, window=128, heavy=128, keep=4, half_life=4096.0, past=past, state=state, impl=impl
        )

    assert_pieces_are_the_whole(call, inputs, heavy.FLOOR[torch.bfloat16], (None, None))


@pytest.mark.parametrize("options", [hybrid.disjoint(128), hybrid.overlapping()], ids=["disjoint", "overlapping"])
def test_hybrid_attention(options: dict[str, Any]) -> None:
    """Gates that remember thousands of tokens, and a linear branch that counts as much as the window."""
    inputs = hybrid.draw(TOKENS, heads=8, gate=9.0)
    inputs = hybrid.balanced(inputs, options).each(torch.bfloat16)

    def call(begin: int, end: int, state: Any, impl: str) -> tuple[Any, ...]:
        return hybrid_attention(**inputs.arguments("softmax", begin, end), **options, state=state, impl=impl)

    assert_pieces_are_the_whole(call, inputs.leaves(), hybrid.FLOOR[torch.bfloat16], (None,))
