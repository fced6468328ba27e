"""Models as they lie in a folder, on the Hub or in a GGUF file: configs, tokenizers, teachers, linearized models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedConfig
from transformers.utils import logging

from lizardzoo.adapters import ADAPTERS
from lizardzoo.adapters.bases import place_of
from lizardzoo.adapters.fit import refuse_misfit
from lizardzoo.adapters.limits import clear_errors
from lizardzoo.config import LINEARIZED
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.difference import difference_of
from lizardzoo.hub.weights import check_object, find_file, pinned, where

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


def from_pretrained(name_or_path: str | Path, **kwargs: Any) -> Any:
    """Load a linearized model, with exactly the parameters that its config asks for.

    Also a difference (`model.save_difference`), together with its base, which is fetched or built where the difference
    says so. Only safetensors are read, and no code of a repository is ever run.

    Args:
        name_or_path: a folder, or a name on the Hub.
        **kwargs: `base`, where a difference's base is, if not where it says: a folder or a Hub id. All others are for
            transformers' `from_pretrained`: dtype, device_map, revision, token, local_files_only, ...

    Returns:
        The model, in eval mode; new parameters are fp32 whatever the dtype.

    Raises:
        LizardzooError: the checkpoint is not a linearized one, its config describes no model, its weights are pickled,
            damaged or unfinished, or its parameters are not exactly the model's, before anything is allocated; the base
            is not the very one that the difference was made to; or the `attn_implementation` is not installed.
        OSError: there is no such folder or repository, or it cannot be reached (as transformers').
    """
    if kwargs.pop("trust_remote_code", False):
        raise LizardzooError(
            "trust_remote_code=True: lizardzoo.from_pretrained runs no code of a repository; leave it out"
        )
    source, file = _place(name_or_path)
    if file:
        raise LizardzooError(
            f"{name_or_path} is a GGUF file, which holds no linearized model; "
            f"make one with lizardzoo.linearize({str(name_or_path)!r})"
        )
    look = pinned(source, **where(kwargs))
    check_object(source, "config.json", **look)
    with clear_errors():
        fields, _ = PreTrainedConfig.get_config_dict(source, **look)
    family = linearized_family(fields)
    if family is None:
        raise LizardzooError(
            f"{source} holds a plain {fields.get('model_type')!r} model, not a linearized one; "
            f"make one with lizardzoo.linearize({source!r})"
        )
    with _readable_weights(name_or_path), _usable_attention(kwargs.get("attn_implementation")):
        model, info = ADAPTERS.get(family).from_pretrained(source, output_loading_info=True, **(kwargs | look))
    refuse_misfit(
        source,
        missing=info["missing_keys"],
        unexpected=info["unexpected_keys"],
        reshaped=info.get("mismatched_keys", ()),
    )
    return model


def load_teacher(source: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """A causal LM from a folder, the Hub or a GGUF file (whose weights become plain ones), with all its parameters."""
    return load_whole(source, dtype)[0]


def load_whole(source: str | Path, dtype: torch.dtype | str) -> tuple[Any, list[str]]:
    """The same, and the names of what the checkpoint holds beside them."""
    place, file = _place(source)
    if file:
        file["quantization_config"] = GgufConfig(dequantize=True)  # kernels for quantized weights are not looked for
    with _readable_weights(source):
        model, info = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, output_loading_info=True, **file)
    if missing := sorted(info["missing_keys"]):  # transformers has made them up
        raise LizardzooError(
            f"the checkpoint {source} lacks {len(missing)} of its parameters (first: {missing[0]}); "
            f"download or save it again"
        )
    if file:
        model.config._name_or_path = str(source)  # there it is the title inside the file
    return model, sorted(info["unexpected_keys"])


def read_config(source: str | Path, **look: Any) -> PreTrainedConfig:
    """The config of a model, linearized or not; `look` says where to look, see `lizardzoo.hub.weights.where`.

    Raises:
        LizardzooError: the config.json of a linearized model describes none; nothing was imported for it then.
    """
    place, file = _place(source)
    if not file:
        fields, _ = PreTrainedConfig.get_config_dict(place, **look)
        if (family := linearized_family(fields)) is not None:
            return ADAPTERS.get(family).config_class.from_dict(fields, name_or_path=place)
    with _readable_weights(source):
        return AutoConfig.from_pretrained(place, trust_remote_code=False, **file, **look)


def linearized_family(config: PreTrainedConfig | Mapping[str, Any]) -> str | None:
    """The `model_type` of the teacher of a linearized config, None for any other; loads no plug-in."""
    model_type = config.get("model_type") if isinstance(config, Mapping) else config.model_type
    return next((name for name in ADAPTERS if LINEARIZED + name == model_type), None)


def read_tokenizer(source: str | Path, teacher: str | Path | None = None) -> Any:
    """The tokenizer beside a model, or in its GGUF file. Where there is none, a difference takes its base's, any other
    student that of its `teacher`, if one is named."""
    place, look = _place(source)
    if not look and not any(find_file(place, name) for name in TOKENIZER_FILES):
        fields, _ = PreTrainedConfig.get_config_dict(place)
        base = difference_of(fields)
        if base is not None:
            place, look = place_of(base, None, {})
        elif teacher is not None:
            return read_tokenizer(teacher)
    return AutoTokenizer.from_pretrained(place, **look)


def _place(source: str | Path) -> tuple[str, dict[str, Any]]:
    """Where transformers looks for a model, and the argument that names a GGUF file in there."""
    path = Path(source)
    if path.suffix != ".gguf" or path.is_dir():  # a folder may have any name
        return str(source), {}
    if not path.is_file():
        raise LizardzooError(f"there is no GGUF file {source}; give the path of one, or a folder or Hub id")
    if importlib.util.find_spec("gguf") is None:
        raise LizardzooError(f"reading {source} needs the package gguf, which is not installed; pip install gguf")
    return str(path.parent), {"gguf_file": path.name}


@contextmanager
def progress_bars(shown: bool) -> Iterator[None]:
    """Without `shown`, transformers' own progress bars (for loading and saving) stay away."""
    before = logging.is_progress_bar_enabled()
    if before and not shown:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if before and not shown:
            logging.enable_progress_bar()


@contextmanager
def _readable_weights(source: str | Path) -> Iterator[None]:
    try:
        yield
    except SafetensorError as error:
        raise LizardzooError(
            f"a weight file of {source} is damaged or cut short ({error}); download or save the checkpoint again"
        ) from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise LizardzooError(
            f"the weights of {source} do not have the shapes its config says (the log lists them); "
            f"correct the config, or convert the checkpoint again"
        ) from error
    except ValueError as error:
        if Path(source).suffix != ".gguf":
            raise
        raise LizardzooError(
            f"transformers cannot read the GGUF file {source} ({error}); is it complete, and of a model it knows?"
        ) from error


@contextmanager
def _usable_attention(implementation: str | None) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if implementation is None or "attention" not in str(error).lower():
            raise
        raise LizardzooError(
            f"attn_implementation={implementation!r} cannot be used here ({str(error).rstrip('.')}); install it, or "
            f"take 'sdpa', which needs nothing"
        ) from error
