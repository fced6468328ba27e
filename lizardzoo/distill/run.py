"""One run of `lizardzoo.distill`: check everything, note what is being done, do the stages, save and plot."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm.auto import tqdm

from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill.data import fingerprint, load_data, names_of
from lizardzoo.distill.processes import check_shard, device_name, start
from lizardzoo.distill.recipe import Recipe
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.training import FACTS, TRAINING, package_version
from lizardzoo.loading import progress_bars

if TYPE_CHECKING:
    from datasets import Dataset

FOLDERS = {"transfer": "transfer", "finetune": "final"}
"""Stages in their order, and where each one's model is saved."""
MANIFEST = "recipe.json"
NOTHING_TO_TRANSFER = "the mixers have no parameters of their own, so the stage transfer has nothing to train"


def run(
    model: Any,
    *,
    tokenizer: Any,
    data: Any,
    recipe: Recipe,
    teacher: Any,
    folder: Path,
    resume: bool,
    stages: Sequence[str] | None,
    progress: bool,
    gradient_checkpointing: bool,
    micro_batch_size: int | None,
    checkpoint_every: int | None,
    shard: bool,
) -> Any:
    """See `lizardzoo.distill`."""
    _check_packages()
    _check_student(model)
    left_out = stages is None and not _learns(model)
    stages = _check_stages(stages, model)
    if shard:
        check_shard(model)
    _check_folder(folder, resume)
    from lizardzoo.distill.lora import check_targets
    from lizardzoo.distill.plots import plot
    from lizardzoo.distill.trainer import StepLog, last_checkpoint, training_arguments

    processes = start()
    if "finetune" in stages:
        check_targets(model, recipe.finetune)
        teacher = _load_teacher(teacher, model)
        if shard and teacher is not None:
            check_shard(teacher)
    datasets = _load(data, tokenizer, recipe, stages)
    arguments = {
        name: training_arguments(
            getattr(recipe, name),
            folder / "checkpoints" / name,
            steps=getattr(recipe, name).total_steps(len(datasets[name])),
            seed=recipe.seed,
            micro_batch_size=micro_batch_size,
            checkpoint_every=checkpoint_every,
        )
        for name in stages
    }
    finished = _finished(folder, stages)
    manifest = _checked_manifest(folder, _manifest(model, recipe, datasets, teacher))
    processes.wait_for_everyone()  # all have looked into the folder
    if processes.is_main_process:
        _write_manifest(folder, manifest)
    processes.wait_for_everyone()

    if left_out and progress and processes.is_main_process:
        tqdm.write(f"{NOTHING_TO_TRANSFER}: it is left out", file=sys.stderr)
    with progress_bars(progress):
        if finished:
            _load_weights(model, folder / FOLDERS[finished[-1]])
        for name in stages:
            if name in finished:
                continue
            log = StepLog(name, folder / "log.jsonl", progress)
            packed, given = datasets[name], arguments[name]
            went_on, begun = last_checkpoint(Path(given.output_dir)) is not None, time.monotonic()
            try:
                if name == "transfer":
                    from lizardzoo.distill.transfer import transfer

                    transfer(model, recipe.transfer, packed, given, log, shard=shard)
                else:
                    from lizardzoo.distill.finetune import finetune

                    checkpointing = {"gradient_checkpointing": gradient_checkpointing}
                    finetune(model, recipe.finetune, packed, given, log, teacher=teacher, shard=shard, **checkpointing)
            finally:
                if processes.is_main_process:
                    plot(folder)
            seconds = None if went_on else round(time.monotonic() - begun, 1)
            if processes.is_main_process:
                _note(folder, name, _facts(seconds, given.device, processes.num_processes, micro_batch_size, data))
                _save(model, tokenizer, folder / FOLDERS[name])
                _remove_checkpoints(Path(given.output_dir))
            processes.wait_for_everyone()
    return model


def _check_packages() -> None:
    missing = [n for n in ("accelerate", "peft", "datasets", "matplotlib") if importlib.util.find_spec(n) is None]
    if missing:
        raise LizardzooError(f"training needs the package {missing[0]}; pip install 'lizardzoo[train]'")


def _check_stages(stages: Sequence[str] | None, model: Any) -> list[str]:
    """The stages to run, in their order; None: those in which something trains."""
    if stages is None:
        stages = list(FOLDERS) if _learns(model) else ["finetune"]
    if isinstance(stages, str) or not stages or not set(stages) <= set(FOLDERS):
        raise LizardzooError(
            f"stages={stages!r}: expected a list of {' and '.join(map(repr, FOLDERS))}, or one of them"
        )
    if "transfer" in stages and not _learns(model):
        raise LizardzooError(f'{NOTHING_TO_TRANSFER}; pass stages=["finetune"], or leave stages out')
    return [name for name in FOLDERS if name in stages]


def _learns(model: Any) -> bool:
    """Whether there is anything to train in stage 1."""
    return any(is_new_parameter(name) for name, _ in model.named_parameters())


def _check_student(model: Any) -> None:
    if not hasattr(model, "mixers"):
        raise LizardzooError(f"a {type(model).__name__} is not linearized; make a student with lizardzoo.linearize")
    if not model.mixers():
        raise LizardzooError("every layer keeps its softmax attention: there is nothing to distil; choose other layers")


def _check_folder(folder: Path, resume: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise LizardzooError(f"output_dir {folder} is a file; choose a new folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not resume:
        raise LizardzooError(
            f"output_dir {folder} is not empty; choose a new folder, or pass resume=True to go on with it"
        )
    if not (folder / MANIFEST).is_file():
        raise LizardzooError(
            f"output_dir {folder} holds no {MANIFEST}, so there is no run to resume; choose a new folder"
        )


def _finished(folder: Path, stages: Sequence[str]) -> list[str]:
    """The stages whose model is there, up to the last one that is wanted."""
    order = list(FOLDERS)[: list(FOLDERS).index(stages[-1]) + 1]
    finished = [name for name in order if (folder / FOLDERS[name]).is_dir()]
    if finished == ["finetune"] and "transfer" in stages:
        raise LizardzooError(
            f"{folder} holds a finished finetune without a transfer before it, which cannot be added now; "
            f"choose a new output_dir"
        )
    return finished


def _load(data: Any, tokenizer: Any, recipe: Recipe, stages: Sequence[str]) -> dict[str, Dataset]:
    """Each stage's sequences; packed once where both want the same length."""
    packed: dict[int, Dataset] = {}
    for name in stages:
        stage = getattr(recipe, name)
        length = stage.sequence_length
        if length not in packed:
            packed[length] = load_data(
                data,
                tokenizer,
                length,
                isolate_documents=recipe.isolate_documents,
                mixing=recipe.mixing,
                seed=recipe.seed,
            )
        if len(packed[length]) < stage.batch_size:
            raise LizardzooError(
                f"the data give {len(packed[length])} sequences of {length} tokens, fewer than one batch of "
                f"{stage.batch_size} ({name}); give more text, or a smaller batch_size or sequence_length"
            )
    return {name: packed[getattr(recipe, name).sequence_length] for name in stages}


def _load_teacher(teacher: Any, model: Any) -> Any:
    if isinstance(teacher, (str, Path)):
        from transformers import AutoModelForCausalLM

        teacher = AutoModelForCausalLM.from_pretrained(str(teacher), dtype="auto")
    if teacher is not None and teacher.config.vocab_size != model.config.vocab_size:
        raise LizardzooError(
            f"the teacher has {teacher.config.vocab_size} words and the student {model.config.vocab_size}: "
            f"their logits cannot be compared; give the model that the student was made from"
        )
    return teacher


def _manifest(model: Any, recipe: Recipe, datasets: Mapping[str, Dataset], teacher: Any) -> dict[str, Any]:
    """What a run depends on; all of it must be the same to resume it exactly.

    "left out" follows from the model alone, not from the stages that were asked for: a resumed run has the same.
    """
    return {
        "recipe": recipe.to_dict(),
        "data": {name: fingerprint(dataset) for name, dataset in datasets.items()},
        "model": {"layers": model.config.layers, "weights": _weights_fingerprint(model)},
        "teacher": "its own base" if teacher is None else _weights_fingerprint(teacher),
        **({} if _learns(model) else {"left out": {"transfer": NOTHING_TO_TRANSFER}}),
    }


def _weights_fingerprint(model: nn.Module) -> str:
    """A hash of up to 64 numbers from every old weight: cheap, and enough to tell models apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if not is_new_parameter(name):
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 64)][:64]
            digest.update(f"{name} {list(parameter.shape)} ".encode() + values.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _checked_manifest(folder: Path, manifest: dict[str, Any]) -> dict[str, Any]:
    """What is to be written; raises where the folder's is another run's."""
    path = folder / MANIFEST
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(manifest))
        differing = list(_differences(before, now))
        if differing:
            raise LizardzooError(
                f"{folder} was started with another {', '.join(differing[:4])}"
                f"{' ...' if differing[4:] else ''}; resume with what {path} says, or choose a new output_dir"
            )
        manifest["data"] = before["data"] | manifest["data"]
    return manifest


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / MANIFEST, manifest)


def _facts(seconds: float | None, device: Any, processes: int, micro: int | None, data: Any) -> dict[str, Any]:
    """How a stage was run: what its recipe does not decide, and a card tells."""
    versions = {name: package_version(name) for name in ("lizardzoo", "torch", "transformers", "peft")}
    told = (seconds, device_name(device), processes, micro, names_of(data), versions)
    return dict(zip(FACTS, told, strict=True))


def _note(folder: Path, stage: str, facts: dict[str, Any]) -> None:
    path = folder / TRAINING
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    _write_json(path, {**before, stage: facts})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """Beside, then in its place."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def _differences(before: Any, now: Any, name: str = "") -> Any:
    """Paths of what differs: "recipe.finetune.steps (250, now 300)". Data of stages not run before cannot."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in before.keys() | now.keys() if name != "data" else before.keys() & now.keys():
            yield from _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif before != now:
        short = all(isinstance(value, (int, float, bool)) for value in (before, now))
        yield f"{name} ({before}, now {now})" if short else name


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Save under another name, then rename: what has the name is whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def _remove_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # another stage's are still there
        folder.parent.rmdir()


def _load_weights(model: Any, folder: Path) -> None:
    from lizardzoo.loading import from_pretrained

    saved = from_pretrained(folder)
    model.load_state_dict(saved.state_dict())
    model.low_rank_updates = saved.low_rank_updates
