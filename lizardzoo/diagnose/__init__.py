"""What is wrong with a conversion: every layer looked at beside the teacher, and a verdict in words.

    import lizardzoo as lz
    from lizardzoo import evaluate

    found = lz.diagnose(student, evaluate.sequences("novel.txt", tokenizer, limit=4), teacher=teacher)
    rich.print(found.table())
    print(found.verdict)                        # "layer 7: the branch linear is bypassed: ..."
    found.plot("diagnosis.png")

A low training loss hides most of what goes wrong: a gate that forgets at once, a branch that the other one has made
superfluous, parameters that never moved, a model that answers every question with A.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lizardzoo.diagnose.layers import look, unmoved
from lizardzoo.diagnose.letters import Letters, answered
from lizardzoo.diagnose.report import Diagnosis
from lizardzoo.diagnose.verdict import Finding, judge
from lizardzoo.evaluate.positions import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Diagnosis", "Finding", "Letters", "diagnose"]


def diagnose(
    model: Any,
    sequences: Tensor,
    *,
    teacher: Any = None,
    start: Any = None,
    questions: str | os.PathLike[str] | None = None,
    examples: str | os.PathLike[str] | None = None,
    few_shot: int = 0,
    limit: int | None = 100,
    tokenizer: PreTrainedTokenizerBase | None = None,
    progress: Progress | None = None,
) -> Diagnosis:
    """Look at every layer of a linearized model on some text, and say what is wrong.

    Each layer gets the input that it has in the teacher, so that no error is passed from layer to layer.

    Args:
        model: what `lizardzoo.linearize` returns, trained or not.
        sequences: [N, T] token ids, as `lizardzoo.evaluate.sequences` makes them; T longer than the windows.
        teacher: what the layers are compared with; None: the model's own projections with softmax attention, which are
            the teacher's until stage 2 has been merged into them.
        start: the student as it was before training, to tell which parameters have moved; None: the start values of
            its specs (a calibrated log-scale differs from them without any training).
        questions: a file of multiple-choice questions with one set of answers such as A, B, C and D (see
            `lizardzoo.evaluate.questions`): whether the model answers all of them alike.
        examples, few_shot, limit: as for `lizardzoo.evaluate.question_tasks`.
        tokenizer: for `questions`.
        progress: called with the sequences done and their number.

    Returns:
        per layer and head the error of the attention output, each branch's share of it, the gates' half-lives, the
        mass on sinks, which parameters have not moved; and `findings`, empty for a healthy model.

    Raises:
        LizardzooError: a model that is not linearized, sequences that do not fit it or its windows, a teacher of
            another shape, questions without a tokenizer or with differing answers.
    """
    layers = look(model, sequences, teacher, progress)
    frozen = unmoved(model, start)
    letters = None
    if questions is not None:
        letters = answered(model, teacher, tokenizer, questions, examples, few_shot, limit)
    return Diagnosis(layers, frozen, letters, judge(layers, frozen, letters))
