"""Which layers should keep their softmax: those whose mixer costs most, measured on the whole model's output.

    layers = lz.select_layers(teacher, evaluate.sequences("novel.txt", tokenizer, limit=8), keep=4)
    student = lz.linearize(teacher, layers)

What a layer's softmax is worth is the KL to the teacher that it takes away: the error of a layer's own output says
little of it (an error may be the noise of a sink, or what all later layers build on). Recall is what a few softmax
layers give back where nothing else does, so they are best chosen by it:

    ids, answers = evaluate.recall_sequences("novel.txt", tokenizer)
    layers = lz.select_layers(teacher, ids, keep=4, weights=answers, greedy=True)

The chosen layers may get something else, such as `give=lz.Window(window=1024)`: recall as far as that, in memory that
does not grow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lizardzoo.config import SpecLike, resolve_spec
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.positions import Progress, Run
from lizardzoo.selection.chosen import Chosen
from lizardzoo.selection.kl import Text, check_weights, student_and_goal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Worth:
    """What one layer's softmax is worth.

    Attributes:
        layer: its index.
        kl: the KL to the teacher with softmax in this layer, in nats per token.
        worth: by how much that is less than without.
    """

    layer: int
    kl: float
    worth: float


@dataclass(frozen=True)
class Selection(Chosen):
    """A layers list, as `lizardzoo.linearize` takes it, and what it was chosen by.

    Attributes:
        layers: one spec per layer.
        kept: the chosen layers, the most valuable first (then those that had softmax before).
        ranking: all that had a mixer by worth, the best first.
        curve: the KL to the teacher, in nats per token, with the first 0, 1, 2, ... of the chosen layers.
    """

    kept: list[int]
    ranking: list[Worth]
    curve: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return {
            "layers": [spec.to_dict() for spec in self.layers],
            "kept": self.kept,
            "ranking": [asdict(worth) for worth in self.ranking],
            "curve": self.curve,
        }

    def table(self) -> Table:
        """The ranking."""
        from rich.table import Table

        table = Table(title=f"KL to the teacher, {self.curve[0]:.4f} without softmax in any of these layers")
        for column in ("layer", "KL with its softmax", "worth", "chosen", "KL with the chosen so far"):
            table.add_column(column, justify="right")
        for worth in self.ranking:
            chosen = worth.layer in self.kept
            place = self.kept.index(worth.layer) + 1 if chosen else 0
            after = f"{self.curve[place]:.4f}" if chosen else ""
            style = "bold" if chosen else None
            table.add_row(
                str(worth.layer), f"{worth.kl:.4f}", f"{worth.worth:+.4f}", str(place or ""), after, style=style
            )
        return table


def select_layers(
    model: Any,
    sequences: Tensor,
    keep: int,
    *,
    layers: SpecLike | Sequence[SpecLike] = "recommended",
    give: SpecLike = "softmax",
    teacher: Any = None,
    weights: Tensor | None = None,
    greedy: bool = False,
    batch_size: int = 1,
    progress: Progress | None = None,
) -> Selection:
    """Choose the layers whose softmax is worth keeping.

    The model runs with mixers in all layers, and once for each layer with softmax in that one; it is the same weights
    each time, nothing is trained. The layers that take away most of the KL to the teacher are chosen.

    Args:
        model: a linearized model, best after stage 1: an untrained mixer says less of what a trained one will lose.
            Or a teacher: it is linearized with `layers` and calibrated on the first sequences.
        sequences: [N, T] token ids of real text, as `lizardzoo.evaluate.sequences` makes them; T well beyond the
            windows, because within them nothing is lost.
        keep: how many layers shall have softmax in all. Layers that have it already stay, and count.
        layers: the mixers of a model that is a teacher.
        give: what the chosen layers get in the list. They are chosen as if it were softmax, which a wide window is for
            texts no longer than it.
        teacher: what KL is measured from; None: the model's own projections with softmax in all layers, which are the
            teacher's until stage 2 has been merged into them.
        weights: [N, T] of at least 0, what each token's prediction counts in the KL; None: all the same. Those of
            `lizardzoo.evaluate.recall_sequences` count the answers of questions about the text; and nothing else, or
            (`share`) all other tokens a little.
        greedy: choose one layer after the other, each time beside those already chosen: `keep` times the work, and
            right where two layers do one job.
        batch_size: sequences per forward.
        progress: called with the sequences run and how many there will be: every run's, the teacher's too.

    Returns:
        a `Selection`: a list of specs for `lizardzoo.linearize`, with the ranking and the KL by layers kept.

    Raises:
        LizardzooError: as `lizardzoo.linearize` and `lizardzoo.evaluate.by_position`; weights or a
            keep that do not fit.
    """
    given = resolve_spec(give)
    student, goal = student_and_goal(model, sequences, layers, teacher)
    check_weights(weights, sequences)
    specs = list(student.config.specs)
    candidates = list(mixers_of(student))
    already = [index for index in range(len(specs)) if index not in candidates]
    whole = isinstance(keep, int) and not isinstance(keep, bool)
    if not whole or not len(already) <= keep <= len(specs):
        raise LizardzooError(
            f"keep must be a whole number from {len(already)} (layers that have softmax already) to {len(specs)} "
            f"(all layers), got {keep!r}"
        )
    count = keep - len(already)
    number = len(candidates)
    later = range(number - 1, number - count, -1) if greedy else [count] * (count > 0)
    text = Text(sequences, goal, batch_size, [1 + number, *later], progress, weights)

    def kls(sets: Sequence[Sequence[int]]) -> list[float]:
        """With softmax in each of these sets of layers."""
        return text.kls([Run(student, partial(softmax_in, student, tuple(chosen))) for chosen in sets])

    base, *single = kls([(), *((index,) for index in candidates)])
    ranking = sorted((Worth(i, kl, base - kl) for i, kl in zip(candidates, single)), key=lambda w: -w.worth)
    if greedy and count:
        chosen, curve = [ranking[0].layer], [base, ranking[0].kl]
        for _ in range(count - 1):
            rest = [index for index in candidates if index not in chosen]
            found = dict(zip(rest, kls([(*chosen, index) for index in rest])))
            chosen.append(min(rest, key=found.__getitem__))
            curve.append(found[chosen[-1]])
    else:
        chosen = [worth.layer for worth in ranking[:count]]
        curve = [base, *(kls([chosen[:n] for n in range(1, count + 1)]) if count else [])]
    result = [given if index in chosen else spec for index, spec in enumerate(specs)]
    return Selection(result, chosen + already, ranking, curve)


@contextmanager
def softmax_in(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Inside, these layers of a linearized model run the teacher's attention."""
    attentions = [model.attentions()[index] for index in layers]
    before = [attention.runs_softmax for attention in attentions]
    for attention in attentions:
        attention.runs_softmax = True
    try:
        yield
    finally:
        for attention, flag in zip(attentions, before):
            attention.runs_softmax = flag
