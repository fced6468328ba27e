"""The laws that depend on the family, for every family and the variants its checkpoints come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import lizardzoo as lz
from lizardzoo.adapters import ADAPTERS
from lizardzoo.config import MixerSpec
from tests.adapters.students import distance, past, student, tokens

COMMON: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, head_dim=16),
    "llama, biases, tied": LlamaConfig(**COMMON, attention_bias=True, tie_word_embeddings=True),
    "llama 3 rope": LlamaConfig(**COMMON, head_dim=16, rope_parameters=LLAMA3_ROPE),
    "llama, yarn": LlamaConfig(**COMMON, rope_parameters=YARN),
    "llama, linear rope": LlamaConfig(**COMMON, rope_parameters=LINEAR),
    "mistral": MistralConfig(**COMMON, head_dim=16, sliding_window=None),
    "mistral, sliding": MistralConfig(**COMMON, sliding_window=12),
    "qwen2": Qwen2Config(**COMMON),
    "qwen2, sliding above": Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=12, max_window_layers=2),
    "qwen3": Qwen3Config(**COMMON, head_dim=16),
    "qwen3, sliding above": Qwen3Config(
        **COMMON, head_dim=32, use_sliding_window=True, sliding_window=12, max_window_layers=2
    ),
}
MIXED: list[MixerSpec] = [lz.Hybrid(window=6, keep=2), lz.Softmax(), lz.Softmax(), lz.Window(window=9)]
every_family = pytest.mark.parametrize("name", CONFIGS)


def make_teacher(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.3)  # they start at zero, where a forgotten one goes unseen
            if parameter_name.endswith("_norm.weight"):
                parameter.uniform_(0.5, 1.5)
    return model


def test_every_registered_family_is_tried() -> None:
    assert set(ADAPTERS.names()) == {config.model_type for config in CONFIGS.values()}


@every_family
def test_softmax_everywhere_is_the_teacher_bit_for_bit(name: str) -> None:
    teacher, ids = make_teacher(name), tokens(2, 40)
    model = lz.linearize(teacher, "softmax")
    assert model.config.own_layer_types == getattr(teacher.config, "layer_types", model.config.own_layer_types)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, teacher(ids).logits)
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        teacher.set_attn_implementation(implementation)
        with torch.no_grad():
            assert torch.equal(model(ids).logits, teacher(ids).logits)


@every_family
def test_a_prompt_within_the_window_is_answered_as_by_the_teacher(name: str) -> None:
    teacher, ids = make_teacher(name), tokens(2, 12)  # the sliding ones see no further either
    with torch.no_grad():
        expected = teacher(ids).logits
        for spec in (lz.Hybrid(window=12), lz.Window(window=12, keep=0)):
            assert distance(lz.linearize(teacher, spec)(ids).logits, expected) < 1e-5
        with lz.softmax_mode(model := student(teacher, MIXED)):
            long = tokens(2, 40)
            assert torch.equal(model(long, use_cache=False).logits, teacher(long).logits)


@every_family
def test_cached_padded_and_generated_alike(name: str) -> None:
    model, ids = student(make_teacher(name), MIXED), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
        cache, pieces = DynamicCache(config=model.config), []
        for start, end in ((0, 5), (5, 6), (6, 23), (23, 40)):
            pieces.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions[:, start:end],
                    **past(cache),
                ).logits
            )
        alone = model(ids[:1, 7:]).logits
    real = mask.bool()
    assert distance(torch.cat(pieces, 1)[real], full[real]) <= 1e-5
    assert distance(full[0, 7:], alone[0]) <= 1e-5
    options: dict[str, Any] = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    assert torch.equal(cached[:1, 7:], model.generate(ids[:1, 7:], **options))
    assert torch.equal(cached[1:], model.generate(ids[1:], prompt_lookup_num_tokens=2, **options))


@every_family
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_cache_goes_in_by_its_old_name_too(name: str) -> None:
    model, ids = student(make_teacher(name), MIXED).model, tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        old, new = (DynamicCache(config=model.config) for _ in range(2))
        for end in (8, 9):
            call = {"input_ids": ids[:, old.get_seq_length() : end], "attention_mask": mask[:, :end]}
            assert torch.equal(model(**call, past_key_values=old)[0], model(**call, **past(new))[0])


@every_family
def test_documents_train_and_travel(name: str, tmp_path: Path) -> None:
    model = student(make_teacher(name), MIXED)
    a, b = tokens(1, 20), tokens(1, 20, seed=4)
    restart = torch.arange(20).repeat(2)[None]
    with torch.no_grad():
        packed = model(torch.cat([a, b], 1), position_ids=restart).logits
        assert distance(packed[:, 20:], model(b).logits) <= 1e-5
        model.save_pretrained(tmp_path)
        assert torch.equal(lz.from_pretrained(tmp_path)(a).logits, model(a).logits)
    model(a, labels=a, use_cache=False).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@every_family
def test_diagnosis_selection_and_chunked_evaluation_know_the_family(name: str) -> None:
    """They reach into attentions by name, and read a text through caches."""
    teacher = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    text = tokens(2, 32)
    model = student(teacher, MIXED)
    found = lz.diagnose(model, text, teacher=teacher)
    assert [layer.layer for layer in found.layers] == [0, 3]
    own = lz.diagnose(model, text)
    for a, b in zip(found.layers, own.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)
        assert all(0 < error < 10 for error in a.error)
    near = found.layers[0].teacher_shares["window"]
    assert all(0 < share <= 1 for share in near)
    selection = lz.select_layers(model, text, keep=4, teacher=teacher)
    assert selection.curve[-1] == pytest.approx(0, abs=1e-6)
    assert selection.curve[0] > 1e-4
    whole, chunked = (
        lz.evaluate.by_position(model, text, teacher=teacher, chunk_size=size).overall for size in (32, 5)
    )
    assert whole.perplexity == pytest.approx(chunked.perplexity, rel=1e-4)
    assert whole.kl == pytest.approx(chunked.kl, rel=1e-3)
