"""Laws of `generate`: every way to generate gives what the same way gives without a cache."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from transformers import CompileConfig
from transformers.cache_utils import DynamicLayer

from lizardzoo.cache import cache_bytes
from lizardzoo.testing.conformance.case import (
    Case,
    assert_close,
    assert_same_tokens,
    greedy,
    logits,
    model_law,
    new_cache,
    past,
)


@model_law
def greedy_generation_is_the_uncached_one(data: st.DataObject, case: Case) -> None:
    """At once, after a chunked prefill, from a static cache, from a cache of one's own, from embeddings."""
    ids, model = case.tokens(2, 17), case.student
    plain = greedy(model, ids, use_cache=False)
    assert_same_tokens(greedy(model, ids), plain, "cached")
    assert_same_tokens(greedy(model, ids, prefill_chunk_size=5), plain, "chunked prefill")
    assert_same_tokens(greedy(model, ids, cache_implementation="static"), plain, "static cache")
    assert_same_tokens(greedy(model, ids, **past(new_cache(model))), plain, "a given cache")
    embeds = model.get_input_embeddings()(ids).detach()
    answer = greedy(model, None, inputs_embeds=embeds, attention_mask=torch.ones_like(ids))
    assert_same_tokens(answer, plain[:, 17:], "inputs_embeds")


@model_law
def a_left_padded_batch_generates_as_its_rows_alone(data: st.DataObject, case: Case) -> None:
    """With a dynamic and with a static cache."""
    ids, model = case.tokens(2, 16), case.student
    mask = torch.ones_like(ids)
    mask[0, : data.draw(st.integers(0, 15))] = 0
    prompts = [ids[row : row + 1, mask[row].bool()] for row in range(2)]
    alone = torch.cat([greedy(model, prompt)[:, prompt.shape[1] :] for prompt in prompts])
    for cache in ("dynamic", "static"):
        answer = greedy(model, ids, attention_mask=mask, cache_implementation=cache)[:, 16:]
        assert_same_tokens(answer, alone, f"{cache} cache")


@model_law
def beams_and_samples_are_the_uncached_ones(data: st.DataObject, case: Case) -> None:
    """Beam search with several returned sequences, sampling under a seed, padded on the left; guidance."""
    ids, model = case.tokens(2, 13), case.student
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    beams: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask}
    plain = greedy(model, ids, use_cache=False, **beams)
    assert_same_tokens(greedy(model, ids, **beams), plain, "beams")
    assert_same_tokens(greedy(model, ids, cache_implementation="static", **beams), plain, "beams, static cache")
    samples: list[Any] = []
    for cached in (True, False):
        torch.manual_seed(7)
        samples.append(
            model.generate(
                ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=True, top_k=20,
                num_return_sequences=3, use_cache=cached,
            )
        )  # fmt: skip
    assert_same_tokens(samples[0], samples[1], "samples")
    guided = [greedy(model, ids[1:], count=3, guidance_scale=1.5, use_cache=cached) for cached in (True, False)]
    assert_same_tokens(guided[0], guided[1], "with guidance, which keeps a second cache")


@model_law
def speculation_is_lossless(data: st.DataObject, case: Case) -> None:
    """Prompt lookup; assisted by another student, the teacher, itself, its own first layers; the teacher by it."""
    ids, model = case.tokens(1, 15, data.draw(st.integers(0, 99))), case.student
    other = case.copy()
    with torch.no_grad():
        for mixer in other.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.2)
    plain = greedy(model, ids, use_cache=False)
    assert_same_tokens(greedy(model, ids, prompt_lookup_num_tokens=3), plain, "prompt lookup")
    for name, assistant in (("another student", other), ("the teacher", case.teacher), ("itself", model)):
        assert_same_tokens(greedy(model, ids, assistant_model=assistant), plain, f"assisted by {name}")
    if _crops_layers_that_did_not_run():
        assert_same_tokens(greedy(model, ids, assistant_early_exit=1), plain, "assisted by its first layer")
    expected = greedy(case.teacher, ids, use_cache=False)
    assert_same_tokens(greedy(case.teacher, ids, assistant_model=model), expected, "the teacher, assisted")


def _crops_layers_that_did_not_run() -> bool:
    """transformers 5.17 does not, so that early exits of some families fail there, teachers' too."""
    try:
        DynamicLayer().crop(-1)
    except TypeError:
        return False
    return True


@model_law
def a_conversation_goes_on_from_its_cache(data: st.DataObject, case: Case) -> None:
    """`generate` twice with one cache, new tokens in between."""
    cache = new_cache(case.student)
    first = greedy(case.student, case.tokens(1, 9), **past(cache))
    second = torch.cat([first, case.tokens(1, 6, seed=2)], 1)
    plain = greedy(case.student, second, use_cache=False)
    assert_same_tokens(greedy(case.student, second, **past(cache)), plain, "the second turn")


@model_law
def generation_goes_past_the_longest_position(data: st.DataObject, case: Case) -> None:
    """Beyond the teacher's max_position_embeddings, with the memory of before if no softmax is kept."""
    length = case.teacher.config.max_position_embeddings
    ids = case.tokens(1, length - 4)
    cache = new_cache(case.student)
    logits(case.student, ids[:, :-1], **past(cache))
    before = cache_bytes(cache)
    answer = greedy(case.student, ids, **past(cache))
    assert answer.shape[1] == length + 4
    assert_same_tokens(answer, greedy(case.student, ids, use_cache=False), "behind the last position")
    if not any(spec.keeps_softmax for spec in case.layers):
        assert cache_bytes(cache) == before, "the cache grew"


@model_law
def compiled_steps_are_the_steps(data: st.DataObject, case: Case) -> None:
    """Decoding from a static cache by one graph without breaks, which no step and no padding compiles anew.

    (transformers' own static sliding layers do compile theirs anew: they count in a Python number.)
    """
    ids, model = case.tokens(2, 11), case.student
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    plain = greedy(model, ids, use_cache=False, attention_mask=mask)
    compilation = CompileConfig(fullgraph=True, backend="eager", mode=None)
    compilation._compile_all_devices = True  # generate compiles on accelerators only, unless told
    options: dict[str, Any] = {"cache_implementation": "static", "compile_config": compilation}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=not case.slides):
        for name, given in (("padded", mask), ("not padded", torch.ones_like(ids))):
            expected = plain if given is mask else greedy(model, ids, use_cache=False)
            assert_same_tokens(greedy(model, ids, attention_mask=given, **options), expected, name)
    torch._dynamo.reset()
    vars(model).pop("_compiled_call", None)


@model_law
def a_compiled_forward_is_the_forward(data: st.DataObject, case: Case) -> None:
    """torch.compile(model, fullgraph=True): a padded batch without a cache, and a step behind a dynamic cache."""
    ids, model = case.tokens(2, 12), case.student
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    cache, held = new_cache(model), new_cache(model)
    for one in (cache, held):
        logits(model, ids, attention_mask=mask, **past(one))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for name, call, same in (
        ("no cache", {"attention_mask": mask, "use_cache": False}, {"attention_mask": mask, "use_cache": False}),
        ("a step", past(cache), past(held)),
    ):
        new = ids if name == "no cache" else ids[:, :1]
        assert_close(logits(compiled, new, **call), logits(model, new, **same), name)
    torch._dynamo.reset()
