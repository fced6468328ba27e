"""Laws of the forward pass: the teacher's answers where they are promised, caches, padding, what a call may ask for."""

from __future__ import annotations

import copy

import torch
from hypothesis import strategies as st
from transformers import DynamicCache

from lizardzoo.adapters import softmax_mode
from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.cache import cache_bytes, state_bytes
from lizardzoo.linearize import linearize
from lizardzoo.testing.conformance.case import (
    Case,
    assert_close,
    assert_same_tokens,
    greedy,
    logits,
    logits_in_pieces,
    model_law,
    new_cache,
    past,
    positions,
    refused,
)


@model_law
def softmax_is_the_teacher_bit_for_bit(data: st.DataObject, case: Case) -> None:
    """All layers softmax, or the student in softmax_mode: the teacher's logits, in eager and in sdpa attention."""
    ids = case.tokens(2, 30)
    teacher, kept, mixed = copy.deepcopy(case.teacher), linearize(case.teacher, "softmax"), case.copy()
    for implementation in ("sdpa", "eager"):
        for model in (teacher, kept, mixed):
            model.set_attn_implementation(implementation)
        assert linearize(teacher, case.layers).config._attn_implementation == implementation
        expected = logits(teacher, ids)
        assert torch.equal(logits(kept, ids), expected), f"softmax everywhere, {implementation}"
        with softmax_mode(mixed):
            assert torch.equal(logits(mixed, ids, use_cache=False), expected), f"softmax_mode, {implementation}"
            plain = greedy(teacher, ids, **past(DynamicCache()))
            assert_same_tokens(greedy(mixed, ids, **past(DynamicCache())), plain, "softmax_mode, generating")
            if mixed.mixers():
                with refused("DynamicCache()"):
                    mixed(ids)


@model_law
def in_a_short_text_the_student_is_the_teacher(data: st.DataObject, case: Case) -> None:
    """Up to the shortest `exact_within` of its mixers."""
    length = min([spec.exact_within for spec in case.layers if not spec.keeps_softmax] + [20])
    if length > 0:
        ids = case.tokens(2, length)
        assert_close(logits(case.student, ids), logits(case.teacher, ids), f"{length} tokens")


@model_law
def beyond_the_reach_of_its_layers_nothing_is_seen(data: st.DataObject, case: Case) -> None:
    """Where every layer has a `reach`, the first token is out of sight behind as many as they add up to."""
    reaches = [spec.reach for spec in case.layers]
    if None in reaches:
        return
    ids = case.tokens(2, 2 + sum(reach - 1 for reach in reaches if reach is not None))
    other = torch.cat([case.tokens(2, 1, seed=2), ids[:, 1:]], 1)
    assert not torch.equal(ids, other)
    assert_close(logits(case.student, other)[:, -1], logits(case.student, ids)[:, -1], f"token {ids.shape[1] - 1}")


@model_law
def cached_equals_full_under_every_split(data: st.DataObject, case: Case) -> None:
    """Token by token, in chunks, or anything between, left-padded or not."""
    length = data.draw(st.integers(2, 30))
    ids = case.tokens(2, length, data.draw(st.integers(0, 99)))
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, length - 1))] = 0
    full = logits(case.student, ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    drawn = sorted({0, length, *data.draw(st.sets(st.integers(1, length)))})
    for edges in (drawn, range(length + 1)):
        cache = new_cache(case.student)
        pieces = logits_in_pieces(case.student, ids, edges, mask, cache)
        assert cache.get_seq_length() == length
        assert_close(pieces[mask.bool()], full[mask.bool()], f"split at {list(edges)}")


@model_law
def a_padded_batch_equals_its_rows_alone(data: st.DataObject, case: Case) -> None:
    """Padding on the left, on the right, and (where no sliding softmax counts places) inside; batches of 1 as well."""
    batch, length = data.draw(st.integers(1, 3)), 24
    ids = case.tokens(batch, length)
    mask = torch.ones_like(ids)
    for row in range(batch):
        sides = ["left", "right"] + ([] if case.slides else ["inside"])
        side, padding = data.draw(st.sampled_from(sides)), data.draw(st.integers(1, length - 1))
        start = {"left": 0, "right": length - padding, "inside": (length - padding) // 2}[side]
        mask[row, start : start + padding] = 0
    padded = logits(case.student, ids, attention_mask=mask, position_ids=positions(mask))
    for row in range(batch):
        real = mask[row].bool()
        assert_close(padded[row, real], logits(case.student, ids[row : row + 1, real])[0], f"row {row} of {mask}")


@model_law
def a_cache_is_gone_on_from_and_copied(data: st.DataObject, case: Case) -> None:
    """A copy of a cache goes on by itself: two continuations of one prompt do not meet."""
    ids, ways = case.tokens(2, 15), [case.tokens(2, 6, seed=2 + i) for i in range(2)]
    cache = new_cache(case.student)
    logits(case.student, ids, **past(cache))
    caches = [copy.deepcopy(cache), cache]
    for t in range(6):  # in turn, a token each
        for way, held in zip(ways, caches, strict=True):
            answer = logits(case.student, way[:, t : t + 1], **past(held))
            full = logits(case.student, torch.cat([ids, way[:, : t + 1]], 1), use_cache=False)
            assert_close(answer, full[:, -1:], f"token {t}")


@model_law
def crop_rolls_back_what_was_recorded(data: st.DataObject, case: Case) -> None:
    """Behind any calls, of one token or more, any number of the last tokens is undone."""
    ids = case.tokens(2, 30)
    prompt, steps = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    # transformers 5.17 makes masks for one recorded call of its own sliding layers: what `generate` does
    calls = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=1 if case.slides else 3))
    remove = data.draw(st.integers(0, sum(calls)))
    cache = new_cache(case.student)
    logits(case.student, ids[:, :prompt], **past(cache))
    for end in range(prompt, prompt + steps):  # in place: nothing is recorded yet
        logits(case.student, ids[:, end : end + 1], **past(cache))
    cache.activate_past_recording()
    end = prompt + steps
    for call in calls:
        logits(case.student, ids[:, end : end + call], **past(cache))
        end += call
    cache.crop(-torch.tensor(remove) if remove else 0)  # prompt lookup passes a tensor
    assert cache.get_seq_length() == end - remove
    after = logits(case.student, ids[:, end - remove :], **past(cache))
    assert_close(after, logits(case.student, ids, use_cache=False)[:, end - remove :], f"{remove} of {calls} undone")


@model_law
def beams_and_batches_can_be_reordered(data: st.DataObject, case: Case) -> None:
    """reorder_cache, batch_select_indices and batch_repeat_interleave move rows and change none."""
    ids, more = case.tokens(3, 14), case.tokens(3, 4, seed=3)
    order = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
    for rows, move in (
        (order, lambda cache: cache.reorder_cache(order)),
        (order[:1].repeat(3), lambda cache: (cache.batch_select_indices(order[:1]), cache.batch_repeat_interleave(3))),
    ):
        cache = new_cache(case.student)
        logits(case.student, ids, **past(cache))
        move(cache)
        expected = logits(case.student, torch.cat([ids[rows], more], 1), use_cache=False)[:, 14:]
        assert_close(logits(case.student, more, **past(cache)), expected, f"rows {rows.tolist()}")


@model_law
def memory_grows_in_kept_softmax_layers_only(data: st.DataObject, case: Case) -> None:
    """Every mixer's state has its one size from the first token on, as `state_bytes` says."""
    sizes = []
    for length in (1, 12, 70):
        cache = new_cache(case.student)
        logits(case.student, case.tokens(2, length), **past(cache))
        kept = sum(cache_bytes(_only(cache, i)) for i, spec in enumerate(case.layers) if spec.keeps_softmax)
        sizes.append(cache_bytes(cache) - kept)
    assert sizes == [state_bytes(case.student, batch=2)] * 3, f"states of {sizes} bytes after 1, 12 and 70 tokens"


def _only(cache: object, index: int) -> object:
    """A cache's layer `index`, as a cache."""
    one = copy.copy(cache)
    one.layers = [cache.layers[index]]  # type: ignore[attr-defined]
    return one


@model_law
def embeddings_go_in_for_tokens(data: st.DataObject, case: Case) -> None:
    """`inputs_embeds` of the same tokens give the same logits."""
    ids = case.tokens(2, 19)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        embeds = case.student.get_input_embeddings()(ids)
        answer = case.student(inputs_embeds=embeds, attention_mask=mask).logits
    assert torch.equal(answer, logits(case.student, ids, attention_mask=mask))


@model_law
def a_call_gives_what_it_is_asked_for(data: st.DataObject, case: Case) -> None:
    """labels, logits_to_keep, output_hidden_states, return_dict and output_attentions, as from any other model."""
    ids, model = case.tokens(2, 21), case.copy()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        all_of_it = model(ids, labels=ids, output_hidden_states=True)
    full = all_of_it.logits
    loss = torch.nn.functional.cross_entropy(full[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert_close(all_of_it.loss, loss, "loss")
    assert len(all_of_it.hidden_states) == len(case.layers) + 1
    assert_close(logits(model, ids, logits_to_keep=3), full[:, -3:], "the last 3 logits")
    assert torch.equal(model(ids, return_dict=False)[0], full)
    if not any(spec.keeps_softmax for spec in case.layers):
        with refused("output_attentions"):
            model(ids, output_attentions=True)
        return
    weights = model(ids, output_attentions=True).attentions
    for index, (spec, weight) in enumerate(zip(case.layers, weights, strict=True)):
        assert (weight is not None) == spec.keeps_softmax, f"attention weights of layer {index}"
        if weight is not None:
            assert_close(weight.sum(-1), torch.ones(weight.shape[:-1]), f"attention weights of layer {index}")


@model_law
def masks_and_caches_that_do_not_fit_are_refused(data: st.DataObject, case: Case) -> None:
    """In one sentence that says what was given and what was expected; pages of a cache, too."""
    ids, model = case.tokens(2, 8), case.student
    with refused("[2, 7]"):
        model(ids, attention_mask=torch.ones(2, 7))
    with refused("[3, 8]"):
        model(ids, attention_mask=torch.ones(3, 8))
    cache = model(ids)[CACHE_KEYWORD]
    with refused("8 tokens in the cache"):
        model(ids, attention_mask=torch.ones(2, 8), **past(cache))
    restart = torch.arange(4).repeat(2)[None].expand(2, -1)
    with refused("use_cache=False"):
        model(ids, position_ids=restart, use_cache=True)
    if not all(spec.keeps_softmax for spec in case.layers):
        with refused("[2, 1, 8, 8]"):
            model(ids, attention_mask=torch.ones(2, 1, 8, 8))
        with refused("DynamicCache(config=model.config)"):
            model(ids, **past(new_cache(case.teacher)))
        with refused("generate_batch"):
            model.generate_batch([[5, 6, 7]])
        cache = model(ids)[CACHE_KEYWORD]
        with refused("activate_past_recording"):
            cache.crop(-2)
