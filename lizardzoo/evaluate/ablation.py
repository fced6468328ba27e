"""Branches switched off, to see what each of them is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from lizardzoo.errors import LizardzooError
from lizardzoo.mixers.base import Mixer


def branch_names(model: PreTrainedModel) -> list[str]:
    """The branches that any of the model's mixers has, in the mixers' own order; none for a teacher."""
    return list(dict.fromkeys(name for mixer in mixers_of(model).values() for name in mixer.branch_names))


def mixers_of(model: PreTrainedModel) -> dict[int, Mixer]:
    """The model's mixers by layer; empty for a model that has none."""
    mixers: Any = getattr(model, "mixers", dict)  # a teacher has none
    return mixers()


@contextmanager
def without(model: PreTrainedModel, branch: str) -> Iterator[PreTrainedModel]:
    """Inside, the branch of that name adds nothing to the output of any layer; afterwards all is as it was.

    A mixer that has no other branch then gives zeros: what the layer's attention is worth at all.

    Args:
        model: a linearized model.
        branch: such as "linear" or "window".

    Raises:
        LizardzooError: no mixer of the model has such a branch.
    """
    if branch not in branch_names(model):
        names = ", ".join(branch_names(model)) or "none (it is not linearized)"
        raise LizardzooError(f"no mixer of the model has a branch {branch!r}; its branches are: {names}")
    mixers = [mixer for mixer in mixers_of(model).values() if branch in mixer.branch_names]
    before = [mixer.switched_off for mixer in mixers]
    try:
        for mixer in mixers:
            mixer.switched_off = mixer.switched_off | {branch}
        yield model
    finally:
        for mixer, switched_off in zip(mixers, before):
            mixer.switched_off = switched_off
