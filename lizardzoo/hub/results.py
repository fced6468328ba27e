"""What a card says of results: the report of `lizardzoo eval`, this model beside its teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lizardzoo.errors import LizardzooError
from lizardzoo.hub.training import read_json

TEACHER = "teacher"
METRICS = {"perplexity": "perplexity", "kl": "KL to the teacher in nats per token"}
TASK = {"task_type": "text-generation"}


class Results:
    """A report with one of its models chosen; `raw` is what evaluation.json holds."""

    def __init__(self, raw: dict[str, Any], row: str) -> None:
        self.raw = raw
        self.row = row

    def figures(self) -> list[dict[str, Any]]:
        """The model's figures as the arguments of huggingface_hub's EvalResult, exactly as they are in the report."""
        found: list[dict[str, Any]] = []
        for text, report in (self.raw.get("positions") or {}).items():
            for cell, label in self._cells(report, self.row):
                found += [
                    _figure(text, key, f"{name}, {label}", cell[key])
                    for key, name in METRICS.items()
                    if _finite(cell[key])
                ]
        for row in self._recall():
            if row["name"] == self.row:
                found += [
                    _figure(
                        "retrieval", "accuracy", f"facts recalled after {each['distance']} tokens", each["accuracy"]
                    )
                    for each in row["points"]
                    if _finite(each["accuracy"])
                ]
        for task, metric, scores in self._scores():
            if _finite(scores.get(self.row)):
                found.append(_figure(task, _slug(metric), metric, scores[self.row]))
        return found

    def positions(self) -> list[dict[str, Any]]:
        """One table for each text: its name, header and rows of text; memory is the same for all, in the first."""
        return [
            {
                "text": plain(text),
                "sequences": report["sequences"],
                "length": report["length"],
                "with_kl": any(row["result"]["overall"]["kl"] is not None for row in report["rows"]),
                "header": ["", *(label for _, label in self._cells(report, report["rows"][0]["name"]))],
                "rows": [
                    [self._name(row), *(_pair(cell) for cell, _ in self._cells(report, row["name"]))]
                    for row in report["rows"]
                ],
            }
            for text, report in (self.raw.get("positions") or {}).items()
        ]

    def memory(self) -> dict[str, Any] | None:
        """The table of what generation holds for one sequence."""
        for report in (self.raw.get("positions") or {}).values():
            rows = [row for row in report["rows"] if row["without"] is None]
            sizes = [[self._name(row), *(_size(size) for size in row["memory"].values())] for row in rows]
            return {"header": ["", *(f"{int(n):,} tokens" for n in rows[0]["memory"])], "rows": sizes}
        return None

    def recall(self) -> dict[str, Any] | None:
        """The table of retrieval by distance."""
        rows = self._recall()
        if not rows:
            return None
        return {
            "header": ["", *(f"{point['distance']:,}" for point in rows[0]["points"])],
            "rows": [[self._name(row), *(_score(point["accuracy"]) for point in row["points"])] for row in rows],
        }

    def tasks(self) -> dict[str, Any] | None:
        """The table of lm-eval's tasks."""
        rows = [
            [plain(task), plain(metric), *(_score(value) for value in scores.values())]
            for task, metric, scores in self._scores()
        ]
        names = (self.raw.get("tasks") or {}).keys()
        return {"header": ["task", "metric", *map(plain, names)], "rows": rows} if rows else None

    def _name(self, row: Mapping[str, Any]) -> str:
        return f"**{plain(row['name'])}**" if row["name"] == self.row else plain(row["name"])

    def _cells(self, report: Mapping[str, Any], name: str) -> list[tuple[Any, str]]:
        """A row's buckets and the whole of it, each with its label."""
        for row in report["rows"]:
            if row["name"] == name:
                buckets = [(cell, f"positions {_label(cell)}") for cell in row["result"]["buckets"]]
                return [*buckets, (row["result"]["overall"], "all positions")]
        return []

    def _recall(self) -> list[Any]:
        return (self.raw.get("retrieval") or {}).get("rows", [])

    def _scores(self) -> list[tuple[str, str, dict[str, Any]]]:
        """(task, metric, row -> value) for every number that the model has."""
        scores = self.raw.get("tasks") or {}
        return [
            (
                task,
                metric.removesuffix(",none"),
                {name: each.get(task, {}).get(metric) for name, each in scores.items()},
            )
            for task, metrics in scores.get(self.row, {}).items()
            for metric, value in metrics.items()
            if isinstance(value, float) and "_stderr" not in metric
        ]


def read_report(source: Any, folder: Path, row: str | None) -> Results | None:
    """A report from a file, a dict or `lizardzoo.evaluate`'s Report; `row` says which of its models the folder holds.

    Raises:
        LizardzooError: it is no such report, or does not say which of its models this one is.
    """
    if source is None:
        return None
    if isinstance(source, (str, Path)):
        given = read_json(Path(source), "report")
    else:
        given = dict(source) if isinstance(source, Mapping) else source.to_dict()
    try:
        if "rows" in given:  # of `evaluate.compare`, which knows no name of the text
            given = {"positions": {"text": given}}
        places = _models(given)
        here = [name for name, place in places.items() if Path(place).resolve() == folder.resolve()]
        chosen = row or given.get("row") or (here[0] if here else None)
        if chosen is None and len(places) == 1:
            chosen = next(iter(places))
        if chosen not in places:
            raise LizardzooError(
                f"the report measures {', '.join(places) or 'no model'}, and {row or 'none of them'!r} is not "
                f"this model's row; say which one is (row=, --row)"
            )
        raw, chosen = _without_paths(given | {"row": chosen}), _short(chosen)
        results = Results(raw, chosen)
        results.figures(), results.positions(), results.memory(), results.recall(), results.tasks()
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, LizardzooError):
            raise
        raise LizardzooError(
            f"the report is not one that lizardzoo eval wrote ({type(error).__name__}: {error}); give its report.json"
        ) from error
    return results


def _models(report: Mapping[str, Any]) -> dict[str, str]:
    """The names of the models that a report measures, and where they lay."""
    if report.get("models"):
        return {str(name): str(place) for name, place in report["models"].items()}
    rows = [row for each in (report.get("positions") or {}).values() for row in each["rows"]]
    return {row["name"]: row["name"] for row in rows if not row["without"] and row["model"] != TEACHER}


def _without_paths(report: Mapping[str, Any]) -> dict[str, Any]:
    """The report with paths of this machine cut to their last two parts, wherever they are part of a name."""
    named = [*(report.get("models") or ()), *(report.get("texts") or ()), report.get("teacher")]
    named += [*(report.get("models") or {}).values(), *(report.get("texts") or {}).values()]
    long = sorted({str(name) for name in named if name and _short(str(name)) != name}, key=len, reverse=True)

    def cut(value: Any) -> Any:
        if isinstance(value, str):
            for name in long:
                value = value.replace(name, _short(name))
            return value
        if isinstance(value, Mapping):
            return {cut(name): cut(each) for name, each in value.items()}
        return [cut(each) for each in value] if isinstance(value, (list, tuple)) else value

    return cut(report)


def _short(name: str) -> str:
    """The last two parts of an absolute path; any other name as it is."""
    return "/".join(Path(name).parts[-2:]) if Path(name).is_absolute() else name


def _figure(dataset: str, metric: str, name: str, value: Any) -> dict[str, Any]:
    data = {"dataset_type": _slug(dataset), "dataset_name": dataset}
    return TASK | data | {"metric_type": metric, "metric_name": name, "metric_value": value}


def _label(bucket: Mapping[str, Any]) -> str:
    first, last = bucket["start"], bucket["stop"] - 1
    return f"{first}-{last}" if last > first else str(first)


def _finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _pair(cell: Mapping[str, Any]) -> str:
    """Perplexity, and below it KL where there is one."""
    value = cell["perplexity"]
    text = f"{value:.2f}" if value < 1000 else f"{value:.3g}"
    return text if cell["kl"] is None else f"{text}<br>{abs(cell['kl']) if abs(cell['kl']) < 5e-5 else cell['kl']:.4f}"


def _score(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else ""


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def plain(text: str) -> str:
    """Words that cannot end a table's cell, a line or a comment."""
    return re.sub(r"[|`<>*\r\n]+", " ", str(text)).strip()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text.lower())
