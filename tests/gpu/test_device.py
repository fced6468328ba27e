"""The same laws on the device: kernels, mixers, generation and training on CUDA agree with float64 on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lizardzoo as lz
from lizardzoo.adapters import is_new_parameter
from lizardzoo.config import MIXERS
from lizardzoo.mixers import AttentionShape, MixerInputs
from lizardzoo.testing import mixer_inputs, random_mixer
from lizardzoo.testing.strategies import TokenFlags
from tests.adapters.students import LAYERS, distance, small, student, tokens

pytestmark = pytest.mark.gpu
SHAPE = AttentionShape(hidden_size=96, heads=6, kv_heads=2, head_dim=8, scale=8**-0.5)
MIXING = [name for name in MIXERS if not MIXERS.get(name).keeps_softmax]


def flags(length: int) -> TokenFlags:
    generator = torch.Generator().manual_seed(0)
    starts = torch.rand(2, length, generator=generator) < 0.02
    return TokenFlags(torch.rand(2, length, generator=generator) < 0.9, starts)


def outputs(mixer: Any, inputs: MixerInputs) -> tuple[Tensor, list[Tensor]]:
    """The mixer's output, and the gradients of a fixed function of it."""
    y, _ = mixer(inputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    parameters = list(mixer.parameters())
    return y.detach(), list(torch.autograd.grad((y * weight).sum(), parameters)) if parameters else []


def in_fp32(mixer: Any) -> Any:
    """On the device; `float()` alone would leave its parameters wide."""
    for parameter in mixer.parameters():
        parameter.data = parameter.data.float()
    return mixer.cuda()


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("length", [1, 63, 64, 65, 300])
def test_fp32_on_cuda_equals_float64_on_the_cpu(name: str, length: int) -> None:
    inputs = mixer_inputs(SHAPE, 2, length, 0, flags(length))
    mixer = random_mixer(small(name), SHAPE, 0)
    y, gradients = outputs(mixer, inputs)
    on_gpu = inputs.each(lambda x: (x.float() if x.is_floating_point() else x).cuda())
    y_gpu, gradients_gpu = outputs(in_fp32(mixer), on_gpu)
    assert distance(y_gpu.double().cpu(), y) < 1e-5
    scale = max([y.abs().max(), *(g.abs().max() for g in gradients)])  # of one token, nothing depends on the gates
    for a, b in zip(gradients_gpu, gradients):
        assert ((a.double().cpu() - b).abs().max() / scale) < 1e-4


@pytest.mark.parametrize("name", MIXING)
def test_bf16_errs_like_bf16_inputs_do(name: str) -> None:
    """At most twice what rounding the inputs (and the output) to bf16 does to the float64 computation."""
    inputs = mixer_inputs(SHAPE, 2, 300, 0, TokenFlags(None, None))
    mixer = random_mixer(small(name), SHAPE, 0)
    narrow = inputs.each(lambda x: x.bfloat16())
    exact, _ = mixer(inputs)
    rounded = mixer(narrow.each(lambda x: x.double()))[0].bfloat16().double()
    on_gpu, _ = in_fp32(mixer)(narrow.each(lambda x: x.cuda()))
    assert on_gpu.dtype == torch.bfloat16
    budget = 2 * (rounded - exact).norm()
    assert (on_gpu.double().cpu() - exact).norm() <= budget


@pytest.mark.parametrize("name", LAYERS)
def test_generation_on_cuda(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name]).cuda()
    ids = tokens(2, 30).cuda()
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    alone = model.generate(ids[:1, 9:], max_new_tokens=12, do_sample=False)
    assert torch.equal(cached[:1, 9:], alone)
    if name == "softmax":
        teacher = tiny_llama.cuda()
        assert torch.equal(model(ids).logits, teacher(ids).logits)


def test_distillation_in_bf16_moves_fp32_parameters(tiny_llama: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    from lizardzoo.distill import Finetune, Recipe, Stage
    from lizardzoo.distill import distill as run

    numbers = {"steps": 4, "batch_size": 2, "sequence_length": 64}
    recipe = Recipe(name="gpu", transfer=Stage(**numbers), finetune=Finetune(**numbers))
    model = lz.linearize(tiny_llama, [lz.Hybrid(window=8)] * 3, dtype=torch.bfloat16).cuda()
    before = {n: p.clone() for n, p in model.named_parameters() if is_new_parameter(n)}
    text = [" ".join(str(i * i % 97) for i in range(4000))]
    model = run(model, tokenizer=tiny_tokenizer, data=text, recipe=recipe, output_dir=tmp_path / "out", progress=False)
    for name, parameter in model.named_parameters():
        if is_new_parameter(name):
            assert parameter.dtype == torch.float32 and parameter.isfinite().all()
            assert not torch.equal(parameter, before[name]), f"{name} did not move"
        else:
            assert parameter.dtype == torch.bfloat16
