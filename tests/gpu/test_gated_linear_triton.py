"""The Triton kernels of gated linear attention on the device, at their real tile sizes: outputs and gradients."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lizardzoo.errors import LizardzooError
from lizardzoo.kernels import FeatureMap, gated_linear_attention, gated_linear_attention_step
from lizardzoo.kernels.gated_linear import init_state
from tests.gpu import plain
from tests.kernels.cases import poison

pytestmark = pytest.mark.gpu


LENGTHS = [1, 63, 64, 65, 127, 500, 2048, 4097]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 3e-6}  # a quarter of the dtype's step, or a few
NAMES = ("q", "k", "v", "log_decay", "log_input", "query", "key")


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    log_input: Tensor | None
    query: Tensor
    key: Tensor

    def each(self, dtype: torch.dtype) -> Inputs:
        """In a dtype, as leaves; gates and maps, which parameters make, in fp32 at least."""
        wide = torch.promote_types(dtype, torch.float32)
        dtypes = [dtype] * 3 + [wide] * 4
        return Inputs(*(None if x is None else x.to(d).detach().requires_grad_() for x, d in zip(self, dtypes)))

    def leaves(self) -> list[Tensor]:
        return [x for x in self if x is not None]

    def arguments(self, activation: Any) -> dict[str, Any]:
        named = dict(zip(NAMES[:5], self))
        return {**named, "feature_map": FeatureMap(self.query, self.key, activation)}


def draw(
    length: int,
    *,
    batch: int = 0,
    heads: int = 6,
    kv_heads: int = 2,
    dim: int = 64,
    features: int = 64,
    decay: int | None = 2,
    enter: int | None = 2,
    gate: float = 4.0,
    map_scale: float = 1.0,
) -> Inputs:
    """Numbers that every dtype of DTYPES holds exactly enough: the same inputs for all. `gate`: the decay's logit."""
    batch = batch or (2 if length <= 2048 else 1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda")

    q, k, v = (randn(batch, length, n, dim).bfloat16().float() for n in (heads, kv_heads, kv_heads))
    log_decay = None if decay is None else F.logsigmoid(randn(batch, length, decay) + gate)
    log_input = None if enter is None else randn(batch, length, enter)
    query, key = ((torch.eye(dim, features, device="cuda") + 0.05 * randn(n, dim, features)) for n in (heads, kv_heads))
    return Inputs(q, k, v, log_decay, log_input, query * map_scale, key * map_scale)


def flags(length: int, batch: int = 2) -> dict[str, Tensor]:
    return {
        "mask": torch.rand(batch, length, device="cuda") < 0.8,
        "starts": torch.rand(batch, length, device="cuda") < 0.01,
    }


def results(inputs: Inputs, impl: str, activation: str = "softmax", **options: Any) -> list[Tensor]:
    arguments = inputs.arguments(activation)
    y, log_mass, _ = gated_linear_attention(**arguments, **options, impl=impl)
    assert y.dtype == inputs.q.dtype
    return gradients(y, log_mass, inputs)


def yardstick(inputs: Inputs, activation: str = "softmax", **options: Any) -> list[Tensor]:
    """The same of plain PyTorch; with exp features, which no plain product survives, of the reference."""
    if activation == "exp":
        return results(inputs, "reference", activation, **options)
    q, k, v, log_decay, log_input, query, key = inputs
    far = (q, k, log_decay, log_input, None, FeatureMap(query, key, "softmax"))
    return gradients(*plain.attention(v, None, far, **options), inputs)


def gradients(y: Tensor, log_mass: Tensor, inputs: Inputs) -> list[Tensor]:
    """y, log_mass (finite part, and which are) and the gradients of a fixed function of both, in float64."""
    generator = torch.Generator("cuda").manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, device="cuda").bfloat16() for x in (y, log_mass)]
    finite = torch.isfinite(log_mass)
    log_mass = log_mass.masked_fill(~finite, 0.0)
    loss = (y.double() * weights[0]).sum() + (log_mass.double() * weights[1]).sum()
    return [x.detach().double() for x in (y, log_mass, finite, *torch.autograd.grad(loss, inputs.leaves()))]


def assert_within_budget(inputs: Inputs, dtype: torch.dtype, **options: Any) -> list[Tensor]:
    """At most twice the error that plain PyTorch makes in the same dtype."""
    exact = results(inputs.each(torch.float64), "reference", **options)
    beside = yardstick(inputs.each(dtype), **options)
    if not all(x.isfinite().all() for x in beside):  # fp16 ends at 65504: its numbers in fp32, y rounded as before
        wide = inputs.each(dtype).each(torch.float32)
        beside = yardstick(wide, **options, **({} if options.get("activation") == "exp" else {"rounded": dtype}))
    ours = results(inputs.each(dtype), "triton", **options)
    largest = max(x.norm() for x in exact[3:])
    names = ["y", "log_mass", "visible", *(f"d_{n}" for n, x in zip(NAMES, inputs) if x is not None)]
    for name, a, b, c in zip(names, ours, beside, exact, strict=True):
        scale = largest if name.startswith("d_") else c.norm()
        budget = 2 * (b - c).norm() + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"
    return ours


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_any_length_in_any_dtype(length: int, dtype: torch.dtype) -> None:
    assert_within_budget(draw(length), dtype, lag=min(70, length // 3), skip=3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_tensors_at_odd_addresses(dtype: torch.dtype) -> None:
    """A form that was compiled for addresses of 16 bytes is not taken for others."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    inputs = draw(200).each(dtype)
    odd = Inputs(*map(moved, inputs))
    assert odd.q.data_ptr() % 16
    expected, found = (results(x.each(dtype) if x is inputs else x, "triton", lag=20) for x in (inputs, odd))
    for a, b in zip(expected[:3], found[:3], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("gate", [-6.0, 9.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_near_0_and_1(dtype: torch.dtype, gate: float) -> None:
    assert_within_budget(draw(700, gate=gate), dtype)


@pytest.mark.parametrize("heads", [(None, None), (1, 1), (6, 2), (2, 6)])
def test_gates_of_any_sharing(heads: tuple[int | None, int | None]) -> None:
    assert_within_budget(draw(300, decay=heads[0], enter=heads[1]), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "features"),
    [
        *((32, 32), (64, 32), (64, 16), (16, 64), (48, 80), (80, 48), (96, 112), (128, 64), (64, 128), (128, 128)),
        *((256, 64), (192, 128), (64, 256), (256, 256)),  # in slabs
    ],
)
def test_head_and_feature_dims(dim: int, features: int, dtype: torch.dtype) -> None:
    assert_within_budget(draw(200, dim=dim, features=features), dtype, lag=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_and_packed_documents(dtype: torch.dtype) -> None:
    assert_within_budget(draw(500), dtype, lag=20, skip=2, **flags(500))


def test_sizes_that_are_neither_powers_of_two_nor_multiples_of_16_are_refused() -> None:
    arguments = draw(10, dim=60, features=20).arguments("softmax")
    with pytest.raises(LizardzooError, match="got 60, 60 and 20; pass impl='reference'"):
        gated_linear_attention(**arguments, impl="auto")


@pytest.mark.parametrize("map_scale", [1.0, 2.5])
def test_exp_features(map_scale: float) -> None:
    """Logits of +-10 at most: within a chunk, weights are taken relative to a row's largest feature, in fp32."""
    assert_within_budget(draw(300, map_scale=map_scale), torch.float32, activation="exp")


def test_a_row_without_a_real_token_gives_nothing() -> None:
    inputs, mask = draw(130), torch.ones(2, 130, dtype=torch.bool, device="cuda")
    mask[0] = False
    y, log_mass, _, *gradients = results(inputs.each(torch.bfloat16), "triton", mask=mask)
    assert (y[0] == 0).all() and (log_mass[0] == 0).all()
    assert all(g.isfinite().all() for g in gradients) and (gradients[0][0] == 0).all()


def test_runs_agree_to_the_last_bit() -> None:
    inputs = draw(1500).each(torch.bfloat16)
    first = results(inputs, "triton", lag=64)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, results(inputs, "triton", lag=64)))


@torch.no_grad()
@pytest.mark.parametrize("lag", [0, 1, 100])
@pytest.mark.parametrize("activation", ["softmax", "exp"])
def test_steps_and_pieces_go_on_from_a_state(lag: int, activation: str) -> None:
    inputs = draw(150, map_scale=1.0)
    arguments = inputs.arguments(activation)
    maps = arguments.pop("feature_map")
    expected = gated_linear_attention(**arguments, feature_map=maps, lag=lag, skip=2, impl="reference")

    def piece(start: int, end: int) -> dict[str, Any]:
        return {name: x[:, start:end] for name, x in arguments.items()}

    state = init_state(2, 6, 2, 64, 128, lag, 2, 2, torch.float32, "cuda")
    outputs = []
    for start, end in itertools.pairwise([0, 70, 131]):
        *output, state = gated_linear_attention(
            **piece(start, end), feature_map=maps, lag=lag, skip=2, state=state, impl="triton"
        )
        outputs.append(output)
    for t in range(131, 150):
        *output, state = gated_linear_attention_step(
            **piece(t, t + 1), feature_map=maps, skip=2, state=state, impl="triton"
        )
        outputs.append(output)
    y, log_mass = (torch.cat(part, 1) for part in zip(*outputs))
    finite = torch.isfinite(expected[1])
    assert torch.equal(finite, torch.isfinite(log_mass))
    assert (y - expected[0]).norm() <= 1e-4 * expected[0].norm()
    assert (log_mass - expected[1])[finite].abs().max() <= 1e-4


@torch.no_grad()
def test_a_step_can_be_captured_in_a_graph() -> None:
    inputs = draw(1).each(torch.bfloat16)
    state = init_state(2, 6, 2, 64, 128, 100, 2, 2, torch.bfloat16, "cuda")
    arguments = inputs.arguments("softmax")
    expected = gated_linear_attention_step(**arguments, state=state, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gated_linear_attention_step(**arguments, state=state, impl="triton")
    graph.replay()
    assert torch.equal(captured[0], expected[0]) and torch.equal(captured[2].kv, expected[2].kv)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
def test_compiled_equals_eager_and_lengths_do_not_recompile_kernels() -> None:
    from lizardzoo.kernels.gated_linear import triton, triton_backward

    inputs = draw(200).each(torch.bfloat16)
    eager = results(inputs, "triton", lag=64)

    def branch(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        arguments = Inputs(*tensors).arguments("softmax")
        return gated_linear_attention(**arguments, lag=64, return_state=False, impl="triton")[:2]

    y, _ = torch.compile(branch, fullgraph=True)(*inputs)
    assert torch.equal(y.double(), eager[0])
    kernels = [x for module in (triton, triton_backward) for x in vars(module).values() if hasattr(x, "device_caches")]

    def compiled_forms() -> int:
        return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())

    results(draw(500).each(torch.bfloat16), "triton", lag=64)
    before = compiled_forms()
    assert before > 0
    for length in (129, 300, 1027):
        results(draw(length).each(torch.bfloat16), "triton", lag=65)
    assert compiled_forms() == before
