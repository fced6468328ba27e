"""What training takes of memory: measured where it can be, foretold for what is larger, one against the other.

    python benchmarks/memory.py                     # as SmolLM2-135M and 360M; five minutes on a CPU
    python benchmarks/memory.py --measure 1b 8b     # on a GPU
    python benchmarks/memory.py --render out/memory.json    # the tables again, for docs/howto/distil.md

Steps of both stages on random weights, one sequence of --tokens tokens at a time, by the very functions that `distill`
calls; beside each, what `lizardzoo linearize --dry-run` says of it without computing. On CUDA the measure is
`torch.cuda.max_memory_allocated`; on a CPU the same of tensors, counted as they are made and freed. Red is an estimate
that is off by more than 15 %; on CUDA, whose kernels make fewer temporaries, only one that is too low.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from report import save
from scaling import SIZES, RandomTokens
from transformers import LlamaConfig

from lizardzoo.distill import RECIPES
from lizardzoo.distill.finetune import finetune
from lizardzoo.distill.memory import LiveTensors, TrainingMemory, training_memory
from lizardzoo.distill.recipe import Recipe
from lizardzoo.distill.trainer import StepLog, training_arguments
from lizardzoo.distill.transfer import transfer
from lizardzoo.evaluate.report import human_bytes
from lizardzoo.streaming import empty_student

SHAPES = SIZES | {
    "360m": (960, 2560, 32, 15, 5, 64, 49152),
    "1.7b": (2048, 8192, 24, 32, 32, 64, 49152),
    "70b": (8192, 28672, 80, 64, 8, 128, 128256),
}
"""Of Llama and SmolLM2 models, as in scaling.py."""
UNTIED = ("8b", "70b")
STEPS = 2
"""The optimizer's moments are there from the second step on."""
TOLERANCE = 0.15


def main(arguments: list[str] | None = None) -> int:
    """Measure, foretell, print tables; 1 where an estimate is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--measure", nargs="+", choices=SHAPES, default=["135m", "360m"])
    parser.add_argument("--foretell", nargs="*", choices=SHAPES, default=["8b", "70b"])
    parser.add_argument("--layers", default="hybrid", help="a preset")
    parser.add_argument("--tokens", type=int, default=1024, help="of a sequence")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the frozen weights")
    parser.add_argument("--out", type=Path, default=Path("out/memory.json"))
    parser.add_argument("--render", type=Path, metavar="JSON", help="only print the tables of an earlier run")
    given = parser.parse_args(arguments)
    if given.render:
        print(markdown(json.loads(given.render.read_text(encoding="utf-8"))))
        return 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    keys = ("layers", "tokens", "dtype")
    run: dict[str, Any] = {"device": device, "torch": torch.__version__, **{key: getattr(given, key) for key in keys}}
    run["rows"] = []
    for size in [*given.measure, *given.foretell]:
        recipe = short_recipe(given.tokens)
        empty = empty_student(config(size, given.tokens), given.layers, getattr(torch, given.dtype))
        estimates = training_memory(empty, recipe)
        found = measure(empty, recipe) if size in given.measure else {}
        for row in estimates:
            run["rows"].append({"size": size, **asdict(row), "total": row.total, "measured": found.get(row.option)})
        print(f"{size}: done", file=sys.stderr, flush=True)
        save(run, given.out)
    print(markdown(run))
    red = [f"RED: {row['size']}, {row['option']}: {off(row):+.0%}" for row in run["rows"] if is_red(row, device)]
    print("\n".join(red) or "estimates hold")
    return 1 if red else 0


def config(size: str, tokens: int) -> LlamaConfig:
    """A Llama of that size."""
    hidden, mlp, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[size]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=tokens,
        tie_word_embeddings=size not in UNTIED,
    )


def short_recipe(tokens: int) -> Recipe:
    """The recipe `recommended`, of a few steps of one sequence."""
    recipe, few = RECIPES["recommended"], {"steps": STEPS, "batch_size": 1, "sequence_length": tokens}
    return replace(recipe, transfer=replace(recipe.transfer, **few), finetune=replace(recipe.finetune, **few))


def measure(empty: Any, recipe: Recipe) -> dict[str, int]:
    """Bytes at the fullest moment of each option of training, by option."""
    torch.manual_seed(0)
    student = type(empty)._from_config(copy.deepcopy(empty.config), dtype=empty.dtype)
    data = RandomTokens(STEPS, recipe.transfer.sequence_length, student.config.vocab_size)
    found = {}
    options = {"transfer": transfer, "finetune": finetune}
    options["finetune, checkpointed"] = partial(finetune, gradient_checkpointing=True)
    for option, function in options.items():
        name = option.partition(",")[0]
        stage = getattr(recipe, name)
        if name == "transfer" and not any(".mixer." in key for key, _ in student.named_parameters()):
            continue  # nothing to learn there
        with tempfile.TemporaryDirectory() as folder:
            settings = training_arguments(
                stage,
                Path(folder) / name,
                steps=STEPS,
                seed=0,
                micro_batch_size=1,
                checkpoint_every=STEPS + 1,
            )
            student.to(settings.device)
            known = sum(parameter.nbytes for parameter in student.parameters())
            log = StepLog(name, Path(folder) / "log.jsonl", progress=False)
            train = partial(function, student, stage, data, settings, log)
            if settings.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                train()
                found[option] = torch.cuda.max_memory_allocated()
            else:
                with LiveTensors(student.parameters()) as live:
                    train()
                found[option] = known + live.peak
    return found


def off(row: dict[str, Any]) -> float:
    """How far the estimate is from what was measured, relative to that."""
    return row["total"] / row["measured"] - 1


def is_red(row: dict[str, Any], device: str) -> bool:
    """Whether a measured row contradicts its estimate."""
    return row["measured"] is not None and not (-TOLERANCE <= off(row) <= (TOLERANCE if device == "cpu" else 99))


def markdown(run: dict[str, Any]) -> str:
    """One table; sizes in order."""
    lines = [
        "| Llama of | option | frozen weights | what trains | activations | all | measured | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = [field for field in TrainingMemory.__dataclass_fields__ if field != "option"]
    for row in run["rows"]:
        cells = [row["size"].upper(), row["option"], *(human_bytes(row[name]) for name in [*names, "total"])]
        cells += [human_bytes(row["measured"]), f"{off(row):+.1%}"] if row["measured"] else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
