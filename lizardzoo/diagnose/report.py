"""A diagnosis as table, picture and plain values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lizardzoo.diagnose.layers import Layer
from lizardzoo.diagnose.letters import Letters
from lizardzoo.diagnose.verdict import DEAD_HALF_LIFE, Finding, in_words
from lizardzoo.evaluate.report import figures, save_figure

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Diagnosis:
    """What `lizardzoo.diagnose` found.

    Attributes:
        layers: the numbers of every layer with a mixer.
        frozen: by layer the parameters that did not move; None for all of them.
        letters: answers by letter; None without questions.
        findings: what is wrong; empty for a healthy model.
    """

    layers: list[Layer]
    frozen: dict[int, list[str] | None]
    letters: Letters | None
    findings: list[Finding]

    @property
    def verdict(self) -> str:
        """What is wrong, in words, a line for each thing."""
        return in_words(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them (the keys of `frozen` are strings there)."""
        values = asdict(self)
        values["frozen"] = {str(layer): names for layer, names in self.frozen.items()}
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text; a gate that forgets nothing has the half-life Infinity, as Python's json reads it."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> Table:
        """One line per layer, means over heads."""
        from rich.table import Table

        branches = list(dict.fromkeys(branch for layer in self.layers for branch in layer.shares))
        table = Table(title="layers beside the teacher's (means over heads; shares beyond the window)")
        for column in ("layer", "mixer"):
            table.add_column(column)
        names = ["error", *(f"share of {b}" for b in branches), "teacher there", "half-life", "sinks", "unmoved"]
        for column in names:
            table.add_column(column, justify="right")
        for layer in self.layers:
            unmoved = self.frozen.get(layer.layer, [])
            table.add_row(
                str(layer.layer),
                layer.mixer,
                f"{_mean(layer.error):.4f}",
                *(f"{_mean(layer.shares[b]):.1%}" if b in layer.shares else "" for b in branches),
                " / ".join(f"{_mean(layer.teacher_shares[b]):.1%}" for b in branches if b in layer.teacher_shares),
                ", ".join(_range(heads) for heads in layer.half_life.values()),
                "" if layer.sink_mass is None else f"{_mean(layer.sink_mass):.1%}",
                "all" if unmoved is None else str(len(unmoved)),
            )
        return table

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write errors, shares, half-lives and sink mass by layer as a picture; returns the path.

        Raises:
            LizardzooError: matplotlib is not installed.
        """
        figure = figures()(figsize=(11, 7), layout="constrained")
        (errors, shares), (gates, sinks) = figure.subplots(2, 2)
        indices = [layer.layer for layer in self.layers]
        self._scatter(errors, [(layer.layer, layer.error) for layer in self.layers], "C3")
        errors.axhline(1, color="0.7", lw=0.8)
        errors.set(yscale="log", title="error / variance of the teacher's output, by head")
        branches = list(dict.fromkeys(branch for layer in self.layers for branch in layer.shares))
        for color, branch in enumerate(branches):
            for attribute, style in (("shares", "-"), ("teacher_shares", ":")):
                values = [getattr(layer, attribute).get(branch) for layer in self.layers]
                heights = [math.nan if each is None else _mean(each) for each in values]
                if not all(map(math.isnan, heights)):
                    label = branch if attribute == "shares" else f"the teacher's attention where {branch} looks"
                    shares.plot(indices, heights, style, color=f"C{color}", marker=".", label=label)
        shares.set(ylim=(-0.02, 1.02), title="share of each branch, beyond the window")
        shares.legend(fontsize="small")
        points = [(layer.layer, heads) for layer in self.layers for heads in layer.half_life.values()]
        self._scatter(gates, points, "C2")
        gates.axhline(DEAD_HALF_LIFE, color="C3", lw=0.8, ls="--")
        gates.set(yscale="log", title="half-life of the gates in tokens, by head (dashed: dead below)")
        self._scatter(sinks, [(layer.layer, layer.sink_mass) for layer in self.layers if layer.sink_mass], "C4")
        sinks.set(ylim=(-0.02, 1.02), title="the window's mass on first tokens and sink logits, by head")
        for axis in (errors, shares, gates, sinks):
            axis.set_xlabel("layer")
            axis.xaxis.get_major_locator().set_params(integer=True)
        return save_figure(figure, path)

    @staticmethod
    def _scatter(axis: Any, points: Sequence[tuple[int, Sequence[float]]], color: str) -> None:
        pairs = [(layer, value) for layer, heads in points for value in heads if math.isfinite(value)]
        if pairs:
            axis.plot(*zip(*pairs), ".", color=color, alpha=0.7)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:.0f}" if f"{low:.0f}" == f"{high:.0f}" else f"{low:.0f}-{high:.0f}"
