"""The heavy mixer takes the op of both branches, and their own where one is switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lizardzoo.mixers import AttentionShape, Heavy
from lizardzoo.mixers import heavy as module
from lizardzoo.testing.strategies import TokenFlags, mixer_inputs

SHAPE = AttentionShape(hidden_size=24, heads=4, kv_heads=2, head_dim=6, scale=6**-0.5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops that the mixer's own file calls, in order."""
    found: list[str] = []
    for name in ("heavy_attention", "heavy_attention_step", "window_and_heavy_attention", "window_and_heavy_step"):
        op = getattr(module, name)

        def record(*arguments: Any, _name: str = name, _op: Any = op, **options: Any) -> Any:
            found.append(_name)
            return _op(*arguments, **options)

        monkeypatch.setattr(module, name, record)
    return found


def test_both_branches_are_one_op(calls: list[str]) -> None:
    mixer = Heavy(window=3, keep=1, heavy=2).build(SHAPE).double()
    inputs = mixer_inputs(SHAPE, 1, 9, 0, TokenFlags(None, None))
    state = mixer.init_state(1, torch.float64, "cpu")
    _, state = mixer(inputs.tokens(0, 7), state, need_state=True)
    _, state = mixer(inputs.tokens(7, 8), state, need_state=True)
    mixer.step_(inputs.tokens(8, 9), state)
    assert calls == ["window_and_heavy_attention", "window_and_heavy_step", "window_and_heavy_step"]
    assert set(mixer.kernels) == {"rotate", "window_and_heavy_attention"}


def test_switched_off_the_other_branch_is_alone(calls: list[str]) -> None:
    mixer = Heavy(window=3, keep=1, heavy=2).build(SHAPE).double()
    inputs = mixer_inputs(SHAPE, 1, 9, 0, TokenFlags(None, None))
    mixer.switched_off = {"heavy"}
    y, state = mixer(inputs, mixer.init_state(1, torch.float64, "cpu"), need_state=True)
    mixer.step_(inputs.tokens(8, 9), state)
    assert calls == ["heavy_attention", "heavy_attention_step"]  # its state moves on
    assert set(mixer.kernels) == {"rotate", "window_attention", "heavy_attention"}
    branches, _ = mixer.branches(inputs, None, False)
    torch.testing.assert_close(y, branches["window"].y)
