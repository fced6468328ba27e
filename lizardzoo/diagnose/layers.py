"""Every layer's numbers, from the input and output that its attention has in the teacher."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lizardzoo.adapters import softmax_mode
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.positions import Progress, check_sequences, in_eval_mode
from lizardzoo.kernels import window_attention
from lizardzoo.mixers.base import Mixer, MixerInputs
from lizardzoo.mixers.branches import WindowFields
from lizardzoo.mixers.gates import DecayGate, evaluate
from lizardzoo.mixers.merge import Branch


@dataclass(frozen=True)
class Layer:
    """One layer; lists have an entry per query head, `half_life` per head of the gate.

    Attributes:
        layer: its index.
        mixer: the name of its spec.
        error: mean squared error of the heads' outputs over the variance of the teacher's; 1 is what a constant scores.
        shares: each branch's part of the output, at positions that the window no longer covers.
        teacher_shares: the part of the teacher's attention that lies where the branch looks; only for a disjoint
            hybrid, whose branches share the past between them.
        half_life: tokens after which a decay gate has halved what it remembers (inf: it forgets nothing), by the gate.
        sink_mass: part of the window branch's mass on kept first tokens and sink logits; None without a window.
    """

    layer: int
    mixer: str
    error: list[float]
    shares: dict[str, list[float]]
    teacher_shares: dict[str, list[float]]
    half_life: dict[str, list[float]]
    sink_mass: list[float] | None


@dataclass
class Sums:
    """What is added up over the sequences, in float64 on the CPU."""

    tokens: int = 0
    values: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        """Add [heads] to what has that name."""
        value = value.detach().double().cpu()
        self.values[name] = self.values[name] + value if name in self.values else value

    def means(self, prefix: str) -> dict[str, list[float]]:
        """Per token: what has a name with this prefix, which is taken off."""
        found = {name: value for name, value in self.values.items() if name.startswith(prefix)}
        return {name.removeprefix(prefix): (value / self.tokens).tolist() for name, value in found.items()}


@torch.no_grad()
def look(model: Any, sequences: Tensor, teacher: Any, progress: Progress | None) -> list[Layer]:
    """The numbers of every layer that has a mixer."""
    mixers = mixers_of(model)
    if not mixers:
        raise LizardzooError(f"{type(model).__name__} has no mixer to look at; give a linearized model")
    check_sequences([model, *([] if teacher is None else [teacher])], sequences)
    length = sequences.shape[1]
    first = max(map(_first_beyond, mixers.values()))
    if length <= first:
        raise LizardzooError(
            f"the sequences have {length} tokens, but the widest window covers {first} (window and kept tokens); "
            f"give longer ones"
        )
    if teacher is not None:
        _check_teacher(model, teacher)
    sums = {index: Sums() for index in mixers}
    with ExitStack() as stack:
        stack.enter_context(in_eval_mode(model))
        if teacher is None:
            stack.enter_context(softmax_mode(model))
        else:
            stack.enter_context(in_eval_mode(teacher))
        watched = model if teacher is None else teacher
        calls = stack.enter_context(_attention_calls(watched, list(mixers)))
        for number, ids in enumerate(sequences.split(1), 1):
            watched.get_decoder()(input_ids=ids.to(watched.device), use_cache=False)
            for index, (hidden, position_embeddings, target) in calls.items():
                attention = model.attentions()[index]
                weight = attention.o_proj.weight
                hidden = hidden.to(weight)
                cos, sin = (x.to(weight.device) for x in position_embeddings)
                inputs = attention.inputs(hidden, (cos, sin))
                span = getattr(attention, "sliding_window", None) or length
                _observe(sums[index], attention.mixer, inputs, target.to(weight.device).view_as(inputs.q), span)
            calls.clear()
            if progress is not None:
                progress(number, len(sequences))
    return [_layer(index, mixers[index], sums[index], len(sequences) * length) for index in mixers]


@contextmanager
def _attention_calls(model: Any, indices: list[int]) -> Iterator[dict[int, Any]]:
    """Inside, a forward pass leaves of each of these layers its input, RoPE, and the heads' outputs [B, T, H D]."""
    calls: dict[int, Any] = {}
    handles = []
    for index in indices:
        attention = model.get_decoder().layers[index].self_attn

        def before(_: Any, args: Any, kwargs: dict[str, Any], index: int = index) -> None:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            calls[index] = (hidden, kwargs["position_embeddings"], None)

        def heads(_: Any, args: Any, index: int = index) -> None:
            calls[index] = (*calls[index][:2], args[0])

        handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(attention.o_proj.register_forward_pre_hook(heads))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _observe(sums: Sums, mixer: Mixer, inputs: MixerInputs, target: Tensor, span: int) -> None:
    """Add one sequence; `span`: how far the teacher's own attention reaches."""
    branches, _ = mixer.branches(inputs, None, False)
    y, target = mixer.output(branches, inputs).double(), target.double()
    sums.add("square", (y - target).square().sum((0, 1, 3)))
    sums.add("sum", target.sum((0, 1, 3)))
    sums.add("sum of squares", target.square().sum((0, 1, 3)))
    first = _first_beyond(mixer)
    sums.tokens += inputs.q.shape[0] * (inputs.q.shape[1] - first)

    def add(name: str, value: Tensor) -> None:
        sums.add(name, value[:, first:].double().sum((0, 1)))

    for name, share in mixer.shares(branches, inputs.x).items():
        add(f"share {name}", share)
    for name, module in mixer.named_modules():
        if isinstance(module, DecayGate):
            (decay,) = evaluate(inputs.x, [module])
            assert decay is not None
            add(f"gate {name}", decay)
    if isinstance(mixer.spec, WindowFields):
        near, sink = _masses(mixer, inputs, branches.get("window"), span)
        add("sink", sink)
        if getattr(mixer.spec, "disjoint", False):
            add("teacher window", near)
            add("teacher linear", 1 - near)


def _masses(mixer: Mixer, inputs: MixerInputs, window: Branch | None, span: int) -> tuple[Tensor, Tensor]:
    """[B, T, H] each: the teacher's attention that the window covers, and the part of the window's mass on sinks."""
    spec, scale = mixer.spec, mixer.shape.scale
    q, k = inputs.rotated(mixer.impl)
    common: dict[str, Any] = {"scale": scale, "return_state": False, "impl": mixer.impl}
    _, everything, _ = window_attention(q, k, inputs.v, window=span, **common)
    _, covered, _ = window_attention(q, k, inputs.v, window=spec.window, keep=spec.keep, **common)
    if not spec.window_rope:
        q, k = inputs.q, inputs.k
    mass = window.log_mass if window is not None else covered
    group = mixer.shape.heads // mixer.shape.kv_heads
    kept = k[:, : spec.keep].float().repeat_interleave(group, 2)
    sink = (torch.einsum("bthd,bnhd->bthn", q.float(), kept) * scale - mass[..., None]).exp().sum(-1)
    sinks = getattr(getattr(mixer, "window", None), "sinks", None)
    if sinks is not None:
        sink = sink + (sinks().logsumexp(-1) - mass).exp()
    return (covered - everything).exp().clamp(max=1), sink  # kept tokens may lie beyond the span


def _layer(index: int, mixer: Mixer, sums: Sums, tokens: int) -> Layer:
    numbers = tokens * mixer.shape.head_dim
    variance = sums.values["sum of squares"] / numbers - (sums.values["sum"] / numbers).square()
    return Layer(
        layer=index,
        mixer=mixer.spec.type_name,
        error=(sums.values["square"] / numbers / variance.clamp_min(1e-12)).tolist(),
        shares=sums.means("share "),
        teacher_shares=sums.means("teacher "),
        half_life={gate: [_half_life(x) for x in heads] for gate, heads in sums.means("gate ").items()},
        sink_mass=sums.means("sink").get(""),
    )


def _half_life(log_decay: float) -> float:
    """Tokens, at this mean log-decay per token."""
    if math.isnan(log_decay):
        return math.nan
    return math.log(0.5) / log_decay if log_decay < 0 else math.inf


def _first_beyond(mixer: Mixer) -> int:
    """The first position whose past is longer than what the window and the kept tokens cover."""
    spec = mixer.spec
    return spec.window + spec.keep if isinstance(spec, WindowFields) else 0


def _check_teacher(model: Any, teacher: Any) -> None:
    for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"):
        own, other = getattr(model.config, name), getattr(teacher.config, name, None)
        if own != other:
            raise LizardzooError(
                f"the teacher's {name} is {other} and the student's {own}; give the model that it was made from"
            )


def unmoved(model: Any, start: Any = None) -> dict[int, list[str] | None]:
    """By layer: the mixer's parameters that still are, in every number, what they were at the start; None for all."""
    before = None if start is None else mixers_of(start)
    mixers = mixers_of(model)
    if before is not None and before.keys() != mixers.keys():
        raise LizardzooError(
            "the start has mixers in other layers than the model; give the student before its training"
        )
    found: dict[int, list[str] | None] = {}
    for index, mixer in mixers.items():
        if before is None:
            origin = mixer.spec.build(mixer.shape)
            origin.reset_parameters()
        else:
            origin = before[index]
        values = dict(origin.named_parameters())
        own = dict(mixer.named_parameters())
        if values.keys() != own.keys():
            raise LizardzooError(
                f"the start's layer {index} has other parameters; give the student before its training"
            )
        same = [name for name, value in own.items() if torch.equal(value.detach().cpu(), values[name].detach().cpu())]
        found[index] = None if own and len(same) == len(own) else same
    return found
