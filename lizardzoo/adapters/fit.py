"""Whether a checkpoint holds the parameters of its config, known from the headers before anything is allocated."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.initialization import no_init_weights

from lizardzoo.adapters.limits import UNFIT, first_lines
from lizardzoo.errors import LizardzooError


def check_fit(
    build: Callable[[Any], Any], config: Any, found: Mapping[str, Any], source: Any, *, others: bool = False
) -> None:
    """Refuse a file that does not hold exactly the parameters of a causal LM, in their shapes.

    Args:
        build: makes the model of a config; it is called on the meta device.
        config: is left as it is.
        found: the shapes of the file's tensors, by name.
        source: for the error.
        others: whether the file may hold more.

    Raises:
        LizardzooError: it does not, or the config describes no model.
    """
    indices = [int(match[1]) for name in found if (match := re.search(r"\.layers\.(\d+)\.", name))]
    if indices and max(indices) + 1 != config.num_hidden_layers:  # before that many are built
        raise LizardzooError(
            f"the checkpoint {source} has {max(indices) + 1} layers, and its config.json says "
            f"{config.num_hidden_layers}; save the whole model with save_pretrained, or correct the config"
        )
    config = copy.deepcopy(config)
    try:
        with torch.device("meta"), no_init_weights():
            model = build(config)
    except (*UNFIT, ImportError) as error:
        if isinstance(error, LizardzooError):
            raise
        raise LizardzooError(f"the config of {source} describes no model: {first_lines(error)}") from error
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    refuse_misfit(
        source,
        missing=expected.keys() - found.keys() - tied,
        unexpected=() if others else found.keys() - expected.keys(),
        reshaped=[name for name in expected.keys() & found.keys() if expected[name] != tuple(found[name])],
    )


def refuse_misfit(source: Any, *, missing: Any, unexpected: Any, reshaped: Any = ()) -> None:
    """Raise the one error of a checkpoint whose parameters are not exactly the model's."""
    problems = [
        f"{len(names)} {what} (first: {sorted(map(str, names))[0]})"
        for what, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", reshaped))
        if names
    ]
    if problems:
        raise LizardzooError(
            f"the checkpoint {source} does not fit its config: parameters {', '.join(problems)}; "
            f"save the whole model with save_pretrained, or correct its config.json"
        )
