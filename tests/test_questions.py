"""Files of questions: prompts as they are described, tasks that lm-eval scores as one does by hand."""

import gzip
import json

import pytest
import torch

from lizardzoo import evaluate
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.questions import prompts, read_questions


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def sums(tmp_path):
    """Nine questions with choices."""
    rows = [
        {"query": f"{i} and {i} are", "choices": [f"{2 * i}", f"{i} tails", "none"], "gold": i % 3} for i in range(9)
    ]
    return write(tmp_path / "sums.jsonl", rows)


@pytest.fixture
def schemas(tmp_path):
    """Nine questions with contexts."""
    rows = [
        {"contexts": [f"Ann met {i} and Ann", f"Ann met {i} and Bob {i}"], "target": "left.", "gold": i % 2}
        for i in range(9)
    ]
    return write(tmp_path / "schemas.jsonl", rows)


def by_hand(model, tokenizer, pairs):
    """The index of the likeliest continuation of (context, continuation) pairs."""
    scores = []
    for context, continuation in pairs:
        start = len(tokenizer(context)["input_ids"])
        whole = tokenizer(f"{context} {continuation}")["input_ids"]
        with torch.no_grad():
            log_probs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(log_probs[i - 1, whole[i]].item() for i in range(start, len(whole))))
    return scores.index(max(scores))


def test_tasks_are_scored_as_one_does_by_hand(tiny_llama, tiny_tokenizer, sums, schemas, tmp_path):
    names = evaluate.question_tasks([sums, schemas], tmp_path / "tasks", few_shot=2)
    assert names == ["sums", "schemas"]
    found = evaluate.lm_eval(tiny_llama, tiny_tokenizer, names, tmp_path / "tasks", batch_size=4)
    for file in (sums, schemas):
        questions = read_questions(file)
        right = 0
        for question, texts in zip(questions, prompts(questions, 2)):
            pairs = [(text, end) for text in texts for end in question.continuations]
            right += by_hand(tiny_llama, tiny_tokenizer, pairs) == question.gold
        assert 0 < right < 9
        assert found[file.stem]["acc,none"] == pytest.approx(right / 9)


def test_likelihoods_leave_no_cache_and_the_model_as_it_was(tiny_llama, tiny_tokenizer, sums, tmp_path):
    caches = []
    tiny_llama.register_forward_hook(lambda module, inputs, output: caches.append(output.past_key_values))
    names = evaluate.question_tasks([sums], tmp_path / "tasks")
    evaluate.lm_eval(tiny_llama, tiny_tokenizer, names, tmp_path / "tasks")
    assert set(caches) == {None}
    assert tiny_llama.config.use_cache
    with torch.no_grad():
        assert tiny_llama(torch.tensor([[3, 4]])).past_key_values is not None


def test_examples_stand_before_the_question_and_are_never_itself(sums, schemas):
    for file in (sums, schemas):
        questions = read_questions(file)
        for question, texts in zip(questions, prompts(questions, 8)):
            for text, context in zip(texts, question.contexts):
                assert text.endswith(f"\n\n{context}")
                for other in questions:
                    assert (f"{other.solved}\n\n" in text) == (other is not question)
    one, other = (list(prompts(questions, 2, seed=seed)) for seed in (0, 1))
    assert one == list(prompts(questions, 2)) != other


def test_a_question_that_stands_there_twice_is_no_example_for_itself(tmp_path):
    """Of two subjects in turn; and what is drawn is drawn from all others."""
    names = ["law", "art"] * 8
    rows = [{"subject": s, "query": f"Q{i % 6}", "choices": ["A", "B"], "gold": 0} for i, s in enumerate(names)]
    questions = read_questions(write(tmp_path / "twice.jsonl", rows))
    drawn = set()
    for question, (text,) in zip(questions, prompts(questions, 3)):
        examples = text.split("\n\n")[1:-1]
        others = [one.solved for one in questions if one.subject == question.subject and one != question]
        assert all(examples.count(example) <= others.count(example) for example in examples)
        assert len(examples) == 3
        drawn |= {(question.subject, *question.contexts, example) for example in examples}
    assert len(drawn) > 10  # of 2 subjects x 3 questions x 2 others there are 12
    with pytest.raises(LizardzooError, match="there are 5 examples about law, fewer than the 6"):
        list(prompts(questions, 6))


def test_questions_with_a_subject_are_asked_as_mmlu_asks(tmp_path):
    def row(subject, i, gold):
        return {"subject": subject, "query": f"Q{subject}{i}\nAnswer:", "choices": ["A", "B"], "gold": gold}

    dev = write(tmp_path / "dev.jsonl", [row(s, i, i % 2) for s in ("high_school", "law") for i in range(3)])
    test = write(tmp_path / "test.jsonl", [row("law", 9, 0)])
    (texts,) = prompts(read_questions(test), 2, read_questions(dev))
    assert texts == [
        "The following are multiple choice questions (with answers) about law.\n\n"
        "Qlaw0\nAnswer: A\n\nQlaw1\nAnswer: B\n\nQlaw9\nAnswer:"
    ]
    with pytest.raises(LizardzooError, match="there are 3 examples about law, fewer than the 4"):
        evaluate.question_tasks([test], tmp_path / "tasks", few_shot=4, examples=dev)
    assert not (tmp_path / "tasks").exists()


def test_a_limit_takes_rows_from_the_whole_file(sums, tmp_path):
    packed = tmp_path / "packed.jsonl.gz"
    packed.write_bytes(gzip.compress(sums.read_bytes()))
    assert evaluate.question_tasks([packed], tmp_path / "tasks", limit=3) == ["packed"]
    rows = [json.loads(line) for line in (tmp_path / "tasks" / "packed.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["0 and 0 are", "3 and 3 are", "6 and 6 are"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("", "has no rows"),
        ('{"query": "Q", "choices": ["a", "b"]}', 'line 1: expected "query" and "choices".*got query, choices'),
        ('{"query": "Q", "choices": ["a", "b"], "gold": 2}', "line 1"),
        ('{"query": "Q", "choices": ["a"], "gold": 0}', "line 1"),
        ("\n[1]", r"line 2: .*got \[1\]"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(LizardzooError, match=message):
        evaluate.question_tasks([path], tmp_path / "tasks")
    assert not (tmp_path / "tasks").exists()


def test_files_and_folders_that_do_not_fit_are_refused(sums, tmp_path):
    with pytest.raises(LizardzooError, match="there is no file of questions"):
        read_questions(tmp_path / "no.jsonl")
    with pytest.raises(LizardzooError, match=r"end in .jsonl or .jsonl.gz"):
        read_questions(tmp_path / "no.csv")
    with pytest.raises(LizardzooError, match="two of the files have one name"):
        evaluate.question_tasks([sums, sums], tmp_path / "tasks")
    with pytest.raises(LizardzooError, match="is not empty"):
        evaluate.question_tasks([sums], tmp_path)
    with pytest.raises(LizardzooError, match="there are 8 examples, fewer than the 9"):
        evaluate.question_tasks([sums], tmp_path / "tasks", few_shot=9)
    with pytest.raises(LizardzooError, match="few_shot must be at least 0"):
        evaluate.question_tasks([sums], tmp_path / "tasks", few_shot=-1)
