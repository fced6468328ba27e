"""How fast both stages train, and in how much memory: by the kernels, and by the papers' dense computation of the same.

    python benchmarks/bench_training.py                            # a random SmolLM2-135M, 8 x 2,048 tokens a step
    python benchmarks/bench_training.py --shape 1b --only hybrid "hybrid, dense"
    python benchmarks/bench_training.py --check                    # a smoke test on a CPU

Every contender goes through the same functions that `distill` calls, with the same weights and batches; what differs is
the mixer (`dense.py` says what the dense ones compute) and, in stage 1, whether the teacher's attention is sdpa or, for
the dense ones, as LoLCATs has it: whole matrices of weights. First each dense mixer is held to ours in plain PyTorch in
float64, outputs and gradients: what is wrong is not timed. Then the losses of the first step have to agree as well.
Where a step does not fit in memory it is tried in smaller micro batches. Tokens per second are of the median step.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contenders import Shape, draw, mixer
from dense import dense_of
from measure import TOLERANCE, attempt, machine, relative_error, results
from report import named, number, rounded, save, table
from scaling import RandomTokens, TimedLog, peak_memory, random_teacher, reset_memory

import lizardzoo as lz
from lizardzoo.config import PRESETS
from lizardzoo.distill.finetune import finetune
from lizardzoo.distill.recipe import recipe_from
from lizardzoo.distill.trainer import read_log, training_arguments
from lizardzoo.distill.transfer import transfer
from lizardzoo.kernels import Impl

SHAPES = {"smollm2": "135m", "1b": "1b", "8b": "8b", "tiny": "tiny"}
"""As `contenders.SHAPES`, by the names of `scaling.SIZES`."""
STAGES = {"transfer": transfer, "finetune": finetune}
NO_MEMORY = "out of memory"
"""In the words of `measure.attempt`."""
EXACT = 1e-9
"""Relative error that a dense mixer may have in float64."""
SMALL = Shape(heads=4, kv_heads=2, head_dim=16, feature_dim=16)
SMALL_TOKENS = 300
"""More than any window here."""


class Contender(NamedTuple):
    """The layers' spec; `like`: the contender that computes the same function by the kernels, None where it is one."""

    spec: Any
    like: str | None = None


CONTENDERS: dict[str, Contender] = {}
for _name in ("hybrid", "lolcats", "lizard"):
    CONTENDERS |= {_name: Contender(PRESETS.get(_name)), f"{_name}, dense": Contender(dense_of(_name), like=_name)}
CONTENDERS["recommended"] = Contender(PRESETS.get("recommended"))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--batch", type=int, default=8, help="sequences a step")
    parser.add_argument("--tokens", type=int, default=2048, help="of a sequence")
    parser.add_argument("--micro", type=int, help="sequences at a time; default: all that fit")
    parser.add_argument("--steps", type=int, default=4, help="that are timed")
    parser.add_argument("--skip", type=int, default=2, help="steps before them: kernels are compiled there")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="CONTENDER")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--check", action="store_true", help="one step of a tiny model each, on any machine")
    parser.add_argument("--render", type=Path, metavar="FILE.json", help="the table of an earlier run")
    parser.add_argument("--out", type=Path, default=Path("out/bench"), help="folder for what is written")
    given = parser.parse_args(argv)
    if given.check:
        given.shape, given.batch, given.tokens, given.steps, given.skip = "tiny", 2, 288, 1, 1
    if min(given.steps, given.skip, given.batch, given.micro or 1) < 1:
        parser.error("--steps, --skip, --batch and --micro have to be above 0")
    if given.batch % (given.micro or 1):
        parser.error(f"--micro has to divide --batch {given.batch}, got {given.micro}")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Verify, time, print, write; 1 where something is wrong."""
    given = parse(argv)
    if given.render:
        print(markdown(json.loads(given.render.read_text(encoding="utf-8"))))
        return 0
    if not torch.cuda.is_available() and not given.check:
        raise SystemExit("bench_training times training on a CUDA device, and torch finds none here; see --check")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = ("shape", "batch", "tokens", "steps", "skip")
    run: dict[str, Any] = {"machine": machine(), **{key: getattr(given, key) for key in keys}}
    run |= {"verified": {}, "results": []}
    path = given.out / "training.json"
    for name in given.only:
        run["verified"][name] = error = verify(name)
        if not error <= EXACT:
            continue
        for stage in given.stages:
            if stage == "transfer" and not learns(name):
                continue
            run["results"].append({"contender": name, "stage": stage, **fitted(name, stage, given, device)})
            print(rounded(run["results"][-1]), flush=True)
            save(run, path)
    save(run, path)
    path.with_suffix(".md").write_text(markdown(run) + "\n", encoding="utf-8")
    print(markdown(run))
    red = problems(run)
    print("\n".join(f"RED: {problem}" for problem in red) or "what was timed computes the same")
    return 1 if red else 0


def verify(name: str) -> float:
    """Largest relative error of output and gradients against the same function by the reference, in float64."""
    contender = CONTENDERS[name]
    if contender.like is None:
        return 0.0  # it is what others are held to; the tests hold it, and bench_attention.py its kernels
    torch.manual_seed(0)
    inputs = draw(SMALL, 2, SMALL_TOKENS, "cpu").leaves(dtype=torch.float64)
    actual, expected = (
        results(mixer(inputs, "reference", CONTENDERS[which].spec), inputs) for which in (name, contender.like)
    )
    scale = 1e-6 * max(gradient.norm().item() for gradient in expected[1].values())  # for those that cancel
    errors = [relative_error(actual[0], expected[0])]
    errors += [relative_error(actual[1][key], gradient, scale) for key, gradient in expected[1].items()]
    return max(errors, key=lambda error: (error != error, error))


def learns(name: str) -> bool:
    """Whether stage 1 has something to train."""
    shape = lz.mixers.AttentionShape(8, 1, 1, 8, 1.0)
    return any(True for _ in CONTENDERS[name].spec.build(shape).parameters())


def fitted(name: str, stage: str, given: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Figures of the largest micro batch that fits; {"missing": ...} where none does, or what else went wrong."""
    micro, too_large = given.micro or given.batch, []
    while micro:
        found = attempt(train, name, stage, given, device, micro)
        if found.get("missing") != NO_MEMORY:
            return {"micro": micro, "too large": too_large, **found}
        too_large.append(micro)
        micro = next((size for size in range(micro // 2, 0, -1) if given.batch % size == 0), 0)
    return {"missing": "does not fit", "too large": too_large}


def train(name: str, stage: str, given: argparse.Namespace, device: torch.device, micro: int) -> dict[str, Any]:
    """Steps of a stage from the start values."""
    gc.collect()  # what an attempt that failed has left
    torch.cuda.empty_cache()
    contender = CONTENDERS[name]
    student = lz.linearize(random_teacher(SHAPES[given.shape], given.tokens, device), contender.spec)
    for module in student.mixers().values():
        module.impl = Impl.REFERENCE if contender.like else Impl.AUTO
    student.set_attn_implementation("eager" if contender.like and stage == "transfer" else "sdpa")
    steps = given.skip + given.steps
    values = dataclasses.replace(
        getattr(recipe_from("recommended"), stage),
        steps=steps, batch_size=given.batch, sequence_length=given.tokens,
    )  # fmt: skip
    data = RandomTokens(given.batch * steps, given.tokens, student.config.vocab_size)
    reset_memory(device)
    with tempfile.TemporaryDirectory() as folder:
        log = TimedLog(stage, Path(folder) / "log.jsonl")
        settings = training_arguments(
            values, Path(folder) / stage, steps=steps, seed=0, micro_batch_size=micro, checkpoint_every=steps + 1
        )
        STAGES[stage](student, values, data, settings, log)
        losses = [entry["loss"] for entry in read_log(log.path)]
    seconds = statistics.median(end - start for start, end in zip(log.ends[given.skip - 1 :], log.ends[given.skip :]))
    found = {"tokens/s": given.batch * given.tokens / seconds, "loss": losses[0]}
    return found | ({"peak MiB": peak_memory(device) / 2**20} if device.type == "cuda" else {})


def problems(run: dict[str, Any]) -> list[str]:
    """What is red: mixers that are wrong, first losses that are not those of the kernels."""
    red = [f"{name}: error {error:.1e}, not timed" for name, error in run["verified"].items() if not error <= EXACT]
    red += [
        f"{entry['contender']}, {entry['stage']}: {entry['missing']}" for entry in run["results"] if "right" in entry
    ]
    losses = {(entry["contender"], entry["stage"]): entry["loss"] for entry in run["results"] if "loss" in entry}
    for (name, stage), loss in losses.items():
        expected = losses.get((CONTENDERS[name].like or name, stage), loss)
        if not abs(loss - expected) <= TOLERANCE * abs(expected):
            red.append(f"{name}, {stage}: the first loss is {loss:.5g}, by the kernels {expected:.5g}")
    return red


def markdown(run: dict[str, Any]) -> str:
    """One table: a row for each contender; behind a dense one how many times faster the kernels are."""
    found = {(entry["contender"], entry["stage"]): entry for entry in run["results"]}
    rows = []
    for name in run["verified"]:
        cells = [name]
        for stage in STAGES:
            entry = found.get((name, stage), {})
            ours = found.get((CONTENDERS[name].like, stage), {})
            cells += [speed(entry, run["batch"]), number(entry.get("peak MiB"))]
            cells.append(f"{ours['tokens/s'] / entry['tokens/s']:.2f}x" if {*ours} & {*entry} >= {"tokens/s"} else "")
        rows.append(cells)
    head = ["layers", *(f"{stage}: {what}" for stage in STAGES for what in ("tokens/s", "peak MiB", "kernels"))]
    title = (
        f"{named(run['machine'])}; {run['shape']}, {run['batch']} x {run['tokens']:,} tokens a step, random weights."
    )
    note = "Dense: the same function in whole matrices; behind it, how many times faster the kernels are."
    return f"{title} {note}\n\n{table(head, rows)}"


def speed(entry: dict[str, Any], batch: int) -> str:
    """Tokens per second, and the micro batches they took."""
    if "tokens/s" not in entry:
        return entry.get("missing", "-")
    return number(entry["tokens/s"]) + (f" ({entry['micro']} at a time)" if entry["micro"] < batch else "")


if __name__ == "__main__":
    sys.exit(main())
