"""A model whose layers lie on several devices: states lie where their layers do, and flags of tokens come to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import lizardzoo as lz
from lizardzoo.kernels.state import state_tensors
from lizardzoo.testing.conformance.case import greedy
from tests.adapters.students import LAYERS, distance, past, student, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() == 1, reason="there is one CUDA device here, and this needs two"),
]
PLACES = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.layers.2": 0, "model.norm": 0,
          "model.rotary_emb": 0, "lm_head": 0}  # fmt: skip


@pytest.mark.parametrize("beyond", [False, True], ids=["", "beyond the positions"])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_on_two_devices_answer_as_on_one(tiny_llama: Any, tmp_path: Path, name: str, beyond: bool) -> None:
    """Padded, cached and generating; also where kept tokens are turned, from 24 positions on."""
    student(tiny_llama, LAYERS[name]).save_pretrained(tmp_path)
    one, two = (lz.from_pretrained(tmp_path, device_map=places) for places in ({"": 0}, PLACES))
    assert {p.device.index for p in two.parameters()} == {0, 1}
    for model in (one, two):
        model.config.max_position_embeddings = 24 if beyond else 512
    ids = tokens(2, 40).cuda(0)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with torch.no_grad():
        full = one(ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        assert distance(two(ids, attention_mask=mask, use_cache=False).logits[mask.bool()], full) <= 1e-5
        cache, whole = DynamicCache(config=two.config), one(ids, use_cache=False).logits
        parts = [two(part, **past(cache)).logits for part in ids.split([30, 1, 1, 8], 1)]
    assert distance(torch.cat(parts, 1), whole) <= 1e-5
    for index, layer in enumerate(cache.layers):
        assert all(x.device.index == index % 2 for x in state_tensors(getattr(layer, "state", None)))
    for implementation in ("dynamic", "static"):
        options = {"attention_mask": mask, "cache_implementation": implementation, "disable_compile": True}
        assert torch.equal(greedy(two, ids, **options), greedy(one, ids, **options)), implementation
