"""Which rows a comparison has: the teacher, every model, and every model with a branch switched off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedModel

from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import branch_names, without
from lizardzoo.evaluate.positions import Run

TEACHER = "teacher"


@dataclass(frozen=True)
class Planned:
    """A row to be: its name, the model's, the branch that is switched off, and how to run it."""

    name: str
    model: str
    without: str | None
    run: Run


def plan(
    models: Mapping[str, PreTrainedModel],
    teacher: PreTrainedModel | None,
    ablate: bool | Sequence[str] = False,
    recent: int | None = None,
) -> list[Planned]:
    """The rows in their order, the teacher's first; see `lizardzoo.evaluate.compare` for the arguments."""
    if TEACHER in models:
        raise LizardzooError(f"the name {TEACHER!r} belongs to the teacher's own row; name the model otherwise")
    if not models and teacher is None:
        raise LizardzooError("there is no model to compare; give a dict of at least one, or a teacher")
    if recent is not None and teacher is None:
        raise LizardzooError(f"recent={recent} is how far back the teacher reads, but there is no teacher; give one")
    chosen = [name for name in models if ablate is True] if isinstance(ablate, bool) else list(ablate)
    if unknown := [name for name in chosen if name not in models]:
        raise LizardzooError(f"ablate names {unknown[0]!r}, which is none of the models: {', '.join(models)}")
    rows = []
    if teacher is not None:
        rows.append(Planned(TEACHER, TEACHER, None, Run(teacher)))
        if recent is not None:
            rows.append(Planned(f"{TEACHER}, last {recent} tokens", TEACHER, None, Run(teacher, recent=recent)))
    for name, model in models.items():
        rows.append(Planned(name, name, None, Run(model)))
        rows += [
            Planned(f"{name} without {branch}", name, branch, Run(model, partial(without, model, branch)))
            for branch in (branch_names(model) if name in chosen else ())
        ]
    return rows
