"""What a run's JSON says, as Markdown tables and as a picture. Needs no GPU."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

OURS, PEERS = ("lizardzoo hybrid", "lizardzoo heavy"), ("composed peer", "sdpa")
COLORS = {
    "sdpa": "0.4", "flex window": "tab:green", "fla branch": "tab:olive", "composed peer": "tab:red",
    "lizardzoo window": "#9ecae1", "lizardzoo gated linear": "#c6b3e0",
    "lizardzoo hybrid": "tab:purple", "lizardzoo heavy": "tab:blue",
}  # fmt: skip
"""A mixer has its kernel's, dashed."""
EAGER = ("forward ms", "forward + backward ms")
GRAPH = ("forward graph ms", "forward + backward graph ms")


def save(run: dict[str, Any], path: Path) -> None:
    """The raw figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def render(path: Path, markdown: Callable[[dict[str, Any]], str], plot: Callable[[dict[str, Any], Path], None]) -> None:
    """Tables, and a picture where matplotlib is installed, beside the raw figures."""
    run = json.loads(path.read_text(encoding="utf-8"))
    tables = markdown(run)
    path.with_suffix(".md").write_text(tables, encoding="utf-8")
    print(tables)
    if importlib.util.find_spec("matplotlib"):
        plot(run, path.with_suffix(".png"))
    else:
        print(f"no matplotlib here: --render {path.name} draws the picture elsewhere")


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """One run of several that had a shape each: on devices of one kind, with the same versions and sizes."""
    first, *others = (json.loads(path.read_text(encoding="utf-8")) for path in paths)
    measured, lists = {"copy TB/s", "bf16 TFLOP/s"}, ("verified", "results", "decode")

    def told(run: dict[str, Any]) -> dict[str, Any]:
        machine = {key: value for key, value in run["machine"].items() if key not in measured}
        return {key: value for key, value in run.items() if key not in lists} | {"machine": machine}

    shapes = {entry["shape"] for entry in first["verified"]}
    for path, other in zip(paths[1:], others):
        if told(other) != told(first):
            raise SystemExit(
                f"{path} is of another machine or other sizes than {paths[0]}: {told(other)}, {told(first)}"
            )
        more = {entry["shape"] for entry in other["verified"]}
        if twice := sorted(shapes & more):
            raise SystemExit(f"shape {twice[0]} is in two of the files, and ratios count within one run")
        shapes |= more
        for key in lists:
            first[key] += other[key]
    return first


def rounded(figures: dict[str, Any]) -> str:
    """For the log."""
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in figures.items()
        if value is not False
    )


def named(machine: dict[str, Any]) -> str:
    """The device and the versions."""
    rate = f" (copies at {machine['copy TB/s']} TB/s)" if "copy TB/s" in machine else ""
    versions = [f"{name} {machine[name]}" for name in ("torch", "transformers", "triton", "fla") if name in machine]
    return f"{machine['device']}{rate}, {', '.join(versions)}"


def markdown(run: dict[str, Any]) -> str:
    """All tables of a run."""
    parts = [
        f"{named(run['machine'])}; bf16, window {run['window']}, {run['keep']} kept tokens, {run['heavy']} heavy ones "
        f"(half-life {run['half_life']:g}). Milliseconds, medians of at least 20 runs: forward / forward + backward. "
        f"The device alone (replayed from a CUDA graph):",
        _speed(run["results"], GRAPH),
        "How many times faster ours are than the peers, the device alone:",
        _ratios(run["results"], GRAPH),
        "As PyTorch runs it, one operation after the other: for short sequences the CPU's time to launch them counts.",
        _speed(run["results"], EAGER),
        "Extra memory of one forward + backward, MiB:",
        _table(run["results"], lambda entry: number(entry.get("peak MiB"))),
    ]
    if run["verified"]:
        parts += ["First forward + backward of a process (compiling, tuning), seconds:", _first(run["verified"])]
    if run["decode"]:
        parts += ["One decoding step of 16 sequences, from a CUDA graph:", _decode(run["decode"])]
    return "\n\n".join(parts) + "\n"


def _speed(results: Sequence[dict[str, Any]], times: tuple[str, str]) -> str:
    """Times; a mark where gradients are not usable."""
    notes = sorted({entry["note"] for entry in results if entry.get("note")})
    marks = {note: "†" * (1 + index) for index, note in enumerate(notes)}

    def cell(entry: dict[str, Any]) -> str:
        if "missing" in entry:
            return entry["missing"]
        both = " / ".join(number(entry.get(time)) for time in times)
        return both + (marks[entry["note"]] if entry.get("note") else "")

    return "\n".join([_table(results, cell), *(f"\n{mark} {note}" for note, mark in marks.items())])


def _ratios(results: Sequence[dict[str, Any]], times: tuple[str, str]) -> str:
    """How many times faster each of ours is than each peer, forward / forward + backward."""
    pairs = [(ours, peer) for ours in OURS for peer in PEERS]
    rows = []
    for case in dict.fromkeys(map(_case, results)):
        found = {entry["contender"]: entry for entry in results if _case(entry) == case}
        rows.append([_case_name(case), *(_ratio(found.get(a, {}), found.get(b, {}), times) for a, b in pairs)])
    return table(["", *(f"{ours.removeprefix('lizardzoo ')} against {peer}" for ours, peer in pairs)], rows)


def _table(results: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any]], str]) -> str:
    contenders = list(dict.fromkeys(entry["contender"] for entry in results))
    rows = []
    for case in dict.fromkeys(map(_case, results)):
        found = {entry["contender"]: entry for entry in results if _case(entry) == case}
        rows.append([_case_name(case), *(cell(found[name]) if name in found else "" for name in contenders)])
    return table(["", *contenders], rows)


def _case(entry: dict[str, Any]) -> tuple[str, int, int]:
    return entry["shape"], entry["batch"], entry["tokens"]


def _case_name(case: tuple[str, int, int]) -> str:
    shape, batch, tokens = case
    return f"{shape}, {batch} x {tokens:,}"


def _ratio(ours: dict[str, Any], theirs: dict[str, Any], times: Sequence[str]) -> str:
    return " / ".join(f"{theirs[t] / ours[t]:.2f}x" if t in ours and t in theirs else "-" for t in times)


def _first(verdicts: Sequence[dict[str, Any]]) -> str:
    contenders = list(dict.fromkeys(verdict["contender"] for verdict in verdicts))
    seconds = {(verdict["shape"], verdict["contender"]): verdict.get("first_s") for verdict in verdicts}
    shapes = dict.fromkeys(verdict["shape"] for verdict in verdicts)
    return table(["", *contenders], [[s, *(number(seconds.get((s, name))) for name in contenders)] for s in shapes])


def _decode(entries: Sequence[dict[str, Any]]) -> str:
    rows = [
        [entry["shape"], entry["contender"], f"{entry['context']:,}", f"{entry['ms'] * 1e3:.1f}", f"{entry['MiB']:.1f}"]
        if "ms" in entry
        else [entry["shape"], entry["contender"], f"{entry['context']:,}", entry["missing"], ""]
        for entry in entries
    ]
    return table(["", "", "tokens before", "microseconds", "state MiB"], rows)


def table(head: Sequence[str], cells: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plot(run: dict[str, Any], path: Path) -> None:
    """Time per 1,000 tokens against the length, one row of panels per shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    results = [entry for entry in run["results"] if GRAPH[0] in entry]
    shapes = list(dict.fromkeys(entry["shape"] for entry in results))
    lengths = sorted({entry["tokens"] for entry in results})
    figure, panels = pyplot.subplots(
        len(shapes), 2, figsize=(11, 1 + 3.6 * len(shapes)), squeeze=False, sharex=True, layout="constrained"
    )
    for row, shape in zip(panels, shapes):
        here = [entry for entry in results if entry["shape"] == shape]
        for panel, key in zip(row, GRAPH):
            panel.set(title=f"{shape}: {key.removesuffix(' graph ms')}", xscale="log", yscale="log")
            _lines(panel, here, key)
            panel.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths])
            panel.set_ylabel("microseconds per 1,000 tokens")
    for panel in panels[-1]:
        panel.set_xlabel("tokens in a sequence")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(
        f"One layer's attention, the device alone, {run['machine']['device']}, torch {run['machine']['torch']}, bf16"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _lines(panel: Any, results: Sequence[dict[str, Any]], key: str) -> None:
    for name in dict.fromkeys(entry["contender"] for entry in results):
        kernel = name.removesuffix(" mixer")
        per_token = {
            entry["tokens"]: 1e6 * entry[key] / (entry["batch"] * entry["tokens"])
            for entry in results
            if entry["contender"] == name and key in entry
        }
        label = f"{name} (wrong gradients)" if any(e["contender"] == name and e.get("note") for e in results) else name
        panel.plot(
            sorted(per_token), [per_token[tokens] for tokens in sorted(per_token)], marker="o", markersize=3,
            color=COLORS.get(kernel, "0.7"), label=label, linewidth=2.5 if name in OURS else 1.2,
            linestyle="-" if name == kernel else "--",
        )  # fmt: skip
    panel.minorticks_off()
    panel.grid(alpha=0.3)
