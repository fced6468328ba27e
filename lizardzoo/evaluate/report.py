"""Several models beside their teacher on the same text: one report, as table, plot and plain values."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import PreTrainedModel

from lizardzoo.cache import kv_bytes, state_bytes
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.plan import TEACHER, plan
from lizardzoo.evaluate.positions import CHUNK_SIZE, ByPosition, Progress, bucket_edges, measure

if TYPE_CHECKING:
    from rich.table import Table

LENGTHS = (2048, 32768, 131072)


@dataclass(frozen=True)
class Row:
    """One model, or one model with a branch switched off.

    Attributes:
        name: of the row.
        model: the name that the model was given.
        without: the branch that is switched off; None: none is.
        result: perplexity and KL by position.
        memory: tokens -> bytes that generation holds for one sequence of so many: states and key-value caches.
    """

    name: str
    model: str
    without: str | None
    result: ByPosition
    memory: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What `compare` found.

    Attributes:
        sequences: how many were read.
        length: their tokens.
        rows: a teacher's comes first.
    """

    sequences: int
    length: int
    rows: list[Row]

    def __getitem__(self, name: str) -> Row:
        """The row of that name."""
        for row in self.rows:
            if row.name == name:
                return row
        raise LizardzooError(f"the report has no row {name!r}; its rows are: {', '.join(r.name for r in self.rows)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them (the keys of `memory` are strings there)."""
        values = asdict(self)
        for row in values["rows"]:
            row["memory"] = {str(tokens): size for tokens, size in row["memory"].items()}
        return values

    def to_json(self, indent: int | None = 2) -> str:
        """`to_dict` as text; what diverged is written Infinity or NaN, as Python's json reads it."""
        return json.dumps(self.to_dict(), indent=indent)

    def table(self) -> Table:
        """Perplexity, and KL to the teacher below it, by position bucket."""
        from rich.table import Table

        with_kl = any(row.result.overall.kl is not None for row in self.rows)
        title = f"perplexity{' and KL to the teacher' if with_kl else ''} by position"
        table = Table(title=f"{title}: {self.sequences} x {self.length} tokens")
        table.add_column("model", overflow="fold")
        for bucket in self.rows[0].result.buckets:
            table.add_column(bucket.label, justify="right")
        table.add_column("all", justify="right", style="bold")
        for row in self.rows:
            cells = [*row.result.buckets, row.result.overall]
            table.add_row(row.name, *(_number(cell.perplexity) for cell in cells), end_section=not with_kl)
            if with_kl:
                table.add_row("  [dim]KL[/]", *(_kl(cell.kl) for cell in cells), style="dim", end_section=True)
        return table

    def memory_table(self) -> Table:
        """Bytes that generation holds for one sequence, by its length."""
        from rich.table import Table

        table = Table(title="memory of one sequence: states and key-value caches")
        table.add_column("model", overflow="fold")
        rows = [row for row in self.rows if row.without is None]
        for tokens in rows[0].memory:
            table.add_column(f"{_tokens(tokens)} tokens", justify="right")
        for row in rows:
            table.add_row(row.name, *(human_bytes(size) for size in row.memory.values()))
        return table

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Write perplexity and KL by position as a picture (PNG, or what the suffix says); returns the path.

        Raises:
            LizardzooError: matplotlib is not installed.
        """
        figure_class = figures()
        from matplotlib.ticker import StrMethodFormatter

        with_kl = any(row.result.overall.kl is not None for row in self.rows)
        figure = figure_class(figsize=(11 if with_kl else 6, 4), layout="constrained")
        axes = figure.subplots(1, 2 if with_kl else 1, squeeze=False)[0]
        for index, row in enumerate(self.rows):
            points = row.result.curve
            middle = [(point.start + point.stop - 1) / 2 for point in points]
            style = {
                "label": row.name,
                "color": f"C{index % 10}",
                "ls": "--" if row.without else "-",
                "lw": 1.4,
            }
            axes[0].plot(middle, [point.perplexity for point in points], **style)
            if with_kl and row.name != TEACHER:
                axes[1].plot(middle, [math.nan if p.kl is None else p.kl for p in points], **style)
        for axis, label in zip(axes, ("perplexity", "KL(teacher || model), nats per token")):
            for edge in self.rows[0].result.buckets[1:]:
                axis.axvline(edge.start, color="0.85", lw=0.8, zorder=0)
            axis.set(xlabel="position", ylabel=label)
        axes[0].set_yscale("log")
        for set_formatter in (axes[0].yaxis.set_major_formatter, axes[0].yaxis.set_minor_formatter):
            set_formatter(StrMethodFormatter("{x:g}"))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
        return save_figure(figure, path)


def compare(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | None,
    sequences: Tensor,
    *,
    ablate: bool | Sequence[str] = False,
    buckets: Sequence[int] | None = None,
    window: int | None = None,
    lengths: Sequence[int] = LENGTHS,
    recent: int | None = None,
    batch_size: int = 1,
    chunk_size: int = CHUNK_SIZE,
    progress: Progress | None = None,
) -> Report:
    """Teacher and students side by side: same text, same batches, same code.

    Args:
        models: the models by the names they have in the report.
        teacher: what KL is measured from; it gets the first row. None measures perplexity alone.
        sequences: [N, T] token ids, as `lizardzoo.evaluate.sequences` makes them.
        ablate: True measures each linearized model also with each of its branches switched off in turn;
            a list of names only those.
        buckets, window, batch_size, chunk_size, progress: as for `by_position`; the window is the narrowest of all.
        recent: also the teacher reading only its last so many tokens: what is left of it beyond its training length,
            where it may read no more. At least two chunks.
        lengths: the lengths in tokens at which bytes are counted.

    Raises:
        LizardzooError: as `by_position`; no model at all; a name that is taken or unknown.
    """
    rows_to_be = plan(models, teacher, ablate, recent)
    edges = bucket_edges([entry.run.model for entry in rows_to_be], buckets, window)
    curves = measure([entry.run for entry in rows_to_be], sequences, teacher, batch_size, chunk_size, progress)
    rows = [
        Row(
            name=entry.name,
            model=entry.model,
            without=entry.without,
            result=curve.cut(edges),
            memory={n: memory_bytes(entry.run.model, min(n, entry.run.recent or n)) for n in lengths},
        )
        for entry, curve in zip(rows_to_be, curves)
    ]
    return Report(sequences.shape[0], sequences.shape[1], rows)


def figures() -> Any:
    """matplotlib's class of figures.

    Raises:
        LizardzooError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LizardzooError(
            'a plot needs the package matplotlib, which is not installed; pip install "lizardzoo[eval]"'
        ) from error
    return Figure


def save_figure(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure (PNG, or what the suffix says); returns the path."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def memory_bytes(model: PreTrainedModel, length: int) -> int:
    """What generation holds for one sequence of `length` tokens: mixers' states and key-value caches."""
    return (state_bytes(model) if mixers_of(model) else 0) + kv_bytes(model, length)


def human_bytes(size: float) -> str:
    """Such as "22.5 MiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _tokens(count: int) -> str:
    return f"{count // 1024}K" if count % 1024 == 0 else f"{count:,}"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _kl(value: float | None) -> str:
    if value is None:
        return ""
    return "0" if abs(value) < 5e-6 else f"{value:.4f}"
