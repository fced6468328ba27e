"""Steps that turn the kept keys, on the device: against the reference, and from a graph that is told another turn.

Slots that hold no token hold NaN.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels.state import map_state, state_tensors
from tests.kernels.cases import error
from tests.kernels.test_turning import OPS, Behind, Case

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
FLOOR = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 3e-5}
SIZES = {
    "llama": {"heads": (32, 8), "dims": (64, 64, 64), "window": 128, "keep": 4},
    "smollm2": {"heads": (9, 3), "dims": (64, 64, 64), "window": 100, "keep": 20},
    "young": {"heads": (9, 3), "dims": (64, 64, 64), "window": 128, "keep": 4, "seen": 20},
    "wide": {"heads": (8, 2), "dims": (128, 128, 64), "window": 30, "keep": 1},
}


def draw(op: str, sizes: str) -> Case:
    numbers = {"batch": 4, "seen": 300, "with_sinks": True, "padded": True, "one_turn": False, "seed": 0}
    return Case(op=op, **{**numbers, **SIZES[sizes]})  # type: ignore[arg-type]


def on_device(case: Case, dtype: torch.dtype) -> Behind:
    """Keys and values in dtype, what is accumulated in fp32."""
    behind = case.behind(torch.float32)
    memory = getattr(behind.state, "linear", None) and behind.state.linear.kv

    def moved(x: Tensor) -> Tensor:
        return x.to(DEVICE, dtype if x.ndim == 4 and x is not memory else x.dtype)

    fixed = {**behind.fixed, "sinks": behind.fixed["sinks"].to(DEVICE)}
    if "feature_map" in fixed:
        maps = fixed["feature_map"]
        fixed["feature_map"] = maps._replace(query=maps.query.to(DEVICE), key=maps.key.to(DEVICE))
    return behind._replace(state=map_state(moved, behind.state), fixed=fixed)


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_step_with_a_turn_is_the_references(op: str, sizes: str, dtype: torch.dtype) -> None:
    case = draw(op, sizes)
    behind, generator = on_device(case, dtype), case.generator()
    one = [x.to(DEVICE) for x in case.tokens(1, dtype, generator)]
    turn = tuple(x.to(DEVICE) for x in case.turn(torch.float32, generator))
    *expected, held = behind.step(one, behind.state, turn=turn, impl="reference")
    *found, new = behind.step(one, behind.state, turn=turn, impl="triton")
    *plain, _ = behind.step(one, behind.state, impl="triton")
    for a, b in zip(found, expected, strict=True):
        assert error(a.double(), b.double()) <= FLOOR[dtype]
    if case.seen > case.window:  # how much it matters depends on what else there is: 1 % of a hybrid's output here
        assert not torch.equal(plain[0], found[0]), "kept tokens are turned where they have left the window"
    else:
        assert error(plain[0].double(), expected[0].double()) <= 2 * FLOOR[dtype], "and nowhere else"
    for a, b in zip(behind.window(new), behind.window(held), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("op", OPS)
@torch.no_grad()
def test_a_graph_turns_by_what_its_tensors_hold(op: str) -> None:
    """Captured with one turn and replayed with others, it is the step; the host is asked for nothing."""
    case = draw(op, "llama")
    behind, generator = on_device(case, torch.bfloat16), case.generator()
    one = [x.to(DEVICE) for x in case.tokens(1, torch.bfloat16, generator)]
    turns = [tuple(x.to(DEVICE) for x in case.turn(torch.float32, generator)) for _ in range(4)]
    expected_state, state = (map_state(torch.clone, behind.state) for _ in range(2))
    expected = [behind.step(one, expected_state, turn=turn, in_place=True, impl="triton")[0] for turn in turns]
    given = tuple(x.clone() for x in turns[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = behind.step(one, state, turn=given, in_place=True, impl="triton")[0]
    for turn, wanted in zip(turns, expected, strict=True):
        for x, now in zip(given, turn, strict=True):
            x.copy_(now)
        graph.replay()
        assert torch.equal(y, wanted)
    for a, b in zip(state_tensors(state), state_tensors(expected_state), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
