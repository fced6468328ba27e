"""Low-rank updates: merged alike everywhere, kept only where they give back the very matrix."""

from __future__ import annotations

import json
import re
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.distill import Finetune
from lizardzoo.distill.lora import merge_lora, with_lora
from lizardzoo.hub import low_rank
from lizardzoo.hub.low_rank import LOW_RANK, LowRank, pack, read
from tests.hub.conftest import command
from tests.hub.server import LoopbackHub
from tests.hub.test_round_trip import logits

MATRIX = "model.layers.0.self_attn.q_proj.weight"


def update(out: int, inside: int, rank: int, dtype: torch.dtype) -> LowRank:
    return LowRank(torch.randn(rank, inside), torch.randn(out, rank), dtype)


@given(
    out=st.integers(1, 9),
    inside=st.integers(1, 9),
    rank=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    block=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_merge_is_the_exact_sum_rounded_once_whatever_the_block(
    out: int, inside: int, rank: int, dtype: torch.dtype, block: int, seed: int
) -> None:
    """Against rational numbers: float64's own rounding is too small to be seen in a matrix of these dtypes."""
    torch.manual_seed(seed)
    found, weight = update(out, inside, rank, dtype), torch.randn(out, inside).to(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_rank, "BLOCK", block)
        merged = found.merged(weight)
    assert merged.dtype == dtype
    for i in range(out):
        for j in range(inside):
            products = (Fraction(b.item()) * Fraction(a.item()) for a, b in zip(found.a[:, j], found.b[i], strict=True))
            exact = Fraction(weight[i, j].item()) + sum(products, Fraction())
            assert merged[i, j] == torch.tensor(float(exact), dtype=torch.float64).to(dtype)


@pytest.fixture
def final(measured: Path, tiny_folder: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of what was distilled, of org/base; alice is logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.put("org/base", {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
    folder = Path(shutil.copytree(measured / "run" / "final", tmp_path / "final"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base"}))
    return folder


def saved(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, LowRank]]:
    """What a difference holds; base and difference are the model."""
    model.save_difference(folder)
    assert torch.equal(logits(lz.from_pretrained(folder)), logits(model))
    return read(folder / "difference.safetensors")


def test_what_finetune_merged_goes_as_factors_and_loads_bit_for_bit(final: Path, tmp_path: Path) -> None:
    model = lz.from_pretrained(final)
    whole, updates = saved(model, tmp_path / "d")
    targets = {name for name in model.state_dict() if re.search(r"\.[qkvo]_proj\.weight$", name)}
    assert updates.keys() == targets == model.low_rank_updates.keys()
    assert all(".mixer." in name for name in whole)
    again = lz.from_pretrained(tmp_path / "d")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert saved(again, tmp_path / "e")[1].keys() == targets  # a difference of a difference is as small
    model.save_pretrained(tmp_path / "whole")
    assert saved(lz.from_pretrained(tmp_path / "whole"), tmp_path / "f")[1].keys() == targets


def test_what_has_moved_since_goes_whole(final: Path, tmp_path: Path) -> None:
    model = lz.from_pretrained(final)
    with torch.no_grad():
        model.get_parameter(MATRIX)[0, 0] += 2**-10
    whole, updates = saved(model, tmp_path / "d")
    assert MATRIX in whole
    assert MATRIX not in updates
    assert len(updates) == len(model.low_rank_updates) - 1
    (final / LOW_RANK).unlink()
    whole, updates = saved(lz.from_pretrained(final), tmp_path / "e")
    assert updates == {}
    assert MATRIX in whole


def test_a_bf16_student_of_an_fp32_base_is_as_small(final: Path, tmp_path: Path) -> None:
    model = lz.linearize("org/base", ["hybrid", "softmax", "window"], dtype=torch.bfloat16)
    lora = with_lora(model, Finetune(steps=1, lora_rank=3, lora_alpha=7.0))  # no power of two
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.low_rank_updates = merge_lora(model)
    lora.unload()
    whole, updates = saved(model, tmp_path / "d")
    assert updates.keys() == model.low_rank_updates.keys()
    assert len(updates) == 12
    assert all(".mixer." in name for name in whole)


def test_a_model_cast_after_its_training_stays_low_rank(final: Path, tmp_path: Path) -> None:
    model = lz.from_pretrained(final, dtype=torch.bfloat16)
    model.config.base_model_name_or_path = "org/base"
    assert saved(model, tmp_path / "d")[1].keys() == model.low_rank_updates.keys()


def test_the_command_line_sends_factors_and_leaves_them_out_of_a_whole_model(
    hub: LoopbackHub, final: Path, tmp_path: Path
) -> None:
    expected = logits(lz.from_pretrained(final))
    command("push", final, "alice/small", "--difference")
    command("push", final, "alice/whole")
    small, whole = hub.files("alice/small"), hub.files("alice/whole")
    assert len(small["difference.safetensors"]) < 0.6 * len(whole["model.safetensors"])
    (tmp_path / "read.safetensors").write_bytes(small["difference.safetensors"])
    assert MATRIX in read(tmp_path / "read.safetensors")[1]
    assert LOW_RANK in {path.name for path in final.iterdir()}
    assert LOW_RANK not in whole
    for name in ("alice/small", "alice/whole"):
        assert torch.equal(logits(lz.from_pretrained(name)), expected)


def merged_in(updates: dict[str, LowRank], **changes: Any) -> dict[str, str]:
    """A file's metadata."""
    return {"merged_in": json.dumps(dict.fromkeys(updates, "float32") | changes)}


def test_factors_that_are_no_update_are_refused_in_a_sentence(final: Path, tmp_path: Path) -> None:
    lz.from_pretrained(final).save_difference(tmp_path / "d")
    path = tmp_path / "d" / "difference.safetensors"
    whole, updates = read(path)
    tensors, metadata = pack(updates)
    tensors |= whole
    a, b = f"{MATRIX}.lora_A", f"{MATRIX}.lora_B"
    mixers = next(name for name, tensor in whole.items() if tensor.ndim == 2)
    bare = {name: tensor for name, tensor in tensors.items() if name != mixers}
    factors = {
        f"{mixers}.lora_A": torch.ones(1, whole[mixers].shape[1]),
        f"{mixers}.lora_B": torch.ones(len(whole[mixers]), 1),
    }
    wrong: list[tuple[dict[str, torch.Tensor], dict[str, str], str]] = [
        ({name: tensor for name, tensor in tensors.items() if name != b}, metadata, f"does not hold {MATRIX} once"),
        (tensors | {b: tensors[b][:, :1].contiguous()}, metadata, f"does not hold {MATRIX} once"),
        (tensors | {a: tensors[a][0].contiguous()}, metadata, f"does not hold {MATRIX} once"),
        (tensors | {MATRIX: torch.ones(64, 48)}, metadata, "and the whole"),
        (tensors | {b: tensors[b][:8].contiguous()}, metadata, rf"1 of another shape \(first: {MATRIX}\)"),
        (
            tensors | {"x.lora_A": tensors[a].clone(), "x.lora_B": tensors[b].clone()},
            merged_in(updates, x="float32"),
            r"1 unexpected \(first: x\)",
        ),
        (tensors | {a: tensors[a].half()}, metadata, "as factors in torch.float16 and torch.float32"),
        (tensors, merged_in(updates, **{MATRIX: "int8"}), "merged in 'int8'"),
        (tensors, merged_in(updates, **{MATRIX: ["float32"]}), "merged in \\['float32'\\]"),
        (tensors, {"format": "pt"}, "merged in None"),
        (tensors, {"merged_in": "[1]"}, "its metadata 'merged_in' is no JSON object"),
        (tensors, {"merged_in": "{"}, "its metadata 'merged_in' is no JSON object"),
        (bare | factors, merged_in(updates, **{mixers: "float32"}), "but its base has no such parameter"),
    ]
    for content, told, message in wrong:
        save_file(content, path, metadata=told)
        with pytest.raises(LizardzooError, match=message) as error:
            lz.from_pretrained(tmp_path / "d")
        assert "\n" not in str(error.value)
    for content in (b"", (final / LOW_RANK).read_bytes()[:-9]):
        (final / LOW_RANK).write_bytes(content)
        with pytest.raises(LizardzooError, match=rf"{LOW_RANK} is damaged or cut short"):
            lz.from_pretrained(final)


def test_an_older_models_updates_do_not_stay_beside_a_new_one(final: Path, tiny_llama: Any) -> None:
    assert load_file(final / LOW_RANK)
    lz.linearize(tiny_llama).save_pretrained(final)
    assert not (final / LOW_RANK).exists()
