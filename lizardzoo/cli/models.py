"""Models, tokenizers and layer lists, from what a person writes on a command line."""

from __future__ import annotations

import json
import runpy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from lizardzoo.cli.base import err, one_line
from lizardzoo.config import MixerSpec, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.loading import from_pretrained, load_teacher, read_config, read_tokenizer
from lizardzoo.mixers.softmax import Softmax


class Dtype(str, Enum):
    """Weights in this type; auto is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    def torch(self) -> torch.dtype | None:
        """None for auto."""
        return None if self is Dtype.auto else getattr(torch, self.value)


DtypeOption = Annotated[Dtype, typer.Option(help="Type of the weights; auto: the checkpoint's own.")]
DeviceOption = Annotated[str, typer.Option(help="Such as cpu or cuda:1; auto: a GPU where there is one.")]


@contextmanager
def loading(name: str) -> Iterator[None]:
    """A spinner; what transformers raises for a model that is missing or broken becomes one sentence."""
    try:
        with err.status(f"loading {name}"):
            yield
    except LizardzooError:
        raise
    except (OSError, ValueError) as error:
        raise LizardzooError(f"cannot load {name!r}: {one_line(error)}") from error


def load_config(name: str) -> Any:
    """The config of a model, linearized or not."""
    with loading(name):
        return read_config(name)


def load_model(name: str, dtype: Dtype = Dtype.auto, device: str = "auto") -> Any:
    """A model for use: a linearized one strictly, any other by transformers alone."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise LizardzooError(f"unknown device {device!r}; name one such as cpu, cuda or cuda:1") from error
    linearized = is_linearized(load_config(name))
    with loading(name):
        load = from_pretrained if linearized else load_teacher
        return load(name, dtype=dtype.torch() or "auto").to(place).eval()


def load_tokenizer(name: str, teacher: str | None = None) -> Any:
    """The tokenizer beside a model; where there is none, its teacher's."""
    with loading(name):
        try:
            return read_tokenizer(name, teacher)
        except (OSError, ValueError) as error:
            if isinstance(error, LizardzooError) or not (Path(name) / "config.json").is_file():
                raise
            raise LizardzooError(
                f"no tokenizer can be read beside the model in {name!r} ({one_line(error)}); save its teacher's "
                f"there: AutoTokenizer.from_pretrained(teacher).save_pretrained({name!r})"
            ) from error


def is_linearized(config: Any) -> bool:
    """Whether a config is one of lizardzoo's."""
    return hasattr(config, "specs")


def read_layers(layers: str, softmax: str | None, num_layers: int) -> list[MixerSpec]:
    """One spec per layer from `--layers` (a preset's name, a .json or .py file) and `--softmax` (9,19-21)."""
    given: Any = layers
    path = Path(layers)
    if path.suffix in (".json", ".py"):
        if not path.is_file():
            raise LizardzooError(f"there is no layers file {layers!r}; give its path, or the name of a preset")
        given = _read_json(path) if path.suffix == ".json" else _run_python(path)
        if isinstance(given, Mapping) and "layers" in given and "type" not in given:  # a linearized model's config.json
            given = given["layers"]
    specs = resolve_layers(given, num_layers)
    for index in _read_indices(softmax or "", num_layers):
        specs[index] = Softmax()
    return specs


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON and of UTF-8
        raise LizardzooError(f"the layers file {path} is not JSON ({error}); write a list of specs") from error


def _run_python(path: Path) -> Any:
    names = runpy.run_path(str(path))
    if "layers" not in names:
        raise LizardzooError(f"the layers file {path} defines no `layers`; set it to a list with one spec per layer")
    return names["layers"]


def _read_indices(text: str, num_layers: int) -> list[int]:
    """0-based layers out of "9,19-21"."""
    indices: list[int] = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise LizardzooError(f"--softmax {text!r} is not a list of layers; write it as 9,19-21")
        indices += range(int(first), int(last if dash else first) + 1)
    if wrong := [index for index in indices if index >= num_layers]:
        raise LizardzooError(f"--softmax names layer {wrong[0]}, but the model's layers are 0 to {num_layers - 1}")
    return indices
