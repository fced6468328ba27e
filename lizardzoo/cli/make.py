"""`linearize` and `distill`: from a teacher to a student."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from lizardzoo.cli.base import app, err, new_folder, out, progress_bar, refuse_used_folder
from lizardzoo.cli.models import (
    Dtype,
    DtypeOption,
    is_linearized,
    load_config,
    load_model,
    load_tokenizer,
    loading,
    read_layers,
)
from lizardzoo.cli.plan import print_plan
from lizardzoo.config import layer_map
from lizardzoo.distill import distill as run_distill
from lizardzoo.distill import recipe_from
from lizardzoo.distill.processes import is_first
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.text import read_text
from lizardzoo.linearize import find_adapter
from lizardzoo.linearize import linearize as convert
from lizardzoo.streaming import ONE_FILE, check_shard_size, find_checkpoint, linearize_checkpoint, unfinished

CALIBRATION_CHARACTERS = 1 << 18  # far more than the tokens that calibration looks at


class StageName(str, Enum):
    """The stages of distillation."""

    transfer = "transfer"
    finetune = "finetune"


@app.command()
def linearize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The teacher: a folder or a Hub id.")],
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help="New folder for the student; not needed for --dry-run.")
    ] = None,
    layers: Annotated[
        str,
        typer.Option(
            "--layers",
            "-l",
            help="A preset's name for all layers (see `lizardzoo list presets`), a .json or .py file "
            "with one spec per layer, or the config.json of a linearized model.",
        ),
    ] = "recommended",
    softmax: Annotated[
        str | None,
        typer.Option("--softmax", metavar="LAYERS", help="Keep softmax in these layers, as 9,19-21."),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate",
            metavar="FILE",
            help="A text whose start the teacher reads, so that the new parameters begin near its attention "
            "(hybrids; recommended has none).",
        ),
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Largest weight file, as 5GB; by default the teacher's largest."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write nothing; show the layers, sizes, and memory to run and to train.")
    ] = False,
) -> None:
    """Replace a teacher's attention, layer by layer; distilling the student then brings it closer.

    Memory is that of one weight file: they are converted one by one. Stopped, it
    leaves OUT.unfinished, and the same command goes on with that. (--calibrate
    has to run the teacher, so it takes all of it into memory, and GGUF does.)

    \b
      lizardzoo linearize HuggingFaceTB/SmolLM2-135M-Instruct --out student
      lizardzoo linearize ./llama --softmax 9,19 --out new
      lizardzoo linearize ./llama --layers hybrid --calibrate text.txt --out new
      lizardzoo linearize ./llama --layers layers.py --out student

    A layers file is Python that sets `layers`, or the same list as JSON:

    \b
      import lizardzoo as lz
      layers = \\[lz.Hybrid(window=128)] * 30
      layers\\[9] = layers\\[19] = lz.Softmax()

    \b
      \\[{"type": "hybrid", "window": 128}, "softmax", "recommended", ...]
    """
    if folder is None and not dry_run:
        raise typer.BadParameter("name a new folder for the student (or pass --dry-run)", param_hint="--out")
    if folder is not None:
        refuse_used_folder(folder)
    config = load_config(model)
    find_adapter(config)
    specs = read_layers(layers, softmax, config.num_hidden_layers)
    if folder is None or dry_run:
        print_plan(model, config, specs, dtype.torch(), recipe_from("recommended"))
        return
    if max_shard_size is not None:
        check_shard_size(max_shard_size)
    text = None if calibrate is None else read_text(calibrate)[:CALIBRATION_CHARACTERS]
    tokenizer = _tokenizer_or_note(model, needed=text is not None)
    with loading(model):
        streams = text is None and find_checkpoint(model) is not None
    if streams:
        if unfinished(folder).is_dir():
            err.print(f"going on with {unfinished(folder)}", soft_wrap=True, markup=False, highlight=False)
        with progress_bar("files", 1) as progress:
            report = linearize_checkpoint(
                model,
                folder,
                specs,
                dtype=dtype.torch(),
                max_shard_size=max_shard_size,
                tokenizer=tokenizer,
                progress=progress,
            )
    else:
        with new_folder(folder) as made:
            with loading(model):
                student = convert(model, specs, calibrate=text, tokenizer=tokenizer, dtype=dtype.torch())
            student.save_pretrained(made, max_shard_size=max_shard_size or ONE_FILE)
            if tokenizer is not None:
                tokenizer.save_pretrained(made)
            report = student.conversion_report
    for index, mixer in layer_map(specs):
        out.print(f"{index:>7}  {escape(mixer)}", highlight=False)
    out.print(str(report))
    if report.dropped:
        out.print(f"dropped: {escape(', '.join(report.dropped))}", highlight=False)
    out.print(f"saved to {escape(str(folder))}", soft_wrap=True, highlight=False)


def _tokenizer_or_note(model: str, needed: bool) -> Any:
    """The teacher's tokenizer, which goes along; a folder without one can be linearized all the same."""
    try:
        return load_tokenizer(model)
    except LizardzooError as error:
        if needed:
            raise
        err.print(f"note: no tokenizer goes along: {error}", soft_wrap=True, markup=False, highlight=False)
        return None


@app.command()
def distill(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="The student: a folder written by `lizardzoo linearize`.")
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            "-d",
            help=".txt or .jsonl file (also .gz); give it again for more files. Or one name of a data set "
            "on the Hub, as org/name:split.",
        ),
    ],
    folder: Annotated[Path, typer.Option("--out", "-o", help="New folder for the run, or the one to resume.")],
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            "-r",
            help="A recipe's name (see `lizardzoo list recipes`), a .json file with one, or the recipe.json of a run.",
        ),
    ] = "recommended",
    teacher: Annotated[
        str | None,
        typer.Option(
            help="The teacher of stage 2; by default the student's own base weights, which are the teacher's."
        ),
    ] = None,
    stages: Annotated[
        list[StageName] | None,
        typer.Option(
            "--stage", help="Only this stage; by default both in turn, as far as there is something to train."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    micro_batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences per forward pass, where a batch does not fit in memory."),
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between checkpoints; by default a tenth of a stage.")
    ] = None,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="Share the frozen weights out among the processes (FSDP2); see below."),
    ] = False,
    dtype: DtypeOption = Dtype.auto,
) -> None:
    """Train a student on its teacher: each layer by itself (transfer), then the whole (finetune).

    Where the mixers have no parameters of their own (recommended, heavy, window), the
    first has nothing to train and is left out, which is said.

    \b
      lizardzoo distill student --data a.txt --data b.jsonl --out runs/first
      lizardzoo distill student --data a.txt --recipe lizard --out runs/paper

    --out then holds the models transfer/ and final/, log.jsonl, loss.png and
    layer_error.png. While a stage runs it also holds checkpoints: after an
    interruption the same command with --resume goes on from the last one.

    On several GPUs, each of which takes its part of every batch; --shard where
    the frozen weights do not fit on one:

    \b
      torchrun --nproc-per-node 2 -m lizardzoo.cli distill student \\
          --data a.txt --out runs/first --shard
    """
    if not resume:
        refuse_used_folder(folder)
    chosen = recipe_from(_read_recipe(recipe) if recipe.endswith(".json") else recipe)
    if not is_linearized(load_config(model)):
        raise LizardzooError(f"{model!r} is not linearized; run `lizardzoo linearize {model} --out FOLDER` first")
    tokenizer = load_tokenizer(model, teacher)
    student = load_model(model, dtype, device="cpu")  # training moves it to where it runs
    run_distill(
        student,
        tokenizer=tokenizer,
        data=data[0] if len(data) == 1 else [Path(name) for name in data],
        recipe=chosen,
        teacher=None if teacher is None else load_model(teacher, dtype, device="cpu"),
        output_dir=folder,
        resume=resume,
        stages=[stage.value for stage in stages] if stages else None,
        gradient_checkpointing=gradient_checkpointing,
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
        shard=shard,
    )
    if not is_first():  # all have taken part; one speaks
        return
    for name in ("transfer", "final", "log.jsonl", "loss.png", "layer_error.png"):
        if (folder / name).exists():
            out.print(f"wrote {escape(str(folder / name))}", soft_wrap=True, highlight=False)


def _read_recipe(path: str) -> Any:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return values["recipe"] if isinstance(values, dict) and "recipe" in values else values  # of a run, or a recipe
    except FileNotFoundError as error:
        raise LizardzooError(f"there is no recipe file {path!r}; give its path, or the name of a recipe") from error
    except ValueError as error:  # of JSON and of UTF-8
        raise LizardzooError(f"the recipe file {path} is not JSON ({error})") from error
