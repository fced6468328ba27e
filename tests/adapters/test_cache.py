"""What the laws of the conformance suite do not see of caches: where states lie, what they weigh, old names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

import lizardzoo as lz
from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.cache import cache_bytes, kv_bytes, state_bytes
from lizardzoo.kernels.state import state_tensors
from tests.adapters.families import FAMILIES, VARIANTS, teacher
from tests.adapters.students import LAYERS, distance, past, student, tokens


def states(cache: Any) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in state_tensors(getattr(layer, "state", None))]


@pytest.mark.parametrize("name", LAYERS)
def test_a_decode_step_moves_no_state_unless_it_may_be_undone(tiny_llama: Any, name: str) -> None:
    model, ids = student(tiny_llama, LAYERS[name]), tokens(2, 12)
    with torch.inference_mode():
        cache = model(ids[:, :9])[CACHE_KEYWORD]
        made_by_inference = states(cache)
    with torch.no_grad():
        model(ids[:, 9:10], **past(cache))  # inference tensors cannot be overwritten here
        assert not any(x.is_inference() for x in states(cache))
        before = states(cache)
        model(ids[:, 10:11], **past(cache))
        assert all(a is b for a, b in zip(before, states(cache), strict=True))
        copies = [x.clone() for x in before]
        cache.activate_past_recording()
        logits = model(ids[:, 11:], **past(cache)).logits
        assert all(torch.equal(a, b) for a, b in zip(before, copies, strict=True))
        assert distance(logits, model(ids, use_cache=False).logits[:, 11:]) <= 1e-5
    assert len(made_by_inference) == len(before)


@pytest.mark.parametrize("name", LAYERS)
def test_a_static_cache_never_moves(tiny_llama: Any, name: str) -> None:
    """Prompt, pieces, steps, undone ones and reordered rows: the state and the length stay at their first addresses."""
    model, ids = student(tiny_llama, LAYERS[name]), tokens(2, 20)
    cache = StaticCache(config=model.config, max_cache_len=24)
    rows = torch.tensor([1, 0])
    with torch.no_grad():
        model(ids[:, :8], **past(cache))
        tensors = [*states(cache), *(layer.cumulative_length for layer in cache.layers)]
        model(ids[:, 8:11], **past(cache))
        model(ids[:, 11:12], **past(cache))
        cache.activate_past_recording()
        model(ids[:, 12:17], **past(cache))
        undone = 3 if all(hasattr(layer, "crop") for layer in cache.layers) else 0  # of softmax not in 5.17
        if undone:
            cache.crop(-undone)
        cache.reorder_cache(rows)
        answer = model(ids[rows, 17 - undone :], **past(cache)).logits
        full = model(ids[rows], use_cache=False).logits
    after = [*states(cache), *(layer.cumulative_length for layer in cache.layers)]
    assert all(a is b for a, b in zip(tensors, after, strict=True))
    assert int(cache.get_seq_length()) == 20
    assert distance(answer, full[:, 17 - undone :]) <= 1e-5


class Stream:
    """Of copies, on a machine that has none."""

    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_stream(self, other: Any) -> None: ...


@pytest.mark.parametrize("layers", ["sms", "mms", "smm", "msm", "sss", "mmm"])
@pytest.mark.parametrize("static", [False, True])
def test_an_offloaded_cache_has_each_layers_keys_where_they_are_needed(
    tiny_llama: Any, monkeypatch: pytest.MonkeyPatch, layers: str, static: bool
) -> None:
    """Here they are hidden in place of being sent to another device; a layer that asks too early fails."""

    def offload(layer: Any) -> None:
        layer.aside, layer.keys, layer.values = (layer.keys, layer.values), None, None

    def prefetch(layer: Any) -> None:
        if getattr(layer, "aside", None) is not None:
            (layer.keys, layer.values), layer.aside = layer.aside, None

    kind = StaticLayer if static else DynamicLayer
    monkeypatch.setattr(kind, "offload", offload)
    monkeypatch.setattr(kind, "prefetch", prefetch)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    model, ids = student(tiny_llama, [lz.Softmax() if c == "s" else lz.Hybrid(window=5) for c in layers]), tokens(2, 20)
    config = {"config": model.config}
    cache = StaticCache(max_cache_len=24, **config) if static else DynamicCache(**config)
    cache.offloading, cache.only_non_sliding, cache.prefetch_stream = True, True, Stream()
    with torch.no_grad():
        parts = [model(part, **past(cache)).logits for part in ids.split([9, 1, 1, 6, 1, 2], 1)]
        assert distance(torch.cat(parts, 1), model(ids, use_cache=False).logits) <= 1e-5
    there = [layer.keys is not None for layer in cache.layers if isinstance(layer, kind)]
    assert sum(there) <= 1, "at most the next one is brought back"


def test_the_cache_of_kept_softmax_weighs_its_share(tiny_llama: Any) -> None:
    model = student(tiny_llama, LAYERS["mixed"])
    with torch.no_grad():
        short, long = (cache_bytes(model(tokens(2, n))[CACHE_KEYWORD]) for n in (12, 100))
    assert long - short == kv_bytes(model, 88, batch=2) == kv_bytes(tiny_llama, 88, batch=2) / 3


@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_a_cache_weighs_what_is_foretold(name: str) -> None:
    """Layers with a sliding window of their own hold that many tokens; the foretold bytes are those of a long text."""
    model = student(teacher(name), [lz.Softmax(), lz.Window(window=4), lz.Softmax()])
    for one in (teacher(name), model):
        cache, ids = DynamicCache(config=one.config), tokens(2, 45)
        with torch.no_grad():
            for part in (ids[:, :44], ids[:, 44:]):  # behind a step nothing is held that slid out of the window
                one(part, **past(cache))
        states = state_bytes(model, batch=2) if one is model else 0
        assert cache_bytes(cache) - states == kv_bytes(one, 45, batch=2)


def test_a_disjoint_hybrid_holds_its_window_once(tiny_llama: Any) -> None:
    """k and v of the window, pre-RoPE k for the memory: three tensors of window x Hkv x D, after beams too."""
    model = student(tiny_llama, [lz.Hybrid(window=64, keep=0)] * 3)
    with torch.no_grad():
        cache = model(tokens(2, 70))[CACHE_KEYWORD]
    ring = 2 * 64 * 2 * 16 * 4
    before = cache_bytes(cache)
    memory = 2 * 2 * 32 * (16 + 2) * 4  # kv, norm and scale
    assert 3 * ring + memory <= before / 3 < 3.2 * ring + memory
    cache.reorder_cache(torch.tensor([1, 0]))
    assert cache_bytes(cache) == before


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_a_cache_goes_in_by_its_old_name_too(name: str) -> None:
    model, ids = student(teacher(name), LAYERS["mixed"]).model, tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with torch.no_grad():
        old, new = (DynamicCache(config=model.config) for _ in range(2))
        for end in (8, 9):
            call = {"input_ids": ids[:, old.get_seq_length() : end], "attention_mask": mask[:, :end]}
            assert torch.equal(model(**call, past_key_values=old)[0], model(**call, **past(new))[0])


def test_a_padded_prompt_makes_no_square_mask_where_no_softmax_is_kept(tiny_llama: Any) -> None:
    """[B, 1, T, T] would be the end of linear memory."""
    masks: list[Any] = []
    for layers in (LAYERS["hybrid"], LAYERS["mixed"]):
        model = student(tiny_llama, layers)
        model.attentions()[0].register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
        mask = torch.ones(2, 30, dtype=torch.long)
        mask[0, :9] = 0
        model(tokens(2, 30), attention_mask=mask)
    assert [mask.shape[-1] for mask in masks] == [0, 30]


def test_softmax_beside_the_mixers_without_a_mask_is_an_error(tiny_llama: Any) -> None:
    """A hook that calls it in a pass of mixers would get attention to the future: there is no causal mask."""
    for implementation in ("sdpa", "eager"):
        tiny_llama.set_attn_implementation(implementation)
        model = student(tiny_llama, LAYERS["hybrid"])
        model.attentions()[1].register_forward_hook(
            lambda module, args, kwargs, output: module.softmax_forward(*args, **kwargs), with_kwargs=True
        )
        with pytest.raises(RuntimeError, match="size"):
            model(tokens(2, 12), use_cache=False)
