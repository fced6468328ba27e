"""What a report says of its own making: enough to make it again, and nothing of the machine's folders."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lizardzoo.adapters.bases import base_hash
from lizardzoo.distill.processes import device_name
from lizardzoo.hub.training import package_version
from lizardzoo.hub.weights import file_hash

ELSEWHERE = ("teacher", "folder", "as_json", "device")
"""Options of `eval` that another machine has its own values for."""
FILES = ("texts", "filler", "tasks", "few_shot_from")
"""Options that name files; some versions of typer hold them as strings here."""
PACKAGES = ("lizardzoo", "torch", "transformers")


def run_record(ctx: Any, models: Mapping[str, Any], begun: float) -> dict[str, Any]:
    """An entry of a report's "runs".

    {"arguments": the options as given, files by their last names; "files": {name: sha256}; "weights": {model: sha256};
    "device"; "seconds"; "versions"}.

    Args:
        ctx: click's, of the command.
        models: all that were measured, by their names; the teacher as "teacher".
        begun: `time.monotonic()` at the beginning.
    """
    arguments: list[str] = []
    files: dict[str, str] = {}
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name)
        if parameter.param_type_name != "option" or parameter.name in ELSEWHERE or given.name != "COMMANDLINE":
            continue
        value = ctx.params[parameter.name]
        if isinstance(value, bool):
            arguments.append(parameter.opts[0] if value else parameter.secondary_opts[0])
            continue
        for each in value if isinstance(value, (list, tuple)) else [value]:
            parts = each.split(",") if parameter.name == "tasks" else [each]
            found = {part: Path(part) for part in parts if parameter.name in FILES and Path(part).exists()}
            files |= {path.name: file_hash(path) for path in found.values() if path.is_file()}
            words = [found[part].name if part in found else _text(part) for part in parts]
            arguments += [max(parameter.opts, key=len), ",".join(words)]
    return {
        "arguments": arguments,
        "files": files,
        "weights": {name: base_hash(model) for name, model in models.items()},
        "device": device_name(next(iter(models.values())).device),
        "seconds": round(time.monotonic() - begun, 1),
        "versions": {
            name: package_version(name) for name in (*PACKAGES, *(["lm_eval"] if ctx.params["tasks"] else []))
        },
    }


def _text(value: Any) -> str:
    return str(getattr(value, "value", value))  # of an Enum, its word
