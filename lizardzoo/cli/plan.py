"""What `linearize --dry-run` shows: the plan of a conversion, and what its result will take. No weight is read."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from rich.markup import escape

from lizardzoo.cli.base import err, out
from lizardzoo.cli.show import make_table, memory_table, parameter_table
from lizardzoo.config import MixerSpec, layer_map
from lizardzoo.distill.recipe import Recipe
from lizardzoo.evaluate.report import human_bytes
from lizardzoo.streaming import empty_student

LENGTHS = (8192, 32768, 131072)


def print_plan(model: str, config: Any, specs: list[MixerSpec], dtype: torch.dtype | None, recipe: Recipe) -> None:
    """The layers, the parameters, the memory of a sequence, and of training with a recipe."""
    student = empty_student(config, specs, dtype or config.dtype or torch.float32)
    out.print(f"[bold]{escape(model)}[/] becomes a {type(student).__name__}", soft_wrap=True, highlight=False)
    layers = make_table("layers", "layer", "mixer")
    for index, mixer in layer_map(specs):
        layers.add_row(index, escape(mixer))
    out.print(layers)
    out.print(parameter_table(student))
    out.print(memory_table(student, LENGTHS))
    if importlib.util.find_spec("peft") is None or importlib.util.find_spec("accelerate") is None:
        err.print("note: for the memory of training, pip install 'lizardzoo\\[train]'")
    elif student.mixers():
        out.print(_training(student, recipe))


def _training(student: Any, recipe: Recipe) -> Any:
    from lizardzoo.distill.memory import training_memory

    lengths = dict.fromkeys((recipe.transfer.sequence_length, recipe.finetune.sequence_length))
    sizes = " and ".join(f"{length:,}" for length in lengths)
    title = f"training ({recipe.name}), one sequence of {sizes} tokens at a time, estimated"
    table = make_table(title, "stage", "frozen weights", "what trains", "activations", "all")
    rows = training_memory(student, recipe)
    for row in rows:
        parts = (row.weights, row.learning, row.activations, row.total)
        table.add_row(row.option, *map(human_bytes, parts))
    table.caption = "sharded over N processes, each has an N-th of the frozen weights"
    if all(row.option != "transfer" for row in rows):
        table.caption += "; no stage transfer: the mixers have no parameters of their own"
    return table
