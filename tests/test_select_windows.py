"""Sharing windows out: a planted answer is found, at the same state, and the list makes the model that was measured."""

import io
import itertools
import json
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.cache import state_bytes
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.positions import Reader
from lizardzoo.selection import budget, windows
from lizardzoo.selection.budget import share_out
from lizardzoo.selection.kl import Text

WINDOW, LENGTH = 8, 40


@pytest.fixture
def text():
    return torch.randint(3, 300, (3, LENGTH))


def planted(*far, layers=3):
    """A teacher of layers that look back 3 tokens, but for `far`, which see all: 4 are enough for the others."""
    config = Qwen2Config(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, use_sliding_window=True, sliding_window=4,
        layer_types=["full_attention" if layer in far else "sliding_attention" for layer in range(layers)],
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def deep(layers):
    """A tiny Llama of so many layers."""
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def kl(teacher, student, text):
    return evaluate.by_position(student, text, teacher=teacher).overall.kl


@pytest.fixture
def made_up(monkeypatch):
    """Makes the KL a function of the layers' specs; gives how many were asked for, call by call."""

    def install(function):
        calls = []

        def kls(self, runs):
            found = []
            for run in runs:
                with run.context():
                    found.append(function([mixer.spec for mixer in mixers_of(run.model).values()]))
            calls.append(len(runs))
            return found

        monkeypatch.setattr(Text, "kls", kls)
        return calls

    return install


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
    for layer, each in found.kl_alone["window"].items():
        for window, expected in each.items():
            layers = [lz.Window(window=window if i == layer else WINDOW, keep=0) for i in range(3)]
            assert expected == pytest.approx(kl(teacher, lz.linearize(teacher, layers), text), rel=1e-4, abs=1e-6)


def test_so_are_heavy_tokens(tiny_llama, text):
    spec = lz.Heavy(window=4, keep=0, heavy=8)
    found = lz.select_windows(tiny_llama, text, layers=spec, field="heavy", octaves=1)
    sizes = found.sizes["heavy"].values()
    assert list(found) == [lz.Heavy(window=4, keep=0, heavy=size) for size in sizes]
    assert found.windows == [4, 4, 4]
    assert sum(sizes) <= 3 * 8 and found.kl <= found.kl_before
    student = lz.linearize(tiny_llama, found)
    assert state_bytes(student) <= state_bytes(lz.linearize(tiny_llama, spec))
    assert found.kl == pytest.approx(kl(tiny_llama, student, text), rel=1e-4, abs=1e-6)
    for layer, each in found.kl_alone["heavy"].items():
        for size, expected in each.items():
            layers = [lz.Heavy(window=4, keep=0, heavy=size if i == layer else 8) for i in range(3)]
            assert expected == pytest.approx(kl(tiny_llama, lz.linearize(tiny_llama, layers), text), rel=1e-4, abs=1e-6)


def test_it_is_never_worse_and_leaves_the_model_as_it_was(tiny_llama, text):
    hybrid = lz.Hybrid(window=WINDOW, keep=2)
    student = lz.linearize(tiny_llama, [hybrid, lz.Softmax(), hybrid], calibrate=text)
    found = lz.select_windows(student, text)
    assert found.kl <= found.kl_before
    assert found[1] == lz.Softmax()
    assert list(found.kl_alone["window"]) == [0, 2]
    assert sum(found.windows) <= 2 * WINDOW
    assert student.config.specs == [hybrid, lz.Softmax(), hybrid]
    assert [mixer.spec for mixer in student.mixers().values()] == [hybrid, hybrid]
    given_teacher = lz.select_windows(student, text, teacher=tiny_llama)
    assert given_teacher.windows == found.windows
    assert given_teacher.kl == pytest.approx(found.kl, rel=1e-3)


@given(data=st.data())
def test_the_knapsack_is_solved_exactly(data):
    count = data.draw(st.integers(1, 4))

    def rows(values):
        return data.draw(st.lists(st.lists(values, min_size=3, max_size=3), min_size=count, max_size=count))

    costs, sizes = rows(st.floats(-1, 1)), rows(st.integers(-5, 5))
    least = sum(map(min, sizes))
    spend = data.draw(st.integers(least, least + 12))
    chosen = share_out(costs, sizes, spend)
    total = lambda table, choice: sum(row[i] for row, i in zip(table, choice))  # noqa: E731
    affordable = [c for c in itertools.product(range(3), repeat=count) if total(sizes, c) <= spend]
    assert tuple(chosen) in affordable
    assert total(costs, chosen) == pytest.approx(min(total(costs, choice) for choice in affordable))


def test_a_large_knapsack_is_filled_almost_as_well_as_by_every_way(monkeypatch):
    draw = random.Random(0)
    costs = [sorted((draw.random() for _ in range(5)), reverse=True) for _ in range(24)]
    sizes = [[each * 2**n for n in range(5)] for each in (780, 792) for _ in range(12)]
    spend = 24 * 4 * 786
    found = {}
    for ways in (64, 10**9):
        monkeypatch.setattr(budget, "WAYS", ways)
        chosen = share_out(costs, sizes, spend)
        assert sum(row[i] for row, i in zip(sizes, chosen)) <= spend
        found[ways] = sum(row[i] for row, i in zip(costs, chosen))
    assert found[10**9] <= found[64] < found[10**9] + 0.02 * (sum(map(max, costs)) - found[10**9])


def test_what_two_sizes_of_a_layer_take_together_may_be_more(made_up, text, monkeypatch):
    """Where a state has window * heavy entries, what looked affordable is not, and is not taken."""
    made_up(lambda specs: sum(1 / spec.window + 1 / spec.heavy for spec in specs[:1]))
    entries = lambda model: sum(m.spec.window * m.spec.heavy for m in mixers_of(model).values())  # noqa: E731
    monkeypatch.setattr(windows, "state_bytes", entries)
    start = lz.Heavy(window=WINDOW, keep=0, heavy=8)
    found = lz.select_windows(deep(3), text, layers=start, field=("window", "heavy"), rounds=3)
    assert sum(spec.window * spec.heavy for spec in found) <= 3 * WINDOW * 8


def test_weights_choose_what_only_the_tokens_that_count_need():
    """Of two layers that look far and cannot both be wide, the one that the tokens need that count is widened."""
    teacher, text = planted(1, 2, layers=4), torch.randint(3, 300, (3, LENGTH))
    start, wide = lz.Window(window=WINDOW, keep=0), lz.Window(window=2 * WINDOW, keep=0)

    def kl_by_token(layers):
        with torch.no_grad():
            goal, found = (model(text).logits.log_softmax(-1) for model in (teacher, lz.linearize(teacher, layers)))
        return (goal.exp() * (goal - found)).sum(-1)

    # What each layer's wider window takes away from every prediction; its weight is that of the token predicted.
    gain = {i: kl_by_token([start] * 4) - kl_by_token([wide if j == i else start for j in range(4)]) for i in (1, 2)}
    for layer, other in ((1, 2), (2, 1)):
        weights = torch.zeros(text.shape)
        weights[:, 1:] = (gain[layer] - gain[other] > 0.02)[:, :-1]
        assert weights.sum() > 5
        found = lz.select_windows(teacher, text, layers=start, octaves=1, rounds=1, weights=weights)
        assert found.windows[layer] == 16 > found.windows[other]
        alone = found.kl_alone["window"][layer][16]
        counted = kl_by_token([wide if i == layer else start for i in range(4)])[:, :-1] * weights[:, 1:]
        assert alone == pytest.approx(float(counted.sum() / weights.sum()), rel=1e-4)
    even = lz.select_windows(teacher, text, layers=start, octaves=1, weights=torch.full(text.shape, 0.5))
    assert even == lz.select_windows(teacher, text, layers=start, octaves=1)


def one_job(specs):
    """Layers 0 and 1 do one job, which the wider of them does for both; each other layer needs its own window."""
    first, second, *others = (spec.window for spec in specs)
    return 8 * (8 / max(first, second)) ** 2 + sum(8 / window for window in others)


def test_further_rounds_take_back_what_two_layers_got_for_one_job(made_up, text):
    teacher, start = deep(6), lz.Window(window=WINDOW, keep=0)
    calls = made_up(one_job)
    once, thrice = (lz.select_windows(teacher, text, layers=start, rounds=rounds) for rounds in (1, 3))
    sizes = (2, 4, 8, 16, 32)
    affordable = [each for each in itertools.product(sizes, repeat=6) if sum(each) <= 6 * WINDOW]
    best = min(one_job([lz.Window(window=window) for window in each]) for each in affordable)
    assert once.kl_before > once.kl > thrice.kl == best
    assert thrice.curve[:2] == once.curve
    assert thrice.curve == sorted(thrice.curve, reverse=True)
    for found in (once, thrice):
        assert found.kl == one_job(found.layers)
        assert found.kl_alone == once.kl_alone
        assert set(found.windows) <= set(sizes)
        assert sum(found.windows) <= 6 * WINDOW
    assert calls[0] == 1 + 4 * 6
    assert all(count <= 1 + 2 * 6 for count in calls[3:])


@pytest.mark.parametrize(("tolls", "better"), [(windows.TOLLS, True), ((0.0,), False)])
def test_a_change_has_to_pay_for_itself(made_up, text, monkeypatch, tolls, better):
    """Each size alone seems to gain by another; together only the one that gains much does."""

    def found_in(specs):
        sizes = [spec.window for spec in specs]
        others = sum(size != WINDOW for size in sizes[2:])
        return 2.0 - (sizes[0] > WINDOW) - 0.01 * (others == 1) + 2.0 * (others > 2)

    monkeypatch.setattr(windows, "TOLLS", tolls)
    made_up(found_in)
    found = lz.select_windows(deep(8), text, layers=lz.Window(window=WINDOW), octaves=1, rounds=1)
    assert (found.kl < found.kl_before) == better
    if better:
        assert found.windows[0] == 2 * WINDOW
        assert sum(found.windows) <= 8 * WINDOW


def test_rounds_stop_when_nothing_gets_better(made_up, text):
    calls = made_up(lambda specs: sum(8 / spec.window for spec in specs))
    found = lz.select_windows(deep(4), text, layers=lz.Window(window=WINDOW, keep=0), rounds=9)
    assert found.windows == [WINDOW] * 4
    assert found.curve == [4.0]
    assert calls == [1 + 4 * 4]  # no other sizes would be better by what each alone costs


def test_windows_and_heavy_tokens_share_one_budget(made_up, text):
    """Of layer 0 a wider window is worth most, of layer 1 more heavy tokens, and of layer 2 nothing."""
    teacher, start = deep(3), lz.Heavy(window=WINDOW, keep=0, heavy=8)
    made_up(lambda specs: 8 / specs[0].window + 8 / specs[1].heavy)
    alone = {
        field: lz.select_windows(teacher, text, layers=start, field=field, octaves=1) for field in ("window", "heavy")
    }
    both = lz.select_windows(teacher, text, layers=start, field=("window", "heavy"), octaves=1)
    assert (alone["window"].windows, list(alone["window"].sizes)) == ([16, 4, 4], ["window"])
    assert (alone["heavy"].windows, alone["heavy"].sizes["heavy"][1]) == ([WINDOW] * 3, 16)
    assert both.sizes["window"][0] == both.sizes["heavy"][1] == 16
    assert both.kl == 1.0 < alone["window"].kl == alone["heavy"].kl
    assert list(both) == [
        lz.Heavy(window=both.sizes["window"][i], keep=0, heavy=both.sizes["heavy"][i]) for i in range(3)
    ]


@given(wants=st.lists(st.tuples(*[st.floats(0, 1)] * 2), min_size=3, max_size=3), rounds=st.integers(1, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_layers_want_the_state_is_no_larger(made_up, wants, rounds):
    """Heavy tokens and a window's are of other sizes: what counts is bytes."""
    start = [lz.Heavy(window=8, heavy=16), lz.Softmax(), lz.Window(window=32), lz.Heavy(window=64, heavy=4)]
    student = lz.linearize(deep(4), start)
    made_up(lambda specs: sum(w / s.window + h / getattr(s, "heavy", 1) for s, (w, h) in zip(specs, wants)))
    found = lz.select_windows(student, torch.zeros(1, 2).long(), field=["heavy", "window"], rounds=rounds)
    assert state_bytes(lz.linearize(deep(4), found)) <= state_bytes(student)
    assert found.kl <= found.kl_before
    assert [type(spec) for spec in found] == [type(spec) for spec in start]
    student.set_window(found.windows)
    assert [spec.window for spec in student.config.specs if hasattr(spec, "window")] == found.windows


def test_both_fields_make_the_model_that_was_measured(tiny_llama, text):
    spec = lz.Heavy(window=4, keep=0, heavy=4)
    found = lz.select_windows(tiny_llama, text, layers=spec, field=("window", "heavy"), octaves=1, rounds=3)
    student = lz.linearize(tiny_llama, found)
    assert found.kl == pytest.approx(kl(tiny_llama, student, text), rel=1e-4, abs=1e-6)
    assert found.kl < found.kl_before
    for field, layers in found.kl_alone.items():
        for layer, each in layers.items():
            for size, expected in each.items():
                other = [replace(spec, **{field: size}) if i == layer else spec for i in range(3)]
                assert expected == pytest.approx(kl(tiny_llama, lz.linearize(tiny_llama, other), text), rel=1e-4)


@pytest.mark.parametrize("rounds", [1, 4])
def test_progress_counts_every_run_and_the_teachers(tiny_llama, text, monkeypatch, rounds):
    calls, forwards = [], []
    told = lambda done, total: calls.append((done, total))  # noqa: E731
    read = Reader.read

    def counted(self, chunk):
        if chunk.stop > 8:  # a look at each model's head takes 8 tokens
            forwards.append(len(self.ids))
        return read(self, chunk)

    monkeypatch.setattr(Reader, "read", counted)
    lz.select_windows(tiny_llama, text, layers=lz.Window(window=WINDOW), octaves=2, rounds=rounds, progress=told)
    assert calls[-1] == (sum(forwards), sum(forwards))
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert [total for _, total in calls] == sorted((total for _, total in calls), reverse=True)


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
    assert f"{found.kl_alone['window'][1][16]:.4f} *" in shown


def test_what_does_not_fit_is_refused(tiny_llama, text):
    with pytest.raises(LizardzooError, match=r"the model has 1 layer\(s\) with a window"):
        lz.select_windows(tiny_llama, text, layers=["window", "softmax", "softmax"])
    for octaves in (0, 4, True):
        with pytest.raises(LizardzooError, match=f"octaves={octaves!r} and window=8"):
            lz.select_windows(tiny_llama, text, layers=lz.Window(window=8), octaves=octaves)
    with pytest.raises(LizardzooError, match=r"the model has 0 layer\(s\) with heavy tokens"):
        lz.select_windows(tiny_llama, text, layers="window", field="heavy")
    with pytest.raises(LizardzooError, match="field='keep': expected 'window' or 'heavy'"):
        lz.select_windows(tiny_llama, text, layers="window", field="keep")
    for field in ([], ["window", "window"], ("window", "keep")):
        with pytest.raises(LizardzooError, match="or a list of both"):
            lz.select_windows(tiny_llama, text, layers=lz.Heavy(window=8), field=field)
    with pytest.raises(LizardzooError, match=r"the model has 0 layer\(s\) with heavy tokens"):
        lz.select_windows(tiny_llama, text, layers=lz.Window(window=8), field=("window", "heavy"))
    for rounds in (0, 1.0, True):
        with pytest.raises(LizardzooError, match=f"rounds must be a whole number of at least 1, got {rounds}"):
            lz.select_windows(tiny_llama, text, layers=lz.Window(window=8), rounds=rounds)
    with pytest.raises(LizardzooError, match=r"they are \[3, 40\]; got \[3, 39\]"):
        lz.select_windows(tiny_llama, text, layers=lz.Window(window=8), weights=torch.ones(3, 39))
    with pytest.raises(LizardzooError, match="token ids"):
        lz.select_windows(tiny_llama, [[1]])
