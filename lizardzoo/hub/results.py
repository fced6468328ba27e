"""What a card says of results: the report of `lizardzoo eval`, this model beside its teacher."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

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
        asked = self.raw["retrieval"]
        return {
            "pairs": asked.get("pairs"),
            "samples": asked.get("samples"),
            "header": ["", *(f"{point['distance']:,}" for point in rows[0]["points"])],
            "rows": [[self._name(row), *(_score(point["accuracy"]) for point in row["points"])] for row in rows],
        }

    def tasks(self) -> dict[str, Any] | None:
        """The table of lm-eval's tasks, with the standard errors and the number of questions where these are known."""
        scores = self.raw.get("tasks") or {}
        rows = [
            [
                plain(task),
                plain(metric),
                *(_score(value, self._error(name, task, metric)) for name, value in values.items()),
            ]
            for task, metric, values in self._scores()
        ]
        if not rows:
            return None
        counts = {plain(task): each.get("sample_len") for task, each in scores.get(self.row, {}).items()}
        header = ["task", "metric", *map(plain, scores)]
        if any(isinstance(count, int) for count in counts.values()):
            header.insert(1, "questions")
            for row in rows:
                row.insert(1, f"{counts[row[0]]:,}" if isinstance(counts[row[0]], int) else "")
        return {"header": header, "rows": rows}

    def runs(self) -> list[Mapping[str, Any]]:
        """What `lizardzoo eval` was asked, once for each report that this one was made of; [] where it does not say."""
        return [run for run in self.raw.get("runs") or () if isinstance(run, Mapping)]

    def measured_with(self) -> str:
        """Versions and devices; what was measured in several goes alike is said once."""
        runs: list[dict[str, Any]] = []
        for run in self.runs() or [{"versions": self.raw.get("versions") or {}}]:
            versions, device = dict(run.get("versions") or {}), run.get("device")
            for known in runs:
                if known["device"] == device and all(
                    known["versions"].get(name, v) == v for name, v in versions.items()
                ):
                    known["versions"] |= versions
                    break
            else:
                runs.append({"versions": versions, "device": device})
        return "; ".join(filter(None, map(environment, runs)))

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

    def _error(self, name: str, task: str, metric: str) -> Any:
        return self.raw["tasks"][name].get(task, {}).get(f"{metric}_stderr,none")

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


def _score(value: Any, error: Any = None) -> str:
    if not isinstance(value, float):
        return ""
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, float) and _finite(error) else f"{value:.4f}"


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def environment(facts: Mapping[str, Any]) -> str:
    """Such as "lizardzoo 0.1.0, torch 2.13.0, on NVIDIA H200", of {"versions": ..., "device": ...}."""
    parts = [f"{plain(name)} {plain(version)}" for name, version in (facts.get("versions") or {}).items()]
    return ", ".join([*parts, *([f"on {plain(facts['device'])}"] if facts.get("device") else [])])


def plain(text: str) -> str:
    """Words that cannot end a table's cell, a line or a comment."""
    return re.sub(r"[|`<>*\r\n]+", " ", str(text)).strip()


def _slug(text: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in text.lower())
