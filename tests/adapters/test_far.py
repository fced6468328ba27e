"""Beyond the teacher's positions kept tokens are brought near: what a text's length may and may not change."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import lizardzoo as lz
from lizardzoo.adapters.masks import CACHE_KEYWORD
from lizardzoo.kernels.state import state_tensors
from lizardzoo.mixers import AttentionShape, MixerInputs, far
from lizardzoo.mixers.window import WindowMixer

POSITIONS, WINDOW, KEEP = 32, 6, 3
MIXERS = {
    "window": lz.Window(window=WINDOW, keep=KEEP),
    "hybrid": lz.Hybrid(window=WINDOW, keep=KEEP),
    "sum": lz.Hybrid(window=WINDOW, keep=KEEP, merge="sum"),  # its branches step one by one
    "heavy": lz.Heavy(window=WINDOW, keep=KEEP, heavy=4),
}


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=POSITIONS, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


def students(teacher, name):
    return lz.linearize(teacher, MIXERS[name]).double()


def logits(model, ids, **given):
    with torch.no_grad():
        return model(ids, use_cache=False, **given).logits


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@given(positions=st.integers(1, 200_000), rank=st.integers(0, 10**6))
def test_a_kept_token_is_never_farther_than_the_teacher_looked(positions, rank):
    reach, step = far.grid(positions)
    assert 1 <= step <= reach <= positions < reach + step
    found = far.turns(positions, torch.ones(1), torch.tensor([rank]), 1, None, None)
    moved = max(0, (rank // step + 1) * step - reach)
    assert 0 <= rank - moved < reach
    assert moved == 0 or rank - moved >= reach - step
    angle = torch.tensor(float(moved))
    assert torch.equal(found.cos[0, 0], angle.cos().expand(2))
    assert torch.equal(found.sin[0, 0], angle.sin().expand(2))


@pytest.mark.parametrize("name", MIXERS)
def test_up_to_the_teachers_positions_nothing_changes(teacher, name):
    """The same weights, told that they know more positions, give the same; and one token later they do not."""
    student, ids = students(teacher, name), torch.randint(0, 100, (2, POSITIONS + 1))
    before = logits(student, ids)
    student.config.max_position_embeddings = 10 * POSITIONS
    after = logits(student, ids)
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert distance(before[:, -1], after[:, -1]) > 1e-6


@pytest.mark.parametrize("more", [16, 61])
def test_how_far_the_first_tokens_are_behind_does_not_matter(teacher, more):
    """Two windows behind it, a window student sees its first tokens and the last ones: the rest may be of any length.

    Only where in S tokens the last one stands has to be the same.
    """
    student, step = students(teacher, "window"), far.grid(POSITIONS)[1]
    first, last = torch.randint(0, 100, (2, KEEP)), torch.randint(0, 100, (2, 2 * WINDOW))
    texts = [
        torch.cat([first, torch.randint(0, 100, (2, count)), last], 1)
        for count in (POSITIONS, POSITIONS + more // step * step)
    ]
    a, b = (logits(student, text)[:, -1] for text in texts)
    assert distance(a, b) < 1e-4  # positions are rotated in fp32
    student.config.max_position_embeddings = 10**6
    a, b = (logits(student, text)[:, -1] for text in texts)
    assert distance(a, b) > 1e-3


@settings(max_examples=6)
@given(data=st.data())
@pytest.mark.parametrize("name", MIXERS)
def test_a_long_text_in_pieces_is_the_whole(teacher, name, data):
    """Dynamic and static caches, single steps and pieces that cross several turns, padding on the left."""
    student = students(teacher, name)
    length = data.draw(st.integers(POSITIONS + 2, 3 * POSITIONS), "length")
    cuts = data.draw(st.lists(st.integers(1, length - 1), unique=True, max_size=4).map(sorted), "cuts")
    steps_from = data.draw(st.integers(0, length), "single steps from")
    bounds = sorted({0, *cuts, *range(steps_from, length), length})
    pad = data.draw(st.sampled_from([0, 5, 40]), "padding")
    ids = torch.randint(0, 100, (2, length), generator=torch.Generator().manual_seed(length))
    expected = logits(student, ids)
    mask = torch.ones(2, pad + length, dtype=torch.long)
    mask[1, :pad] = 0
    padded = torch.cat([torch.full((2, pad), 7), ids], 1)
    padded[0] = torch.cat([ids[0], torch.full((pad,), 7)])
    mask[0, length:] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = logits(student, padded, attention_mask=mask, position_ids=positions) if pad else expected
    assert distance(found[1, pad:], expected[1]) < 1e-9
    assert distance(found[0, :length], expected[0]) < 1e-9
    for cache in (None, StaticCache(config=student.config, max_cache_len=length)):
        pieces = []
        with torch.no_grad():
            for start, stop in pairwise(bounds):
                given = {} if cache is None else {CACHE_KEYWORD: cache}
                out = student(ids[:, start:stop], use_cache=True, **given)
                cache = out[CACHE_KEYWORD]
                pieces.append(out.logits)
        assert distance(torch.cat(pieces, 1), expected) < 1e-9


@pytest.mark.parametrize("name", MIXERS)
def test_steps_that_turn_what_they_read_are_those_around_which_it_is_turned(teacher, name, monkeypatch):
    """A mixer that knows nothing of turns has the same steps and the same states."""
    student, ids = students(teacher, name), torch.randint(0, 100, (2, 2 * POSITIONS))
    assert all(mixer.turns_steps for mixer in student.mixers().values())
    runs = []
    for turns_steps in (True, False):
        for mixer in student.mixers().values():
            monkeypatch.setattr(mixer, "turns_steps", turns_steps)
        cache, found = None, []
        with torch.no_grad():
            for t in range(ids.shape[1]):
                out = student(ids[:, t : t + 1], use_cache=True, **({} if cache is None else {CACHE_KEYWORD: cache}))
                cache = out[CACHE_KEYWORD]
                found.append(out.logits)
        runs.append((torch.cat(found, 1), [x for layer in cache.layers for x in state_tensors(layer.state)]))
    (own, states), (around, others) = runs
    assert distance(own, around) < 1e-12
    for a, b in zip(states, others):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


class Blind(WindowMixer):
    """A mixer whose steps must not hear of turns."""

    turns_steps = False

    def branches(self, inputs, state, need_state, in_place=False):
        assert inputs.turns is None
        return super().branches(inputs, state, need_state, in_place)


def test_turns_reach_only_mixers_that_hand_them_on(teacher):
    """Neither one that turns nothing by itself, nor one whose keys are not rotated, nor one that keeps none."""
    ids = torch.randint(0, 100, (1, POSITIONS + 8))
    for spec, turns_steps in (
        (MIXERS["window"], False),
        (lz.Window(window=WINDOW, keep=KEEP, window_rope=False), True),
    ):
        student = lz.linearize(teacher, [spec, MIXERS["window"]]).double()
        mixer = student.mixers()[0]
        mixer.__class__ = Blind
        mixer.turns_steps = turns_steps
        with torch.no_grad():
            out = student(ids[:, :-2], use_cache=True)
            for t in (-2, -1):
                out = student(ids[:, t:][:, :1], **{CACHE_KEYWORD: out[CACHE_KEYWORD]})


@pytest.mark.parametrize("name", MIXERS)
def test_packed_documents_beyond_the_positions_are_as_alone(teacher, name):
    student = students(teacher, name)
    documents = [torch.randint(0, 100, (1, count)) for count in (POSITIONS + 9, 5, 2 * POSITIONS + 3)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    packed = logits(student, torch.cat(documents, 1), position_ids=positions)
    for alone, part in zip(documents, packed.split([x.shape[1] for x in documents], 1)):
        assert distance(part, logits(student, alone)) < 1e-9


@pytest.mark.parametrize("name", MIXERS)
def test_a_rolled_back_cache_goes_on_as_if_nothing_had_been(teacher, name):
    student, ids = students(teacher, name), torch.randint(0, 100, (1, 2 * POSITIONS))
    expected = logits(student, ids)
    with torch.no_grad():
        cache = student(ids[:, :40], use_cache=True)[CACHE_KEYWORD]
        for layer in cache.layers:
            layer.activate_past_recording()
        student(torch.randint(0, 100, (1, 13)), **{CACHE_KEYWORD: cache})
        for layer in cache.layers:
            layer.crop(-13)
        found = student(ids[:, 40:], **{CACHE_KEYWORD: cache}).logits
    assert distance(found, expected[:, 40:]) < 1e-9


def test_outputs_and_gradients_are_those_of_kept_keys_at_nearer_places():
    """Of the definition, densely: a kept key that query i sees stands moved_i places later than it did."""
    count, heads, dim = 3 * POSITIONS, 4, 8
    mixer = MIXERS["window"].build(AttentionShape(16, heads, 2, dim, 0.3))
    reach, step = far.grid(POSITIONS)
    frequencies = torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=torch.float64)
    q, k, v = (torch.randn(1, count, n, dim, dtype=torch.float64, requires_grad=True) for n in (heads, 2, 2))

    def rotated(x, places):
        angles = (places[:, None] * frequencies).tile(2)
        first, second = x.chunk(2, -1)
        return x * angles.cos()[:, None] + torch.cat([-second, first], -1) * angles.sin()[:, None]

    places = torch.arange(count)
    angles = (places[None, :, None] * frequencies).tile(2)
    found = far.turns(POSITIONS, frequencies, torch.zeros(1, dtype=torch.long), count, None, None)
    moved = ((places // step + 1) * step - reach).clamp(min=0)
    exact = (moved[None, :, None] * frequencies).tile(2)
    assert torch.allclose(found.cos.double(), exact.cos(), atol=1e-4)
    inputs = MixerInputs(
        q, k, v, torch.zeros(1, count, 16), angles.cos(), angles.sin(),
        turns=found._replace(cos=exact.cos(), sin=exact.sin()),
    )  # fmt: skip
    y, _ = far.run(mixer, inputs, None, need_state=False)

    keys, values = (x.repeat_interleave(2, 2) for x in (k, v))
    expected = []
    for i in range(count):
        near = places[max(0, i - WINDOW + 1) : i + 1]
        kept = places[: max(0, min(KEEP, i - WINDOW + 1))]
        seen = torch.cat([kept, near])
        at = torch.cat([kept + moved[i], near])
        scores = 0.3 * (rotated(q[0, i : i + 1], places[i : i + 1]) * rotated(keys[0, seen], at)).sum(-1)
        expected.append((scores.softmax(0)[..., None] * values[0, seen]).sum(0))
    expected = torch.stack(expected)[None]
    assert distance(y, expected) < 1e-12
    weights = torch.randn_like(y)
    gradients = (torch.autograd.grad((x * weights).sum(), (q, k, v)) for x in (y, expected))
    for a, b in zip(*gradients):
        assert distance(a, b) < 1e-12


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("name", MIXERS)
def test_one_compiled_graph_serves_steps_before_and_beyond_the_positions(teacher, name):
    student, ids = students(teacher, name), torch.randint(0, 100, (2, POSITIONS + 9))
    expected, found = logits(student, ids), []
    counter = CompileCounter()
    torch._dynamo.reset()
    step = torch.compile(student, fullgraph=True, backend=counter)
    cache = StaticCache(config=student.config, max_cache_len=ids.shape[1])
    with torch.no_grad():
        student(ids[:, : POSITIONS - 4], use_cache=True, **{CACHE_KEYWORD: cache})
        for token in ids[:, POSITIONS - 4 :].split(1, 1):
            out = step(token.clone(), use_cache=True, **{CACHE_KEYWORD: cache})
            found += [out.logits]
    assert distance(torch.cat(found, 1), expected[:, POSITIONS - 4 :]) < 1e-9
    assert counter.frame_count == 1
    torch._dynamo.reset()
