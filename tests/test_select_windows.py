"""Sharing windows out: a planted answer is found, at the same state, and the list makes the model that was measured."""

import io
import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.cache import state_bytes
from lizardzoo.errors import LizardzooError
from lizardzoo.selection.windows import share_out

WINDOW, LENGTH = 8, 40


@pytest.fixture
def text():
    return torch.randint(3, 300, (3, LENGTH))


def planted(far):
    """A teacher of three layers that look back 3 tokens, but for `far`, which sees all: 4 are enough for the others."""
    config = Qwen2Config(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention" if layer == far else "sliding_attention" for layer in range(3)],
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def kl(teacher, student, text):
    return evaluate.by_position(student, text, teacher=teacher).overall.kl


@pytest.mark.parametrize("far", range(3))
def test_the_layer_that_looks_far_gets_what_the_others_do_not_need(text, far):
    teacher = planted(far)
    start = [lz.Window(window=WINDOW, keep=0)] * 3
    found = lz.select_windows(teacher, text, layers=start, octaves=1)
    assert found.windows == [16 if layer == far else 4 for layer in range(3)]
    assert found.kl < found.kl_before
    before, student = lz.linearize(teacher, start), lz.linearize(teacher, found)
    assert state_bytes(student) == state_bytes(before)
    assert found.kl == pytest.approx(kl(teacher, student, text), rel=1e-4, abs=1e-6)
    assert found.kl_before == pytest.approx(kl(teacher, before, text), rel=1e-4, abs=1e-6)
    before.set_window(found.windows)
    assert before.config.specs == list(found)
    for layer, each in found.kl_alone.items():
        for window, expected in each.items():
            layers = [lz.Window(window=window if i == layer else WINDOW, keep=0) for i in range(3)]
            assert expected == pytest.approx(kl(teacher, lz.linearize(teacher, layers), text), rel=1e-4, abs=1e-6)


def test_so_are_heavy_tokens(tiny_llama, text):
    spec = lz.Heavy(window=4, keep=0, heavy=8)
    found = lz.select_windows(tiny_llama, text, layers=spec, field="heavy", octaves=1)
    assert list(found) == [lz.Heavy(window=4, keep=0, heavy=size) for size in found.windows]
    assert sum(found.windows) <= 3 * 8 and found.kl <= found.kl_before
    student = lz.linearize(tiny_llama, found)
    assert state_bytes(student) <= state_bytes(lz.linearize(tiny_llama, spec))
    assert found.kl == pytest.approx(kl(tiny_llama, student, text), rel=1e-4, abs=1e-6)
    for layer, each in found.kl_alone.items():
        for size, expected in each.items():
            layers = [lz.Heavy(window=4, keep=0, heavy=size if i == layer else 8) for i in range(3)]
            assert expected == pytest.approx(kl(tiny_llama, lz.linearize(tiny_llama, layers), text), rel=1e-4, abs=1e-6)


def test_it_is_never_worse_and_leaves_the_model_as_it_was(tiny_llama, text):
    hybrid = lz.Hybrid(window=WINDOW, keep=2)
    student = lz.linearize(tiny_llama, [hybrid, lz.Softmax(), hybrid], calibrate=text)
    found = lz.select_windows(student, text)
    assert found.kl <= found.kl_before
    assert found[1] == lz.Softmax()
    assert list(found.kl_alone) == [0, 2]
    assert sum(found.windows) <= 2 * WINDOW
    assert student.config.specs == [hybrid, lz.Softmax(), hybrid]
    assert [mixer.spec for mixer in student.mixers().values()] == [hybrid, hybrid]
    given_teacher = lz.select_windows(student, text, teacher=tiny_llama)
    assert given_teacher.windows == found.windows
    assert given_teacher.kl == pytest.approx(found.kl, rel=1e-3)


@given(data=st.data())
def test_the_knapsack_is_solved_exactly(data):
    sizes = [1, 2, 4]
    count = data.draw(st.integers(1, 4))
    costs = data.draw(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=count, max_size=count))
    budget = data.draw(st.integers(count, 4 * count))
    chosen = share_out(costs, sizes, budget)
    cost = lambda choice: sum(row[i] for row, i in zip(costs, choice))  # noqa: E731
    affordable = [c for c in itertools.product(range(3), repeat=count) if sum(sizes[i] for i in c) <= budget]
    assert tuple(chosen) in affordable
    assert cost(chosen) == pytest.approx(min(map(cost, affordable)))


def test_progress_counts_both_rounds(tiny_llama, text):
    calls = []
    told = lambda done, total: calls.append((done, total))  # noqa: E731
    lz.select_windows(tiny_llama, text, layers=lz.Window(window=WINDOW), octaves=1, progress=told)
    assert calls == [(done, 6) for done in range(1, 7)]


def test_a_selection_is_a_list_shows_itself_and_survives_json(text):
    found = lz.select_windows(planted(1), text, layers=lz.Window(window=WINDOW, keep=0), octaves=1)
    values = json.loads(found.to_json())
    assert values == found.to_dict()
    assert lz.config.resolve_layers(values["layers"], 3) == list(found)
    assert len(found) == 3
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    shown = console.export_text()
    assert f"{found.kl:.4f} with the chosen windows" in " ".join(shown.split())
    assert f"{found.kl_alone[1][16]:.4f} *" in shown


def test_what_does_not_fit_is_refused(tiny_llama, text):
    mixed = lz.linearize(tiny_llama, [lz.Window(window=8), lz.Window(window=16), lz.GatedLinear()])
    with pytest.raises(LizardzooError, match=r"the model has windows of \[8, 16\] tokens"):
        lz.select_windows(mixed, text)
    with pytest.raises(LizardzooError, match=r"the model has 1 layer\(s\) with a window"):
        lz.select_windows(tiny_llama, text, layers=["window", "softmax", "softmax"])
    for octaves in (0, 4, True):
        with pytest.raises(LizardzooError, match=f"octaves={octaves!r} and window=8"):
            lz.select_windows(tiny_llama, text, layers=lz.Window(window=8), octaves=octaves)
    with pytest.raises(LizardzooError, match=r"the model has 0 layer\(s\) with heavy tokens"):
        lz.select_windows(tiny_llama, text, layers="window", field="heavy")
    with pytest.raises(LizardzooError, match="field='keep': expected 'window' or 'heavy'"):
        lz.select_windows(tiny_llama, text, layers="window", field="keep")
    with pytest.raises(LizardzooError, match="token ids"):
        lz.select_windows(tiny_llama, [[1]])
