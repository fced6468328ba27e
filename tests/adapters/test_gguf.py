"""A checkpoint is linearized from a folder and from a GGUF file alike, by the same call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf.quants import quantize

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters import is_new_parameter
from lizardzoo.testing import tiny_teacher
from tests.adapters.students import distance, tokens

LAYERS = [lz.Hybrid(window=6, keep=1), lz.Softmax(), lz.Window(window=8)]
FAMILIES = ["qwen2", "qwen3"]


def teacher(family: str) -> Any:
    """Of sizes that GGUF's blocks of 32 divide; head_dim is what transformers takes a GGUF's Qwen3 to have."""
    return tiny_teacher(family, hidden_size=64, head_dim={"qwen2": 16, "qwen3": 128}[family])


def write_gguf(model: Any, path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """A model as llama.cpp's converter writes it: matrices in `kind`, all else in fp32."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    arch = {"qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}[config.model_type]
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data, own = tensor.numpy(), kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), quantize(data, own),
                          raw_dtype=own)  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_and_a_gguf_file_are_linearized_alike(family: str, tmp_path: Path) -> None:
    model, file = teacher(family), tmp_path / "model.gguf"
    model.save_pretrained(tmp_path / "folder")
    write_gguf(model, file, gguf.GGMLQuantizationType.F32)
    ids = tokens(2, 30)
    expected = lz.linearize(model, LAYERS)
    for source in (tmp_path / "folder", file, str(file)):
        student = lz.linearize(source, LAYERS)
        assert type(student) is type(expected)
        for name, parameter in student.state_dict().items():
            assert torch.equal(parameter, expected.state_dict()[name]), f"{name} of {source}"
        assert distance(student(ids).logits, expected(ids).logits) <= 1e-6
        assert student.config.base_model_name_or_path == str(source)
        student.save_pretrained(tmp_path / "student")
        assert lz.from_pretrained(tmp_path / "student").config.specs == LAYERS


@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_weights_become_plain_ones(family: str, tmp_path: Path) -> None:
    """Q8_0 keeps 8 bits of a number; the dtype is a choice, and the student can be saved and trained."""
    file = tmp_path / "model.gguf"
    write_gguf(teacher(family), file, gguf.GGMLQuantizationType.Q8_0)
    student, ids = lz.linearize(file, LAYERS, dtype=torch.bfloat16), tokens(2, 30)
    for name, parameter in student.named_parameters():
        assert parameter.dtype == (torch.float32 if is_new_parameter(name) else torch.bfloat16)
    assert 0 < distance(student(ids).logits.float(), lz.linearize(teacher(family), LAYERS)(ids).logits) < 0.1
    student(ids, labels=ids).loss.backward()
    student.save_pretrained(tmp_path / "student")
    assert torch.equal(lz.from_pretrained(tmp_path / "student").lm_head.weight, student.lm_head.weight)
    with pytest.raises(LizardzooError, match=r"is a GGUF file, which holds no linearized model; make one with"):
        lz.from_pretrained(file)


def test_a_checkpoint_without_all_weights_is_refused(tmp_path: Path) -> None:
    """transformers fills the holes with random numbers, and says so in its log."""
    model, weights = teacher("qwen3"), "model.layers.1.mlp.up_proj.weight"
    whole = model.state_dict()
    model.save_pretrained(tmp_path, state_dict={name: tensor for name, tensor in whole.items() if name != weights})
    with pytest.raises(LizardzooError, match=f"lacks 1 of its parameters .*{weights}"):
        lz.linearize(tmp_path)


def test_weights_of_other_shapes_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    write_gguf(tiny_teacher("qwen3", head_dim=16), file, gguf.GGMLQuantizationType.F32)
    with pytest.raises(LizardzooError, match="shape"):
        lz.linearize(file)


def test_a_folder_may_be_named_as_a_file_is(tmp_path: Path) -> None:
    lz.linearize(teacher("qwen2"), LAYERS).save_pretrained(tmp_path / "student.gguf")
    assert lz.from_pretrained(tmp_path / "student.gguf").config.specs == LAYERS


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LizardzooError, match="there is no GGUF file"):
        lz.linearize(tmp_path / "no.gguf")
    (tmp_path / "text.gguf").write_text("a text of some length, and no model in it at all")
    with pytest.raises(LizardzooError, match=r"cannot read the GGUF file .*text\.gguf"):
        lz.linearize(tmp_path / "text.gguf")
