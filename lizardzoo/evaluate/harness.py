"""The bridge to lm-eval (EleutherAI's evaluation harness): its tasks, on a model that is already loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lizardzoo.errors import LizardzooError


def lm_eval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: str | Sequence[str] | None = None,
    include_path: str | os.PathLike[str] | None = None,
    *,
    batch_size: int = 1,
    max_length: int | None = None,
    **kwargs: Any,
) -> dict[str, dict[str, Any]]:
    """Run tasks of lm-eval; returns its results by task, such as {"piqa": {"acc,none": 0.68, ...}}.

    Args:
        model, tokenizer: as loaded; the model runs on its device and in its dtype.
        tasks: names of tasks or groups; None takes all that `include_path` defines.
        include_path: a folder with task files (YAML) of your own. With tasks from there and local data
            nothing is downloaded. A task file may run code (`!function`): take none from strangers.
        batch_size: sequences per forward.
        max_length: longest context in tokens; by default the model's own.
        **kwargs: for `lm_eval.simple_evaluate`, e.g. num_fewshot=5, limit=100, apply_chat_template=True.

    Raises:
        LizardzooError: lm-eval is not installed, the folder or a task does not exist.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LizardzooError(
            f"lm-eval's tasks need the package lm-eval, which cannot be imported ({error}); "
            f'pip install "lizardzoo[eval]"'
        ) from error

    names = [tasks] if isinstance(tasks, str) else tasks and list(tasks)
    manager = None
    if include_path is not None:
        if not os.path.isdir(include_path):
            raise LizardzooError(
                f"there is no folder {os.fspath(include_path)!r}; "
                f"give one that holds task files (.yaml) of lm-eval's form"
            )
        # lm-eval's own thousands of tasks take seconds to index: only where a name is not found without them.
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        names = manager.all_tasks if names is None else names
    if not names:
        where = "no tasks are named" if include_path is None else f"{os.fspath(include_path)!r} defines no task"
        raise LizardzooError(f"{where}; name lm-eval tasks such as piqa, or give a folder of task files")
    if manager is None or not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    if unknown := [name for name in names if name not in manager.task_index and not os.path.isfile(name)]:
        raise LizardzooError(
            f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists its own, "
            f"include_path adds a folder of yours"
        )
    training, caches = model.training, model.config.use_cache
    model.config.use_cache = False  # likelihoods need none, and states take time; `generate` asks for one by itself
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)
        found = simple_evaluate(model=lm, tasks=names, task_manager=manager, **{"log_samples": False, **kwargs})
    finally:
        model.config.use_cache = caches
        model.train(training)
    return {
        task: {key: value for key, value in values.items() if key != "alias"}
        for task, values in found["results"].items()
    }
