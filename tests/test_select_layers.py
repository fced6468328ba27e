"""Choosing softmax layers: a planted answer is found, and every KL is that of the model which the list makes."""

import io
import itertools
import json

import pytest
import torch
from rich.console import Console
from transformers import Qwen2Config, Qwen2ForCausalLM

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.errors import LizardzooError

WINDOW, LENGTH = 6, 40


@pytest.fixture
def text():
    return torch.randint(3, 300, (3, LENGTH))


def planted(far):
    """A teacher of four layers, of which only `far` look beyond WINDOW tokens."""
    config = Qwen2Config(
        vocab_size=300, hidden_size=48, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.2, use_sliding_window=True, sliding_window=WINDOW,
        layer_types=["full_attention" if layer in far else "sliding_attention" for layer in range(4)],
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def kl(teacher, layers, text):
    return evaluate.by_position(lz.linearize(teacher, layers), text, teacher=teacher).overall.kl


@pytest.mark.parametrize("layer", range(4))
@pytest.mark.parametrize("greedy", [False, True])
def test_the_only_layer_that_looks_far_is_found(text, layer, greedy):
    window = lz.Window(window=WINDOW, keep=0)
    found = lz.select_layers(planted([layer]), text, 1, layers=window, greedy=greedy)
    assert found.kept == [layer]
    assert list(found) == [lz.Softmax() if i == layer else window for i in range(4)]
    assert found.curve[0] > 1e-3
    assert found.curve[1] == pytest.approx(0, abs=1e-6)
    best, *others = found.ranking
    assert best.layer == layer
    assert best.worth == pytest.approx(found.curve[0], abs=1e-6)
    assert all(other.worth == pytest.approx(0, abs=1e-6) for other in others)


def test_the_chosen_layers_get_what_is_wished(text):
    """Chosen as if it were softmax; a window as long as the text is just that."""
    teacher, narrow, wide = planted([2]), lz.Window(window=WINDOW, keep=0), lz.Window(window=LENGTH, keep=0)
    found = lz.select_layers(teacher, text, 1, layers=narrow, give=wide)
    assert list(found) == [narrow, narrow, wide, narrow]
    assert kl(teacher, found, text) == pytest.approx(found.curve[1], abs=1e-6)
    with pytest.raises(LizardzooError, match="softmx"):
        lz.select_layers(teacher, text, 1, give="softmx")


@pytest.mark.parametrize("greedy", [False, True])
def test_two_layers_that_look_far_are_found_and_the_list_makes_that_model(text, greedy):
    teacher = planted([1, 2])
    found = lz.select_layers(teacher, text, keep=2, layers=lz.Window(window=WINDOW, keep=0), greedy=greedy)
    assert set(found.kept) == {1, 2}
    assert kl(teacher, found, text) == pytest.approx(0, abs=1e-6)
    window = lz.Window(window=WINDOW, keep=0)
    for count, expected in enumerate(found.curve):
        layers = [lz.Softmax() if i in found.kept[:count] else window for i in range(4)]
        assert expected == pytest.approx(kl(teacher, layers, text), rel=1e-4, abs=1e-6)
    for worth in found.ranking:
        layers = [lz.Softmax() if i == worth.layer else window for i in range(4)]
        assert worth.kl == pytest.approx(kl(teacher, layers, text), rel=1e-4, abs=1e-6)
        assert worth.worth == pytest.approx(found.curve[0] - worth.kl)


def test_greedy_takes_the_best_layer_beside_those_it_has(tiny_llama, text):
    window = lz.Window(window=WINDOW, keep=0)
    found = lz.select_layers(tiny_llama, text, 3, layers=window, greedy=True)
    chosen: list[int] = []
    for layer in found.kept:
        rest = [i for i in range(3) if i not in chosen]
        kls = {i: kl(tiny_llama, [lz.Softmax() if j in (*chosen, i) else window for j in range(3)], text) for i in rest}
        assert layer == min(rest, key=kls.__getitem__)
        chosen.append(layer)
        assert found.curve[len(chosen)] == pytest.approx(kls[layer], rel=1e-4, abs=1e-6)
    assert list(found) == [lz.Softmax()] * 3


def test_a_trained_student_is_ranked_as_it_is_and_left_so(tiny_llama, text):
    hybrid = lz.Hybrid(window=WINDOW, keep=2)
    student = lz.linearize(tiny_llama, [hybrid, lz.Softmax(), hybrid], calibrate=text).train()
    before = [attention.runs_softmax for attention in student.attentions()]
    own = lz.select_layers(student, text, keep=2)
    given = lz.select_layers(student, text, keep=2, teacher=tiny_llama)
    assert own.kept == given.kept == [own.ranking[0].layer, 1]
    assert {worth.layer for worth in own.ranking} == {0, 2}
    assert own.curve == pytest.approx(given.curve, rel=1e-3)
    assert own.curve[0] == pytest.approx(evaluate.by_position(student, text, teacher=tiny_llama).overall.kl, rel=1e-3)
    assert [attention.runs_softmax for attention in student.attentions()] == before
    assert student.training
    assert lz.select_layers(student, text, keep=1).curve == own.curve[:1]


@pytest.mark.parametrize("greedy", [False, True])
def test_with_weights_only_the_tokens_that_count_do(tiny_llama, text, greedy):
    """The KL of one token of one sequence is what the text cut behind it says of its last prediction."""
    window = lz.Window(window=WINDOW, keep=0)
    weights = torch.zeros(text.shape)
    weights[1, 30] = 0.5  # its size changes nothing
    found = lz.select_layers(tiny_llama, text, 2, layers=window, weights=weights, greedy=greedy)
    for count, expected in enumerate(found.curve):
        layers = [lz.Softmax() if i in found.kept[:count] else window for i in range(3)]
        student = lz.linearize(tiny_llama, layers)
        at_last = evaluate.by_position(student, text[1:2, :31], teacher=tiny_llama, buckets=[29]).buckets[-1]
        assert at_last.tokens == 1
        assert expected == pytest.approx(at_last.kl, rel=1e-4, abs=1e-6)
    everything = lz.select_layers(tiny_llama, text, 2, layers=window, weights=torch.full(text.shape, 2.0))
    assert everything == lz.select_layers(tiny_llama, text, 2, layers=window)


def test_of_two_layers_that_look_far_the_one_that_recalls_is_chosen():
    """Where only the tokens behind `far` count, a layer that nothing but they need is found."""
    teacher, text = planted([1, 2]), torch.randint(3, 300, (3, LENGTH))
    alone = {}
    for layer in (1, 2):
        layers = [lz.Softmax() if i == layer else lz.Window(window=WINDOW, keep=0) for i in range(4)]
        alone[layer] = [evaluate.by_position(lz.linearize(teacher, layers), row[None], teacher=teacher) for row in text]
    for row in range(3):
        weights = torch.zeros(text.shape)
        weights[row] = 1
        found = lz.select_layers(teacher, text, 1, layers=lz.Window(window=WINDOW, keep=0), weights=weights)
        assert found.kept == [min((1, 2), key=lambda layer: alone[layer][row].overall.kl)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], r"they are \[3, 40\]; got list"),
        (torch.ones(3, 39), r"they are \[3, 40\]; got \[3, 39\]"),
        (torch.zeros(3, 40), "above 0 for some token behind the first"),
        (torch.eye(3, 40)[:1].expand(3, 40), "above 0 for some token behind the first"),
        (torch.full((3, 40), -1.0), "at least 0"),
        (torch.full((3, 40), float("nan")), "finite"),
    ],
)
def test_weights_that_say_nothing_are_refused(tiny_llama, text, weights, message):
    with pytest.raises(LizardzooError, match=message):
        lz.select_layers(tiny_llama, text, 1, layers=lz.Window(window=WINDOW), weights=weights)


def test_a_teacher_is_calibrated_on_the_text(tiny_llama, text):
    spec = lz.Hybrid(window=WINDOW)
    found = lz.select_layers(tiny_llama, text, keep=0, layers=spec)
    student = lz.linearize(tiny_llama, spec, calibrate=text[:2])
    assert found.curve == [pytest.approx(evaluate.by_position(student, text, teacher=tiny_llama).overall.kl, rel=1e-4)]
    assert list(found) == [spec] * 3


def test_a_selection_is_a_list_shows_itself_and_survives_json(text):
    found = lz.select_layers(planted([2]), text, 1, layers=lz.Window(window=WINDOW, keep=0))
    assert len(found) == 4
    assert found[2] == lz.Softmax()
    assert found[1:3] == [found[1], found[2]]
    values = json.loads(found.to_json())
    assert values == found.to_dict()
    assert lz.config.resolve_layers(values["layers"], 4) == list(found)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    assert f"{found.ranking[0].worth:+.4f}" in console.export_text()


def test_progress_counts_every_run_and_the_teachers(tiny_llama, text):
    for greedy, keep, calls_of in ((False, 2, (4, 2)), (True, 3, (4, 2, 1))):
        each = [runs + 1 for runs in calls_of for _ in range(3)]  # three sequences
        expected = [(done, sum(each)) for done in itertools.accumulate(each)]
        calls = []
        told = lambda done, total: calls.append((done, total))  # noqa: B023, E731
        lz.select_layers(tiny_llama, text, keep, layers="window", greedy=greedy, progress=told)
        assert calls == expected


@pytest.mark.parametrize("keep", [0, 4, True, 1.0])
def test_a_number_that_does_not_fit_is_refused(tiny_llama, text, keep):
    student = lz.linearize(tiny_llama, ["window", "softmax", "window"])
    with pytest.raises(LizardzooError, match=r"keep must be a whole number from 1 .* to 3"):
        lz.select_layers(student, text, keep)


def test_what_is_no_text_is_refused(tiny_llama):
    with pytest.raises(LizardzooError, match=r"token ids \[N, T\], got list"):
        lz.select_layers(tiny_llama, [[1, 2]], 1)


def test_a_diverged_model_is_refused(tiny_llama, text):
    student = lz.linearize(tiny_llama, lz.Hybrid(window=WINDOW))
    with torch.no_grad():
        student.mixers()[1].log_scale.bias.fill_(float("nan"))
    for choose in (lz.select_windows, lambda model, ids: lz.select_layers(model, ids, 1)):
        with pytest.raises(LizardzooError, match="is not finite"):
            choose(student.set_window(8) or student, text)
