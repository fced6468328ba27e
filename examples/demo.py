"""The whole way on a real model: linearize, distil, compare with the teacher, save, reload, speak.

Run it with `make demo`, or `python examples/demo.py --out FOLDER` where `lizardzoo[demo]` is installed: two CPU
cores, less than 10 minutes, 6 GB of memory, 1.1 GB on disk, no GPU. The teacher is SmolLM2-135M-Instruct.

The text is the documentation of the Python standard library (stdlib_text.py); some modules are held out.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Threads that wait for each other spin; where something else uses a core too, that makes a step up to 15 times
# slower. Ten thousand turns instead of libgomp's 300,000 make it 3 times, and cost nothing on an idle machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # read when torch is imported

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.panel import Panel
from rich.progress import Progress
from rich.table import Table
from rich.text import Text
from stdlib_text import documentation
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.distill import recipe_from
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.positions import Bucket
from lizardzoo.evaluate.report import Report, human_bytes
from lizardzoo.smollm2 import load_teacher

OUT = Path("out/demo")
RECIPE = "demo"
EVALUATION = (4, 2048)
"""Held-out sequences (the beginning of one module each) and their length: longer than any in training."""
CALIBRATION = (2, 1024)
QUESTION = "Write a short story about a lizard that loses its tail."
NEW_TOKENS = 120
"""Prompt and answer are longer than the window."""

UNTRAINED, FINETUNED = "recommended, untrained", "recommended, after stage 2"
HYBRID, TRANSFERRED = "hybrid, untrained", "hybrid, after stage 1"
LONG = 32768
"""The length in tokens at which the closing table counts memory."""

console = Console()


@dataclass(frozen=True)
class Summary:
    """One model of the closing table; `inside` are positions below the window, `beyond` all others."""

    name: str
    perplexity_inside: float
    perplexity_beyond: float
    kl_inside: float
    kl_beyond: float
    memory: dict[int, int]
    """Tokens -> bytes that generation holds."""


def summarize(report: Report, window: int) -> list[Summary]:
    """One line per model of a report whose buckets have an edge at the window."""
    lines = []
    for row in report.rows:
        inside = [bucket for bucket in row.result.buckets if bucket.stop <= window]
        beyond = [bucket for bucket in row.result.buckets if bucket.start >= window]
        (perplexity_inside, kl_inside), (perplexity_beyond, kl_beyond) = pooled(inside), pooled(beyond)
        lines.append(Summary(row.name, perplexity_inside, perplexity_beyond, kl_inside, kl_beyond, row.memory))
    return lines


def pooled(buckets: Sequence[Bucket]) -> tuple[float, float]:
    """Perplexity and KL of several buckets as if they were one: means over tokens, in nats."""
    tokens = sum(bucket.tokens for bucket in buckets)
    nll = sum(bucket.tokens * math.log(bucket.perplexity) for bucket in buckets) / tokens
    kl = sum(bucket.tokens * (bucket.kl or 0.0) for bucket in buckets) / tokens
    return math.exp(nll), kl


def closing_table(lines: Sequence[Summary], window: int) -> Table:
    """What it all came to."""
    table = Table(title=f"held-out text, inside the window (positions below {window}) and beyond")
    table.add_column("\nmodel", overflow="fold")
    for title in ("perplexity\ninside", "\nbeyond", "KL\ninside", "\nbeyond"):
        table.add_column(title, justify="right")
    table.add_column(f"memory at\n{LONG // 1024}K tokens", justify="right")
    for line in lines:
        table.add_row(
            line.name,
            f"{line.perplexity_inside:.2f}",
            f"{line.perplexity_beyond:.2f}",
            f"{abs(line.kl_inside):.4f}",  # of the teacher to itself it is 0 with either sign
            f"{abs(line.kl_beyond):.4f}",
            human_bytes(line.memory[LONG]),
        )
    return table


def broken_promises(lines: Sequence[Summary], bare: str, as_large: str) -> list[str]:
    """What the demo is to show and does not: well chosen tokens bring a student closer, and so does each stage."""
    kl = {line.name: line.kl_beyond for line in lines}
    steps = [(as_large, UNTRAINED), (UNTRAINED, FINETUNED), (bare, HYBRID), (HYBRID, TRANSFERRED)]
    return [
        f"KL beyond the window: {better} has {kl[better]:.4f}, which is not below the {kl[worse]:.4f} of {worse}"
        for worse, better in steps
        if not kl[better] < kl[worse]
    ]


def answer(model: Any, tokenizer: Any) -> str:
    """A greedy answer to the question; generation stops at the end of the turn or after NEW_TOKENS."""
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def beginnings(documents: Sequence[str], tokenizer: Any, count: int, length: int) -> Tensor:
    """The first `length` tokens of each of the first `count` documents: [count, length]."""
    return torch.cat([evaluate.sequences(text, tokenizer, length, limit=1) for text in documents[:count]])


def reload(folder: Path, model: Any, probe: Tensor) -> Any:
    """The saved model, read again in both ways; raises unless its logits equal those of `model` bit for bit."""
    with torch.no_grad():
        expected = model(probe, use_cache=False).logits
        for load in (AutoModelForCausalLM.from_pretrained, lz.from_pretrained):
            again = load(folder)
            if not torch.equal(again(probe, use_cache=False).logits, expected):
                raise LizardzooError(
                    f"{folder}, read by {load.__qualname__}, gives other logits than the model that was saved"
                )
    return again


class Phases:
    """Seconds per phase, announced as they begin."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, title: str) -> Iterator[None]:
        console.rule(f"[bold]{title}[/]  {sum(self.seconds.values()):.0f} s", align="left")
        start = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - start


def free_folder(wanted: Path) -> Path:
    """The folder itself, or with a number behind its name if there is something in it."""
    folder, number = wanted, 1
    while folder.exists() and (folder.is_file() or any(folder.iterdir())):
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def run(out: Path) -> None:
    """The demo; everything it makes goes into the folder `out`."""
    phase = Phases()

    with phase("Teacher and text"):
        teacher, tokenizer = load_teacher()
        train, held_out = documentation()
        text = beginnings(held_out, tokenizer, *EVALUATION)
        console.print(
            f"teacher: SmolLM2-135M-Instruct, {teacher.num_parameters():,} parameters\n"
            f"text: documentation strings of {len(train)} modules of the standard library; "
            f"{len(held_out)} others are held out"
        )

    with phase("Linearize"):
        calibration = beginnings(train, tokenizer, *CALIBRATION)
        student = lz.linearize(teacher, "recommended")
        hybrid = lz.linearize(teacher, "hybrid", calibrate=calibration)
        spec = student.config.specs[0]
        for name, made in (("recommended", student), ("hybrid", hybrid)):
            console.print(f"{name}: {made.config.specs[0]}\nin every layer: {made.conversion_report}")

    with phase("Distil"):
        settings = {"tokenizer": tokenizer, "data": train, "recipe": RECIPE, "teacher": teacher}
        console.print(
            "recommended: nothing to train in stage 1; in stage 2 (finetune) LoRA learns the teacher's logits"
        )
        lz.distill(student, output_dir=out, **settings)
        console.print("hybrid: in stage 1 (transfer) every mixer learns its layer's attention")
        lz.distill(hybrid, output_dir=out / "hybrid", stages=["transfer"], **settings)

    with phase("Save and reload"):
        final = reload(out / "final", student, text[:1, : spec.exact_within + 128])
        del student  # the one that was read again goes on
        console.print(f"{escape(str(out / 'final'))}: both ways to read it give the logits of the model that was saved")

    with phase("Compare"):
        bare, as_large = f"window {spec.window}", f"window {evaluate.state_matched_window(final)}, {spec.keep} kept"
        models = {
            bare: lz.linearize(teacher, lz.Window(window=spec.window, keep=0)),
            as_large: lz.linearize(teacher, evaluate.matched_layers(final, keep=spec.keep)),
            UNTRAINED: lz.linearize(teacher, "recommended"),
            FINETUNED: final,
            HYBRID: lz.linearize(teacher, "hybrid", calibrate=calibration),
            TRANSFERRED: hybrid,
        }
        with Progress(console=console) as bar:
            task = bar.add_task(f"{len(models) + 1} models", total=len(text))
            report = evaluate.compare(
                models, teacher, text, window=spec.window, progress=lambda done, _: bar.update(task, completed=done)
            )
        lines = summarize(report, spec.window)

    with phase("Speak"):
        samples = {name: answer(model, tokenizer) for name, model in (("teacher", teacher), (FINETUNED, final))}
        console.print(QUESTION)
        for name, sample in samples.items():
            console.print(Panel(Text(sample), title=name, title_align="left"))

    console.rule("[bold]Result[/]", align="left")
    tables = [report.table(), closing_table(lines, spec.window)]
    console.print(*tables)
    kl = {line.name: line.kl_beyond for line in lines}
    behind = "still behind it" if kl[TRANSFERRED] > kl[as_large] else "ahead of it"
    console.print(
        f"{as_large} (first tokens, for ever) is the bare window whose state has as many bytes as the students' have. "
        f"Half of those bytes recommended spends on the older tokens that drew most attention, and is closer to the "
        f"teacher without any training. The hybrid's linear branch has to learn: after minutes of it, it is {behind}."
    )
    report.plot(out / "by_position.png")
    with (out / "table.txt").open("w", encoding="utf-8") as file:
        Console(file=file, width=110).print(*tables)
    results = {
        "summary": [asdict(line) for line in lines],
        "report": report.to_dict(),
        "samples": {"question": QUESTION, **samples},
        "recipe": recipe_from(RECIPE).to_dict(),
        "seconds": phase.seconds,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("lizardzoo", "torch", "transformers")},
        "threads": torch.get_num_threads(),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    console.print(
        f"saved: the model in [bold]{escape(str(out / 'final'))}[/] (read it with lizardzoo.from_pretrained);"
    )
    console.print(
        f"  in {escape(str(out))}: " + ", ".join(sorted(path.name for path in out.iterdir() if path.is_file()))
    )
    console.print(f"time: {sum(phase.seconds.values()):.0f} s on {torch.get_num_threads()} threads")
    if broken := broken_promises(lines, bare, as_large):
        raise LizardzooError("; ".join(broken))


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help=f"an empty or new folder (default: {OUT}, or the next free number)")
    out = parser.parse_args().out or free_folder(OUT)
    logging.basicConfig(handlers=[RichHandler(console=console, show_time=False, show_path=False)], format="%(message)s")
    logging.getLogger("lizardzoo").setLevel(logging.INFO)  # says when the teacher is being downloaded
    transformers_logging.disable_progress_bar()  # bars for reading files, between ours
    try:
        run(out)
    except LizardzooError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
