"""The base of a difference: a plain model of the Hub, which a stranger's config.json names, and may have made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lizardzoo.adapters.fit import check_fit
from lizardzoo.adapters.limits import check_fields, check_sizes, clear_errors
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.difference import Base, weights_hash
from lizardzoo.hub.weights import check_object, find_file, tensor_shapes, weight_files


def load_base(base: Base, model_type: str, look: Mapping[str, Any]) -> Any:
    """The base, in its own dtype; what it may be is what a linearized model may be, see `limits`.

    Args:
        base: its hash is not looked at.
        model_type: the family that it has to be of.
        look: where to look, see `lizardzoo.hub.weights.where`.

    Raises:
        LizardzooError: it is of another family, quantized, pickled or not whole, or its config describes no model;
            nothing is allocated, and no code fetched, then.
    """
    look = {**look, "revision": base.revision}
    check_object(base.name, "config.json", **look)
    if find_file(base.name, "adapter_config.json", **look) is not None:
        raise LizardzooError(
            f"the base {base.name} holds adapter_config.json, by which weights of another model would be loaded; name "
            f"a whole model"
        )
    with clear_errors():
        fields, _ = PreTrainedConfig.get_config_dict(base.name, **look)
        if fields.get("model_type") != model_type:
            raise LizardzooError(
                f"the base {base.name} is a {fields.get('model_type')!r} model, and this one was made from a "
                f"{model_type!r} one; name the right base"
            )
        if fields.get("quantization_config") is not None:
            raise LizardzooError(f"the weights of the base {base.name} are quantized; name the model they were made of")
        check_fields(fields)
        config = AutoConfig.from_pretrained(base.name, trust_remote_code=False, **look)
        check_sizes(config)
    check_fit(
        AutoModelForCausalLM.from_config, config, tensor_shapes(weight_files(base.name, **look)), base.name, others=True
    )
    return AutoModelForCausalLM.from_pretrained(
        base.name, config=config, dtype="auto", trust_remote_code=False, use_safetensors=True, **look
    )


def base_hash(teacher: Any) -> str:
    """Of a base's weights; a tied head is the embedding and is not counted again."""
    tensors = dict(teacher.state_dict())
    if teacher.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return weights_hash(tensors)
