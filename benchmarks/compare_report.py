"""What a comparison's results.json says, as Markdown tables and as a picture. Needs no GPU and no model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EDGES = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
FAR = 512
"""Positions from here on are what the order of the tables goes by: no window of the comparison covers them."""
NAMES = {
    "start": "At the start (calibrated, not trained)",
    "transfer": "After stage 1 (transfer)",
    "finetune": "After stage 2 (finetune)",
}


def markdown(results: dict[str, Any]) -> str:
    """All tables: one for each text and stage, the best variant first; then the layers chosen to keep softmax."""
    settings = results["settings"]
    per_step = settings["batch"] * settings["tokens"]
    amounts = " and ".join(f"{steps:,} steps ({steps * per_step / 1e6:.1f}M tokens)" for steps in settings["steps"])
    parts = [
        f"Stages of {amounts}, {settings['batch']} x {settings['tokens']} tokens a step, {settings['dtype']}. "
        f"KL to the teacher in nats per token by position, below it perplexity over the teacher's; mean over "
        f"seeds, and half their spread. State: bytes per sequence, of any length, without kept softmax layers' cache."
    ]
    for text in texts_of(results):
        for stage in NAMES:
            if rows := list(rows_of(results, text, stage)):
                parts += [f"## {text}: {NAMES[stage]}", table(rows)]
    for stage in NAMES:
        if rows := list(scores_of(results, stage)):
            header = list(dict.fromkeys(name for _, scores in rows for name in scores))
            lines = [f"| variant | {' | '.join(header)} |", f"|---|{'---|' * len(header)}"]
            lines += [
                f"| {name} | {' | '.join(scores.get(column, '') for column in header)} |" for name, scores in rows
            ]
            parts += [f"## Retrieval and questions, student / teacher: {NAMES[stage]}", "\n".join(lines)]
    for selection in results["selection"].values():
        parts += [
            "## Layers by what their softmax is worth",
            f"Chosen greedily on {selection['of']}: {', '.join(map(str, selection['kept']))}. "
            f"KL with the first 0, 1, 2, ... of them: {', '.join(f'{kl:.4f}' for kl in selection['curve'])}.",
        ]
    for name, found in results.get("sizes", {}).items():
        curve = ", ".join(f"{kl:.4f}" for kl in found["curve"])
        parts += [
            f"## {name}: sizes by layer, at the same state",
            f"Chosen on {found['of']}, KL before and after each round that found better ones: {curve}.",
            *(f"{field}: {', '.join(map(str, sizes.values()))}." for field, sizes in found["sizes"].items()),
        ]
    return "\n\n".join(parts) + "\n"


def texts_of(results: dict[str, Any]) -> list[str]:
    """The texts that any run was measured on."""
    return list(
        dict.fromkeys(t for run in results["runs"].values() for s in run["stages"].values() for t in s["texts"])
    )


def rows_of(results: dict[str, Any], text: str, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each variant's runs on a text after a stage, best first: far KLs, and cells by bucket."""
    found: dict[str, list[dict[str, Any]]] = {}
    known: dict[str, dict[str, Any]] = {}
    for run in results["runs"].values():
        if text in run["stages"].get(stage, {"texts": {}})["texts"]:
            found.setdefault(run["variant"], []).append(run["stages"][stage]["texts"][text])
            known[run["variant"]] = run
    rows = {}
    for variant, seeds in found.items():
        labels = [label for label in seeds[0] if not label.startswith("teacher ")]
        rows[variant] = {
            "differs": known[variant]["differs"],
            "state": known[variant]["state bytes"],
            "far": [far_kl(seed) for seed in seeds],
            "cells": {
                label: (
                    [seed[label]["kl"] for seed in seeds],
                    [seed[label]["perplexity"] / seed[f"teacher {label}"]["perplexity"] for seed in seeds],
                )
                for label in labels
            },
        }
    yield from sorted(rows.items(), key=lambda row: _order(statistics.fmean(row[1]["far"])))


def far_kl(buckets: dict[str, Any]) -> float:
    """Mean KL at positions from FAR on; of all, where a text is shorter."""
    far = [bucket for label, bucket in buckets.items() if is_far(label)] or [buckets["all"]]
    return sum(bucket["kl"] * bucket["tokens"] for bucket in far) / sum(bucket["tokens"] for bucket in far)


def is_far(label: str) -> bool:
    """Whether a bucket such as "512-1023" begins at FAR or behind it."""
    return label[0].isdigit() and int(label.partition("-")[0]) >= FAR


def table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Markdown."""
    labels = list(rows[0][1]["cells"])
    last = f" from {FAR} on |" if any(map(is_far, labels)) else ""
    lines = [f"| variant | what differs | state | {' | '.join(labels)} |{last}"]
    lines.append("|---" * lines[0].count("|", 1) + "|")
    for name, row in rows:
        cells = [f"{spread(kl)}<br>{spread(ratio, 2)}x" for kl, ratio in row["cells"].values()]
        cells += [f"**{spread(row['far'])}**"] if last else []
        lines.append(f"| {name} | {row['differs']} | {row['state'] / 2**20:.2f} MiB | {' | '.join(cells)} |")
    return "\n".join(lines)


def scores_of(results: dict[str, Any], stage: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Retrieval and question scores of each run, by column."""
    for run in results["runs"].values():
        found = run["stages"].get(stage, {})
        scores = {}
        rows = {row["name"]: row["points"] for row in found.get("retrieval", ())}
        for student, teacher in zip(rows.get("student", ()), rows.get("teacher", ())):
            scores[f"recall at {student['distance']}"] = f"{student['accuracy']:.2f} / {teacher['accuracy']:.2f}"
        tasks = found.get("tasks", {"student": {}})
        for task, values in tasks["student"].items():
            for metric in ("acc", "acc_norm"):
                pair = [tasks[who][task][f"{metric},none"] for who in ("student", "teacher")] if values else []
                scores[f"{task} {metric}"] = " / ".join(f"{value:.4f}" for value in pair)
        if scores:
            yield f"{run['variant']}, seed {run['seed']}", scores


def spread(values: Sequence[float], digits: int = 3) -> str:
    """The mean, and half the range where there are several."""
    mean = statistics.fmean(values)
    mean = round(mean, digits) + 0.0 if math.isfinite(mean) else mean  # no -0.000
    text = f"{mean:.{digits}f}" if abs(mean) < 1000 else f"{mean:.3g}"
    return text if len(values) == 1 else f"{text} ± {(max(values) - min(values)) / 2:.{digits}f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Far KL of each variant after its last stage, a panel for each text."""
    from matplotlib.figure import Figure

    texts = texts_of(results)
    stage = next(stage for stage in reversed(NAMES) if any(stage in run["stages"] for run in results["runs"].values()))
    count = max(len(list(rows_of(results, text, stage))) for text in texts)
    figure = Figure(figsize=(6 * len(texts), 1.5 + 0.25 * count), layout="constrained")
    for axis, text in zip(figure.subplots(1, len(texts), squeeze=False)[0], texts):
        rows = [(name, row["far"]) for name, row in rows_of(results, text, stage)][::-1]
        rows = [(name, far) for name, far in rows if all(map(math.isfinite, far))]
        means = [statistics.fmean(far) for _, far in rows]
        errors = [
            [m - min(far) for m, (_, far) in zip(means, rows)],
            [max(far) - m for m, (_, far) in zip(means, rows)],
        ]
        colors = ["0.6" if name.startswith("bare") else "C0" for name, _ in rows]
        axis.barh([name for name, _ in rows], means, xerr=errors, color=colors)
        axis.set(xscale="log", title=text, xlabel=f"KL to the teacher from position {FAR} on, nats per token")
        axis.tick_params(axis="y", labelsize="small")
    figure.suptitle(NAMES[stage])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _order(value: float) -> float:
    """What diverged comes last."""
    return value if math.isfinite(value) else math.inf
