"""Retrieval by distance: the prompts are what they say, and models that copy from near score as they must."""

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.positions import Run
from lizardzoo.evaluate.retrieval import LEAD, answer, make_prompts

FILLER = "The lizard on the wall lost its tail and slowly grew another one. " * 60
WINDOW = 8


@pytest.fixture
def filler(tiny_tokenizer):
    return tiny_tokenizer(FILLER)["input_ids"]


@pytest.fixture
def student(tiny_llama):
    return lz.linearize(tiny_llama, lz.Hybrid(window=WINDOW, keep=2))


class Copier(nn.Module):
    """Says what followed the longest match of the last tokens among those at most `reach` tokens back."""

    def __init__(self, reach):
        super().__init__()
        self.reach = reach
        self.head = nn.Linear(300, 300, bias=False)
        nn.init.eye_(self.head.weight)
        self.device = torch.device("cpu")

    def get_output_embeddings(self):
        return self.head

    def get_decoder(self):
        return self.decode

    def decode(self, input_ids, use_cache):
        assert not use_cache
        (ids,) = input_ids.tolist()
        hidden = torch.zeros(1, len(ids), 300)
        for now in range(len(ids)):
            best = max(
                range(max(0, now - self.reach), now),
                key=lambda then: next((n for n in range(then + 1) if ids[then - n] != ids[now - n]), then + 1),
                default=0,
            )
            hidden[0, now, ids[best + 1] if best < now else 0] = 10.0
        return type("Output", (), {"last_hidden_state": hidden})


def facts_end_before(tokenizer, filler, ids, first_answer, distance):
    """Whether a fact ends exactly `distance` tokens of filler before the first question."""
    sentence = tokenizer.decode(ids[:first_answer]).rpartition("\n")[2]
    end = first_answer - len(tokenizer("\n" + sentence)["input_ids"]) - distance
    between = ids[end : end + distance].tolist()
    return tokenizer.decode(ids[:end]).endswith(".\n") and between in [
        filler[i : i + distance] for i in range(len(filler))
    ]


@pytest.mark.parametrize("pairs", [1, 3])
def test_a_prompt_asks_for_its_facts_after_exactly_the_distance(tiny_tokenizer, filler, pairs):
    for distance in (1, 40):
        for prompt in make_prompts(tiny_tokenizer, filler, distance, pairs=pairs, samples=3):
            text = tiny_tokenizer.decode(prompt.ids)
            said = [part.split(" is ")[0] for part in text.split("The magic number of ")[1:]]
            assert len(said) == 2 * pairs
            assert set(said[:pairs]) == set(said[pairs:])
            first_question = prompt.answers[0].start
            for part in prompt.answers:
                number = tiny_tokenizer.decode(prompt.ids[part])
                assert number.strip().isdecimal()
                assert len(number.strip()) == 5
                assert text.count(number) == 2
            assert facts_end_before(tiny_tokenizer, filler, prompt.ids, first_question, distance)
            assert "magic" not in tiny_tokenizer.decode(prompt.ids[:LEAD])
            assert prompt.answers[-1].stop == len(prompt.ids)


@pytest.mark.parametrize("pairs", [1, 3])
def test_sequences_of_recall_are_prompts_of_one_length_with_their_answers_marked(tiny_tokenizer, filler, pairs):
    length, distances = 400, (20, 90)
    ids, answers = evaluate.recall_sequences(FILLER, tiny_tokenizer, length, 5, distances=distances, pairs=pairs)
    assert ids.shape == answers.shape == (5, length)
    assert set(answers.unique().tolist()) == {0.0, 1.0}
    for row, (sequence, marked) in enumerate(zip(ids, answers.bool())):
        text = tiny_tokenizer.decode(sequence)
        told = [part.split(".")[0] for part in text.split("The magic number of ")[1:]]
        assert set(told[:pairs]) == set(told[pairs:])
        assert tiny_tokenizer.decode(sequence[marked]).split() == [fact.split(" is ")[1] for fact in told[pairs:]]
        assert marked[-1]
        assert facts_end_before(tiny_tokenizer, filler, sequence, int(marked.nonzero()[0]), distances[row % 2])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_answers_have_their_share_and_all_other_tokens_the_same(tiny_tokenizer, share):
    ids, answers = evaluate.recall_sequences(FILLER, tiny_tokenizer, 400, 4, distances=(20, 90))
    same, weights = evaluate.recall_sequences(FILLER, tiny_tokenizer, 400, 4, distances=(20, 90), share=share)
    assert torch.equal(same, ids)
    counted = weights[:, 1:]  # nothing predicts the first
    marked = answers[:, 1:].bool()
    assert float(counted[marked].sum() / counted.sum()) == pytest.approx(share, rel=1e-4)
    assert set(counted[marked].tolist()) == {1.0}
    assert len(set(counted[~marked].tolist())) == 1


def test_sequences_of_recall_that_cannot_be_are_refused(tiny_tokenizer):
    make = evaluate.recall_sequences
    with pytest.raises(LizardzooError, match="do not fit into 60 tokens"):
        make(FILLER, tiny_tokenizer, 60, 2, distances=(50,))
    with pytest.raises(LizardzooError, match=r"a limit of as many, got distances=\(8, 16, 32\) and limit=2"):
        make(FILLER, tiny_tokenizer, 400, 2, distances=(8, 16, 32))
    with pytest.raises(LizardzooError, match="a limit of as many"):
        make(FILLER, tiny_tokenizer, 400, 2, distances=())
    for share in (0, 1.5, float("nan")):
        with pytest.raises(LizardzooError, match=f"above 0 and at most 1, got {share}"):
            make(FILLER, tiny_tokenizer, 400, 2, distances=(8,), share=share)
    with pytest.raises(LizardzooError, match="fewer than the 100000"):
        make(FILLER, tiny_tokenizer, 100_000, 2, distances=(8,))


def test_the_same_seed_gives_the_same_prompts(tiny_tokenizer, filler):
    first, again, other = (
        [p.ids.tolist() for p in make_prompts(tiny_tokenizer, filler, 9, samples=2, seed=seed)] for seed in (0, 0, 1)
    )
    assert first == again != other
    assert first[0] != first[1]


@pytest.mark.parametrize("pairs", [1, 4])
def test_a_model_that_copies_recalls_as_far_as_it_reaches(tiny_tokenizer, pairs):
    models = {"all": Copier(10**6), "near": Copier(150)}
    report = evaluate.retrieval(models, None, tiny_tokenizer, FILLER, distances=(20, 200), pairs=pairs, samples=3)
    assert [p.accuracy for p in report["all"].points] == [1.0, 1.0]
    near, far = report["near"].points
    assert near.accuracy == 1.0 if pairs == 1 else near.accuracy > 0
    assert far.accuracy == 0.0
    assert far.nll > 1 > report["all"].points[1].nll
    assert near.questions == 3 * pairs


def test_answers_are_scored_by_the_full_logits_in_any_chunks(student, tiny_tokenizer, filler):
    (prompt,) = make_prompts(tiny_tokenizer, filler, 30, pairs=3, samples=1)
    with torch.no_grad():
        log_probs = student(prompt.ids[None]).logits[0].log_softmax(-1)
    expected = []
    for part in prompt.answers:
        own = log_probs[part.start - 1 : part.stop - 1]
        targets = prompt.ids[part]
        nll = -own.gather(-1, targets[:, None]).sum().item()
        expected.append((bool((own.argmax(-1) == targets).all()), pytest.approx(nll, rel=1e-4), len(targets)))
    for chunk_size in (10**6, 7, 1):
        assert answer(Run(student), prompt, chunk_size) == expected


def test_only_beyond_its_window_a_student_recalls_otherwise_than_its_teacher(student, tiny_llama, tiny_tokenizer):
    wide = lz.linearize(tiny_llama, lz.Hybrid(window=400))
    report = evaluate.retrieval(
        {"wide": wide, "narrow": student},
        tiny_llama,
        tiny_tokenizer,
        FILLER,
        distances=(50,),
        samples=2,
        ablate=["wide"],
    )
    nll = {row.name: row.points[0].nll for row in report.rows}
    assert list(nll) == ["teacher", "wide", "wide without linear", "wide without window", "narrow"]
    assert nll["wide"] == pytest.approx(nll["teacher"], rel=1e-5)
    assert abs(nll["narrow"] - nll["teacher"]) > 1e-3
    assert abs(nll["wide without window"] - nll["teacher"]) > 1e-3


def test_a_report_shows_its_numbers_and_survives_json(tiny_llama, tiny_tokenizer, tmp_path):
    report = evaluate.retrieval({"copy": Copier(10**6)}, None, tiny_tokenizer, FILLER, distances=(16, 32), samples=1)
    assert json.loads(report.to_json()) == report.to_dict()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.table())
    shown = console.export_text()
    assert "copy" in shown
    assert "1.00" in shown
    assert report.plot(tmp_path / "new" / "recall.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LizardzooError, match="no row 'paste'; its rows are: copy"):
        report["paste"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"distances": (10**6,)}, r"the filler has \d+ tokens, fewer than the 1000064"),
        ({"distances": ()}, "there is no distance"),
        ({"distances": (0,)}, "distance must be a whole number of at least 1, got 0"),
        ({"pairs": 65}, "at least 1 and at most 64, got 65"),
        ({"samples": True}, "samples must be"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"ablate": ["b"]}, "none of the models: a"),
    ],
)
def test_wrong_input_gets_one_sentence(tiny_llama, tiny_tokenizer, arguments, message):
    with pytest.raises(LizardzooError, match=message):
        evaluate.retrieval({"a": tiny_llama}, None, tiny_tokenizer, FILLER, **{"distances": (8,), **arguments})
