"""Conversion of a checkpoint too large for memory: shard by shard from disk to disk, and on from where it stopped.

Nothing of the teacher is computed with, so nothing of it has to be whole: every parameter is copied, or is a mixer's
and has its start value. The files are those that `linearize` and `save_pretrained` would write.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from lizardzoo.adapters import is_new_parameter
from lizardzoo.config import SpecLike, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.weights import shard_names
from lizardzoo.linearize import ConversionReport, convert_config, find_adapter
from lizardzoo.loading import progress_bars, read_config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PATTERNS = ["config.json", "generation_config.json", INDEX, "model*.safetensors"]
MANIFEST = "conversion.json"
OTHERS = "others"
"""Of an unfinished folder: what is not weights, so that nobody takes it for a model."""
ONE_FILE = 50 * 10**9
"""Bytes up to which `save_pretrained` writes one file."""


@dataclass
class Checkpoint:
    """A teacher on disk, in safetensors."""

    folder: Path
    files: dict[str, str]
    """The file of each parameter."""

    @property
    def largest(self) -> int:
        """Bytes of its largest file."""
        return max((self.folder / name).stat().st_size for name in set(self.files.values()))


@dataclass
class Plan:
    """What a conversion will write."""

    student: Any
    """The linearized model without its weights (on the meta device)."""
    report: ConversionReport
    shards: dict[str, list[str]]
    """Parameters by file."""
    index: dict[str, Any] | None
    """What the index file will hold; None for a single file."""


def linearize_checkpoint(
    source: str | Path,
    folder: str | Path,
    layers: SpecLike | Sequence[SpecLike] = "recommended",
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConversionReport:
    """Convert a safetensors checkpoint on disk, one file of the result in memory at a time.

    Until all is there, it is in `<folder>.unfinished`; the same call goes on with what that holds.

    Args:
        source: a folder or a Hub id (whose files are downloaded first).
        folder: where the student is written: new or empty.
        layers, dtype: as for `lizardzoo.linearize`.
        max_shard_size: bytes of a file, or "5GB"; by default as the teacher's largest, or 50 GB where it is one file.
        tokenizer: goes along.
        progress: is told (files done, files in all).

    Raises:
        LizardzooError: as `lizardzoo.linearize`; a checkpoint that is not in safetensors, or is quantized, or whose
            parameters are not named as the model's; an unfinished folder that was begun with something else.
    """
    target = Path(folder)
    if isinstance(max_shard_size, str):
        check_shard_size(max_shard_size)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise LizardzooError(f"{target} is not an empty folder; name a new one")
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise LizardzooError(
            f"{source} holds no {WEIGHTS} (nor shards with an index); convert it in memory with lizardzoo.linearize"
        )
    plan = plan_conversion(source, checkpoint, layers, dtype=dtype, max_shard_size=max_shard_size)
    part = unfinished(target)
    _begin(part, plan, _manifest(checkpoint, plan))
    if tokenizer is not None:
        tokenizer.save_pretrained(part / OTHERS)
    for done, name in enumerate(plan.shards):
        if progress is not None:
            progress(done, len(plan.shards))
        if not _is_whole(part / name, plan.shards[name]):
            _write_shard(part / name, plan, name, checkpoint)
    if progress is not None:
        progress(len(plan.shards), len(plan.shards))
    _finish(part, target, plan)
    return plan.report


def find_checkpoint(source: str | Path) -> Checkpoint | None:
    """The safetensors files of a folder or a Hub id; None where it has none (a GGUF file, PyTorch's own format)."""
    folder = Path(source)
    if folder.is_file():
        return None
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), allow_patterns=PATTERNS))
    if (folder / INDEX).is_file():
        shard_names(folder / INDEX, source)  # of a stranger: each is a file of the folder itself
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    elif (folder / WEIGHTS).is_file():
        with _readable(folder / WEIGHTS) as file:
            files = dict.fromkeys(file.keys(), WEIGHTS)
    else:
        return None
    if missing := sorted({name for name in files.values() if not (folder / name).is_file()}):
        raise LizardzooError(f"{folder} lacks {missing[0]}, which its index names; download the checkpoint again")
    return Checkpoint(folder, files)


def plan_conversion(
    source: str | Path,
    checkpoint: Checkpoint,
    layers: SpecLike | Sequence[SpecLike],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | str | None = None,
) -> Plan:
    """What `linearize_checkpoint` will write; reads headers, no weights."""
    config = read_config(source)
    if getattr(config, "quantization_config", None) is not None:
        raise LizardzooError(
            f"the weights of {source} are quantized; load them dequantized with transformers, "
            f"and convert that model with lizardzoo.linearize"
        )
    student = empty_student(config, layers, dtype or config.dtype or _first_dtype(checkpoint))
    student.generation_config = _generation_config(checkpoint.folder)
    saved = _saved_parameters(student)
    report = _compare(source, checkpoint, student, saved)
    if max_shard_size is None:
        max_shard_size = ONE_FILE if set(checkpoint.files.values()) == {WEIGHTS} else checkpoint.largest
    split = split_torch_state_dict_into_shards(
        saved, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    index = None
    if split.is_sharded:
        metadata = {"total_parameters": student.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
    return Plan(student, report, split.filename_to_tensors, index)


def empty_student(config: Any, layers: SpecLike | Sequence[SpecLike], dtype: torch.dtype) -> Any:
    """The linearized model of a teacher's config, without weights (on the meta device)."""
    adapter = find_adapter(config)
    specs = [spec.to_dict() for spec in resolve_layers(layers, config.num_hidden_layers)]
    with torch.device("meta"):
        student = adapter._from_config(convert_config(config, adapter, specs), dtype=dtype)
    student.tie_weights()
    return student


def check_shard_size(size: str) -> None:
    """Raise unless transformers would understand it."""
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=size)
    except ValueError as error:
        raise LizardzooError(f"max_shard_size {size!r} is not a size; write it as 5GB or 500MB") from error


def unfinished(folder: Path) -> Path:
    """Where a conversion into `folder` is, until it is done."""
    return folder.absolute().with_name(f"{folder.name}.unfinished")


def _saved_parameters(student: Any) -> dict[str, Tensor]:
    """What `save_pretrained` writes, in its order: of tied weights the first."""
    every = dict(student.named_parameters(remove_duplicate=False))
    tied = every.keys() - dict(student.named_parameters()).keys()
    return {name: tensor for name, tensor in student.state_dict().items() if name not in tied}


def _compare(source: str | Path, checkpoint: Checkpoint, student: Any, saved: Mapping[str, Tensor]) -> ConversionReport:
    """What becomes of each parameter; one that is missing or has another shape raises."""
    every = student.state_dict()
    report = ConversionReport(
        new=[name for name in every if is_new_parameter(name)],
        kept=[name for name in every if not is_new_parameter(name)],
        dropped=[name for name in checkpoint.files if name not in every],
    )
    copied = [name for name in saved if not is_new_parameter(name)]
    if missing := [name for name in copied if name not in checkpoint.files]:
        raise LizardzooError(
            f"the checkpoint {source} lacks {len(missing)} of the model's parameters (first: {missing[0]}), or names "
            f"them otherwise; download it again, or convert it in memory with lizardzoo.linearize"
        )
    with ExitStack() as stack:
        files = {n: stack.enter_context(_readable(checkpoint.folder / n)) for n in set(checkpoint.files.values())}
        for name in copied:
            shape = _slice(files, checkpoint, name).get_shape()
            if shape != list(saved[name].shape):
                raise LizardzooError(
                    f"{name} in the checkpoint {source} has the shape {shape}, but its config says "
                    f"{list(saved[name].shape)}; correct the config, or download the checkpoint again"
                )
    return report


def _slice(files: Mapping[str, Any], checkpoint: Checkpoint, name: str) -> Any:
    try:
        return files[checkpoint.files[name]].get_slice(name)
    except SafetensorError as error:
        file = checkpoint.folder / checkpoint.files[name]
        raise LizardzooError(f"{file} lacks {name}, which the index says it holds; download it again") from error


def _first_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Of the first weight: what transformers takes where a config does not say."""
    name, file = next(iter(checkpoint.files.items()))
    with _readable(checkpoint.folder / file) as opened:
        return opened.get_tensor(name).dtype


def _generation_config(folder: Path) -> Any:
    """The teacher's, which transformers reads from its config where it has no file of its own."""
    with _valid_generation_config():
        if (folder / "generation_config.json").is_file():
            return GenerationConfig.from_pretrained(folder)
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


@contextmanager
def _valid_generation_config() -> Iterator[None]:
    """transformers looks at some values when it reads them, at others when it saves."""
    try:
        yield
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise LizardzooError(
            f"the teacher's generation_config.json is not valid ({reason}); correct it, or delete it"
        ) from error


def _manifest(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What decides the files, so that a conversion only goes on with its own."""
    digest = hashlib.sha256()
    for name in sorted(set(checkpoint.files.values())):
        path = checkpoint.folder / name
        size = path.stat().st_size
        digest.update(f"{name} {size} ".encode())
        with path.open("rb") as file:  # the header, and 64 pieces of the weights: enough to tell checkpoints apart
            for start in range(0, size, max(1, size // 64)):
                file.seek(start)
                digest.update(file.read(4096))
    config = copy.deepcopy(plan.student.config)
    config._name_or_path = ""
    return {
        "teacher": digest.hexdigest(),
        "config": json.loads(config.to_json_string(use_diff=False)),
        "files": plan.shards,
    }


def _begin(part: Path, plan: Plan, manifest: dict[str, Any]) -> None:
    """An unfinished folder of this conversion: new, with all but the weights; or what is there of it."""
    path = part / MANIFEST
    if part.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = None
        if before != json.loads(json.dumps(manifest)):
            raise LizardzooError(
                f"{part} was begun with another teacher, other layers or another dtype; "
                f"finish it with those, or delete it to begin anew"
            )
        return
    made = part.with_name(f".{part.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        with progress_bars(False), _valid_generation_config():
            plan.student.save_pretrained(made / OTHERS, state_dict={})  # no weights
        (made / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        made.rename(part)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_whole(path: Path, names: Sequence[str]) -> bool:
    """Whether a file of the result is there; safetensors checks that it is as long as its header says."""
    if not path.is_file():
        return False
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys()) == set(names)
    except SafetensorError:
        return False


def _write_shard(path: Path, plan: Plan, name: str, checkpoint: Checkpoint) -> None:
    """One file: kept parameters from the teacher's files, cast if need be, and new ones at their start values."""
    target = plan.student.state_dict()
    tensors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        sources = {checkpoint.files[key] for key in plan.shards[name] if key in checkpoint.files}
        files = {file: stack.enter_context(_readable(checkpoint.folder / file)) for file in sources}
        for key in plan.shards[name]:
            if is_new_parameter(key):
                tensors[key] = _start_value(plan.student, key)
            else:
                tensors[key] = files[checkpoint.files[key]].get_tensor(key).to(target[key].dtype)
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, metadata={"format": "pt"})
    partial.replace(path)


def _start_value(student: Any, name: str) -> Tensor:
    """A new parameter at its start; one mixer has weights at a time."""
    prefix, _, own = name.partition(".self_attn.mixer.")
    mixer = copy.deepcopy(student.get_submodule(f"{prefix}.self_attn.mixer")).to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # where a plug-in's start is random, a file written again must be the same
        mixer.reset_parameters()
    return mixer.get_parameter(own).detach()


def _finish(part: Path, target: Path, plan: Plan) -> None:
    """The other files beside the weights, the index after them, and last the folder's own name."""
    if (part / OTHERS).is_dir():
        for path in (part / OTHERS).iterdir():
            path.replace(part / path.name)
        (part / OTHERS).rmdir()
    if plan.index is not None:
        content = json.dumps(plan.index, indent=2, sort_keys=True) + "\n"  # as save_pretrained writes it
        (part / INDEX).write_text(content, encoding="utf-8")
    for path in part.iterdir():
        if path.name.endswith(".partial") or path.name == MANIFEST:
            path.unlink()
    if target.is_dir():
        target.rmdir()
    part.rename(target)


@contextmanager
def _readable(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as error:
        raise LizardzooError(f"{path} is damaged or cut short ({error}); download or save it again") from error
