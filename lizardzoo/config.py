"""Specs and the layers list: what each layer's mixer is, as plain values that live in config.json.

A spec is a frozen dataclass of a few typed fields. The list with one spec per layer IS the per-layer hybrid
configuration; `resolve_layers` makes it from whatever the user wrote, and `to_dict` / `spec_from_dict` are exact
inverses of each other.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Union, cast

from lizardzoo.errors import LizardzooError
from lizardzoo.registry import Registry

LINEARIZED = "lizard_"
"""What the `model_type` of a linearized model's config starts with; its teacher's follows."""


@dataclasses.dataclass(frozen=True)
class MixerSpec:
    """Base of all specs: fields are checked by type, then by `validate`; `type_name` is the name in config.json."""

    type_name: ClassVar[str] = ""
    keeps_softmax: ClassVar[bool] = False
    """True for the spec that leaves the layer's own attention as it is."""
    continuous: ClassVar[bool] = True
    """False where the mixer chooses among tokens, so that rounding may decide between two that count the same."""

    def __post_init__(self) -> None:
        hints = _field_types(cast(Hashable, type(self)))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            self.require(_fits(value, hints[field.name]), field.name, _describe(hints[field.name]))
        self.validate()

    def validate(self) -> None:
        """Check the fields against each other; raise through `require`."""

    @property
    def exact_within(self) -> int:
        """In a text of at most so many tokens the mixer is softmax attention, whatever it has learned; 0: in none."""
        return 0

    @property
    def reach(self) -> int | None:
        """How many keys back a query sees, itself included; None: the whole past, or some of it for ever."""
        return None

    def require(self, condition: bool, field: str, expected: str) -> None:
        """Raise the one error text of a field that does not fit."""
        if not condition:
            raise LizardzooError(
                f"{type(self).__name__}({field}={getattr(self, field)!r}): {field} must be {expected}; "
                f"change it in the layers list"
            )

    def build(self, shape: Any) -> Any:
        """The mixer (an `lizardzoo.mixers.base.Mixer`) of this spec for an `AttentionShape`."""
        raise NotImplementedError(f"{type(self).__name__} does not say which mixer it builds")

    def to_dict(self) -> dict[str, Any]:
        """All fields, with the registered name under "type": what config.json holds."""
        return {"type": self.type_name, **dataclasses.asdict(self)}


MIXERS: Registry[type[MixerSpec]] = Registry("mixer", group="lizardzoo.mixers")
PRESETS: Registry[MixerSpec] = Registry("preset")

SpecLike = MixerSpec | str | Mapping[str, Any]


def register_mixer(name: str) -> Any:
    """Class decorator: make a spec known under `name` in config.json, `resolve_layers` and the command line.

    Args:
        name: unique among mixers; `lizardzoo list` shows those that are taken.

    Raises:
        LizardzooError: another spec has that name.
    """

    def decorate(spec: type[MixerSpec]) -> type[MixerSpec]:
        spec.type_name = name
        return MIXERS.add(name, spec)

    return decorate


def register_preset(name: str, spec: MixerSpec) -> MixerSpec:
    """Give a spec a name that users can write instead of it.

    Args:
        name: unique among presets.
        spec: what the name stands for.

    Returns:
        The spec.

    Raises:
        LizardzooError: another spec has that name.
    """
    return PRESETS.add(name, spec)


def spec_from_dict(entry: Mapping[str, Any]) -> MixerSpec:
    """The inverse of `MixerSpec.to_dict`; unknown names and unknown fields raise."""
    fields = dict(entry)
    name = fields.pop("type", None)
    if not isinstance(name, str):
        raise LizardzooError(f'a layer is described as {{"type": NAME, ...}}, got {dict(entry)!r}')
    spec = MIXERS.get(name)
    known = {field.name for field in dataclasses.fields(spec)}
    if unknown := sorted(set(fields) - known):
        raise LizardzooError(f"mixer {name!r} has no field {unknown[0]!r}; its fields are: {', '.join(sorted(known))}")
    return spec(**fields)


def resolve_spec(entry: SpecLike) -> MixerSpec:
    """One spec from a spec, a preset name or a dict."""
    if isinstance(entry, MixerSpec):
        return entry
    if isinstance(entry, str):
        return PRESETS.get(entry)
    if isinstance(entry, Mapping):
        return spec_from_dict(entry)
    raise LizardzooError(f"a layer is a spec, a preset name or a dict, got {type(entry).__name__} {entry!r}")


def resolve_layers(layers: SpecLike | Sequence[SpecLike], num_layers: int) -> list[MixerSpec]:
    """One spec per layer, from one spec or preset name for all layers, or from a list of exactly `num_layers`.

    Args:
        layers: a spec, a preset's name, a dict as in config.json, or a list of such.
        num_layers: of the model.

    Raises:
        LizardzooError: a list of another length, a name or field that does not exist, a value that does not fit.
    """
    if isinstance(layers, (MixerSpec, str, Mapping)):
        return [resolve_spec(layers)] * num_layers
    if not isinstance(layers, Sequence):
        raise LizardzooError(f"layers is a list, a spec or a preset name, got {type(layers).__name__} {layers!r}")
    if len(layers) != num_layers:
        raise LizardzooError(
            f"layers has {len(layers)} entries but the model has {num_layers} layers; give one spec per layer, "
            f"or a single spec for all of them"
        )
    return [resolve_spec(entry) for entry in layers]


def describe_spec(spec: MixerSpec) -> str:
    """A preset's name where the spec is one, else the mixer's with the fields that are not the default."""
    for name in PRESETS:
        if PRESETS.get(name) == spec and name != spec.type_name:
            return name
    changed = [
        f"{field.name}={getattr(spec, field.name)!r}"
        for field in dataclasses.fields(spec)
        if getattr(spec, field.name) != field.default
    ]
    return " ".join([spec.type_name, *changed])


def runs(indices: Sequence[int]) -> str:
    """Ascending layers as "0-8, 10"."""
    groups = itertools.groupby(enumerate(indices), key=lambda pair: pair[1] - pair[0])
    edges = [[index for _, index in group] for _, group in groups]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in edges)


def layer_map(specs: Sequence[MixerSpec]) -> list[tuple[str, str]]:
    """Runs of equal layers: ("0-8", "recommended"), ("9", "softmax"), ..."""
    rows = []
    for text, run in itertools.groupby(enumerate(map(describe_spec, specs)), key=lambda pair: pair[1]):
        rows.append((runs([index for index, _ in run]), text))
    return rows


@functools.cache
def _field_types(spec: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cast(type, spec))


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value, possibly read from JSON, has the field's type. bool is no int here; NaN and inf fit nothing."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        return any(value == option and type(value) is type(option) for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(hint))
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return "one of " + ", ".join(repr(option) for option in typing.get_args(hint))
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(option) for option in typing.get_args(hint))
    return (
        "None"
        if hint is type(None)
        else {"int": "a whole number", "float": "a finite number"}.get(hint.__name__, f"a {hint.__name__}")
    )
