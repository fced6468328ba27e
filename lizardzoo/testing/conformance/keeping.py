"""Laws of files, dtypes and devices: what is saved is what is loaded, and new parameters stay in fp32."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lizardzoo.adapters import is_new_parameter
from lizardzoo.linearize import linearize
from lizardzoo.loading import from_pretrained
from lizardzoo.testing.conformance.case import (
    Case,
    assert_close,
    assert_same_tokens,
    greedy,
    logits,
    model_law,
    refused,
)


@contextmanager
def saved(model: Any, **options: Any) -> Iterator[Path]:
    """The folder of a saved model."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **options)
        yield Path(folder)


@model_law
def conversion_copies_and_leaves_the_teacher_alone(data: st.DataObject, case: Case) -> None:
    """Every parameter of the teacher is the student's, in memory of its own; what is new is a mixer's."""
    before = {name: p.clone() for name, p in case.teacher.state_dict().items()}
    config = case.teacher.config.to_dict()
    model = linearize(case.teacher, case.layers)
    report, state = model.conversion_report, model.state_dict()
    assert set(report.kept) == set(before) and not report.dropped
    assert set(report.new) == set(state) - set(before) and all(map(is_new_parameter, report.new))
    assert all(torch.equal(state[name], before[name]) for name in before)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(p, before[name]) for name, p in case.teacher.state_dict().items())
    assert case.teacher.config.to_dict() == config


@model_law
def what_cannot_be_converted_is_refused(data: st.DataObject, case: Case) -> None:
    """A list of another length, a student for a teacher, a teacher for a student."""
    count = len(case.layers)
    with refused(f"has {count + 1} entries but the model has {count} layers"):
        linearize(case.teacher, [*case.layers, case.layers[0]])
    with refused("linearized already"):
        linearize(case.student, case.layers)
    with saved(case.teacher) as folder, refused("not a linearized one"):
        from_pretrained(folder)


@model_law
def a_checkpoint_with_other_parameters_is_refused(data: st.DataObject, case: Case) -> None:
    """One that is missing, is one too many or has another shape is named; what a teacher has too many is dropped."""
    for model, load in ((case.student, from_pretrained), (case.teacher, lambda folder: linearize(folder, case.layers))):
        with saved(model) as folder:
            file = folder / "model.safetensors"
            weights = load_file(file)
            embedding = model.get_input_embeddings().weight  # where it is tied, two parameters are missing without it
            names = sorted(name for name, p in model.named_parameters() if p is not embedding)
            name = data.draw(st.sampled_from(names))
            missing = {other: weight for other, weight in weights.items() if other != name}
            reshaped = weights | {name: torch.zeros(3, *weights[name].shape)}
            for broken, of_student, of_teacher in (
                (missing, f"1 missing (first: {name})", f"lacks 1 of its parameters (first: {name})"),
                (reshaped, f"1 of another shape (first: {name})", "do not have the shapes its config says"),
                (weights | {"other.weight": torch.zeros(2)}, "1 unexpected (first: other.weight)", None),
            ):
                save_file(broken, file, metadata={"format": "pt"})
                if model is case.teacher and of_teacher is None:
                    assert load(folder).conversion_report.dropped == ["other.weight"]
                    continue
                with refused(of_student if model is case.student else str(of_teacher)):
                    load(folder)
            file.write_bytes(file.read_bytes()[:-10])
            with refused("damaged or cut short"):
                load(folder)


@model_law
def save_and_load_gives_the_same_logits(data: st.DataObject, case: Case) -> None:
    """In one file and in shards, by lizardzoo and by AutoModelForCausalLM."""
    ids, expected, weights = case.tokens(2, 25), logits(case.student, case.tokens(2, 25)), case.student.state_dict()
    for options in ({}, {"max_shard_size": "40KB"}):
        with saved(case.student, **options) as folder:
            assert (len(list(folder.glob("*.safetensors"))) > 1) == bool(options)
            for load in (from_pretrained, AutoModelForCausalLM.from_pretrained):
                again = load(folder)
                assert type(again) is type(case.student) and again.config.specs == case.layers
                for name, weight in again.state_dict().items():
                    assert torch.equal(weight, weights[name]), f"{name} is another one after {options}"
                # matrix products round by where their operands lie in memory
                assert_close(logits(again, ids), expected, f"saved with {options}", bound=1e-6)


@model_law
def a_narrow_model_keeps_its_new_parameters_wide(data: st.DataObject, case: Case) -> None:
    """Loaded in bf16 or fp16, or cast: new parameters are fp32 to the bit, and survive being saved from there."""
    new = {name: p for name, p in case.student.named_parameters() if is_new_parameter(name)}
    with saved(case.student) as folder:
        for dtype in (torch.bfloat16, torch.float16):
            for narrow in (from_pretrained(folder, dtype=dtype), case.copy().to(dtype)):
                with saved(narrow) as narrower:
                    for model in (narrow, from_pretrained(narrower)):
                        for name, parameter in model.named_parameters():
                            assert parameter.dtype == (torch.float32 if name in new else dtype), f"dtype of {name}"
                            assert name not in new or torch.equal(parameter, new[name]), f"{name} changed its value"


@model_law
def narrow_results_differ_by_rounding_only(data: st.DataObject, case: Case) -> None:
    """In bf16 and fp16, cast or loaded, the student is as far from itself in fp32 as the teacher is, times 4.

    Where a mixer is not `continuous`, rounding may change its choice: then it holds up to its `exact_within`, where
    there is none to make, and behind that only dtype and finiteness. What an unnormalized mixer sums up may be too
    large for fp16: then there is nothing to compare.
    """
    ids = case.tokens(2, 25)
    largest = _largest_output(case.student, ids)
    held = min([25, *(spec.exact_within for spec in case.layers if not spec.continuous)])
    wide, plain = (logits(model, ids)[:, :held] for model in (case.student, case.teacher))
    with saved(case.student) as folder:
        for dtype in (torch.bfloat16, torch.float16):
            if largest > torch.finfo(dtype).max / 2:
                continue
            # a mixer rounds more often than softmax does: features, gates, two branches and their merge
            budget = 4 * _error(logits(copy.deepcopy(case.teacher).to(dtype), ids)[:, :held], plain)
            for name, narrow in (
                ("cast", case.copy().to(dtype)),
                ("loaded", from_pretrained(folder, dtype=dtype)),
            ):
                answer = logits(narrow, ids)
                assert answer.dtype == dtype and torch.isfinite(answer).all(), f"{name} in {dtype}: not finite"
                error = _error(answer[:, :held], wide)
                assert error <= budget, f"{name} in {dtype}: an error of {error:.1e}, {budget:.1e} at most"


def _largest_output(model: Any, ids: Tensor) -> float:
    """Of any layer's attention, before its last projection."""
    found: list[float] = []
    handles = [
        attention.o_proj.register_forward_pre_hook(lambda _, args: found.append(args[0].abs().max().item()))
        for attention in model.attentions()
    ]
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return max(found)


def _error(narrow: Tensor, wide: Tensor) -> float:
    """Root of the mean squared difference, relative to the mean square."""
    if not wide.numel():
        return 0.0
    return ((narrow - wide).square().mean() / wide.square().mean()).sqrt().item()


@model_law
def it_loads_by_device_map_and_without_memory(data: st.DataObject, case: Case) -> None:
    """device_map "cpu", "auto" and layers left on disk, attn_implementation beside it; the meta device has shapes."""
    ids, expected = case.tokens(2, 25), logits(case.student, case.tokens(2, 25))
    with saved(case.student) as folder:
        for device_map in ("cpu", "auto"):
            model = from_pretrained(folder, device_map=device_map, attn_implementation="eager")
            answer = logits(model, ids.to(model.device)).cpu()
            assert model.config._attn_implementation == "eager"
            assert_close(answer, expected, device_map, bound=1e-5 if model.device.type == "cpu" else 1e-2)
        base = case.student.base_model_prefix
        places = {name: "cpu" for name, _ in case.student.named_children() if name != base}
        places |= {f"{base}.{name}": "cpu" for name, _ in getattr(case.student, base).named_children()}
        del places[f"{base}.layers"]
        places |= {f"{base}.layers.{index}": "disk" for index in range(len(case.layers))}
        model = from_pretrained(folder, device_map=places, offload_folder=folder / "offloaded")
        assert all(p.is_meta for layer in getattr(model, base).layers for p in layer.parameters())
        assert_close(logits(model, ids), expected, "layers on disk")
        assert_same_tokens(greedy(model, ids, 3), greedy(case.student, ids, 3), "layers on disk")
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: p.shape for name, p in case.student.named_parameters()}
    assert {name: p.shape for name, p in empty.named_parameters()} == shapes
    assert all(p.is_meta for p in empty.parameters())
