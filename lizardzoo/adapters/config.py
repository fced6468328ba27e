"""The config of a linearized model: its family's own, and `layers`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lizardzoo import mixers as _builtin_mixers  # noqa: F401  registers the mixers that a config.json may name
from lizardzoo.adapters.limits import check_config, check_fields, clear_errors
from lizardzoo.cache import MIXER_LAYER_TYPE, SLIDING_MIXER_LAYER_TYPE
from lizardzoo.config import MIXERS, MixerSpec, resolve_layers

MIXER_TYPES = {"full_attention": MIXER_LAYER_TYPE, "sliding_attention": SLIDING_MIXER_LAYER_TYPE}
"""The cache layer of a mixer, by what the layer's attention is in the teacher."""


@dataclass(kw_only=True)
class LizardConfigMixin:
    """Adds to a family's config `layers`, one spec dict per layer (or a preset name for all; see `lizardzoo.config`).

    `layer_types` follows from it and from `teacher_layer_types`, which says what each layer was in the teacher.
    """

    base_model_tp_plan: ClassVar[Any] = None  # a plan would have to shard the mixers' per-head parameters too

    layers: list[Any] | str | None = None
    teacher_layer_types: list[str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_config(self)
        super().__post_init__(**kwargs)  # type: ignore[misc]
        self.normalize_layers()

    def normalize_layers(self) -> None:
        """Write `layers` out as one full dict per layer, whatever form it was given in (None = all softmax)."""
        self.layers = [spec.to_dict() for spec in self.specs]

    @property
    def specs(self) -> list[MixerSpec]:
        """One spec per layer."""
        layers = "softmax" if self.layers is None else self.layers
        return resolve_layers(layers, self.num_hidden_layers)  # type: ignore[attr-defined]

    @property
    def layer_types(self) -> list[str]:
        """Which cache layer each layer gets: derived from `layers`, so that it can never be stale.

        Forwards of some families ask for it once per layer, compiled ones too: it builds no specs.
        """
        keeps = [MIXERS.get(name).keeps_softmax for name in self._mixer_names()]
        return [own if kept else MIXER_TYPES[own] for own, kept in zip(self.own_layer_types, keeps)]

    @layer_types.setter
    def layer_types(self, value: Any) -> None:
        """Ignored: `layers` says it (the families' own constructors set it)."""

    @property
    def own_layer_types(self) -> list[str]:
        """What each layer's attention is in the teacher: "full_attention" or "sliding_attention"."""
        if self.teacher_layer_types is not None:
            return list(self.teacher_layer_types)
        sliding = getattr(self, "sliding_window", None) is not None
        return ["sliding_attention" if sliding else "full_attention"] * self.num_hidden_layers  # type: ignore[attr-defined]

    def _mixer_names(self) -> list[str]:
        layers = self.layers
        if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):  # not written out yet
            layers = [spec.to_dict() for spec in self.specs]
        return [layer["type"] for layer in layers]

    def validate_layer_type(self) -> None:
        """transformers knows its own layer types only."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers', of what a stranger may have written: one sentence if it is wrong, no code fetched."""
        check_fields(config_dict)
        with clear_errors():
            return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the package's source is never copied next to a checkpoint."""
