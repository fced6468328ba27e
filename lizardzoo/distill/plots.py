"""The two pictures of a run, drawn from its log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lizardzoo.distill.trainer import read_log

PANELS = {
    ("transfer", "loss"): "transfer: layer error",
    ("finetune", "kl"): "finetune: KL to the teacher, nats",
    ("finetune", "cross_entropy"): "finetune: cross-entropy, nats",
}


def plot(folder: Path) -> None:
    """Draw `loss.png` and `layer_error.png` from `log.jsonl`."""

    def panels(count: int) -> tuple[Any, Any]:
        figure = Figure(figsize=(5 * count, 3.5), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        for axis in axes:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
        return figure, axes

    entries = read_log(folder / "log.jsonl")
    series = {
        key: [(entry["step"], entry[key[1]]) for entry in entries if entry["stage"] == key[0] and key[1] in entry]
        for key in PANELS
    }
    if not any(series.values()):
        return
    figure, axes = panels(sum(map(bool, series.values())))
    for axis, (key, points) in zip(axes, [item for item in series.items() if item[1]]):
        axis.plot(*zip(*points))
        axis.set(title=PANELS[key], xlabel="step", ylim=(0, 1.05 * max(value for _, value in points)))
    figure.savefig(folder / "loss.png", dpi=120)

    steps = [entry for entry in entries if "layer_error" in entry]
    if not steps:
        return
    layers = sorted(map(int, steps[0]["layer_error"]))
    figure, (left, right) = panels(2)
    for offset, entry, label in ((-0.2, steps[0], "first step"), (0.2, steps[-1], "last step")):
        heights = [entry["layer_error"][str(layer)] for layer in layers]
        left.bar([layer + offset for layer in layers], heights, width=0.4, label=label)
    left.set(title="error / variance of the target", xlabel="layer")
    left.legend()
    errors = [[entry["layer_error"][str(layer)] for entry in steps] for layer in layers]
    floor = max(1e-6, min(map(min, errors)))  # a layer without any error would have no logarithm
    image = right.pcolormesh(
        [entry["step"] for entry in steps],
        layers,
        [[max(error, floor) for error in row] for row in errors],
        norm=LogNorm(vmin=floor, vmax=max(2 * floor, *map(max, errors))),
        shading="nearest",
    )
    right.set(title="the same by layer and step", xlabel="step", ylabel="layer")
    right.grid(visible=False)
    figure.colorbar(image, ax=right)
    figure.savefig(folder / "layer_error.png", dpi=120)
