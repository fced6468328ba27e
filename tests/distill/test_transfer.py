"""Stage 1: the stream stays the teacher's, only mixers move, and their errors fall."""

import dataclasses
import math
import weakref

import pytest
import torch

import lizardzoo as lz
from lizardzoo.adapters.base import is_new_parameter
from lizardzoo.distill.recipe import Finetune, Stage
from lizardzoo.distill.trainer import NonFiniteError, parameter_group, parameter_groups, training
from lizardzoo.distill.transfer import TeacherForcing, layer_error

PACKED = torch.cat([torch.arange(20), torch.arange(9), torch.arange(19)]).expand(4, -1)


@pytest.mark.parametrize("position_ids", [None, PACKED], ids=["plain", "packed"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("mixing", [[0, 2], [0, 1, 2]], ids=["mixed", "no softmax kept"])
def test_under_teacher_forcing_the_residual_stream_is_the_teachers_bit_for_bit(
    layers, tiny_llama, batch, position_ids, implementation, mixing
):
    tiny_llama.set_attn_implementation(implementation)
    student = lz.linearize(tiny_llama, [layers[0] if i in mixing else layers[1] for i in range(3)])
    given = {"position_ids": position_ids, "output_hidden_states": True, "use_cache": False}
    with torch.no_grad():
        expected = tiny_llama(batch, **given)
        with TeacherForcing(student) as forcing:
            found = student(batch, **given)
        free = student(batch, **given)
    assert all(torch.equal(a, b) for a, b in zip(expected.hidden_states, found.hidden_states, strict=True))
    assert torch.equal(expected.logits, found.logits)
    assert not torch.equal(expected.logits, free.logits)
    assert list(forcing.errors) == mixing


def test_the_errors_are_those_of_the_mixers_own_outputs(student, tiny_llama, batch):
    seen = {}
    for attention in tiny_llama.model.layers:
        attention.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.update({module.layer_idx: (args, kwargs, output[0])}),
            with_kwargs=True,
        )
    with torch.no_grad():
        tiny_llama(batch, use_cache=False)
        with TeacherForcing(student) as forcing:
            student(batch, use_cache=False)
        for layer, error in forcing.errors.items():
            args, kwargs, target = seen[layer]
            y, _ = student.attentions()[layer](*args, **kwargs)
            expected = ((y - target) ** 2).mean() / ((target - target.mean()) ** 2).mean()
            assert error.item() == pytest.approx(expected.item(), rel=1e-5)
            assert error.item() > 1e-3


def test_layer_error_counts_real_tokens_in_fp32_and_survives_a_constant_target():
    target, output = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    padded = output.clone()
    padded[~mask] = 1e6
    expected = layer_error(output[mask][None], target[mask][None])
    assert torch.equal(layer_error(padded, target, mask), expected)
    assert layer_error(target.mean().expand_as(target), target).item() == pytest.approx(1)
    assert layer_error(output.bfloat16(), target.bfloat16()).dtype == torch.float32
    assert layer_error(torch.zeros(1, 4, 3), torch.zeros(1, 4, 3)).item() == 0


def errors_on(student, batch):
    with torch.no_grad(), TeacherForcing(student) as forcing:
        student(batch, use_cache=False)
    return {layer: error.item() for layer, error in forcing.errors.items()}


def test_stage_1_lowers_every_layers_error_and_moves_new_parameters_only(train, student, batch):
    first = errors_on(student, batch)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    flags = [parameter.requires_grad for parameter in student.parameters()]
    assert train(stages=["transfer"]) is student
    after = student.state_dict()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved == {name for name in before if is_new_parameter(name)}
    log = train.log("transfer")
    assert [entry["step"] for entry in log] == list(range(1, 11))
    last = errors_on(student, batch)
    assert all(last[layer] < 0.8 * first[layer] for layer in (0, 2)), (first, last)
    for entry in log:
        mean = sum(entry["layer_error"].values()) / 2
        assert entry["loss"] == pytest.approx(mean, rel=1e-5)
    assert [parameter.requires_grad for parameter in student.parameters()] == flags
    assert all(parameter.grad is None for parameter in student.parameters())
    assert student.config.use_cache
    assert not student.training
    assert not any(attention._forward_hooks for attention in student.attentions())


def test_the_gradients_are_those_of_all_errors_together(student, tiny_llama, batch):
    learns = {name: p for name, p in student.named_parameters() if is_new_parameter(name)}
    seen = []
    handles = [
        attention.register_forward_hook(lambda *call: seen.append(call), with_kwargs=True)
        for attention in tiny_llama.model.layers.modules()
        if hasattr(attention, "q_proj")
    ]
    with torch.no_grad():
        tiny_llama(batch, use_cache=False)
    [handle.remove() for handle in handles]
    errors = []
    for layer, (_, args, kwargs, (target, _)) in enumerate(seen):
        if student.attentions()[layer].mixer is not None:
            errors.append(layer_error(student.attentions()[layer](*args, **kwargs)[0], target))
    expected = torch.autograd.grad(torch.stack(errors).mean(), list(learns.values()))
    with training(student, learns), TeacherForcing(student) as forcing:
        student(batch, use_cache=False)
        torch.stack(list(forcing.errors.values())).mean().backward()
        for (name, parameter), gradient in zip(learns.items(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-8, msg=name)


def test_stage_1_holds_the_activations_of_one_layer_at_a_time(student, batch):
    class Saved:
        """A tensor that a graph keeps."""

        def __init__(self, tensor):
            self.tensor = tensor.detach()  # an output that its own node keeps would never go
            kept.add(self)

    kept, before, after = weakref.WeakSet(), [], []
    for mixer in student.mixers().values():
        mixer.register_forward_pre_hook(lambda *_: before.append(len(kept)))
        mixer.register_forward_hook(lambda *_: after.append(len(kept)))
    names = [name for name, _ in student.named_parameters() if is_new_parameter(name)]
    with (
        training(student, names),
        TeacherForcing(student) as forcing,
        torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor),
    ):
        student(batch, use_cache=False)
        assert before == [0, 0]
        assert min(after) > 0
        assert len(kept) == 0
        assert all(error.requires_grad for error in forcing.errors.values())


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_learning_rate_rises_from_the_floor_and_falls_back_to_it(schedule, train, recipe):
    stage = dataclasses.replace(recipe.transfer, schedule=schedule, warmup=0.2, floor=0.1, scalar_rate=1e-3)
    train(recipe=dataclasses.replace(recipe, transfer=stage), stages=["transfer"])
    found = [entry["learning_rate"] / stage.feature_map_rate for entry in train.log("transfer")]
    fall = {
        "cosine": lambda progress: 0.55 + 0.45 * math.cos(math.pi * progress),
        "linear": lambda progress: 1 - 0.9 * progress,
        "constant": lambda progress: 1.0,
    }[schedule]
    assert found == pytest.approx([0.1, 0.55, *(fall(i / 8) for i in range(8))])


def test_packed_documents_are_isolated_in_teacher_and_student(train, recipe):
    train(recipe=dataclasses.replace(recipe, isolate_documents=True), stages=["transfer"])
    errors = [entry["loss"] for entry in train.log("transfer")]
    assert errors[-1] < errors[0]


def test_a_bf16_student_trains_fp32_mixers(train, tiny_llama, layers):
    student = lz.linearize(tiny_llama, layers, dtype=torch.bfloat16)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    train(student)
    for name, value in student.state_dict().items():
        assert value.dtype == (torch.float32 if is_new_parameter(name) else torch.bfloat16), name
        if is_new_parameter(name):
            assert not torch.equal(value, before[name]), name
    assert all(entry["loss"] > 0 for stage in ("transfer", "finetune") for entry in train.log(stage))


def test_every_parameter_has_the_rate_of_its_kind(student):
    stage = Stage(steps=1, scalar_rate=1, projection_rate=2, feature_map_rate=3, weight_decay=0.1)
    rates = {"scalar": (1, 0), "projection": (2, 0.1), "feature_map": (3, 0.1)}
    expected = {
        "linear.feature_map.query": "feature_map",
        "linear.feature_map.key": "feature_map",
        "linear.decay.weight": "projection",
        "linear.decay.bias": "scalar",
        "linear.input_gate.weight": "projection",
        "linear.input_gate.bias": "scalar",
        "log_scale.weight": "projection",
        "log_scale.bias": "scalar",
    }
    new = {name: p for name, p in student.named_parameters() if is_new_parameter(name)}
    assert {name.partition("mixer.")[2]: parameter_group(name, p) for name, p in new.items()} == expected
    with training(student, new):
        groups = parameter_groups(student, stage)
        owners = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert owners == {id(p): rates[parameter_group(name, p)] for name, p in new.items()}
    lora = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert parameter_group(lora, torch.zeros(2, 2)) == "lora"
    assert parameter_group("model.layers.0.self_attn.mixer.alpha", torch.zeros(())) == "scalar"
    assert Finetune(steps=1).lora_rate > 0


def test_a_non_finite_error_names_step_layer_and_checkpoint_and_keeps_the_good_weights(train, at_step, student):
    kept = {}

    def poison(model):
        kept.update({name: p.detach().clone() for name, p in model.named_parameters()})
        model.mixers()[2].log_scale.bias.data.fill_(float("nan"))

    at_step("transfer", 5, poison)
    with pytest.raises(NonFiniteError, match=r"transfer, step 6: the error of layer 2 is not finite") as error:
        train(checkpoint_every=2)
    checkpoint = train.folder / "checkpoints" / "transfer" / "checkpoint-4"
    assert str(checkpoint) in str(error.value)
    assert (checkpoint / "trainable.safetensors").is_file()
    assert len(train.log("transfer")) == 5
    assert not (train.folder / "transfer").exists()
    for name, parameter in student.named_parameters():
        if "layers.2.self_attn.mixer.log_scale.bias" not in name:
            assert torch.equal(parameter, kept[name]), name


def test_a_non_finite_gradient_stops_before_the_optimizer_with_the_parameter_named(train, student):
    weight = student.mixers()[0].linear.decay.weight
    before = {name: value.clone() for name, value in student.state_dict().items()}
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(
        NonFiniteError,
        match=r"step 1: the gradient of model.layers.0.self_attn.mixer.linear.decay.weight is not finite; "
        r"no checkpoint was written",
    ):
        train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
