"""What a selection gives: a layers list that says how it was chosen."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

from lizardzoo.config import MixerSpec


@dataclass(frozen=True)
class Chosen(Sequence[MixerSpec]):
    """A layers list, as `lizardzoo.linearize` takes it: one spec per layer."""

    layers: list[MixerSpec]

    @overload
    def __getitem__(self, index: int) -> MixerSpec: ...

    @overload
    def __getitem__(self, index: slice) -> list[MixerSpec]: ...

    def __getitem__(self, index: int | slice) -> MixerSpec | list[MixerSpec]:
        """The spec of a layer."""
        return self.layers[index]

    def __len__(self) -> int:
        """The number of layers."""
        return len(self.layers)

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=indent)
