"""The fused decode step on the device, at its real sizes: against the reference, in a graph, again and again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.kernels import FeatureMap, HybridState, hybrid_attention_step
from lizardzoo.kernels.gated_linear import init_state as init_linear_state
from lizardzoo.kernels.hybrid import share
from lizardzoo.kernels.state import map_state, state_tensors
from lizardzoo.kernels.window import init_state as init_window_state

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 8e-3, torch.float16: 1e-3, torch.float32: 3e-5}


class Decoder:
    """One layer's weights, and its tokens one by one."""

    def __init__(
        self,
        *,
        batch: int = 4,
        heads: int = 32,
        kv_heads: int = 8,
        dim: int = 64,
        features: int = 64,
        window: int = 128,
        keep: int = 4,
        lag: int | None = None,
        decay_heads: int | None = None,
        same_keys: bool = False,
        sinks: int = 0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.sizes = (batch, heads, kv_heads, dim)
        self.decay_heads = kv_heads if decay_heads is None else decay_heads
        self.lag, self.same_keys, self.dtype = window if lag is None else lag, same_keys, dtype
        maps = [
            0.3 * torch.randn(n, dim, features, device="cuda") + torch.eye(dim, features).cuda()
            for n in (heads, kv_heads)
        ]
        self.options: dict[str, Any] = {
            "feature_map": FeatureMap(*maps, "softmax"),
            "keep": keep,
            "skip": keep if self.lag else 0,
            "sinks": torch.randn(sinks, device="cuda") if sinks else None,
        }
        near = init_window_state(batch, kv_heads, dim, window, keep, dtype, "cuda")
        far = init_linear_state(
            batch, heads, kv_heads, dim, 2 * features, self.lag, self.decay_heads, kv_heads, dtype, "cuda"
        )
        self.state = share(near, far, same_keys)

    def token(self, masked: bool = False) -> dict[str, Any]:
        """Arguments of one step."""
        batch, heads, kv_heads, dim = self.sizes

        def randn(*shape: int) -> Tensor:
            return torch.randn(batch, 1, *shape, device="cuda")

        q, near_q = (randn(heads, dim).to(self.dtype) for _ in range(2))
        k, near_k, v = (randn(kv_heads, dim).to(self.dtype) for _ in range(3))
        return {
            "q": q,
            "k": k,
            "v": v,
            "rotated": (q, k) if self.same_keys else (near_q, near_k),
            "log_decay": F.logsigmoid(randn(self.decay_heads) + 4),
            "log_input": randn(kv_heads),
            "log_scale": randn(heads),
            "mask": torch.rand(batch, 1, device="cuda") < 0.8 if masked else None,
            **self.options,
        }


def wide(token: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""

    def cast(x: Any) -> Any:
        return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x

    maps = token["feature_map"]
    near = token["rotated"]
    found = {name: cast(x) for name, x in token.items()}
    rotated = (found["q"], found["k"]) if near[1] is token["k"] else tuple(map(cast, near))
    return {**found, "rotated": rotated, "feature_map": FeatureMap(cast(maps.query), cast(maps.key), maps.activation)}


def assert_agree(state: HybridState, expected: HybridState, floor: float) -> None:
    """Rings bit for bit, memories within the floor."""
    assert torch.equal(state.window.length, expected.window.length)
    for a, b in zip((*state.window[:4], *state.linear[3:7]), (*expected.window[:4], *expected.linear[3:7])):
        assert torch.equal(a.double(), b.double())
    scales = state.linear.scale.double(), expected.linear.scale
    assert torch.equal(torch.isinf(scales[0]), torch.isinf(scales[1]))
    for name in ("norm", "kv"):
        ours, theirs = (
            getattr(s.linear, name).double() * (scale.exp() if name == "norm" else scale.exp()[..., None])
            for s, scale in zip((state, expected), scales)
        )
        assert (ours - theirs).norm() <= floor * theirs.norm() + 1e-12


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"window": 100, "keep": 20, "sinks": 3},
        {"window": 300, "keep": 0, "heads": 9, "kv_heads": 3},
        {"window": 1, "keep": 1, "decay_heads": 1},
        {"lag": 0, "decay_heads": 1, "same_keys": True},
        {"same_keys": True, "heads": 8, "kv_heads": 8, "features": 32},
        {"dim": 128, "features": 64, "batch": 2},
        {"dim": 128, "features": 128, "batch": 2, "heads": 16, "kv_heads": 2},
        {"dim": 80, "features": 48, "heads": 8, "kv_heads": 1},
        {"dim": 256, "features": 64, "batch": 2, "window": 40},  # in slabs, by the branches' own kernels
        {"dim": 256, "features": 256, "batch": 2, "window": 20, "lag": 0},
    ],
    ids=str,
)
@torch.no_grad()
def test_steps_in_place_are_the_references_steps(sizes: dict[str, Any], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    decoder = Decoder(**sizes, dtype=dtype)
    state, floor, memory, mass = decoder.state, FLOOR[dtype], 1e-3, 1e-3
    if sizes.get("dim") == 256 and sizes["features"] <= 128 and dtype != torch.float32:
        # Logits are rounded there, which is one rounding more for outputs and memory; one of 16 to 32 moves by up to 8
        # eps, and the log of what it weighs with it.
        floor, memory, mass = 2 * floor, 2 * floor, 8 * torch.finfo(dtype).eps
    exact = map_state(lambda x: x.double() if x.is_floating_point() else x.clone(), state)
    addresses = [x.data_ptr() for x in state_tensors(state)]
    for t in range(min(2 * state.window.k.shape[1] + 20, 400)):
        token = decoder.token(masked=t % 3 == 0)
        y, log_mass, same = hybrid_attention_step(**token, state=state, in_place=True, impl="triton")
        expected, expected_mass, exact = hybrid_attention_step(**wide(token), state=exact, impl="reference")
        assert same is state and y.dtype == dtype
        assert (y - expected).norm() <= floor * expected.norm() + 1e-12
        finite = torch.isfinite(expected_mass)
        assert torch.equal(finite, torch.isfinite(log_mass))
        assert ((log_mass - expected_mass)[finite].abs() <= mass + 1e-3 * expected_mass[finite].abs()).all()
    assert [x.data_ptr() for x in state_tensors(state)] == addresses
    assert_agree(state, exact, memory)


@pytest.mark.parametrize("sizes", [{"batch": 16}, {"batch": 2, "dim": 256, "features": 64}], ids=str)
@torch.no_grad()
def test_a_graph_of_steps_gives_the_same_bits_every_time(sizes: dict[str, int]) -> None:
    """16 x 8 programs at once, 300 steps: a race would show as a difference."""
    decoder = Decoder(**sizes, decay_heads=1)
    start = map_state(torch.clone, decoder.state)
    token = decoder.token()

    def step() -> tuple[Tensor, Tensor]:
        return hybrid_attention_step(**token, state=decoder.state, in_place=True, impl="triton")[:2]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, log_mass = step()
    results = []
    for _ in range(4):
        for x, first in zip(state_tensors(decoder.state), state_tensors(start)):
            x.copy_(first)
        outputs = []
        for _ in range(300):
            graph.replay()
            outputs += [y.clone(), log_mass.clone()]
        results.append([*outputs, *(x.clone() for x in state_tensors(decoder.state))])
    assert (decoder.state.window.length == 300).all()
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(again, results[0], strict=True))
