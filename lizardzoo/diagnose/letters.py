"""Which letter a model answers multiple-choice questions with: a broken conversion says A to all of them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.positions import in_eval_mode
from lizardzoo.evaluate.questions import prompts, read_questions


@dataclass(frozen=True)
class Letters:
    """Answers counted by letter.

    Attributes:
        questions: how many there were.
        right: the right answers.
        model: the model's.
        teacher: the teacher's; None without one.
    """

    questions: int
    right: dict[str, int]
    model: dict[str, int]
    teacher: dict[str, int] | None


@torch.no_grad()
def answered(
    model: Any,
    teacher: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    questions: str | os.PathLike[str],
    examples: str | os.PathLike[str] | None,
    few_shot: int,
    limit: int | None,
) -> Letters:
    """Count the letters; see `lizardzoo.diagnose`."""
    if tokenizer is None:
        raise LizardzooError("questions are text, which needs a tokenizer; pass tokenizer=...")
    rows = read_questions(questions)
    letters = rows[0].continuations
    if other := next((row.continuations for row in rows if row.continuations != letters or len(letters) < 2), None):
        raise LizardzooError(
            f"{os.fspath(questions)} has questions answered with {list(letters)} and with {list(other)}; whether "
            f"answers collapse can be told only where all have the same ones, such as A, B, C and D"
        )
    texts = list(prompts(rows, few_shot, None if examples is None else read_questions(examples)))
    count = len(rows) if limit is None else min(limit, len(rows))
    chosen = [i * len(rows) // count for i in range(count)]  # evenly: files are sorted by subject
    said: dict[int, Counter[str]] = {}
    for one in (model, teacher):
        if one is None:
            continue
        said[id(one)] = Counter()
        with in_eval_mode(one):
            for i in chosen:
                said[id(one)][letters[_answer(one, tokenizer, texts[i][0], letters)]] += 1
    right = Counter(letters[rows[i].gold] for i in chosen)
    every = [
        {letter: counts[letter] for letter in letters}
        for counts in (right, said[id(model)], Counter() if teacher is None else said[id(teacher)])
    ]
    return Letters(count, every[0], every[1], None if teacher is None else every[2])


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: str, letters: Sequence[str]) -> int:
    """The likeliest of the letters: of the first tokens in which the prompt with one differs from that with another."""
    wholes = [tokenizer(f"{prompt} {letter}")["input_ids"] for letter in letters]
    alike = next(i for i, tokens in enumerate(zip(*wholes)) if len(set(tokens)) > 1)  # a blank may be its own token
    ids = torch.tensor([wholes[0][:alike]], device=model.device)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1]
    return int(logits[[whole[alike] for whole in wholes]].argmax())
