"""How wide each layer's window should be, or how many heavy tokens it holds, at no more state than one size for all.

    layers = lz.select_windows(student, evaluate.sequences("novel.txt", tokenizer, limit=8))
    student = lz.linearize(teacher, layers)     # or student.set_window(layers.windows): a window is a run-time choice

How much attention a layer has beyond its window does not tell what that costs (SmolLM2: most in layers 0-10, where a
narrower window does least harm; wider ones help most above layer 14), so it is measured on the model's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lizardzoo.config import SpecLike
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.positions import Progress, Run
from lizardzoo.selection.chosen import Chosen
from lizardzoo.selection.kl import Text, student_and_goal

if TYPE_CHECKING:
    from rich.table import Table


NAMES = {"window": ("a window", "windows"), "heavy": ("heavy tokens", "numbers of heavy tokens")}
"""The fields that can be shared out, in words."""


@dataclass(frozen=True)
class WindowSelection(Chosen):
    """A layers list, as `lizardzoo.linearize` takes it, and what it was chosen by.

    Attributes:
        layers: one spec per layer.
        windows: the window of each layer that has one, for `set_window`; or its heavy tokens.
        kl: the KL to the teacher with these windows, in nats per token.
        kl_before: the same with those the model had.
        kl_alone: by layer and window, the KL where only that layer has that window.
        field: what was shared out, "window" or "heavy".
    """

    windows: list[int]
    kl: float
    kl_before: float
    kl_alone: dict[int, dict[int, float]]
    field: str = "window"

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them (keys of `kl_alone` are strings there)."""
        return {
            "layers": [spec.to_dict() for spec in self.layers],
            "field": self.field,
            "windows": self.windows,
            "kl": self.kl,
            "kl_before": self.kl_before,
            "kl_alone": {str(i): {str(w): kl for w, kl in each.items()} for i, each in self.kl_alone.items()},
        }

    def table(self) -> Table:
        """Every layer's KL by window, the chosen one marked."""
        from rich.table import Table

        after = f"{self.kl:.4f} with the chosen {NAMES[self.field][1]}"
        table = Table(title=f"KL to the teacher: {self.kl_before:.4f} before, {after}")
        table.add_column("layer", justify="right")
        sizes = sorted({window for each in self.kl_alone.values() for window in each})
        for size in sizes:
            table.add_column(f"{self.field} {size}", justify="right")
        for (layer, each), chosen in zip(self.kl_alone.items(), self.windows):
            cells = [f"{each[size]:.4f}" if size in each else "" for size in sizes]
            marked = [f"[bold]{cell} *[/]" if size == chosen else cell for size, cell in zip(sizes, cells)]
            table.add_row(str(layer), *marked)
        return table


def select_windows(
    model: Any,
    sequences: Tensor,
    *,
    layers: SpecLike | Sequence[SpecLike] = "recommended",
    teacher: Any = None,
    field: str = "window",
    octaves: int = 2,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> WindowSelection:
    """Share the windows out among the layers, so that the KL to the teacher is least and the state no larger.

    Each layer alone is run with its window halved and doubled, `octaves` times each; nothing is trained. As if the
    changes of KL added up, the best windows are found exactly (a knapsack); then they are run together, as are those
    with fewer octaves, and the best of these and of what the model had is taken. So it is never worse on this text.

    Args:
        model: a linearized model, or a teacher, which is linearized with `layers` and calibrated first. All its
            windows are of one size.
        sequences: [N, T] token ids of real text; T well beyond the widest window that is tried.
        layers: the mixers of a model that is a teacher.
        teacher: what KL is measured from; as for `select_layers`.
        field: what is shared out: "window", or "heavy", the tokens that a layer's `Heavy` mixer holds.
        octaves: 2 tries a quarter, half, double and four times the window.
        batch_size: sequences per forward.
        progress: called with the sequences done and their number, over both rounds.

    Returns:
        a `WindowSelection`: a list of specs for `lizardzoo.linearize`, with what was measured.

    Raises:
        LizardzooError: no layer or only one with a window, or windows of several sizes; a window that cannot be
            halved so often; what `lizardzoo.linearize` and `lizardzoo.evaluate.by_position` raise.
    """
    student, goal = student_and_goal(model, sequences, layers, teacher)
    if field not in NAMES:
        raise LizardzooError(f"field={field!r}: expected 'window' or 'heavy', a size that mixers have")
    windows = {i: getattr(m.spec, field) for i, m in mixers_of(student).items() if hasattr(m.spec, field)}
    if len(windows) < 2 or len(set(windows.values())) > 1:
        one, many = NAMES[field]
        sizes_there = f"{many} of {sorted(set(windows.values()))} tokens"
        found = sizes_there if len(windows) > 1 else f"{len(windows)} layer(s) with {one}"
        raise LizardzooError(
            f"sharing {many} out needs two layers or more with {one}, all of one size; the model has {found}"
        )
    window = next(iter(windows.values()))
    if not isinstance(octaves, int) or isinstance(octaves, bool) or octaves < 1 or window % 2**octaves:
        raise LizardzooError(
            f"octaves must be a whole number of at least 1, and the {field} a multiple of 2 ** octaves; "
            f"got octaves={octaves!r} and {field}={window}"
        )
    unit = window // 2**octaves
    sizes = [unit * 2**n for n in range(2 * octaves + 1)]
    text = Text(sequences, goal, batch_size, 2, progress)

    def run(changed: Mapping[int, int]) -> Run:
        return Run(student, partial(sizes_of, student, field, dict(changed)))

    alone = [(index, size) for index in windows for size in sizes if size != window]
    before, *kls = text.kls([run({}), *(run({index: size}) for index, size in alone)])
    kl_alone = {index: dict.fromkeys(sizes, before) for index in windows}
    for (index, size), kl in zip(alone, kls):
        kl_alone[index][size] = kl
    candidates = [dict(windows)]
    for reach in range(1, octaves + 1):
        near = [size for size in sizes if window / 2**reach <= size <= window * 2**reach]
        costs = [[each[size] for size in near] for each in kl_alone.values()]
        best = share_out(costs, [size // unit for size in near], window // unit * len(windows))
        candidates.append({index: near[choice] for index, choice in zip(windows, best)})
    together = text.kls([run(candidate) for candidate in candidates])
    kl, chosen = min(zip(together, candidates), key=lambda pair: pair[0])
    specs = [
        replace(spec, **{field: chosen[index]}) if index in chosen else spec
        for index, spec in enumerate(student.config.specs)
    ]
    return WindowSelection(specs, list(chosen.values()), kl, before, kl_alone, field)


def share_out(costs: Sequence[Sequence[float]], sizes: Sequence[int], budget: int) -> list[int]:
    """For each row of costs the column taken, so that their sum is least and the columns' sizes are at most the budget.

    Exact, by dynamic programming over what is left of the budget.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for row in costs:
        after: dict[int, tuple[float, list[int]]] = {}
        for used, (cost, choices) in best.items():
            for column, size in enumerate(sizes):
                key, total = used + size, cost + row[column]
                if key <= budget and (key not in after or total < after[key][0]):
                    after[key] = (total, [*choices, column])
        best = after
    return min(best.values(), key=lambda pair: pair[0])[1]


@contextmanager
def sizes_of(model: Any, field: str, sizes: Mapping[int, int]) -> Iterator[None]:
    """Inside, these layers have these sizes; the config goes unchanged."""
    mixers = mixers_of(model)
    before = {index: mixers[index].spec for index in sizes}
    for index, size in sizes.items():
        mixers[index].spec = replace(before[index], **{field: size})
    try:
        yield
    finally:
        for index, spec in before.items():
            mixers[index].spec = spec
