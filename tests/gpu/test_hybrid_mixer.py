"""The hybrid mixer on the device by its Triton kernels: training, decoding, graphs and torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lizardzoo.kernels import Impl
from lizardzoo.kernels.state import map_state, state_tensors
from lizardzoo.mixers import AttentionShape, MixerInputs
from lizardzoo.mixers.hybrid import Hybrid, HybridMixer
from tests.kernels.test_rotary import tables

pytestmark = pytest.mark.gpu
FLOOR = {torch.bfloat16: 2e-3, torch.float16: 3e-4, torch.float32: 3e-6}
SHAPES = [
    AttentionShape(hidden_size=384, heads=6, kv_heads=2, head_dim=dim, scale=dim**-0.5) for dim in (64, 128, 256)
]  # the heads of test_hybrid_triton: their kernels are compiled once


def make(spec: Hybrid, shape: AttentionShape = SHAPES[0], impl: str = "triton") -> HybridMixer:
    """With parameters that are no constants, and branches of which both count; always the same."""
    mixer = spec.build(shape).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        if mixer.log_scale is not None:
            mixer.log_scale.bias.fill_(5.0)
        for parameter in mixer.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator, device="cuda"))
    mixer.impl = Impl(impl)
    return mixer


def draw(length: int, shape: AttentionShape = SHAPES[0], dtype: torch.dtype = torch.bfloat16) -> MixerInputs:
    def randn(*size: int) -> Tensor:
        return torch.randn(2, length, *size, device="cuda").bfloat16().to(dtype)

    heads = [randn(n, shape.head_dim) for n in (shape.heads, shape.kv_heads, shape.kv_heads)]
    cos, sin = tables(torch.arange(length, device="cuda")[None], shape.head_dim, torch.bfloat16)
    return MixerInputs(*heads, randn(shape.hidden_size), cos.to(dtype), sin.to(dtype))


def outputs(mixer: Any, inputs: MixerInputs) -> list[Tensor]:
    """y and the gradients of q, k, v, x and all parameters, in float64."""
    leaves = [x.detach().requires_grad_() for x in inputs[:4]]
    y = mixer(MixerInputs(*leaves, *inputs[4:]))[0]
    weight = torch.linspace(-1, 1, y.numel(), device="cuda").view(y.shape).bfloat16()
    found = torch.autograd.grad((y.double() * weight).sum(), [*leaves, *mixer.parameters()])
    return [x.detach().double() for x in (y, *found)]


@pytest.mark.parametrize("dtype", FLOOR, ids=str)
@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (Hybrid(), SHAPES[0]),
        (Hybrid(), SHAPES[1]),
        (Hybrid(feature_dim=64), SHAPES[2]),
        (Hybrid(disjoint=False, sinks=2, feature_rope=True), SHAPES[0]),
    ],
    ids=["default", "128", "256", "overlapping"],
)
def test_triton_errs_at_most_twice_as_much_as_the_reference(
    spec: Hybrid, shape: AttentionShape, dtype: torch.dtype
) -> None:
    inputs = draw(700, shape, dtype)
    exact = outputs(make(spec, shape, "reference").double(), inputs.each(lambda x: x.double()))
    plain = outputs(make(spec, shape, "reference"), inputs)
    mixer = make(spec, shape)
    ours = outputs(mixer, inputs)
    largest = max(x.norm() for x in exact[1:])
    names = ["y", "q", "k", "v", "x", *(name for name, _ in mixer.named_parameters())]
    for name, a, b, c in zip(names, ours, plain, exact, strict=True):
        scale = c.norm() if name == "y" else largest
        budget = 2 * (b - c).norm() + FLOOR[dtype] * scale
        assert (a - c).norm() <= budget, f"{name}: {(a - c).norm() / scale:.1e}, PyTorch {(b - c).norm() / scale:.1e}"


@pytest.mark.parametrize(
    "spec", [Hybrid(window=64), Hybrid(window=64, keep=0, disjoint=False, gate="token")], ids=["disjoint", "overlap"]
)
@torch.no_grad()
def test_cached_steps_equal_the_full_forward(spec: Hybrid) -> None:
    """A prompt of 200 tokens and 60 steps, of which the last 10 go over the end of a ring."""
    inputs, mixer = draw(260), make(spec)
    full, _ = mixer(inputs)
    exact, _ = make(spec, impl="reference").double()(inputs.each(lambda x: x.double()))
    y, state = mixer(inputs.tokens(0, 200), mixer.init_state(2, torch.bfloat16, "cuda"), need_state=True)
    addresses = [x.data_ptr() for x in state_tensors(state)]
    pieces = [y, *(mixer.step_(inputs.tokens(t, t + 1), state) for t in range(200, 260))]
    assert [x.data_ptr() for x in state_tensors(state)] == addresses
    steps = torch.cat(pieces, 1)
    error, scale = (full.double() - exact).norm(), exact.norm()
    assert (steps.double() - exact).norm() <= 2 * error + FLOOR[torch.bfloat16] * scale
    last = slice(250, 260)
    assert (steps[:, last].double() - exact[:, last]).norm() <= 1e-2 * exact[:, last].norm()


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["64", "256"])
@torch.no_grad()
def test_a_step_in_a_graph_is_the_step(shape: AttentionShape) -> None:
    inputs, mixer = draw(200, shape), make(Hybrid(window=64, feature_dim=64), shape)
    _, state = mixer(inputs.tokens(0, 100), need_state=True)
    held, start = map_state(torch.clone, state), map_state(torch.clone, state)
    token = inputs.tokens(100, 101).each(torch.clone)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        mixer.step_(token, held)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = mixer.step_(token, held)
    for x, first in zip(state_tensors(held), state_tensors(start), strict=True):
        x.copy_(first)
    for t in range(100, 200):
        now = inputs.tokens(t, t + 1)
        for x, new in zip(token, now):
            if x is not None and new is not None:
                x.copy_(new)
        graph.replay()
        assert torch.equal(y, mixer.step_(now, state)), f"token {t}"
    for a, b in zip(state_tensors(held), state_tensors(state), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # torch's own
def test_torch_compile_takes_the_whole_graph() -> None:
    mixer, inputs = make(Hybrid()), draw(300)
    eager = outputs(mixer, inputs)
    compiled = torch.compile(mixer, fullgraph=True)

    class Compiled:
        parameters = staticmethod(mixer.parameters)
        __call__ = staticmethod(compiled)

    for a, b in zip(outputs(Compiled(), inputs), eager, strict=True):
        # inductor fuses what surrounds the kernels (gates, sums), and so rounds elsewhere
        assert (a - b).norm() <= torch.finfo(torch.bfloat16).eps * b.norm()
