"""Texts that are sampled by streams: each token is the teacher's own choice behind all that it was given before."""

import copy

import pytest
import torch


@pytest.fixture
def streams(script):
    """benchmarks/streams.py."""
    return script("streams")


def scripts(streams):
    return [streams.Script([1, 40 + row, 9, 33], [7, 5, 60]) for row in range(3)] + [
        streams.Script([2]), streams.Script([8, 11])
    ]  # fmt: skip


ENDS = [7, *range(280, 300)]
"""Enough of them for a random model to end its texts."""
TOKENS, FIRST = 28, 12


def written(streams, model, temperature=1.0, seed=0, steps=60, **changed):
    settings = {"tokens": TOKENS, "first_turn": FIRST, "steps": steps, "temperature": temperature, **changed}
    return streams.Streams(model, scripts(streams), ENDS, **settings).round(seed)


def chosen(streams, text):
    """The tokens of a text as its model read them, and where those stand that it chose itself."""
    script = scripts(streams)[text.row]
    tokens = [*script.prefix, *text.turns[0]]
    own = list(range(len(script.prefix), len(tokens)))
    if len(text.turns) > 1:
        tokens += [*script.bridge, *text.turns[1]]
        own += range(len(tokens) - len(text.turns[1]), len(tokens))
    return tokens, own


def test_each_token_is_the_models_own_wherever_its_row_stands(streams, tiny_llama):
    """Without chance (a temperature near 0) it is the likeliest behind the whole text before it, in every text."""
    expected = copy.deepcopy(tiny_llama)
    texts = written(streams, tiny_llama, temperature=1e-6)
    assert {text.row for text in texts} == set(range(5))
    for text in texts:
        tokens, own = chosen(streams, text)
        if own:
            best = expected(torch.tensor([tokens], device=expected.device)).logits[0].argmax(-1)
            assert [tokens[place] for place in own] == [int(best[place - 1]) for place in own]
    rows = [[text.turns for text in texts if text.row == row] for row in range(5)]
    assert all(len(row) > 1 and row.count(row[0]) == len(row) for row in rows)  # nothing is left of the text before


def test_chance_is_the_softmax(streams):
    logits = torch.randn(30).mul(1.5)
    for temperature in (1.0, 0.5):
        drawn = streams.draw(logits.expand(20000, -1), temperature)
        found = torch.bincount(drawn, minlength=30) / 20000
        assert (found - (logits / temperature).softmax(-1)).abs().sum() < 0.03


def test_texts_have_their_turns_and_their_ends(streams, tiny_llama):
    texts = written(streams, tiny_llama, steps=150)
    assert len(texts) > 20
    for text in texts:
        script = scripts(streams)[text.row]
        tokens, _ = chosen(streams, text)
        assert all(set(turn).isdisjoint(ENDS) for turn in text.turns)
        if text.whole:
            assert len(text.turns) == (2 if script.bridge else 1)
            assert len(tokens) <= TOKENS
        if script.bridge:
            assert len(text.turns[0]) <= FIRST
    assert {len(text.turns) for text in texts if not text.whole} == {1, 2}  # cut in either turn
    assert all(text.whole for text in written(streams, tiny_llama, tokens=400, first_turn=300, steps=200))


def test_a_round_is_its_seed(streams, tiny_llama):
    model = streams.Streams(tiny_llama, scripts(streams), ENDS, tokens=TOKENS, first_turn=FIRST, steps=30)
    first, second = model.round(1), model.round(2)
    assert first != second
    assert model.round(1) == first
    assert written(streams, tiny_llama, seed=2, steps=30) == second


def test_what_is_begun_is_ended_and_nothing_else(streams, tiny_llama):
    model = streams.Streams(tiny_llama, scripts(streams), ENDS, tokens=TOKENS, first_turn=FIRST, steps=30)
    texts = model.round(0)
    for row, codes in enumerate(model.record[: int(model.clock)].T.tolist()):
        over = [step for step, code in enumerate(codes) if code in (streams.DONE, streams.CUT)]
        assert len(over) == sum(text.row == row for text in texts)
        assert sum(step >= 30 for step in over) == 1
        assert set(codes[over[-1] + 1 :]) == {streams.IDLE} and streams.IDLE not in codes[: over[-1]]


@pytest.mark.gpu
def test_a_graph_of_the_step_writes_the_same(streams, tiny_llama):
    test_each_token_is_the_models_own_wherever_its_row_stands(streams, tiny_llama.to("cuda"))
    test_a_round_is_its_seed(streams, tiny_llama)


def test_no_number_comes_back_before_a_round_is_over(streams, tiny_llama):
    """On the meta device whoever asks for one fails, as the capture of a graph would."""
    meta = copy.deepcopy(tiny_llama).to("meta")
    model = streams.Streams(meta, scripts(streams), ENDS, tokens=TOKENS, first_turn=FIRST, steps=5)
    model.step()
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(model.live.any())
