"""A step that turns the kept keys: against steps of keys that were turned before, by complex numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo import LizardzooError
from lizardzoo.kernels import (
    FeatureMap,
    WindowState,
    hybrid_attention,
    hybrid_attention_step,
    window_and_heavy_attention,
    window_and_heavy_step,
    window_attention,
    window_attention_step,
)
from lizardzoo.mixers.heavy import HeavyMixerState
from tests.kernels.cases import assert_same_tokens, error

DIMS = (6, 3, 4)
"""Of keys, values, features."""
DIM = DIMS[0]
OPS = ("window", "hybrid", "heavy")


class Behind(NamedTuple):
    """An op behind a text: its state, and `step(tokens, state, **options)`: y, log_mass and the next one.

    fixed: what every step is given beside that.
    """

    fixed: dict[str, Any]
    run: Callable[..., tuple[Tensor, Tensor, Any]]
    state: Any
    window: Callable[[Any], WindowState]
    with_window: Callable[[Any, WindowState], Any]

    def step(self, tokens: list[Tensor], state: Any, **options: Any) -> tuple[Tensor, Tensor, Any]:
        return self.run(tokens, state, **self.fixed, **options)


class Case(NamedTuple):
    op: str
    batch: int
    seen: int
    window: int
    keep: int
    heads: tuple[int, int]
    with_sinks: bool
    padded: bool
    one_turn: bool
    seed: int
    dims: tuple[int, int, int] = DIMS

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def tokens(self, count: int, dtype: torch.dtype, generator: torch.Generator) -> list[Tensor]:
        """q, k and v."""
        heads, kv_heads = self.heads
        return [
            torch.randn(self.batch, count, n, dim, generator=generator, dtype=torch.float64).to(dtype)
            for n, dim in zip((heads, kv_heads, kv_heads), (self.dims[0], *self.dims[:2]), strict=True)
        ]

    def mask(self, count: int, generator: torch.Generator) -> Tensor | None:
        return torch.rand(self.batch, count, generator=generator) < 0.8 if self.padded else None

    def turn(self, dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        angles = 6 * torch.rand(1 if self.one_turn else self.batch, 1, self.dims[0] // 2, generator=generator).to(dtype)
        return angles.cos().tile(2), angles.sin().tile(2)

    def behind(self, dtype: torch.dtype) -> Behind:
        """The state of the reference behind `seen` tokens, or before the first, with NaN where it holds none."""
        generator = self.generator()
        options: dict[str, Any] = {"keep": self.keep}
        text = self.tokens(self.seen + 1, dtype, generator)
        mask = torch.ones(self.batch, self.seen + 1, dtype=torch.bool)
        mask &= True if (drawn := self.mask(self.seen + 1, generator)) is None else drawn
        mask[:, self.seen :] = False  # so that there may be a state of no tokens
        options["sinks"] = torch.randn(2, generator=generator).to(dtype) if self.with_sinks else None
        if self.op == "window":
            *_, state = window_attention(*text, window=self.window, **options, mask=mask)
            found = Behind(options, _window_step, state, lambda s: s, lambda s, w: w)
        elif self.op == "heavy":
            *_, near, far = window_and_heavy_attention(*text, window=self.window, heavy=3, **options, mask=mask)
            found = Behind(options, _heavy_step, HeavyMixerState(near, far), lambda s: s.window, _with_window)
        else:
            dim, _, features = self.dims
            maps = (torch.randn(n, dim, features, generator=generator).to(dtype) / dim**0.5 for n in self.heads)
            options |= {"feature_map": FeatureMap(*maps, "exp"), "skip": self.keep}
            *_, state = hybrid_attention(
                *text, rotated=text[:2], window=self.window, lag=self.window, **options, mask=mask
            )
            found = Behind(options, _hybrid_step, state, lambda s: s.window, _with_window)
        window = found.window(found.state)
        for ring in window[:4]:
            empty = torch.arange(ring.shape[1]) >= window.length[:, None]
            ring.masked_fill_(empty[..., None, None], float("nan"))
        return found


def _with_window(state: Any, window: WindowState) -> Any:
    return state._replace(window=window)


def _window_step(tokens: list[Tensor], state: Any, **options: Any) -> Any:
    return window_attention_step(*tokens, state, **options)  # type: ignore[arg-type]


def _hybrid_step(tokens: list[Tensor], state: Any, **options: Any) -> Any:
    q, k, v = tokens
    return hybrid_attention_step(q, k, v, None, state, rotated=(q, k), **options)


def _heavy_step(tokens: list[Tensor], state: Any, **options: Any) -> Any:
    y, log_mass, *after = window_and_heavy_step(*tokens, *state, **options)
    return y, log_mass, HeavyMixerState(*after)


CASES = st.builds(
    Case,
    op=st.sampled_from(OPS),
    batch=st.integers(1, 2),
    seen=st.integers(0, 30),
    window=st.sampled_from([1, 2, 7, 20]),
    keep=st.sampled_from([0, 1, 3, 18]),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    with_sinks=st.booleans(),
    padded=st.booleans(),
    one_turn=st.booleans(),
    seed=st.integers(0, 2**16),
    dims=st.just(DIMS),
)


def rotated(kept: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """kept [B, keep, Hkv, D], each pair of numbers as a complex one times e^(i angle)."""
    half = kept.shape[-1] // 2
    phase = torch.complex(turn[0][..., :half], turn[1][..., :half])[:, :, None]
    pairs = torch.complex(*kept.chunk(2, -1)) * phase
    return torch.cat([pairs.real, pairs.imag], -1)


@given(CASES)
def test_kept_keys_are_read_turned_and_stay_held_as_they_are(case: Case) -> None:
    behind, generator = case.behind(torch.float64), case.generator()
    one, turn = case.tokens(1, torch.float64, generator), case.turn(torch.float64, generator)
    mask, window = case.mask(1, generator), behind.window(behind.state)
    before = behind.with_window(behind.state, window._replace(kept_k=rotated(window.kept_k, turn)))
    *expected, _ = behind.step(one, before, mask=mask)
    *_, after = behind.step(one, behind.state, mask=mask)
    *found, new = behind.step(one, behind.state, mask=mask, turn=turn)
    assert all(error(a, b) <= 1e-12 for a, b in zip(found, expected, strict=True))
    assert_same_tokens(behind.window(new), behind.window(after))


@pytest.mark.parametrize("op", OPS)
def test_a_turn_by_nothing_changes_no_bit(op: str) -> None:
    case = Case(op, 2, 20, 4, 3, (4, 2), True, False, False, 0)
    behind = case.behind(torch.float32)
    one = case.tokens(1, torch.float32, case.generator())
    turn = torch.ones(2, 1, DIM), torch.zeros(2, 1, DIM)
    for a, b in zip(behind.step(one, behind.state)[:2], behind.step(one, behind.state, turn=turn)[:2], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((3, 1, DIM), torch.float32, r"turn: cos is \[1 or 2, 1, 6\], got \[3, 1, 6\]"),
        ((2, 2, DIM), torch.float32, r"turn: cos is \[1 or 2, 1, 6\], got \[2, 2, 6\]"),
        ((2, 1, DIM), torch.int64, "turn: q, k, cos, sin have dtypes"),
    ],
)
def test_a_turn_that_does_not_fit_is_one_clear_error(op: str, shape: tuple[int, ...], dtype: Any, words: str) -> None:
    case = Case(op, 2, 5, 4, 3, (4, 2), False, False, False, 0)
    behind, table = case.behind(torch.float32), torch.ones(shape, dtype=dtype)
    with pytest.raises(LizardzooError, match=words):
        behind.step(case.tokens(1, torch.float32, case.generator()), behind.state, turn=(table, table))
