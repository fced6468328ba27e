"""The figures of the site, each computed by the package itself; `docs/hooks.py` draws them while the site is built.

    python docs/figures.py FOLDER        # all of them, as SVG files

Attention weights come out of a kernel when the values are the unit vectors: y is then the row of weights.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from torch import Tensor
from transformers import LlamaConfig

from lizardzoo.adapters.llama import LizardLlamaConfig, LizardLlamaForCausalLM
from lizardzoo.cache import kv_bytes, state_bytes
from lizardzoo.diagnose.verdict import DEAD_HALF_LIFE
from lizardzoo.kernels import gated_linear_attention, window_attention
from lizardzoo.kernels.merge import joint

NOTES = Path(__file__).parents[1] / "benchmarks" / "NOTES.md"
LINEAR, WINDOW, KEPT, SOFTMAX = "tab:orange", "tab:blue", "tab:green", "0.45"
FIGURES: dict[str, Callable[[], Figure]] = {}


def figure(draw: Callable[[], Figure]) -> Callable[[], Figure]:
    """Decorator: a figure of the site, by the function's name."""
    FIGURES[draw.__name__] = draw
    return draw


def svg(name: str) -> bytes:
    """The figure of that name; the same bytes every time, for one version of matplotlib."""
    with matplotlib.rc_context({"svg.hashsalt": "lizardzoo", "svg.fonttype": "none", "font.size": 9}):
        file = io.BytesIO()
        FIGURES[name]().savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def weights(attend: Callable[[Tensor], tuple[Tensor, Tensor, Any]], count: int) -> tuple[Tensor, Tensor]:
    """The weight of every key for every query [T, T] of a kernel with one head, and the log-masses [T]."""
    y, log_mass, _ = attend(torch.eye(count, dtype=torch.float64).view(1, count, 1, count))
    return y[0, :, 0], log_mass[0, :, 0]


def random_heads(count: int, dim: int = 16) -> tuple[Tensor, Tensor]:
    """q and k of one head, float64 [1, T, 1, D]."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, count, 1, dim, generator=generator, dtype=torch.float64)
    return q, k


@figure
def coverage() -> Figure:
    """Which keys each branch sees, read off the kernels' weights."""
    count, window, keep = 24, 6, 2
    q, k = random_heads(count)
    padded = torch.ones(1, count, dtype=torch.bool)
    padded[:, 8:14] = False
    cases: Sequence[tuple[str, int, int, Tensor | None]] = (
        ("hybrid: disjoint", window, keep, None),
        ("Lizard: the memory sees everything", 0, 0, None),
        ("disjoint, positions 8-13 padded", window, keep, padded),
    )
    picture = Figure(figsize=(9, 3.9), layout="constrained")
    for axis, (title, lag, skip, mask) in zip(picture.subplots(1, 3), cases):
        kept = keep if lag else 0
        near, _ = weights(lambda v, n=kept, m=mask: window_attention(q, k, v, window=window, keep=n, mask=m), count)  # type: ignore[misc]
        last, _ = weights(lambda v, m=mask: window_attention(q, k, v, window=window, mask=m), count)  # type: ignore[misc]
        far, _ = weights(
            lambda v, n=lag, s=skip, m=mask: gated_linear_attention(q, k, v, lag=n, skip=s, mask=m),  # type: ignore[misc]
            count,
        )
        image = torch.ones(count, count, 3)
        for seen, color in ((far > 0, LINEAR), (near > 0, KEPT), (last > 0, WINDOW)):
            image[seen] = torch.tensor(to_rgb(color), dtype=image.dtype)
        axis.imshow(image.numpy())
        both_see = ((far > 0) & (near > 0)).nonzero()
        axis.plot(both_see[:, 1], both_see[:, 0], ".", color=LINEAR, ms=3)
        axis.set(title=title, xlabel="key")
    picture.axes[0].set_ylabel("query")
    names = (("window", WINDOW), ("kept tokens", KEPT), ("memory", LINEAR))
    patches = [Patch(color=color, label=name) for name, color in names]
    both = Line2D([], [], color=LINEAR, marker=".", ls="", label="also in the memory")
    picture.legend(handles=[*patches, both], loc="outside lower center", ncols=4)
    return picture


@figure
def merge() -> Figure:
    """The weights that one query gives to all keys, under each merge, and how much of them is the memory's."""
    count, window, keep = 96, 24, 2
    q, k = random_heads(count)
    near, near_mass = weights(lambda v: window_attention(q, k, v, window=window, keep=keep), count)
    decay = torch.full((1, count, 1), math.log(0.98), dtype=torch.float64)
    far, far_mass = weights(lambda v: gated_linear_attention(0.3 * q, 0.3 * k, v, decay, lag=window, skip=keep), count)
    whole, _ = joint([(near[None, :, None], near_mass[None, :, None]), (far[None, :, None], far_mass[None, :, None])])
    rows: dict[str, Tensor] = {
        "joint: one denominator": whole[0, :, 0],
        "sum: two denominators": near + far,
        "none: no denominator for the memory": near + far_mass.exp()[:, None] * far,
    }
    picture = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = picture.subplots(1, 2, width_ratios=(3, 2))
    for index, (name, row) in enumerate(rows.items()):
        left.plot(row[-1], label=f"{name} (sum {row[-1].sum():.3g})", color=f"C{index}", lw=1)
    left.axvspan(count - window, count - 1, color=WINDOW, alpha=0.08)
    left.set(yscale="log", xlabel="key", ylabel="weight", title=f"the last query's weights (window {window} shaded)")
    left.legend(fontsize="small")
    for shift in (-4, -2, 0, 2):
        share = torch.sigmoid(far_mass + shift - near_mass)
        right.plot(share, label=f"c = {shift}", lw=1)
    right.set(ylim=(-0.02, 1), xlabel="query", title="joint: the memory's share, by log-scale c")
    right.legend(fontsize="small")
    return picture


@figure
def decay() -> Figure:
    """What is left of a key in the memory after some tokens, for gates that start at different places."""
    count = 4096
    q, k = torch.zeros(2, 1, count, 1, 1, dtype=torch.float64)
    value = torch.zeros(1, count, 1, 1, dtype=torch.float64)
    value[:, 0] = 1
    picture = Figure(figsize=(6, 3), layout="constrained")
    axis = picture.subplots()
    for gate in (0.5, 0.9, 0.99, 0.999):
        gates = torch.full((1, count, 1), math.log(gate), dtype=torch.float64)
        y, log_mass, _ = gated_linear_attention(q, k, value, gates)
        left = (y * log_mass.exp()[..., None])[0, 1:, 0, 0]
        half_life = math.log(0.5) / math.log(gate)
        axis.plot(range(1, count), left, label=f"{gate} (half-life {half_life:.3g})")
    axis.axvline(DEAD_HALF_LIFE, color="0.6", ls="--", lw=0.8)
    axis.text(DEAD_HALF_LIFE, 1.03, "lz.diagnose calls shorter half-lives dead", fontsize=7, color="0.4", ha="center")
    axis.set_xscale("log", base=2)
    axis.set(xlabel="tokens ago", ylabel="what is left of a key", ylim=(-0.02, 1.02))
    axis.legend(title="gate", fontsize="small")
    return picture


@figure
def ring() -> Figure:
    """What the slots of a window's ring hold after each token, read out of its state."""
    count, window = 11, 5
    x = torch.zeros(1, count, 1, 1)
    ranks = torch.arange(count, dtype=x.dtype).view(1, count, 1, 1)
    picture = Figure(figsize=(5, 3.6), layout="constrained")
    axis = picture.subplots()
    state = None
    for token in range(count):
        part = slice(token, token + 1)
        _, _, state = window_attention(x[:, part], x[:, part], ranks[:, part], window=window, state=state)
        assert state is not None
        for slot in range(window):
            held = slot <= token
            written = slot == token % window
            color = WINDOW if written else "0.9" if held else "white"
            axis.add_patch(Rectangle((slot, token), 1, 1, fc=color, ec="white", lw=2))
            if held:
                text = str(int(state.v[0, slot, 0, 0]))
                axis.text(slot + 0.5, token + 0.5, text, ha="center", va="center", color="white" if written else "0.2")
    axis.set(xlim=(0, window), ylim=(count, 0), xlabel="slot", ylabel="after token", title="a step writes one slot")
    axis.set_xticks([i + 0.5 for i in range(window)], [str(i) for i in range(window)])
    axis.set_yticks([i + 0.5 for i in range(count)], [str(i) for i in range(count)])
    return picture


@figure
def memory() -> Figure:
    """Bytes that generation holds for one sequence, counted by the package for two shapes."""
    shapes = {  # as their own config.json has them
        "SmolLM2-135M": {
            "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        },
        "Llama-3.1-8B": {
            "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        },
    }  # fmt: skip
    lengths = [2**n for n in range(8, 18)]
    picture = Figure(figsize=(9, 3.2), layout="constrained")
    for axis, (name, shape) in zip(picture.subplots(1, 2), shapes.items()):
        every_sixth = ["softmax" if i % 6 == 5 else "recommended" for i in range(shape["num_hidden_layers"])]
        for label, layers, color in (
            ("teacher", "softmax", SOFTMAX),
            ("softmax kept in every sixth layer", every_sixth, KEPT),
            ("recommended", "recommended", WINDOW),
        ):
            given = LlamaConfig(**shape).to_dict()
            for other in ("model_type", "layer_types", "architectures", "transformers_version"):
                given.pop(other, None)
            with torch.device("meta"):
                config = LizardLlamaConfig(**given, layers=layers)
                model = LizardLlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
            sizes = [(state_bytes(model) + kv_bytes(model, n)) / 2**20 for n in lengths]
            axis.plot(lengths, sizes, label=label, color=color)
        axis.set_xscale("log", base=2)
        axis.set(yscale="log", xlabel="tokens", title=name)
    picture.axes[0].set_ylabel("MiB per sequence, bf16")
    picture.axes[0].legend(fontsize="small")
    return picture


@figure
def kernels() -> Figure:
    """The first table of benchmarks/NOTES.md as bars: where a layer's time goes."""
    cases, parts, totals, peer = notes_table(NOTES.read_text(encoding="utf-8"))
    picture = Figure(figsize=(9, 3.4), layout="constrained")
    axes = picture.subplots(1, len(cases), squeeze=False)[0]
    colors = matplotlib.colormaps["tab20"]
    for column, (axis, case) in enumerate(zip(axes, cases)):
        below = 0.0
        for index, (name, times) in enumerate(parts.items()):
            label = name if column == 0 else None
            axis.bar(0, times[column], bottom=below, color=colors(index), label=label, width=0.6)
            below += times[column]
        axis.bar(1, peer[column], color=SOFTMAX, width=0.6)
        axis.set_xticks([0, 1], [f"hybrid\n{totals[column]:,.0f}", f"sdpa\n{peer[column]:,.0f}"])
        axis.set_title(case)
    axes[0].set_ylabel("forward + backward, µs")
    picture.legend(loc="outside right center", fontsize=7)
    return picture


def notes_table(text: str) -> tuple[list[str], dict[str, list[float]], list[float], list[float]]:
    """Cases, microseconds by kernel, their totals, and sdpa's forward + backward: the notes' first table.

    A cell is a number or a sum of numbers; the row of sdpa has "forward / forward + backward".
    """
    lines = itertools.dropwhile(lambda line: not line.startswith("|"), text.splitlines())
    table = [line.strip("| ").split("|") for line in itertools.takewhile(lambda line: line.startswith("|"), lines)]
    rows = {row[0].strip("* "): [cell.strip("* ") for cell in row[1:]] for row in table}
    header, *names = [name for name in rows if not set(name) <= set("-")] or [""]
    total, peer = (next((n for n in names if sign in n), "") for sign in (", all", "sdpa"))
    if not total or not peer:
        raise ValueError(
            f"the first table of {NOTES.name} has no row of all kernels ('..., all') or none of sdpa, only {names}; "
            f"put it back, or draw docs/figures.py's `kernels` from what stands there now"
        )

    def numbers(cell: str) -> list[float]:
        return [float(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cell)]

    parts = {name: [sum(numbers(cell)) for cell in rows[name]] for name in names if name not in (total, peer)}
    return (
        rows[header],
        parts,
        [numbers(cell)[0] for cell in rows[total]],
        [numbers(cell)[-1] for cell in rows[peer]],
    )


def main(folder: str) -> None:
    """Write all figures into a folder."""
    for name in FIGURES:
        path = Path(folder) / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(svg(name))


if __name__ == "__main__":
    main(*sys.argv[1:])
