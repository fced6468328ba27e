"""How much of the teacher is left: perplexity and KL by position, retrieval by distance, ablations, bytes, tasks.

    import lizardzoo as lz
    from lizardzoo import evaluate

    text = evaluate.sequences("wikitext.txt", tokenizer, length=2048, limit=32)
    report = evaluate.compare({"student": model}, teacher, text, ablate=True)
    rich.print(report.table(), report.memory_table())
    report.plot("by_position.png")
    evaluate.retrieval({"student": model}, teacher, tokenizer, "novel.txt", pairs=8).plot("retrieval.png")

Judge by KL to the teacher beyond the window: perplexity alone also rewards leaving the teacher for the
training text, and inside the window a hybrid is the teacher by construction.
"""

from lizardzoo.evaluate.ablation import without
from lizardzoo.evaluate.baseline import matched_layers, state_matched_window
from lizardzoo.evaluate.harness import lm_eval
from lizardzoo.evaluate.positions import Bucket, ByPosition, by_position
from lizardzoo.evaluate.questions import question_tasks
from lizardzoo.evaluate.report import Report, Row, compare
from lizardzoo.evaluate.retrieval import Recall, RecallReport, recall_sequences, retrieval
from lizardzoo.evaluate.text import sequences

__all__ = [
    "by_position",
    "compare",
    "retrieval",
    "recall_sequences",
    "sequences",
    "without",
    "state_matched_window",
    "matched_layers",
    "lm_eval",
    "question_tasks",
    "Bucket",
    "ByPosition",
    "Report",
    "Row",
    "Recall",
    "RecallReport",
]
