"""`list` and `info`: what there is, and what a model is made of. Neither reads any weights."""

from __future__ import annotations

import copy
import dataclasses
import types
import typing
from collections.abc import Sequence
from enum import Enum
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from transformers import AutoModelForCausalLM

from lizardzoo.adapters import ADAPTERS, is_new_parameter
from lizardzoo.cache import kv_bytes, state_bytes
from lizardzoo.cli.base import app, out
from lizardzoo.cli.models import is_linearized, load_config
from lizardzoo.config import MIXERS, PRESETS, MixerSpec, layer_map, runs
from lizardzoo.distill.recipe import RECIPES, Finetune
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.report import LENGTHS, human_bytes
from lizardzoo.kernels.dispatch import Impl, auto_on_cuda
from lizardzoo.mixers.softmax import Softmax


class Kind(str, Enum):
    """What `list` can be narrowed to."""

    presets = "presets"
    mixers = "mixers"
    architectures = "architectures"
    recipes = "recipes"


@app.command("list")
def list_(what: Annotated[Kind | None, typer.Argument(help="Show only these.")] = None) -> None:
    """List presets, mixers with their fields, architectures and recipes.

    A preset is a name for --layers; a mixer and its fields are what a layers
    file is made of.
    """
    tables = {
        Kind.presets: _presets,
        Kind.mixers: _mixers,
        Kind.architectures: _architectures,
        Kind.recipes: _recipes,
    }
    for kind, table in tables.items():
        if what in (None, kind):
            out.print(table())


def make_table(title: str, *columns: str) -> Table:
    """An empty table in the house's style."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _presets() -> Table:
    table = make_table("presets: names for --layers", "preset", "mixer", "what differs from the mixer's defaults")
    for name in PRESETS:
        spec = PRESETS.get(name)
        table.add_row(name, spec.type_name, escape(", ".join(_changed_fields(spec))))
    return table


def _changed_fields(spec: MixerSpec) -> list[str]:
    fields = dataclasses.fields(spec)
    return [f"{f.name}={getattr(spec, f.name)!r}" for f in fields if getattr(spec, f.name) != f.default]


def _mixers() -> Table:
    table = make_table(
        "mixers: the types of a layers file, and their fields' defaults",
        "mixer",
        "field",
        "default",
        "values",
    )
    for name in MIXERS:
        fields = dataclasses.fields(MIXERS.get(name))
        hints = typing.get_type_hints(MIXERS.get(name))
        for index, field in enumerate(fields):
            default = "(required)" if field.default is dataclasses.MISSING else repr(field.default)
            table.add_row(name if index == 0 else "", field.name, escape(default), escape(_values(hints[field.name])))
        if not fields:
            table.add_row(name, "", "", "")
        table.add_section()
    return table


def _values(hint: Any) -> str:
    """Such as "int | None" or "'head' | 'layer'"."""
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(_values, typing.get_args(hint)))
    return "None" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _architectures() -> Table:
    table = make_table("architectures: model types that can be linearized", "teacher", "linearized")
    for name in ADAPTERS:
        table.add_row(name, ADAPTERS.get(name).__name__)
    return table


def _recipes() -> Table:
    table = make_table("recipes: names for --recipe", "recipe", "stage", "length", "sequences", "loss")
    for name, recipe in sorted(RECIPES.items()):
        for label, stage in (("transfer", recipe.transfer), ("finetune", recipe.finetune)):
            amount = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs:g} epochs"
            table.add_row(
                name if label == "transfer" else "",
                label,
                str(stage.sequence_length),
                f"{amount} of {stage.batch_size}",
                "layer error" if label == "transfer" else _loss(recipe.finetune),
            )
        table.add_section()
    return table


def _loss(stage: Finetune) -> str:
    weights = {"cross-entropy": stage.ce_weight, "KL to the teacher": stage.kl_weight}
    parts = {name: weight for name, weight in weights.items() if weight}
    return " + ".join(name if len(parts) == 1 else f"{weight:g} {name}" for name, weight in parts.items())


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id, linearized or not.")],
) -> None:
    """Show a model's layer map, adapter and kernels, its new and kept parameters, and the memory of one sequence.

    \b
      lizardzoo info student
    """
    config = load_config(model)
    specs = config.specs if is_linearized(config) else [Softmax()] * config.num_hidden_layers
    with torch.device("meta"):  # shapes alone: a 70B model is told of in a second
        empty = AutoModelForCausalLM.from_config(config, dtype=config.dtype or torch.float32)
    out.print(
        f"[bold]{escape(model)}[/]  {config.model_type}, {str(empty.dtype).removeprefix('torch.')}",
        highlight=False,
    )
    out.print(_adapter(config, empty), soft_wrap=True, highlight=False)
    layers = make_table("layers", "layer", "mixer")
    for index, text in layer_map(specs):
        layers.add_row(index, escape(text))
    out.print(layers)
    out.print(_kernels(empty, specs))
    out.print(parameter_table(empty))
    out.print(memory_table(empty))


def _adapter(config: Any, model: Any) -> str:
    if is_linearized(config):
        return f"adapter: {type(model).__name__}"
    known = config.model_type in ADAPTERS
    return f"adapter: {ADAPTERS.get(config.model_type).__name__}, once linearized" if known else "adapter: none"


def _kernels(model: Any, specs: list[MixerSpec]) -> Table:
    """What computes each layer where nothing else is asked for (`mixer.impl`)."""
    layers: dict[tuple[str, str, str], list[int]] = {}
    mixers, theirs = mixers_of(model), f"transformers, {model.config._attn_implementation}"
    for index in range(len(specs)):
        rows = [("softmax", theirs, theirs)]
        if index in mixers:
            kernels = mixers[index].kernels
            rows = [(op, Impl.REFERENCE.value, auto_on_cuda(op, sizes)) for op, sizes in kernels.items()]
        for row in rows or [("(the mixer does not say)", "", "")]:
            layers.setdefault(row, []).append(index)
    table = make_table("kernels", "kernel", "layers", "on a CPU", "on CUDA")
    for (op, cpu, cuda), indices in layers.items():
        table.add_row(op, runs(indices), cpu, cuda)
    return table


def parameter_table(model: Any) -> Table:
    """New and kept ones, by number and size."""
    parameters: dict[bool, list[Any]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        parameters[is_new_parameter(name)].append(parameter)
    table = make_table("parameters", "", "tensors", "numbers", "bytes")
    for label, new in (("new (mixers, fp32)", True), ("kept (the teacher's)", False)):
        numbers, size = sum(p.numel() for p in parameters[new]), sum(p.nbytes for p in parameters[new])
        table.add_row(label, f"{len(parameters[new]):,}", f"{numbers:,}", human_bytes(size))
    return table


def memory_table(model: Any, lengths: Sequence[int] = LENGTHS) -> Table:
    """States do not grow with the length; the cache of kept softmax layers, and of the teacher, does."""
    table = make_table(
        "memory of one sequence", "tokens", "states", "cache of softmax layers", "all", "teacher's cache"
    )
    teacher = types.SimpleNamespace(config=copy.deepcopy(model.config), dtype=model.dtype)
    teacher.config.layers = [Softmax().to_dict()] * model.config.num_hidden_layers
    states = state_bytes(model) if mixers_of(model) else 0
    for length in lengths:
        cache = kv_bytes(model, length)
        sizes = (states, cache, states + cache, kv_bytes(teacher, length))
        table.add_row(f"{length:,}", *map(human_bytes, sizes))
    return table
