"""Distillation: stage 1 (transfer) teaches each mixer its layer's attention, stage 2 (finetune) the student.

Importing this package imports neither accelerate nor peft nor datasets: that happens when `distill` runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lizardzoo.distill.data import Source, load_data
from lizardzoo.distill.recipe import RECIPES, Finetune, Recipe, Stage, recipe_from, register_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "RECIPES",
    "Finetune",
    "Recipe",
    "Stage",
    "distill",
    "load_data",
    "recipe_from",
    "register_recipe",
]


def distill(
    model: Any,
    *,
    tokenizer: PreTrainedTokenizerBase,
    data: Source,
    recipe: str | Recipe | Mapping[str, Any] = "recommended",
    teacher: PreTrainedModel | str | Path | None = None,
    output_dir: str | Path,
    resume: bool = False,
    stages: Sequence[str] | None = None,
    progress: bool = True,
    gradient_checkpointing: bool = False,
    micro_batch_size: int | None = None,
    checkpoint_every: int | None = None,
    shard: bool = False,
) -> Any:
    """Train a linearized model to do what its teacher does, in place.

    Both stages, one after the other. Stage 1 trains what the mixers have of their own: where none has a parameter
    (`Heavy`, a bare `Window`) it is left out, which is said beside the progress bars and in `recipe.json`.

    `output_dir` gets `transfer/` and `final/` (model and tokenizer after each stage), `log.jsonl` (a line per
    step), `loss.png`, `layer_error.png`, `recipe.json` (what decides the result), `training.json` (seconds, device,
    files of data, versions), and while a stage runs its checkpoints: what trains, the optimizer, the schedule and
    the state of the random numbers. A run that was interrupted goes on with `resume`, and its losses are those of
    one that was not.

    Args:
        model: what `lizardzoo.linearize` returns. Stage 1 needs its projections as the teacher has them.
        tokenizer: the teacher's; needs an EOS token.
        data: text; see `lizardzoo.distill.load_data` for all the forms it may have.
        recipe: a name (see `RECIPES`), a `Recipe` or its dict.
        teacher: for stage 2's KL: a model, its id or folder. None: the model's own base weights with softmax
            attention, which are the teacher until stage 2 has been merged into them.
        output_dir: an empty or new folder, or the one to resume.
        resume: go on with the run in `output_dir` (from its beginning, if it holds none). The model is to be
            given as it was at the start; another recipe, data, model or teacher is refused.
        stages: "transfer", "finetune" or both. None: both, as far as there is something to train.
        progress: show progress bars, and say which stage is left out.
        gradient_checkpointing: recompute stage 2's activations in the backward pass: less memory, a third more
            time. Stage 1 holds the activations of one layer at a time as it is.
        micro_batch_size: sequences per forward pass, where a recipe's batch does not fit in memory.
        checkpoint_every: steps between checkpoints; a tenth of the stage unless given.
        shard: each process keeps its part of the frozen weights on its device (FSDP2) and gathers a layer while
            it computes, instead of keeping all of them; for several processes, and models given on the CPU.

    Started by torchrun or accelerate launch, every process calls it with the same arguments and takes its part of
    each batch. The losses are those of one process with the same `micro_batch_size`, up to rounding, and a run may
    be resumed with another number of processes. The first process writes.

    Returns:
        The model that was given, trained, LoRA merged into its projections; mixers stay fp32. On the CPU with
        `shard`, else where it was trained.

    Raises:
        LizardzooError: wrong input, before anything is written, also a "transfer" that is asked for where it has
            nothing to train; its subclass `NonFiniteError` when a loss or
            gradient is not finite: it names the step, the layer and the last good checkpoint.
    """
    from lizardzoo.distill.run import run

    return run(
        model,
        tokenizer=tokenizer,
        data=data,
        recipe=recipe_from(recipe),
        teacher=teacher,
        folder=Path(output_dir),
        resume=resume,
        stages=stages,
        progress=progress,
        gradient_checkpointing=gradient_checkpointing,
        micro_batch_size=micro_batch_size,
        checkpoint_every=checkpoint_every,
        shard=shard,
    )
