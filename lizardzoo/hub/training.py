"""What a card says of training: the recipe of a run of `lizardzoo.distill`, and how far it came."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lizardzoo.errors import LizardzooError

STAGES = ("transfer", "finetune")
TRAINING = "training.json"
"""In a run's folder, beside recipe.json, which holds what decides the result: how each stage was run, see FACTS."""
FACTS = ("seconds", "device", "processes", "micro_batch_size", "data", "versions")
"""Seconds (None: resumed, not known), where and by how many processes, {file of data: sha256}, {package: version}."""
FOLDERS = {"transfer": STAGES[:1], "final": STAGES}
"""A run's folders, and the stages that the model in each has behind it."""


def read_recipe(source: Any, folder: Path) -> dict[str, Any] | None:
    """{"recipe": its dict, "data": hashes, "teacher": hash, "trained": stages}, or None.

    A stage is {name, steps, batch_size, sequence_length, tokens}, and what of FACTS is known.

    `source`: a file, a dict, a Recipe, or None: the recipe.json of the run whose transfer/ or final/ `folder` is.
    """
    run = folder.resolve().parent
    if source is None:
        source = run / "recipe.json"
        if folder.resolve().name not in FOLDERS or not source.is_file():
            return None
    if isinstance(source, (str, Path)):
        run = Path(source).resolve().parent
        values = read_json(Path(source), "recipe")
    else:
        values = dict(source) if isinstance(source, Mapping) else source.to_dict()
    if "recipe" not in values:
        values = {"recipe": values}
    try:
        kept: dict[str, Any] = {"recipe": dict(values["recipe"]), "data": dict(values.get("data", {}))}
        if values.get("teacher"):
            kept["teacher"] = str(values["teacher"])
        done = [stage["name"] for stage in values.get("trained", [])] or list(kept["data"]) or list(STAGES)
        allowed = FOLDERS.get(folder.resolve().name, STAGES)
        kept["trained"] = [
            _stage(name, kept["recipe"][name], values.get("trained", []), run) for name in STAGES
            if name in done and name in allowed
        ]  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise LizardzooError(
            f"the recipe {source if isinstance(source, (str, Path)) else ''} is not one of lizardzoo.distill "
            f"({type(error).__name__}: {error}); give the recipe.json of the run"
        ) from error
    return kept


def _stage(name: str, stage: Mapping[str, Any], known: Any, run: Path) -> dict[str, Any]:
    steps = stage["steps"]
    facts = read_json(run / TRAINING, "training").get(name, {}) if (run / TRAINING).is_file() else {}
    for each in known:
        if each["name"] == name:
            steps, facts = each["steps"], each
    if steps is None:  # a recipe in epochs: the run's log has counted
        steps = _logged_steps(run / "log.jsonl", name)
    batch, length = stage["batch_size"], stage["sequence_length"]
    tokens = None if steps is None else steps * batch * length
    told = {key: facts[key] for key in FACTS if facts.get(key) is not None}
    for key in ("data", "versions"):
        if key in told:
            told[key] = dict(told[key])
    return {"name": name, "steps": steps, "batch_size": batch, "sequence_length": length, "tokens": tokens, **told}


def _logged_steps(path: Path, name: str) -> int | None:
    if not path.is_file():
        return None
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return max((line["step"] for line in lines if line.get("stage") == name), default=None)


def data_of(training: Mapping[str, Any] | None) -> dict[str, str | None]:
    """The files and data sets that all stages together were trained on: {name: sha256, or None of a data set's}."""
    stages = [] if training is None else training["trained"]
    return {name: sha256 for stage in stages for name, sha256 in stage.get("data", {}).items()}


def package_version(name: str) -> str:
    """The installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"  # a checkout on the path, without an installation


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LizardzooError(f"there is no {what} file {path}; give its path") from error
    except ValueError as error:
        raise LizardzooError(f"the {what} file {path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise LizardzooError(f"the {what} file {path} holds no object; give what lizardzoo wrote")
    return values
