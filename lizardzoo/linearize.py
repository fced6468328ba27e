"""Teacher to student: build the linearized model, copy every weight, report both sides; and load one strictly."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.initialization import no_init_weights
from transformers.utils import logging

from lizardzoo.adapters import ADAPTERS, is_new_parameter, softmax_mode
from lizardzoo.adapters.bases import place_of
from lizardzoo.adapters.fit import refuse_misfit
from lizardzoo.adapters.limits import clear_errors
from lizardzoo.config import LINEARIZED, SpecLike, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.difference import difference_of
from lizardzoo.hub.weights import check_object, find_file, pinned, where
from lizardzoo.mixers.base import Mixer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
CALIBRATION_LENGTH = 2048
CALIBRATION_TOKENS = 4096


@dataclass
class ConversionReport:
    """What became of each parameter, by name.

    Attributes:
        new: a mixer's, with its start value.
        kept: copied from the teacher.
        dropped: the checkpoint's alone, of which transformers makes no use either.
    """

    new: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{len(self.new)} new, {len(self.kept)} kept, {len(self.dropped)} dropped parameters"


def linearize(
    model: PreTrainedModel | str | Path,
    layers: SpecLike | Sequence[SpecLike] = "recommended",
    *,
    calibrate: str | Tensor | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A linearized copy of a teacher.

    Args:
        model: a loaded causal LM, or the id, folder or GGUF file of one. It is left untouched.
        layers: one spec, preset name or dict per layer, or one for all layers.
        calibrate: text, or token ids [B, T], on which mixers set their start values from the teacher's own attention
            (text needs `tokenizer`, or a `model` given by id, folder or file). None: sensible constants. Mixers without
            parameters, such as `Heavy`, have nothing to set.
        tokenizer: for `calibrate`.
        dtype: of the copied weights; the teacher's unless given. New parameters are fp32 always.

    Returns:
        The student, a Hugging Face model of the family's linearized class, in eval mode; its `conversion_report` says
        which parameters are new, kept and dropped.

    Raises:
        LizardzooError: an unsupported architecture, layers that do not fit the model, a checkpoint that is not whole.
    """
    source = None
    dropped: list[str] = []
    if isinstance(model, (str, Path)):
        source = str(model)
        config = read_config(source)
        adapter = find_adapter(config)
        specs = resolve_layers(layers, config.num_hidden_layers)  # a wrong list costs no download
        model, dropped = _load_teacher(source, dtype or "auto")
    elif not hasattr(model, "config"):
        raise LizardzooError(
            f"linearize takes a causal LM of transformers, or the id, folder or GGUF file of one, got "
            f"a {type(model).__name__}; load it with AutoModelForCausalLM.from_pretrained"
        )
    else:
        adapter = find_adapter(model.config)
        specs = resolve_layers(layers, model.config.num_hidden_layers)
    if isinstance(calibrate, str):
        calibrate = _tokenize(calibrate, tokenizer, source)

    config = convert_config(model.config, adapter, [spec.to_dict() for spec in specs])
    with no_init_weights():  # mixers have their start values; all else is copied
        student = adapter._from_config(config, dtype=dtype or model.dtype).to(model.device)
    student.tie_weights()
    student.conversion_report = _copy_weights(model, student)
    student.conversion_report.dropped += dropped
    student.generation_config = copy.deepcopy(model.generation_config)
    student.eval()
    if calibrate is not None:
        calibrate_mixers(student, calibrate)
    return student


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


def read_tokenizer(source: str | Path) -> Any:
    """The tokenizer beside a model, or in its GGUF file; a difference that has none takes its base's."""
    place, look = _place(source)
    if not look and not any(find_file(place, name) for name in TOKENIZER_FILES):
        fields, _ = PreTrainedConfig.get_config_dict(place)
        base = difference_of(fields)
        if base is not None:
            place, look = place_of(base, None, {})
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


def load_teacher(source: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """A causal LM from a folder, the Hub or a GGUF file (whose weights become plain ones), with all its parameters."""
    return _load_teacher(source, dtype)[0]


def _load_teacher(source: str | Path, dtype: torch.dtype | str) -> tuple[Any, list[str]]:
    """The same, and what the checkpoint holds beside them."""
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


def find_adapter(config: PreTrainedConfig) -> Any:
    """The linearized class for a teacher's config."""
    if linearized_family(config) is not None:
        raise LizardzooError(
            f"this model is linearized already ({config.model_type}); load its teacher to convert it "
            f"anew, or use set_window() or set_heavy() to change sizes"
        )
    if config.model_type not in ADAPTERS:
        raise LizardzooError(
            f"cannot linearize a {config.model_type!r} model; supported architectures: {', '.join(ADAPTERS)} "
            f"(CONTRIBUTING says how to add one)"
        )
    return ADAPTERS.get(config.model_type)


@torch.no_grad()
def calibrate_mixers(student: Any, token_ids: Tensor) -> None:
    """Let every mixer set its start values from the teacher's own q, k, v on `token_ids` [B, T].

    Where no mixer has anything to set, the teacher does not run.
    """

    def calibrate(attention: Any, args: Any, kwargs: dict[str, Any]) -> None:
        attention.mixer.calibrate(attention.inputs(*args, **kwargs))

    idle = Mixer.calibrate  # of mixers that set nothing
    attentions = [a for a in student.attentions() if a.mixer is not None and type(a.mixer).calibrate is not idle]
    if not attentions:
        return
    handles = [attention.register_forward_pre_hook(calibrate, with_kwargs=True) for attention in attentions]
    try:
        with softmax_mode(student):
            student(token_ids.to(student.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()


def convert_config(teacher: PreTrainedConfig, adapter: Any, layers: list[dict[str, Any]]) -> Any:
    """The linearized config. Explicit: a plain `from_pretrained` of the other class would keep the wrong model_type."""
    fields = teacher.to_dict()
    for name in ("model_type", "architectures", "layer_types", "transformers_version", "quantization_config"):
        fields.pop(name, None)
    fields.pop("torch_dtype", None)
    fields["teacher_layer_types"] = getattr(teacher, "layer_types", None)
    config = adapter.config_class(**fields, layers=layers)
    config._attn_implementation = teacher._attn_implementation
    config.base_model_name_or_path = teacher._name_or_path or None
    return config


def _copy_weights(teacher: Any, student: nn.Module) -> ConversionReport:
    """Copy by name; what is neither the teacher's nor a mixer's, or has another shape, raises before any copy."""
    source, target = teacher.state_dict(), student.state_dict()
    report = ConversionReport(
        new=[name for name in target if name not in source],
        kept=[name for name in target if name in source],
        dropped=[name for name in source if name not in target],
    )
    strangers = [name for name in report.new if not is_new_parameter(name)] + report.dropped
    strangers += [name for name in report.kept if source[name].shape != target[name].shape]
    if strangers:
        raise LizardzooError(
            f"the parameters of this {type(teacher).__name__} are not those of a {teacher.config.model_type!r} causal "
            f"LM: {', '.join(strangers[:3])} ({len(strangers)} in all) are missing, unexpected or of another shape; "
            f"load it with AutoModelForCausalLM, and give a PEFT model as merge_and_unload() does"
        )
    with torch.no_grad():
        for name in report.kept:
            target[name].copy_(source[name])
    return report


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


def _tokenize(text: str, tokenizer: Any, source: str | None) -> Tensor:
    if tokenizer is None:
        if source is None:
            raise LizardzooError(
                "calibrate is a text, which needs a tokenizer; pass tokenizer=..., or token ids [B, T]"
            )
        tokenizer = read_tokenizer(source)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False, verbose=False)["input_ids"][0]
    length = min(CALIBRATION_LENGTH, len(ids))
    count = max(1, min(len(ids), CALIBRATION_TOKENS) // length) if length else 0
    if count == 0:
        raise LizardzooError("the calibration text is empty; give a text longer than the window, or none")
    return ids[: count * length].view(count, length)


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
