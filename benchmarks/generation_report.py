"""What a run of bench_generation says, as Markdown tables and as a picture. Needs no GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from report import named, number, table

COLORS = {"teacher": "0.35", "teacher, static cache": "0.7", "student": "tab:blue"}
STEP, GRAPH = "step ms", "step graph ms"


def markdown(run: dict[str, Any]) -> str:
    """All tables of a run."""
    model = run["model"]
    parts = [
        f"{named(run['machine'])}; {model['name']} ({model['parameters'] / 1e6:.1f} M parameters, {model['dtype']}, "
        f"trained for {model['positions']:,} positions). Teacher: softmax (sdpa). Student: `hybrid` in every "
        f"layer, untrained.",
        "Generating, one token a step: tokens per second of all sequences from a CUDA graph (as PyTorch runs it), "
        "medians of at least 20 steps. The teacher's cache is full and read without a mask, the best case for softmax; "
        f"its static cache is transformers' own, with {model['room']} tokens of room. Faster, smaller: the student "
        "against the better of the two.",
        _decode(run["decode"]),
        "MiB beside the weights while a step runs (of these, the cache):",
        _memory(run["decode"]),
    ]
    if run["prefill"]:
        parts += [
            f"Reading the context: seconds, and MiB beside the weights meanwhile, the cache included. The teacher "
            f"reads it at once, the student {model['piece']:,} tokens of all rows at a time.",
            _prefill(run["prefill"]),
        ]
    if "long" in run:
        parts += _long(run["long"])
    parts += [
        "Relative errors of logits against plain PyTorch in fp32, and what is allowed (twice those of plain PyTorch in "
        "the model's dtype):",
        _verified(run["verified"]),
    ]
    return "\n\n".join(parts) + "\n"


def tokens_per_second(entry: dict[str, Any], key: str) -> float | None:
    """Of all sequences."""
    return 1e3 * entry["batch"] / entry[key] if key in entry else None


def compared(entries: Sequence[dict[str, Any]]) -> str:
    """Whose times are compared: those of graphs, unless the device has none."""
    return GRAPH if any(GRAPH in entry for entry in entries) else STEP


def _decode(entries: Sequence[dict[str, Any]]) -> str:
    key = compared(entries)

    def cell(entry: dict[str, Any]) -> str:
        return f"{number(tokens_per_second(entry, GRAPH))} ({number(tokens_per_second(entry, STEP))})"

    def ratios(found: dict[str, dict[str, Any]]) -> list[str]:
        student = found.get("student", {})
        teachers = [entry for name, entry in found.items() if name != "student" and key in entry]
        if not teachers or key not in student:
            return ["-", "-"]
        faster = min(entry[key] for entry in teachers) / student[key]
        smaller = min(entry["cache MiB"] for entry in teachers) / student["cache MiB"]
        return [f"{faster:.2f}x", f"{smaller:.1f}x"]

    return _by_case(entries, cell, ("faster", "cache smaller"), ratios)


def _memory(entries: Sequence[dict[str, Any]]) -> str:
    def cell(entry: dict[str, Any]) -> str:
        return f"{number(entry.get('peak MiB'))} ({number(entry['cache MiB'])})"

    return _by_case(entries, cell)


def _prefill(entries: Sequence[dict[str, Any]]) -> str:
    def cell(entry: dict[str, Any]) -> str:
        return f"{number(entry['ms'] / 1e3)} s, {number(entry.get('peak MiB'))} MiB"

    return _by_case(entries, cell)


def _by_case(
    entries: Sequence[dict[str, Any]], cell: Any, more: Sequence[str] = (), extra: Any = lambda found: []
) -> str:
    """One row for each batch and context, one column for each contender; what was not timed says why."""
    contenders = list(dict.fromkeys(entry["contender"] for entry in entries))
    lines = []
    for batch, context in dict.fromkeys((entry["batch"], entry["context"]) for entry in entries):
        here = [entry for entry in entries if (entry["batch"], entry["context"]) == (batch, context)]
        found = {entry["contender"]: entry for entry in here}
        cells = [found[name].get("missing") or cell(found[name]) if name in found else "" for name in contenders]
        lines.append([f"{batch} x {context:,}", *cells, *extra(found)])
    return table(["sequences x tokens before", *contenders, *more], lines)


def _long(long: dict[str, Any]) -> list[str]:
    if "missing" in long:
        return [f"The long text: {long['missing']}"]
    return [
        f"One text of the student: {long['generated']:,} tokens behind a prompt of {long['prompt']:,}, each by the "
        f"same step. Its last logits differ by {long['error']:.1e} from those of reading the whole text in pieces.",
        table(
            ["tokens so far", "ms a token", "MiB", "most MiB since"],
            [
                [f"{mark['tokens']:,}", f"{mark['ms']:.3f}", number(mark.get("MiB")), number(mark.get("peak MiB"))]
                for mark in long["marks"]
            ],
        ),
    ]


def _verified(entries: Sequence[dict[str, Any]]) -> str:
    columns = ("whole", "eager", "graph", "graph against eager", "plain", "allowed")
    return table(
        ["", *columns, ""],
        [
            [
                entry["contender"],
                *(f"{entry[column]:.1e}" if column in entry else "-" for column in columns),
                "right" if entry["right"] else entry.get("missing", "RED, not timed"),
            ]
            for entry in entries
        ],
    )


def plot(run: dict[str, Any], path: Path) -> None:
    """Throughput and memory against the context, and the long text's time and memory from mark to mark."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    key = compared(run["decode"])
    entries = [entry for entry in run["decode"] if key in entry]
    marks = run.get("long", {}).get("marks", [])
    count = 3 if marks else 2
    figure, panels = pyplot.subplots(1, count, figsize=(5 * count, 4.4), layout="constrained")
    styles = dict(zip(dict.fromkeys(entry["batch"] for entry in entries), ("-", "--", ":", "-.")))
    for name, batch in dict.fromkeys((entry["contender"], entry["batch"]) for entry in entries):
        here = [entry for entry in entries if (entry["contender"], entry["batch"]) == (name, batch)]
        contexts = [entry["context"] for entry in here]
        look = {"color": COLORS[name], "linestyle": styles.get(batch, "-"), "marker": "o", "markersize": 3}
        for panel, values in (
            (panels[0], [tokens_per_second(entry, key) for entry in here]),
            (panels[1], [entry.get("peak MiB", entry["cache MiB"]) for entry in here]),
        ):
            panel.plot(contexts, values, label=f"{name}, batch {batch}", **look)
    contexts = sorted({entry["context"] for entry in entries})
    for panel, title in ((panels[0], "tokens per second"), (panels[1], "MiB beside the weights")):
        panel.set(title=title, xscale="log", yscale="log", xlabel="tokens before the step")
        panel.set_xticks(contexts, [f"{context / 1024:g}K" for context in contexts])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    if marks:
        _plot_long(panels[2], marks)
    figure.suptitle(f"Generating: {run['model']['name']}, {named(run['machine'])}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_long(panel: Any, marks: Sequence[dict[str, Any]]) -> None:
    panel.set(title="the student's long text", xlabel="tokens so far", ylabel="ms a token")
    tokens = [mark["tokens"] for mark in marks]
    panel.plot(tokens, [mark["ms"] for mark in marks], color=COLORS["student"], marker="o", markersize=3)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    if all("peak MiB" in mark for mark in marks):
        memory = panel.twinx()
        memory.plot(tokens, [mark["peak MiB"] for mark in marks], color="tab:orange", marker="s", markersize=3)
        memory.set(ylim=(0, None), ylabel="most MiB beside the weights (squares)")
