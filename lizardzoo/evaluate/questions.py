"""Multiple-choice questions from local files, with examples before them: tasks for lm-eval that download nothing.

A file is JSON lines (.jsonl, also .gz). A row has `gold`, the index of the right answer, and one of

    {"query": "Question: ...\\nAnswer:", "choices": ["one", "two"]}        each choice continues the query
    {"contexts": ["... so Sarah", "... so Maria"], "target": "got up."}    the target continues each context

with one blank between the two. A row with a `subject` is asked as MMLU asks: a line that names the subject, then
examples of the same subject.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lizardzoo.errors import LizardzooError

SUFFIXES = (".jsonl", ".jsonl.gz")
FORM = '"query" and "choices", or "contexts" and "target", and "gold"'
HEADING = "The following are multiple choice questions (with answers) about {subject}.\n\n"

# What lm-eval is told; the examples are in the rows already. Fields by their names: a template is compiled anew for
# each row, which took half of its time. A task of contexts names the gold index as its text.
TASK = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
{rows}
target_delimiter: " "
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
OF_CHOICES = "doc_to_text: prompt\ndoc_to_choice: choices\ndoc_to_target: gold"
OF_CONTEXTS = "doc_to_text: gold\ndoc_to_choice: prompts\ndoc_to_target: target"


@dataclass(frozen=True)
class Question:
    """One row: the texts before the answer and the answers; there is one of the former or one of the latter."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int
    subject: str | None

    @property
    def solved(self) -> str:
        """Question and right answer, as an example."""
        context = self.contexts[self.gold if len(self.contexts) > 1 else 0]
        return f"{context} {self.continuations[self.gold if len(self.continuations) > 1 else 0]}"


def read_questions(path: str | os.PathLike[str]) -> list[Question]:
    """The rows of a file, checked.

    Raises:
        LizardzooError: a file that is missing, unreadable or empty, a row of another form; it names the line.
    """
    path = Path(path)
    if not path.name.endswith(SUFFIXES):
        raise LizardzooError(f"{path}: files of questions end in {' or '.join(SUFFIXES)}; rename or convert it")
    if not path.is_file():
        raise LizardzooError(f"there is no file of questions {str(path)!r}; check the path")
    try:
        raw = path.read_bytes()
        lines = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8").split("\n")
        rows = [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise LizardzooError(f"{path}: cannot be read ({error}); it should be JSON on each line") from error
    if not rows:
        raise LizardzooError(f"{path} has no rows; each line is to hold {FORM}")
    return [_question(row, f"{path}, line {number}") for number, row in rows]


def prompts(
    questions: Sequence[Question], few_shot: int = 0, examples: Sequence[Question] | None = None, seed: int = 0
) -> Iterator[list[str]]:
    """Each question's contexts with the examples before them.

    Examples are the first ones of `examples` that have the question's subject; without `examples` others of the
    questions themselves, drawn anew for each.

    Raises:
        LizardzooError: fewer examples than asked for.
    """
    if few_shot < 0:
        raise LizardzooError(f"few_shot must be at least 0, got {few_shot}")
    pools: dict[str | None, list[Question]] = {}
    places: dict[Question, list[int]] = {}  # of a question in the pool of its subject: it is no example for itself
    for one in examples or questions:
        pool = pools.setdefault(one.subject, [])
        places.setdefault(one, []).append(len(pool))
        pool.append(one)
    for index, question in enumerate(questions):
        pool, own = pools.get(question.subject, []), places.get(question, [])
        count = len(pool) - len(own)
        if count < few_shot:
            about = "" if question.subject is None else f" about {question.subject}"
            raise LizardzooError(
                f"there are {count} examples{about}, fewer than the {few_shot} asked for; "
                f"give a file with more of them, or a smaller few_shot"
            )
        first = range(few_shot)
        picks = first if examples is not None else random.Random(f"{seed} {index}").sample(range(count), few_shot)
        before = "" if question.subject is None else HEADING.format(subject=question.subject.replace("_", " "))
        before += "".join(f"{pool[_past(pick, own)].solved}\n\n" for pick in picks)
        yield [before + context for context in question.contexts]


def _past(number: int, left_out: Sequence[int]) -> int:
    """The place of the number-th of those that are left; `left_out` ascends."""
    for place in left_out:
        number += place <= number
    return number


def question_tasks(
    files: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    few_shot: int = 0,
    examples: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> list[str]:
    """Write tasks of lm-eval's form into a folder; returns their names, which are those of the files.

        names = evaluate.question_tasks(["mmlu_val.jsonl.gz"], "tasks", few_shot=5, examples="mmlu_dev.jsonl.gz")
        evaluate.lm_eval(model, tokenizer, names, "tasks")

    Args:
        files: files of questions (see this module's first lines); "a/piqa_val.jsonl.gz" becomes the task piqa_val.
        folder: where to, a new folder or an empty one.
        few_shot: examples before each question. They stand in the rows: lm-eval's own num_fewshot stays 0.
        examples: a file to take them from; None draws them from the other rows of the same file.
        limit: take so many rows, evenly from the whole file (files are sorted by subject or source).
        seed: of the drawing.

    Raises:
        LizardzooError: as `read_questions` and `prompts`; two files of one name; a folder in use.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LizardzooError(f"{folder} is not empty; name a new folder for the tasks")
    named = {Path(file).name.partition(".jsonl")[0]: file for file in files}
    if len(named) < len(files):
        raise LizardzooError(f"two of the files have one name ({', '.join(map(str, files))}); rename one of them")
    pool = None if examples is None else read_questions(examples)
    rendered = {}
    for name, file in named.items():
        questions = read_questions(file)
        texts = list(prompts(questions, few_shot, pool, seed))
        every = range(len(questions))
        if limit is not None and limit < len(questions):
            every = [i * len(questions) // limit for i in range(limit)]  # type: ignore[assignment]
        rendered[name] = [_row(questions[i], texts[i]) for i in every]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in rendered.items():
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        form = OF_CHOICES if "choices" in rows[0] else OF_CONTEXTS
        (folder / f"{name}.yaml").write_text(TASK.format(name=name, data=json.dumps(str(data)), rows=form))
    return list(rendered)


def _row(question: Question, texts: list[str]) -> dict[str, Any]:
    """What lm-eval reads."""
    if len(texts) > 1:
        return {"prompts": texts, "target": question.continuations[0], "gold": question.gold}
    return {"prompt": texts[0], "choices": question.continuations, "gold": question.gold}


def _question(row: Any, where: str) -> Question:
    """One row's question."""
    fields = row if isinstance(row, Mapping) else {}
    pairs: list[tuple[Any, Any]] = [
        (fields.get("contexts"), [fields.get("target")]),
        ([fields.get("query")], fields.get("choices")),
    ]
    gold, subject = fields.get("gold"), fields.get("subject")
    for contexts, continuations in pairs:
        if _texts(contexts) and _texts(continuations):
            count = max(len(contexts), len(continuations))
            if count > 1 and isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < count:
                return Question(
                    tuple(contexts), tuple(continuations), gold, subject if isinstance(subject, str) else None
                )
    given = ", ".join(map(str, fields)) or repr(row)
    raise LizardzooError(f"{where}: expected {FORM} (an index from 0), got {given}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(text, str) for text in value)
