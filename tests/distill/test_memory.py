"""The memory of training, foretold: the tensors that a real forward pass keeps, and counts that can be done by hand."""

import pytest
import torch

import lizardzoo as lz
from lizardzoo.distill.memory import training_memory
from lizardzoo.streaming import empty_student


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_weights_it_is_what_a_real_pass_keeps(dtype, tiny_llama, layers, recipe):
    real = training_memory(lz.linearize(tiny_llama, layers, dtype=dtype), recipe, micro_batch_size=2)
    empty = empty_student(tiny_llama.config, layers, dtype)
    assert training_memory(empty, recipe, micro_batch_size=2) == real
    assert all(parameter.requires_grad for parameter in empty.parameters())
    assert not any("lora" in name for name, _ in empty.named_parameters())


def test_weights_and_optimizer_are_counted(tiny_llama, layers, recipe):
    student = lz.linearize(tiny_llama, layers, dtype=torch.bfloat16)
    transfer, finetune, checkpointed = training_memory(student, recipe)
    sizes = {name: p.numel() for name, p in student.named_parameters()}
    new = sum(size for name, size in sizes.items() if ".mixer." in name)
    assert transfer.learning == 16 * new
    assert transfer.weights == finetune.weights == 2 * (sum(sizes.values()) - new)
    lora = 3 * 8 * (48 + 64 + 2 * (48 + 32) + 64 + 48)  # layers x rank x (in + out) of q, k, v, o
    assert finetune.learning == checkpointed.learning == 16 * (new + lora)
    assert checkpointed.total < finetune.total
    assert transfer.total == transfer.weights + transfer.learning + transfer.activations


def test_only_the_second_stage_takes_more_activations_for_more_layers_and_both_for_more_tokens(tiny_llama, recipe):
    def activations(depth, batch):
        tiny_llama.config.num_hidden_layers = depth
        student = empty_student(tiny_llama.config, "hybrid", torch.bfloat16)
        rows = training_memory(student, recipe, batch)
        gradients.append(rows[0].learning // 4)
        return [row.activations for row in rows]

    gradients = []
    short, deep, wide = activations(2, 1), activations(4, 1), activations(2, 2)
    assert 0 <= deep[0] - short[0] <= 1.01 * (gradients[1] - gradients[0])
    assert deep[1] > 1.6 * short[1]
    assert deep[1] > 2 * deep[2] > 2 * short[2]
    assert all(1.7 * one < two < 2.3 * one for one, two in zip(short, wide, strict=True))


def test_mixers_without_parameters_have_no_first_stage(tiny_llama, recipe):
    rows = training_memory(empty_student(tiny_llama.config, lz.Window(window=8), torch.float32), recipe)
    assert [row.option for row in rows] == ["finetune", "finetune, checkpointed"]
