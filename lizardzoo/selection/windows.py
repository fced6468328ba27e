"""How wide each layer's window should be, and how many heavy tokens it holds, at no more state than one size for all.

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
from itertools import product
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lizardzoo.cache import state_bytes
from lizardzoo.config import SpecLike
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.positions import Progress, Run
from lizardzoo.selection.budget import share_out
from lizardzoo.selection.chosen import Chosen
from lizardzoo.selection.kl import Text, check_weights, student_and_goal

if TYPE_CHECKING:
    from rich.table import Table


NAMES = {"window": ("a window", "windows"), "heavy": ("heavy tokens", "numbers of heavy tokens")}
"""The fields that can be shared out, in words."""
ROUNDS = 2
"""At most so many, unless told: the second costs half of the first, and is the one that sees the layers together."""
TOLLS = (0.0, 1 / 64, 1 / 16, 1 / 4)
"""What a change by an octave has to pay for itself, in parts of the best change's worth: the higher, the fewer."""
CHOICES = 3 * len(TOLLS)
"""Choices for each number of octaves: by every toll, of all layers and of every second one."""

Sizes = dict[tuple[str, int], int]
"""The size of a field in a layer."""
Costs = dict[tuple[str, int], dict[int, float]]
"""The KL with one size changed."""


@dataclass(frozen=True)
class WindowSelection(Chosen):
    """A layers list, as `lizardzoo.linearize` takes it, and what it was chosen by.

    Attributes:
        layers: one spec per layer.
        sizes: by field and layer, the size that was chosen.
        curve: the KL to the teacher, in nats per token: with the sizes the model had, then after each round that found
            better ones.
        kl_alone: by field, layer and size, the KL where only that one size is another than the model's.
    """

    sizes: dict[str, dict[int, int]]
    curve: list[float]
    kl_alone: dict[str, dict[int, dict[int, float]]]

    @property
    def windows(self) -> list[int]:
        """The window of each layer that has one, as `set_window` takes it."""
        return [spec.window for spec in self.layers if hasattr(spec, "window")]

    @property
    def kl_before(self) -> float:
        """The KL to the teacher with the sizes the model had."""
        return self.curve[0]

    @property
    def kl(self) -> float:
        """The KL to the teacher with the chosen sizes."""
        return self.curve[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them (layers and sizes are strings where they are keys)."""
        return {
            "layers": [spec.to_dict() for spec in self.layers],
            "sizes": {field: {str(i): size for i, size in each.items()} for field, each in self.sizes.items()},
            "curve": self.curve,
            "kl_alone": {
                field: {str(i): {str(size): kl for size, kl in each.items()} for i, each in layers.items()}
                for field, layers in self.kl_alone.items()
            },
        }

    def table(self) -> Table:
        """Every layer's KL by size, the chosen one marked."""
        from rich.table import Table

        after = f"{self.kl:.4f} with the chosen {' and '.join(NAMES[field][1] for field in self.sizes)}"
        table = Table(title=f"KL to the teacher: {self.kl_before:.4f} before, {after}")
        table.add_column("layer", justify="right")
        table.add_column("size of")
        sizes = sorted({size for layers in self.kl_alone.values() for each in layers.values() for size in each})
        for size in sizes:
            table.add_column(str(size), justify="right")
        for field, layers in self.kl_alone.items():
            for layer, each in layers.items():
                chosen = self.sizes[field][layer]
                cells = [f"{each[size]:.4f}" if size in each else "" for size in sizes]
                marked = [f"[bold]{cell} *[/]" if size == chosen else cell for size, cell in zip(sizes, cells)]
                table.add_row(str(layer), field, *marked)
        return table


def select_windows(
    model: Any,
    sequences: Tensor,
    *,
    layers: SpecLike | Sequence[SpecLike] = "recommended",
    teacher: Any = None,
    weights: Tensor | None = None,
    field: str | Sequence[str] = "window",
    octaves: int = 2,
    rounds: int = ROUNDS,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> WindowSelection:
    """Share the windows out among the layers, so that the KL to the teacher is least and the state no larger.

    Each size alone is halved and doubled, `octaves` times each; nothing is trained. As if the changes of KL added up,
    the best sizes for the same bytes of state are found (a knapsack), and more careful ones, with fewer octaves and
    fewer changes. They are run together, and the best of them and of what the model had is taken, so it is never worse
    on this text. But layers are not additive: a further round begins at what the last one chose, halves and doubles
    each size once, and chooses in the same way, until one finds nothing better.

    For S sizes (one for each layer and field) the model runs at most 1 + (2 * S + 12) * octaves times through the
    sequences, and 1 + 2 * S + 12 times for a further round; the teacher once for every 32 of these.

    Args:
        model: a linearized model, or a teacher, which is linearized with `layers` and calibrated first.
        sequences: [N, T] token ids of real text; T well beyond the widest window that is tried.
        layers: the mixers of a model that is a teacher.
        teacher: what KL is measured from; as for `select_layers`.
        weights: [N, T], what each token's prediction counts in the KL; as for `select_layers`.
        field: what is shared out: "window", or "heavy", the tokens that a layer's `Heavy` mixer holds; or both,
            ("window", "heavy"), out of one budget.
        octaves: 2 gives a size from a quarter to four times what it was, in all rounds together.
        rounds: at most so many.
        batch_size: sequences per forward.
        progress: called with the sequences run and how many there may be: every run's, the teacher's too.

    Returns:
        a `WindowSelection`: a list of specs for `lizardzoo.linearize`, with what was measured.

    Raises:
        LizardzooError: no layer has the field, or there is only one size; a size that cannot be halved so often;
            weights that do not fit; what `lizardzoo.linearize` and `lizardzoo.evaluate.by_position` raise.
    """
    fields = _fields(field)
    student, goal = student_and_goal(model, sequences, layers, teacher)
    check_weights(weights, sequences)
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 1:
        raise LizardzooError(f"rounds must be a whole number of at least 1, got {rounds!r}")
    start = sizes = _sizes(student, fields, octaves)
    scales = {item: [size * 2**n // 2**octaves for n in range(2 * octaves + 1)] for item, size in start.items()}
    budget = state_bytes(student)
    planned = [1 + 2 * octaves * len(start), CHOICES * octaves, *[1 + 2 * len(start), CHOICES] * (rounds - 1)]
    text = Text(sequences, goal, batch_size, planned, progress, weights)

    def kls(tried: Sequence[Sizes]) -> list[float]:
        return text.kls([Run(student, partial(sizes_of, student, each)) for each in tried])

    curve: list[float] = []
    alone: Costs = {}
    for number in range(rounds):
        reach = octaves if number == 0 else 1
        near = {item: [x for x in scales[item] if _octaves(x, sizes[item]) <= reach] for item in sizes}
        single = [(item, size) for item, each in near.items() for size in each if size != sizes[item]]
        now, *changed = kls([sizes, *({**sizes, item: size} for item, size in single)])
        costs = {item: dict.fromkeys(each, now) for item, each in near.items()}
        for (item, size), kl in zip(single, changed):
            costs[item][size] = kl
        if number == 0:
            curve, alone = [now], costs
        candidates = _together(student, sizes, costs, reach, budget)
        if not candidates:
            break
        kl, best = min(zip(kls(candidates), candidates), key=lambda pair: pair[0])
        if kl >= now:
            break
        curve.append(kl)
        sizes = best
    text.finish()
    specs = [
        replace(spec, **{name: sizes[name, index] for name in fields if (name, index) in sizes})
        for index, spec in enumerate(student.config.specs)
    ]
    return WindowSelection(specs, _by_field(sizes), curve, _by_field(alone))


def _fields(field: str | Sequence[str]) -> list[str]:
    """The names of what is shared out."""
    names = [field] if isinstance(field, str) else list(field)
    if not names or not set(names) <= set(NAMES) or len(set(names)) < len(names):
        raise LizardzooError(
            f"field={field!r}: expected 'window' or 'heavy', sizes that mixers have, or a list of both"
        )
    return names


def _sizes(student: Any, fields: Sequence[str], octaves: int) -> Sizes:
    """What there is to share out."""
    mixers = mixers_of(student)
    sizes = {(name, i): getattr(m.spec, name) for name in fields for i, m in mixers.items() if hasattr(m.spec, name)}
    for name in fields:
        one, many = NAMES[name]
        count = sum(has == name for has, _ in sizes)
        if count == 0 or len(sizes) < 2:
            raise LizardzooError(
                f"sharing {many} out needs two layers or more with {one}; the model has {count} layer(s) with {one}"
            )
    whole = isinstance(octaves, int) and not isinstance(octaves, bool) and octaves >= 1
    for (name, _), size in sizes.items():
        if not whole or size % 2**octaves:
            raise LizardzooError(
                f"octaves must be a whole number of at least 1, and every {name} a multiple of 2 ** octaves; "
                f"got octaves={octaves!r} and {name}={size}"
            )
    return sizes


def _together(student: Any, sizes: Sizes, costs: Costs, reach: int, budget: int) -> list[Sizes]:
    """Sizes that should be best by what each alone costs, once each: up to `reach` octaves away, with every toll, and
    with all layers or every second one changed (of two layers that do one job each seems superfluous)."""
    kl_now = next(each[sizes[item]] for item, each in costs.items())
    worth = max(kl_now - kl for each in costs.values() for kl in each.values())
    bytes_now = _bytes_with(student, sizes)
    more = {
        item: {size: _bytes_with(student, {**sizes, item: size}) - bytes_now for size in each}
        for item, each in costs.items()
    }
    layers = sorted({layer for _, layer in sizes})
    found: list[Sizes] = []
    for octaves, changed in product(range(1, reach + 1), (layers, layers[::2], layers[1::2])):
        near = {
            item: [x for x in each if _octaves(x, sizes[item]) <= octaves * (item[1] in changed)]
            for item, each in costs.items()
        }
        taken = [[more[item][x] for x in each] for item, each in near.items()]
        for toll in TOLLS:
            paid = [
                [costs[item][x] + toll * worth * _octaves(x, sizes[item]) for x in each] for item, each in near.items()
            ]
            columns = share_out(paid, taken, budget - bytes_now)
            candidate = {item: each[column] for (item, each), column in zip(near.items(), columns)}
            # What two sizes of a layer take could be more than the sum of both; of the mixers here it is not.
            if candidate != sizes and candidate not in found and _bytes_with(student, candidate) <= budget:
                found.append(candidate)
    return found


def _octaves(size: int, other: int) -> int:
    """How often one size has to be halved or doubled to be the other."""
    return (max(size, other) // min(size, other)).bit_length() - 1


def _by_field(values: Mapping[tuple[str, int], Any]) -> dict[str, dict[int, Any]]:
    """By field, then by layer."""
    return {name: {i: x for (of, i), x in values.items() if of == name} for name in dict.fromkeys(n for n, _ in values)}


def _bytes_with(model: Any, sizes: Sizes) -> int:
    """Bytes of a sequence's state with these sizes."""
    with sizes_of(model, sizes):
        return state_bytes(model)


@contextmanager
def sizes_of(model: Any, sizes: Sizes) -> Iterator[None]:
    """Inside, these fields of these layers have these sizes; the config goes unchanged."""
    mixers = mixers_of(model)
    before = {index: mixers[index].spec for _, index in sizes}
    for (name, index), size in sizes.items():
        mixers[index].spec = replace(mixers[index].spec, **{name: size})
    try:
        yield
    finally:
        for index, spec in before.items():
            mixers[index].spec = spec
