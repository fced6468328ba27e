"""Laws of training: packed documents, gradients, checkpointing, adapters on the projections."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from lizardzoo.adapters import is_new_parameter
from lizardzoo.loading import from_pretrained
from lizardzoo.testing.conformance.case import Case, assert_close, logits, model_law

LORA = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "init_lora_weights": False}


@model_law
def packed_documents_train_as_documents_alone(data: st.DataObject, case: Case) -> None:
    """Restarting positions isolate them: the same logits, and gradients that add up."""
    lengths = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=3))
    documents = [case.tokens(1, length, seed=i) for i, length in enumerate(lengths)]
    packed = torch.cat(documents, 1)
    labels = torch.cat([torch.cat([ids.new_full((1, 1), -100), ids[:, 1:]], 1) for ids in documents], 1)
    restart = torch.cat([torch.arange(length) for length in lengths])[None]
    model = case.copy()
    apart = [model(ids, labels=ids, use_cache=False) for ids in documents]
    weights = [(length - 1) / (sum(lengths) - len(lengths)) for length in lengths]
    sum(weight * one.loss for weight, one in zip(weights, apart, strict=True)).backward()
    expected = _gradients(model)
    model.zero_grad()
    together = model(packed, labels=labels, position_ids=restart)
    together.loss.backward()
    assert_close(together.logits, torch.cat([one.logits for one in apart], 1), "logits")
    _assert_same_gradients(_gradients(model), expected, "packed")


@model_law
def every_parameter_learns(data: st.DataObject, case: Case) -> None:
    """Finite gradients reach all new ones, and no gradient of the others is anything but finite, padding or not."""
    model, ids = case.copy().train(), case.tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, 19))] = 0
    model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.backward()
    for name, gradient in _gradients(model).items():
        assert torch.isfinite(gradient).all(), f"the gradient of {name} is not finite"


@model_law
def gradient_checkpointing_changes_no_gradient(data: st.DataObject, case: Case) -> None:
    """Layers that are computed again in the backward pass give the same."""
    ids, gradients = case.tokens(2, 20), []
    for checkpointing in (False, True):
        model = case.copy().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            name = "is_activation_checkpointing"  # since transformers 5.20
            assert getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(_gradients(model))
    plain, checkpointed = gradients
    _assert_same_gradients(checkpointed, plain, "checkpointed")


@model_law
def lora_trains_travels_and_merges(data: st.DataObject, case: Case) -> None:
    """On q, k, v and o: a step changes the model; saved and loaded, and merged, it is the same."""
    from peft import LoraConfig, PeftModel, get_peft_model

    ids = case.tokens(2, 20)
    torch.manual_seed(0)
    with _without_future_warnings():
        tuned = get_peft_model(case.copy(), LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    before = logits(tuned, ids)
    tuned(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in tuned.named_parameters():
        assert parameter.grad is None or "lora_" in name, f"a gradient reaches {name}, which is no part of the LoRA"
    optimizer.step()
    after = logits(tuned.eval(), ids)
    assert (after - before).abs().max() > 0, "a training step changed nothing"
    with tempfile.TemporaryDirectory() as folder:
        tuned.save_pretrained(folder)
        with _without_future_warnings():
            again = PeftModel.from_pretrained(case.copy(), folder).eval()
    assert_close(logits(again, ids), after, "the adapter, saved and loaded", bound=1e-6)
    merged = again.merge_and_unload()
    assert type(merged) is type(case.student)
    assert_close(logits(merged, ids), after, "merged", bound=1e-4)  # W + BA is rounded once more
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(Path(folder))
        assert_close(logits(from_pretrained(folder), ids), logits(merged, ids), "merged, saved and loaded", bound=1e-6)


@contextmanager
def _without_future_warnings() -> Iterator[None]:
    """peft asks a transformers newer than 5.19 for gradient checkpointing by its old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient; zero where a projection is not used by any mixer, but a new one without raises."""
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None or not is_new_parameter(name), f"no gradient reaches {name}"
        gradients[name] = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
    return gradients


def _assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """Equal relative to the largest of all, as rounding is: a gradient that cancels to zero has nothing else to be."""
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        worst = (actual[name] - gradient).abs().max().item()
        assert worst <= 1e-5 * largest, (
            f"{what}: the gradient of {name} differs by {worst:.2e} ({largest:.2e} is the largest)"
        )
