"""A linearized model behaves as a transformers model: cached = full, padded = alone, every way to generate."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters.base import CACHE_KEYWORD
from lizardzoo.cache import cache_bytes, kv_bytes, state_bytes
from lizardzoo.kernels.state import state_tensors
from tests.adapters.students import LAYERS, distance, past, student, tokens

EXACT = 1e-5  # relative to the largest logit, fp32
every_mixer = pytest.mark.parametrize("name", LAYERS)
reuses_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids as `generate` makes them."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def greedy(model: Any, ids: torch.Tensor, count: int = 12, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, do_sample=False, **options)  # type: ignore[no-any-return]


@every_mixer
@reuses_fixtures
@given(data=st.data())
def test_cached_equals_full_under_every_split(tiny_llama: Any, name: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(2, 30))
    ids = tokens(2, length, data.draw(st.integers(0, 99)))
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, length - 1))] = 0
    edges = sorted({0, length, *data.draw(st.sets(st.integers(1, length)))})
    model = student(tiny_llama, LAYERS[name])
    with torch.no_grad():
        full = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        cache, pieces = DynamicCache(config=model.config), []
        for start, end in itertools.pairwise(edges):
            pieces.append(
                model(
                    ids[:, start:end],
                    attention_mask=mask[:, :end],
                    position_ids=positions(mask)[:, start:end],
                    **past(cache),
                ).logits
            )
    real = mask.bool()
    assert distance(torch.cat(pieces, 1)[real], full[real]) <= EXACT
    assert cache.get_seq_length() == length


@every_mixer
def test_a_left_padded_batch_equals_its_rows_alone(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    ids = tokens(3, 20)
    mask = torch.ones_like(ids)
    mask[0, :7], mask[1, :19] = 0, 0
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, position_ids=positions(mask)).logits
        continued = greedy(model, ids, attention_mask=mask)
        for row in range(3):
            real = mask[row].bool()
            alone = ids[row : row + 1, real]
            assert distance(padded[row, real], model(alone).logits[0]) <= EXACT
            assert torch.equal(continued[row, 20:], greedy(model, alone)[0, alone.shape[1] :])


@every_mixer
def test_every_way_to_generate_agrees_with_the_uncached_one(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    ids = tokens(2, 17)
    plain = greedy(model, ids, use_cache=False)
    assert torch.equal(greedy(model, ids), plain)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=5), plain)
    assert torch.equal(greedy(model, ids[:1], prompt_lookup_num_tokens=3), plain[:1])
    assert torch.equal(
        greedy(model, ids, num_beams=3, num_return_sequences=2),
        greedy(model, ids, num_beams=3, num_return_sequences=2, use_cache=False),
    )
    sampled = []
    for cached in (True, False):
        torch.manual_seed(7)
        sampled.append(model.generate(ids, max_new_tokens=12, do_sample=True, use_cache=cached))
    assert torch.equal(*sampled)


@every_mixer
def test_a_conversation_goes_on_from_its_cache(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    cache = DynamicCache(config=model.config)
    first = greedy(model, tokens(1, 9), **past(cache))
    second = torch.cat([first, tokens(1, 6, seed=2)], 1)
    assert torch.equal(greedy(model, second, **past(cache)), greedy(model, second, use_cache=False))


@every_mixer
@reuses_fixtures
@given(data=st.data())
def test_crop_rolls_back_what_was_recorded(tiny_llama: Any, name: str, data: st.DataObject) -> None:
    ids = tokens(2, 30)
    model = student(tiny_llama, LAYERS[name])
    prompt, steps = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    calls = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    remove = data.draw(st.integers(0, sum(calls)))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :prompt], **past(cache))
        for end in range(prompt, prompt + steps):  # in place: nothing is recorded yet
            model(ids[:, end : end + 1], **past(cache))
        cache.activate_past_recording()
        end = prompt + steps
        for call in calls:
            model(ids[:, end : end + call], **past(cache))
            end += call
        cache.crop(-torch.tensor(remove) if remove else 0)  # prompt lookup passes a tensor
        assert cache.get_seq_length() == end - remove
        after = model(ids[:, end - remove :], **past(cache)).logits
        full = model(ids, use_cache=False).logits
    assert distance(after, full[:, end - remove :]) <= EXACT


@every_mixer
def test_a_decode_step_moves_no_state_unless_it_may_be_undone(tiny_llama: Any, name: str) -> None:
    model, ids = student(tiny_llama, LAYERS[name]), tokens(2, 12)

    def states(cache: Any) -> list[torch.Tensor]:
        return [x for layer in cache.layers for x in state_tensors(getattr(layer, "state", None))]

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
        assert distance(logits, model(ids, use_cache=False).logits[:, 11:]) <= EXACT
    assert len(made_by_inference) == len(before)


def test_crop_without_a_record_is_refused(tiny_llama: Any) -> None:
    model = student(tiny_llama, LAYERS["hybrid"])
    cache = model(tokens(1, 9))[CACHE_KEYWORD]
    with pytest.raises(LizardzooError, match="activate_past_recording"):
        cache.crop(-2)


@every_mixer
def test_beams_and_batches_can_be_reordered(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    ids, more = tokens(3, 14), tokens(3, 4, seed=3)
    order = torch.tensor([2, 0, 0])
    with torch.no_grad():
        cache = model(ids)[CACHE_KEYWORD]
        cache.reorder_cache(order)
        expected = model(torch.cat([ids[order], more], 1), use_cache=False).logits[:, 14:]
        assert distance(model(more, **past(cache)).logits, expected) <= EXACT
        cache = model(ids)[CACHE_KEYWORD]
        cache.batch_select_indices(torch.tensor([1]))
        cache.batch_repeat_interleave(3)
        expected = model(torch.cat([ids[[1, 1, 1]], more], 1), use_cache=False).logits[:, 14:]
        assert distance(model(more, **past(cache)).logits, expected) <= EXACT


@pytest.mark.parametrize("name", [name for name in LAYERS if "softmax" not in name])
def test_generation_memory_does_not_grow_with_the_length(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    with torch.no_grad():
        short, long = (cache_bytes(model(tokens(2, n))[CACHE_KEYWORD]) for n in (12, 100))
    softmax = model.config.layer_types.count("full_attention")
    assert long - short == kv_bytes(model, 88, batch=2)
    assert short - kv_bytes(model, 12, batch=2) == state_bytes(model, batch=2)
    assert kv_bytes(tiny_llama, 100) * softmax == kv_bytes(model, 100) * 3


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


@every_mixer
def test_packed_documents_are_isolated(tiny_llama: Any, name: str) -> None:
    model = student(tiny_llama, LAYERS[name])
    a, b = tokens(1, 13), tokens(1, 17, seed=5)
    ids = torch.cat([a, b], 1)
    restart = torch.cat([torch.arange(13), torch.arange(17)])[None]
    with torch.no_grad():
        packed = model(ids, position_ids=restart).logits
        assert distance(packed[:, :13], model(a).logits) <= EXACT
        assert distance(packed[:, 13:], model(b).logits) <= EXACT
        assert distance(model(ids).logits[:, 13:], model(b).logits) > EXACT
    with pytest.raises(LizardzooError, match="pass use_cache=False"):
        model(ids, position_ids=restart, use_cache=True)


@every_mixer
def test_gradient_checkpointing_changes_no_gradient(tiny_llama: Any, name: str) -> None:
    ids = tokens(2, 20)
    gradients = []
    for checkpointing in (False, True):
        model = student(tiny_llama, LAYERS[name]).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable()
            name = "is_activation_checkpointing"  # since transformers 5.20
            assert getattr(model, name if hasattr(type(model), name) else "is_gradient_checkpointing")
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient is not None and torch.allclose(gradient, gradients[1][parameter], atol=1e-6)


def test_masks_that_do_not_fit_are_refused(tiny_llama: Any) -> None:
    model = student(tiny_llama, LAYERS["hybrid"])
    ids = tokens(2, 8)
    with pytest.raises(LizardzooError, match="arbitrary attention patterns need softmax"):
        model(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(LizardzooError, match=r"attention_mask is \[2, 7\], expected \[2, 8\]"):
        model(ids, attention_mask=torch.ones(2, 7))
    with pytest.raises(LizardzooError, match=r"DynamicCache\(config=model.config\)"):
        model(ids, **past(DynamicCache()))


def test_softmax_mode_is_the_teacher(tiny_llama: Any) -> None:
    model, ids = student(tiny_llama, LAYERS["mixed"]), tokens(2, 30)
    with torch.no_grad():
        with lz.softmax_mode(model):
            assert torch.equal(model(ids, use_cache=False).logits, tiny_llama(ids).logits)
        assert distance(model(ids).logits, tiny_llama(ids).logits) > 1e-3
