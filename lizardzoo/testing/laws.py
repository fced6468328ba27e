"""The laws that every mixer obeys, as functions of a mixer: registering one is what gets it tested.

`check_mixer(spec_class)` runs them all on specs drawn from the class's own fields; plug-in authors call it in a test.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo.config import MixerSpec, spec_from_dict
from lizardzoo.kernels.state import map_state, state_tensors
from lizardzoo.mixers.base import AttentionShape, Mixer, MixerInputs
from lizardzoo.testing.strategies import SHAPES, TokenFlags, mixer_inputs, specs, token_flags

TOLERANCE = 1e-9  # float64: far above rounding, far below any mistake
Law = Callable[[st.DataObject, MixerSpec, AttentionShape, int], None]
LAWS: dict[str, Law] = {}
"""Every law of mixers, by name; see `check_mixer`."""


def law(check: Law) -> Law:
    """Register a law under its function's name."""
    LAWS[check.__name__] = check
    return check


def check_mixer(spec_class: type[MixerSpec], examples: int = 40) -> None:
    """Run every law of `LAWS` on a mixer.

    Args:
        spec_class: a registered spec. Its fields are drawn by their types, and from its presets.
        examples: how many specs, shapes and inputs each law is tried on, all in float64.

    Raises:
        AssertionError: a law is broken, with the case that breaks it.
    """
    for check in LAWS.values():
        check_law(check, spec_class, examples)


def check_law(check: Law, spec_class: type[MixerSpec], examples: int = 40) -> None:
    """Run one law of `LAWS`; see `check_mixer`."""

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.data(), specs(spec_class), st.sampled_from(SHAPES), st.integers(0, 2**16))
    def run(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
        check(data, spec, shape, seed)

    run()


def random_mixer(spec: MixerSpec, shape: AttentionShape, seed: int) -> Mixer:
    """A float64 mixer with random parameters, so that no gate is constant and no map is the identity."""
    mixer: Mixer = spec.build(shape).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to rounding relative to the largest entry, and finite."""
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    worst = (actual - expected).abs().max().item() if actual.numel() else 0.0
    bound = TOLERANCE * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert worst <= bound, f"{what}: differs by {worst:.2e}"


def _rows(x: Tensor, row: int, real: Tensor) -> Tensor:
    return x[row : row + 1, real]


def _run(mixer: Mixer, inputs: MixerInputs, splits: list[int]) -> tuple[Tensor, Any]:
    """The outputs of consecutive pieces, state handed on from the empty one."""
    state = mixer.init_state(inputs.q.shape[0], torch.float64, "cpu")
    edges = [0, *splits, inputs.q.shape[1]]
    outputs = []
    for start, end in itertools.pairwise(edges):
        if end > start:
            y, state = mixer(inputs.tokens(start, end), state, need_state=True)
            outputs.append(y)
    return torch.cat(outputs, 1), state


@law
def splitting_a_sequence_changes_nothing(
    data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int
) -> None:
    """Any split, down to single steps, equals the whole, with any padding and packing; so does what comes after."""
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 14))
    inputs = mixer_inputs(shape, batch, length, seed, data.draw(token_flags(batch, length)))
    mixer = random_mixer(spec, shape, seed)
    whole, _ = mixer(inputs)
    splits = sorted(data.draw(st.sets(st.integers(1, length))))
    pieces, state = _run(mixer, inputs, splits)
    assert_close(pieces, whole, f"pieces {splits}")
    steps, stepped = _run(mixer, inputs, list(range(1, length)))
    assert_close(steps, whole, "single steps")
    after = mixer_inputs(shape, batch, 3, seed + 1, TokenFlags(None, None))
    assert_close(mixer(after, state)[0], mixer(after, stepped)[0], "going on from either state")


@law
def a_step_in_place_is_the_step(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """`step_` gives the output and the state of a call with one token, in the tensors of the state it was given."""
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 10))
    inputs = mixer_inputs(shape, batch, length, seed, data.draw(token_flags(batch, length)))
    mixer = random_mixer(spec, shape, seed)
    state, moved = (mixer.init_state(batch, torch.float64, "cpu") for _ in range(2))
    addresses = [x.data_ptr() for x in state_tensors(moved)]
    for t in range(length):
        token = inputs.tokens(t, t + 1)
        expected, state = mixer(token, state, need_state=True)
        assert_close(mixer.step_(token, moved), expected, f"token {t}")
        assert [x.data_ptr() for x in state_tensors(moved)] == addresses, "the state moved to other addresses"
        for a, b in zip(state_tensors(moved), state_tensors(state), strict=True):
            assert torch.equal(a, b), "the state differs"


@law
def the_future_changes_nothing(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Outputs up to t do not depend on what comes behind t."""
    length = data.draw(st.integers(2, 12))
    t = data.draw(st.integers(1, length - 1))
    flags = TokenFlags(None, None)
    inputs, other = (mixer_inputs(shape, 1, length, seed + i, flags) for i in range(2))
    names = ("q", "k", "v", "x")
    parts: dict[str, Any] = {n: torch.cat([getattr(inputs, n)[:, :t], getattr(other, n)[:, t:]], 1) for n in names}
    mixed = inputs._replace(**parts)
    mixer = random_mixer(spec, shape, seed)
    assert_close(mixer(mixed)[0][:, :t], mixer(inputs)[0][:, :t], "outputs before the change")


@law
def in_a_short_text_it_is_softmax_where_it_says_so(
    data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int
) -> None:
    """Up to `spec.exact_within` tokens the output is that of softmax attention over all of them."""
    length = min(spec.exact_within, 14)  # shorter ones are its beginnings
    if length == 0:
        return
    inputs = mixer_inputs(shape, 1, length, seed, TokenFlags(None, None))
    q, k = (x.transpose(1, 2) for x in inputs.rotated())
    expected = F.scaled_dot_product_attention(
        q, k, inputs.v.transpose(1, 2), is_causal=True, enable_gqa=True, scale=shape.scale
    )
    assert_close(random_mixer(spec, shape, seed)(inputs)[0], expected.transpose(1, 2), f"{length} tokens")


@law
def beyond_its_reach_it_sees_nothing(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Tokens that lie `spec.reach` and more before a query change nothing for it."""
    if spec.reach is None:
        return
    old = data.draw(st.integers(1, 5))
    length = old + spec.reach
    flags = TokenFlags(None, None)
    inputs, other = (mixer_inputs(shape, 1, length, seed + i, flags) for i in range(2))
    names = ("q", "k", "v", "x")
    parts: dict[str, Any] = {n: torch.cat([getattr(other, n)[:, :old], getattr(inputs, n)[:, old:]], 1) for n in names}
    mixed = inputs._replace(**parts)
    mixer = random_mixer(spec, shape, seed)
    assert_close(mixer(mixed)[0][:, -1], mixer(inputs)[0][:, -1], "the last token's output")


@law
def a_call_leaves_the_given_state_alone(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """A state can be gone on from twice: what crop and beams live on. Only `step_` overwrites it."""
    inputs = mixer_inputs(shape, 2, 9, seed, data.draw(token_flags(2, 9, documents=False)))
    mixer = random_mixer(spec, shape, seed)
    _, state = mixer(inputs.tokens(0, 5), mixer.init_state(2, torch.float64, "cpu"), need_state=True)
    before = [x.clone() for x in state_tensors(state)]
    for end in (6, 9):
        mixer(inputs.tokens(5, end), state, need_state=True)
        for a, b in zip(before, state_tensors(state), strict=True):
            assert torch.equal(a, b), "the state was changed"


@law
def a_padded_batch_equals_its_rows_alone(
    data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int
) -> None:
    """Padding anywhere, filled with NaN, changes no real token's output; a padded token's output is zero."""
    length = data.draw(st.integers(1, 12))
    flags = data.draw(token_flags(2, length, documents=False, always_padded=True))
    mask = flags.mask
    assert mask is not None
    inputs = mixer_inputs(shape, 2, length, seed, flags)
    hole = ~mask
    poisoned = inputs._replace(**{n: getattr(inputs, n).clone() for n in ("q", "k", "v", "x")})
    for name in ("q", "k", "v", "x"):
        getattr(poisoned, name)[hole] = float("nan")
    mixer = random_mixer(spec, shape, seed)
    padded, _ = mixer(poisoned)
    assert (padded[hole] == 0).all(), "a padded token's output is not zero"
    for row in range(2):
        real = mask[row]
        if real.any():
            alone = inputs._replace(mask=None).each(partial(_rows, row=row, real=real))
            assert_close(padded[row : row + 1, real], mixer(alone)[0], f"row {row}")


@law
def packed_documents_equal_documents_alone(
    data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int
) -> None:
    """A restart resets state and window."""
    lengths = data.draw(st.lists(st.integers(1, 7), min_size=2, max_size=3))
    total = sum(lengths)
    starts = torch.zeros(1, total, dtype=torch.bool)
    edges = [0]
    for length in lengths:
        starts[0, edges[-1]] = True
        edges.append(edges[-1] + length)
    inputs = mixer_inputs(shape, 1, total, seed, TokenFlags(None, starts))
    mixer = random_mixer(spec, shape, seed)
    packed, _ = mixer(inputs)
    for start, end in itertools.pairwise(edges):
        alone = inputs.tokens(start, end)._replace(starts=None)
        assert_close(packed[:, start:end], mixer(alone)[0], f"document {start}..{end}")


@law
def the_state_does_not_grow(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Same shapes and dtypes after one token and after many, and as `init_state` promises."""
    mixer = random_mixer(spec, shape, seed)
    inputs = mixer_inputs(shape, 2, 50, seed, TokenFlags(None, None))
    layouts = []
    for length in (0, 1, 50):
        state = mixer.init_state(2, torch.float64, "cpu")
        if length:
            _, state = mixer(inputs.tokens(0, length), state, need_state=True)
        layouts.append([(x.shape, x.dtype) for x in state_tensors(state)])
    assert layouts[0] == layouts[1] == layouts[2], "the state's layout depends on the length"


@law
def rows_of_a_batch_are_independent(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Reordered rows of inputs and state give reordered outputs (beam search)."""
    order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
    inputs = mixer_inputs(shape, 3, 9, seed, data.draw(token_flags(3, 9, documents=False)))
    mixer = random_mixer(spec, shape, seed)
    _first, state = mixer(inputs.tokens(0, 6), mixer.init_state(3, torch.float64, "cpu"), need_state=True)
    rest = inputs.tokens(6, 9)
    moved = rest.each(lambda x: x[order])
    reordered = map_state(lambda x: x.index_select(0, order), state)
    assert_close(mixer(moved, reordered)[0], mixer(rest, state)[0][order], "rows")


@law
def every_parameter_learns(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Gradients reach every parameter and are finite, padded rows and empty branches included."""
    length = data.draw(st.integers(1, 12))
    flags = data.draw(token_flags(2, length))
    inputs = mixer_inputs(shape, 2, length, seed, flags)
    mixer = random_mixer(spec, shape, seed)
    q, k, v = (x.requires_grad_() for x in inputs[:3])
    mixer(inputs)[0].square().sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None, f"no gradient reaches {name}"
        assert torch.isfinite(parameter.grad).all(), f"the gradient of {name} is not finite"
    assert all(x.grad is None or torch.isfinite(x.grad).all() for x in (q, k, v)), "an input's gradient is not finite"


@law
def parameters_stay_in_fp32(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Casting the module to a narrow dtype leaves its parameters, to the bit; inputs in bf16 give outputs in bf16."""
    mixer: Mixer = spec.build(shape)
    before = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    mixer = mixer.to(torch.bfloat16).half()
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == torch.float32, f"{name} became {parameter.dtype}"
        assert torch.equal(parameter, before[name]), f"{name} changed its value"
    inputs = mixer_inputs(shape, 1, 5, seed, TokenFlags(None, None))
    narrow = inputs.each(lambda x: x.to(torch.bfloat16))
    y, _ = mixer(narrow)
    assert y.dtype == torch.bfloat16 and torch.isfinite(y).all()


@law
def switching_all_branches_off_gives_nothing(
    data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int
) -> None:
    """`switched_off` takes a branch out of the output and leaves the state alone."""
    mixer = random_mixer(spec, shape, seed)
    inputs = mixer_inputs(shape, 1, 9, seed, TokenFlags(None, None))
    _, state = mixer(inputs, mixer.init_state(1, torch.float64, "cpu"), need_state=True)
    mixer.switched_off = set(mixer.branch_names)
    y, silent = mixer(inputs, mixer.init_state(1, torch.float64, "cpu"), need_state=True)
    assert mixer.branch_names and (y == 0).all()
    for a, b in zip(state_tensors(state), state_tensors(silent), strict=True):
        assert torch.equal(a, b), "the state depends on what is switched off"


@law
def the_output_is_that_of_its_branches(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """A forward of its own, behind a state or not, gives what the branches give when they are merged."""
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 12))
    inputs = mixer_inputs(shape, batch, length, seed, data.draw(token_flags(batch, length)))
    mixer, state = random_mixer(spec, shape, seed), None
    if data.draw(st.booleans()):
        before = mixer_inputs(shape, batch, 9, seed + 1, TokenFlags(None, None))
        state = mixer(before, mixer.init_state(batch, torch.float64, "cpu"), need_state=True)[1]
    branches, _ = mixer.branches(inputs, state, state is not None)
    assert_close(mixer(inputs, state)[0], mixer.output(branches, inputs), "the branches merged")


@law
def branches_share_the_output(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """`shares` gives every branch a part from 0 to 1, together 1; none to a branch that saw nothing."""
    mixer = random_mixer(spec, shape, seed)
    inputs = mixer_inputs(shape, 1, data.draw(st.integers(1, 12)), seed, TokenFlags(None, None))
    branches, _ = mixer.branches(inputs, None, False)
    shares = mixer.shares(branches, inputs.x)
    assert tuple(shares) == tuple(branches) and set(shares) == set(mixer.branch_names)
    total = torch.stack(list(shares.values())).sum(0)
    assert_close(total, torch.ones_like(total), "the sum of the shares")
    for name, share in shares.items():
        assert (share >= 0).all(), f"{name} has a negative share"
        assert (share[branches[name].log_mass == -torch.inf] == 0).all(), f"{name} has a share of what it did not see"


@law
def a_spec_round_trips(data: st.DataObject, spec: MixerSpec, shape: AttentionShape, seed: int) -> None:
    """Through JSON and back, exactly."""
    import json

    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
