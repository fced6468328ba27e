"""The suite catches what goes wrong in practice: each mixer here has one mistake, and is caught by the laws named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lizardzoo.adapters.qwen2 import LizardQwen2Attention
from lizardzoo.adapters.qwen3 import LizardQwen3Attention
from lizardzoo.config import MIXERS, MixerSpec, register_mixer
from lizardzoo.kernels import GatedLinearState, gated_linear_attention
from lizardzoo.kernels.state import overwrite
from lizardzoo.mixers import AttentionShape, GatedLinear, Mixer, MixerInputs, Window
from lizardzoo.mixers.gated_linear import GatedLinearMixer
from lizardzoo.mixers.merge import Branch
from lizardzoo.mixers.window import WindowMixer
from lizardzoo.testing import LAWS, MODEL_LAWS, check_law, check_model_law
from tests.adapters.families import teacher


class PadsDecayTheState(GatedLinearMixer):
    """Padded keys weigh nothing, but the gate goes on closing (flash-linear-attention had it)."""

    def branches(
        self, inputs: MixerInputs, state: GatedLinearState | None, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], GatedLinearState | None]:
        log_decay, log_input = self.linear.gates(inputs.x)
        if inputs.mask is not None and log_input is not None:
            log_input = log_input.masked_fill(~inputs.mask[..., None], -1e4)
        y, log_mass, new = gated_linear_attention(
            inputs.q, inputs.k, inputs.v, log_decay, log_input=log_input, feature_map=self.linear.feature_map(),
            starts=inputs.starts, state=state, return_state=need_state,
        )  # fmt: skip
        return {"linear": Branch(y, log_mass)}, overwrite(state, new) if in_place else new


class SeesOneTooFew(WindowMixer):
    """A window of w that holds w - 1 keys."""

    def __init__(self, spec: Window, shape: AttentionShape) -> None:
        super().__init__(replace(spec, window=max(1, spec.window - 1)), shape)


class SeesOneTooMany(WindowMixer):
    """A window of w that holds w + 1 keys."""

    def __init__(self, spec: Window, shape: AttentionShape) -> None:
        super().__init__(replace(spec, window=spec.window + 1), shape)


class StepsSeeOneTooFew(WindowMixer):
    """Right in one pass over a text; a single step forgets a token early."""

    def branches(
        self, inputs: MixerInputs, state: Any, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], Any]:
        if state is not None and inputs.q.shape[1] == 1:
            oldest = (state.length % state.k.shape[1] + 1) % state.k.shape[1]
            rows = torch.arange(len(oldest))
            state.k[rows, oldest], state.v[rows, oldest] = 0, 0
        return super().branches(inputs, state, need_state, in_place)


class OverwritesItsState(WindowMixer):
    """Every call moves the given state on where it is: nothing is left to go back to."""

    def forward(self, inputs: MixerInputs, state: Any = None, need_state: bool = False) -> tuple[Tensor, Any]:
        y, new = super().forward(inputs, state, need_state)
        return y, overwrite(state, new) if state is not None and new is not None else new


class IsFasterWithoutItsBranches(WindowMixer):
    """A forward of its own that forgets the sinks."""

    def forward(self, inputs: MixerInputs, state: Any = None, need_state: bool = False) -> tuple[Tensor, Any]:
        sinks, self.window.sinks = self.window.sinks, None
        found = super().forward(inputs, state, need_state)
        self.window.sinks = sinks
        return found


class ParametersFollowTheModel(GatedLinearMixer):
    """Casting the model casts gates and maps with it."""

    _apply = nn.Module._apply  # type: ignore[assignment]


class DocumentsMeet(GatedLinearMixer):
    """Where a packed document begins is not looked at."""

    def branches(
        self, inputs: MixerInputs, state: GatedLinearState | None, need_state: bool, in_place: bool = False
    ) -> tuple[dict[str, Branch], GatedLinearState | None]:
        return super().branches(inputs._replace(starts=None), state, need_state, in_place)


class Past(NamedTuple):
    k: Tensor
    v: Tensor
    mask: Tensor


class KeepsEverything(Mixer):
    """Softmax with a cache of its own: right, and growing."""

    branch_names = ("all",)

    def init_state(self, batch: int, dtype: torch.dtype, device: torch.device | str) -> Past:
        empty = torch.zeros(batch, 0, self.shape.kv_heads, self.shape.head_dim, dtype=dtype, device=device)
        return Past(empty, empty, torch.zeros(batch, 0, dtype=torch.bool, device=device))

    def branches(self, inputs: MixerInputs, state: Past | None, need_state: bool) -> tuple[dict[str, Branch], Past]:
        q, k = inputs.rotated()
        new = Past(k, inputs.v, torch.ones(k.shape[:2], dtype=torch.bool) if inputs.mask is None else inputs.mask)
        held = new if state is None else Past(*(torch.cat(pair, 1) for pair in zip(state, new, strict=True)))
        scores = torch.einsum("bihgd,bthd->bhgit", q.unflatten(2, (k.shape[2], -1)), held.k) * self.shape.scale
        count, total = scores.shape[-2:]
        seen = torch.ones(count, total, dtype=torch.bool).tril(total - count) & held.mask[:, None]
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1).nan_to_num()
        y = torch.einsum("bhgit,bthd->bihgd", weights, held.v).flatten(2, 3)
        return {"all": Branch(y, y[..., 0])}, held

    def step_(self, inputs: MixerInputs, state: Past) -> Tensor:
        return self.forward(inputs, state)[0]


@contextmanager
def registered(base: type[MixerSpec], mixer: Any) -> Iterator[type[MixerSpec]]:
    """A spec class with the fields of `base` that builds `mixer`; forgotten afterwards."""

    @register_mixer("broken")
    @dataclass(frozen=True)
    class Broken(base):  # type: ignore[valid-type, misc]
        def build(self, shape: AttentionShape) -> Any:
            return mixer(self, shape)

    try:
        yield Broken
    finally:
        MIXERS.remove("broken")


SMALL: dict[type[MixerSpec], dict[str, Any]] = {Window: {"window": 5, "keep": 0}, GatedLinear: {"gate_init": 0.5}}
CAUGHT_IN_A_MODEL = [
    (GatedLinear, PadsDecayTheState, "a_padded_batch_equals_its_rows_alone"),
    (Window, SeesOneTooFew, "in_a_short_text_the_student_is_the_teacher"),
    (Window, SeesOneTooMany, "beyond_the_reach_of_its_layers_nothing_is_seen"),
    (Window, StepsSeeOneTooFew, "cached_equals_full_under_every_split"),
    (Window, StepsSeeOneTooFew, "greedy_generation_is_the_uncached_one"),
    (Window, OverwritesItsState, "crop_rolls_back_what_was_recorded"),
    (Window, OverwritesItsState, "speculation_is_lossless"),
    (GatedLinear, ParametersFollowTheModel, "a_narrow_model_keeps_its_new_parameters_wide"),
    (GatedLinear, DocumentsMeet, "packed_documents_train_as_documents_alone"),
    (Window, KeepsEverything, "memory_grows_in_kept_softmax_layers_only"),
]
CAUGHT_ALONE = [
    (GatedLinear, PadsDecayTheState, "a_padded_batch_equals_its_rows_alone"),
    (Window, SeesOneTooFew, "in_a_short_text_it_is_softmax_where_it_says_so"),
    (Window, SeesOneTooMany, "beyond_its_reach_it_sees_nothing"),
    (Window, OverwritesItsState, "a_call_leaves_the_given_state_alone"),
    (Window, IsFasterWithoutItsBranches, "the_output_is_that_of_its_branches"),
    (GatedLinear, ParametersFollowTheModel, "parameters_stay_in_fp32"),
]


def named(cases: list[Any]) -> list[Any]:
    return [pytest.param(*case, id=f"{case[1].__name__}-{case[2]}") for case in cases]


@pytest.mark.parametrize(("base", "mixer", "law"), named(CAUGHT_IN_A_MODEL))
def test_a_law_of_models_catches_it(base: type[MixerSpec], mixer: Any, law: str) -> None:
    with registered(base, mixer) as broken:
        layers = [broken(**SMALL[base]), base(**SMALL[base]), broken(**SMALL[base])]
        with pytest.raises(AssertionError):
            check_model_law(MODEL_LAWS[law], teacher("llama"), layers, examples=10)
    check_model_law(MODEL_LAWS[law], teacher("llama"), base(**SMALL[base]), examples=1)  # it is the mistake


@pytest.mark.parametrize(("base", "mixer", "law"), named(CAUGHT_ALONE))
def test_a_law_of_mixers_catches_it(base: type[MixerSpec], mixer: Any, law: str) -> None:
    with registered(base, mixer) as broken, pytest.raises(AssertionError):
        check_law(LAWS[law], broken)


@pytest.mark.parametrize(("family", "attention"), [("qwen2", LizardQwen2Attention), ("qwen3", LizardQwen3Attention)])
def test_a_law_catches_an_adapter_that_forgets_what_its_family_adds(
    family: str, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The biases of the projections; the norms of q and k."""
    law = "in_a_short_text_the_student_is_the_teacher"

    def bare(self: Any, x: Tensor) -> tuple[Tensor, ...]:
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        return tuple((x @ weight.T).unflatten(-1, (-1, self.head_dim)) for weight in weights)

    monkeypatch.setattr(attention, "project", bare)
    with pytest.raises(AssertionError):
        check_model_law(MODEL_LAWS[law], teacher(family), Window(**SMALL[Window]), examples=1)
