"""Teacher to student: build the linearized model, copy every weight, report both sides."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from lizardzoo.adapters import ADAPTERS, is_new_parameter, softmax_mode
from lizardzoo.config import SpecLike, resolve_layers
from lizardzoo.errors import LizardzooError
from lizardzoo.loading import linearized_family, load_whole, read_config, read_tokenizer
from lizardzoo.mixers.base import Mixer

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
        model, dropped = load_whole(source, dtype or "auto")
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
