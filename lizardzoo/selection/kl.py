"""What both selections measure by: the KL to the teacher of one student, run in many ways over the same text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from lizardzoo.adapters import softmax_mode
from lizardzoo.config import SpecLike
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.positions import Progress, Run, check_sequences, measure
from lizardzoo.linearize import linearize

CALIBRATION_SEQUENCES = 2
AT_ONCE = 32
"""Runs that are measured on a batch together, beside one of the goal: their outputs are held at the same time."""


def student_and_goal(
    model: Any, sequences: Tensor, layers: SpecLike | Sequence[SpecLike], teacher: Any
) -> tuple[Any, Run]:
    """A linearized model (a teacher is linearized with `layers` and calibrated), and what KL is measured from."""
    check_sequences([model, *([] if teacher is None else [teacher])], sequences)
    if hasattr(model, "mixers"):
        return model, Run(model, partial(softmax_mode, model)) if teacher is None else Run(teacher)
    student = linearize(model, layers, calibrate=sequences[:CALIBRATION_SEQUENCES])
    return student, Run(model if teacher is None else teacher)


def check_weights(weights: Tensor | None, sequences: Tensor) -> None:
    """Refuse what does not say for each token what it counts."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.shape != sequences.shape:
        given = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise LizardzooError(
            f"weights say what each token of the sequences counts, so they are {list(sequences.shape)}; got {given}"
        )
    predicted = weights[:, 1:].double()
    if not (bool((predicted >= 0).all()) and math.isfinite(total := float(predicted.sum())) and total > 0):
        raise LizardzooError(
            "weights must be finite, at least 0, and above 0 for some token behind the first of a sequence; "
            "lizardzoo.evaluate.recall_sequences makes such as count the answers of questions"
        )


class Text:
    """Sequences, what KL is measured from, what each token counts, and progress through all that is to be run.

    planned: how many runs each of the coming calls of `kls` will take; a call may take another number.
    """

    def __init__(
        self,
        sequences: Tensor,
        goal: Run,
        batch_size: int,
        planned: Sequence[int],
        progress: Progress | None,
        weights: Tensor | None = None,
    ) -> None:
        self.sequences, self.goal, self.batch_size = sequences, goal, batch_size
        self.planned, self.progress = list(planned), progress
        self.weights = weights
        self.done = 0

    def kls(self, runs: Sequence[Run]) -> list[float]:
        """The (weighted) mean KL of each run, in nats per token."""
        self.planned = self.planned[1:]
        total = self.done + self._passes([len(runs), *self.planned])
        kls: list[float] = []
        for start in range(0, len(runs), AT_ONCE):
            kls += self._measured(runs[start : start + AT_ONCE], total)
        if not all(map(math.isfinite, kls)):
            raise LizardzooError(
                "the model's KL to its teacher is not finite, so nothing can be chosen by it; lizardzoo.diagnose names "
                "the layer where it begins"
            )
        return kls

    def finish(self) -> None:
        """What was planned and has not been run will not be."""
        if self.progress is not None and self.planned:
            self.progress(self.done, self.done)
        self.planned = []

    def _measured(self, runs: Sequence[Run], total: int) -> list[float]:
        """Some runs, and the goal once."""
        before, progress = self.done, self.progress

        def told(now: int, _: int) -> None:
            if progress is not None:
                progress(before + now * (len(runs) + 1), total)

        # Whole sequences, without caches: a layer's cache would be a mixer's where it runs softmax.
        length = self.sequences.shape[1]
        curves = measure(runs, self.sequences, self.goal, self.batch_size, length, told, self.weights)
        self.done += self._passes([len(runs)])
        return [curve.cut([]).overall.kl or 0.0 for curve in curves]

    def _passes(self, calls: Sequence[int]) -> int:
        """Sequences that are run by calls of so many runs each: the goal's too, once for every `AT_ONCE` of them."""
        return len(self.sequences) * sum(runs + math.ceil(runs / AT_ONCE) for runs in calls)
