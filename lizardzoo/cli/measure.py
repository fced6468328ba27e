"""`eval`: what a student can do, beside its teacher."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from lizardzoo import evaluate
from lizardzoo.cli.base import app, new_folder, out, progress_bar
from lizardzoo.cli.models import DeviceOption, Dtype, DtypeOption, load_model, load_tokenizer
from lizardzoo.cli.record import run_record
from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.plan import TEACHER, plan
from lizardzoo.evaluate.positions import CHUNK_SIZE
from lizardzoo.evaluate.questions import SUFFIXES
from lizardzoo.hub.training import package_version
from lizardzoo.linearize import linearize
from lizardzoo.mixers.window import Window

REPORT, POSITIONS, RETRIEVAL = "report.json", "by_position", "retrieval.png"


@app.command("eval")
def eval_(
    ctx: typer.Context,
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", "-t", help="Folder or Hub id; KL is measured from it.")
    ] = None,
    texts: Annotated[
        list[Path] | None, typer.Option("--text", help="A text file (UTF-8, also .gz); give it again for more.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Read only so many sequences of each text.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 1,
    chunk_size: Annotated[
        int, typer.Option(min=1, help="Tokens per forward pass; longer sequences go on from a cache.")
    ] = CHUNK_SIZE,
    window: Annotated[
        int | None, typer.Option(help="End of the first position bucket; by default the narrowest window.")
    ] = None,
    recent: Annotated[
        int | None,
        typer.Option(help="Also the teacher reading only its last so many tokens: what it is past its own length."),
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also with each branch switched off.")] = False,
    baseline: Annotated[
        bool, typer.Option(help="Also a bare window of the teacher's with as many bytes of state.")
    ] = True,
    distances: Annotated[
        str | None,
        typer.Option(help="Retrieval: facts put into a text are asked for after 256,1024,... tokens."),
    ] = None,
    filler: Annotated[
        Path | None, typer.Option(help="For --distances: put the facts into this text; by default into the first one.")
    ] = None,
    facts: Annotated[int, typer.Option(min=1, help="Facts in a text, for --distances; all are asked for.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Texts at each distance.")] = 32,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Files of questions (.jsonl, also .gz), names of lm-eval tasks as piqa,arc_easy, or a folder of "
            "lm-eval's task files (which may run code)."
        ),
    ] = None,
    few_shot: Annotated[
        str | None, typer.Option(help="Examples in each task's prompt; 0,5 measures with none and with five.")
    ] = None,
    few_shot_from: Annotated[
        Path | None, typer.Option(help="Take the examples for files of questions from this file.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Questions per task.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help=f"New folder for {REPORT} and the plots.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Measure perplexity and KL to the teacher by position, retrieval by distance, memory, and tasks.

    \b
      lizardzoo eval runs/first/transfer runs/first/final \\
          --teacher HuggingFaceTB/SmolLM2-135M-Instruct --text wiki.txt \\
          --limit 32 --ablate --distances 64,256,1024 --out report
      lizardzoo eval runs/first/final --tasks piqa,arc_easy --json
      lizardzoo eval runs/first/final --tasks mmlu.jsonl --few-shot 0,5 \\
          --few-shot-from mmlu_dev.jsonl
      lizardzoo eval runs/first/final -t ... --text novel.txt --length 65536 \\
          --chunk-size 2048 --recent 4096

    Judge by KL beyond the window: inside it a hybrid is its teacher by
    construction, and perplexity alone also rewards fitting the training text.
    The bare window of equal state is what a linear branch has to beat.
    """
    named_texts = _labels([str(path) for path in texts or ()])
    if not named_texts and tasks is None and distances is None:
        raise LizardzooError("there is nothing to measure; give --text FILE, --tasks NAMES or both")
    filler = filler or next(map(Path, named_texts.values()), None)
    if distances is not None and filler is None:
        raise LizardzooError("--distances needs a text to put the facts into; give --text FILE, or --filler FILE alone")
    asked = _counts("--distances", distances, "256,1024")
    shots = _counts("--few-shot", few_shot, "5, or 0,5", least=0)
    begun = time.monotonic()
    with nullcontext() if folder is None else new_folder(folder) as made:
        tokenizer = load_tokenizer(models[0], teacher)
        ids = {label: evaluate.sequences(Path(p), tokenizer, length, limit) for label, p in named_texts.items()}
        with _task_source(tasks, shots, few_shot_from, task_limit, batch_size) as source:
            loaded = {label: load_model(name, dtype, device) for label, name in _labels(models).items()}
            expected = None if teacher is None else load_model(teacher, dtype, device)
            beside = baseline and expected is not None and (ids or asked)
            rows = _with_baselines(loaded, expected) if beside else loaded
            ablated = list(loaded) if ablate else False
            positions = {}
            for label, sequences in ids.items():
                with progress_bar(f"{label}: sequences", len(sequences)) as progress:
                    positions[label] = evaluate.compare(
                        rows, expected, sequences, ablate=ablated, window=window, recent=recent,
                        batch_size=batch_size, chunk_size=chunk_size, progress=progress,
                    )  # fmt: skip
            recall = None
            if asked and filler is not None:
                with progress_bar("texts with facts", len(asked) * samples) as progress:
                    recall = evaluate.retrieval(
                        rows, expected, tokenizer, filler, distances=asked,
                        pairs=facts, samples=samples, ablate=ablated, chunk_size=chunk_size, progress=progress,
                    )  # fmt: skip
            scores = {}
            if source is not None:
                for row in plan(loaded, expected, ablated):
                    with row.run.context():
                        scores[row.name] = source(row.run.model, tokenizer)
        result = {
            "models": _labels(models),
            "teacher": teacher,
            "texts": named_texts,
            "positions": {label: report.to_dict() for label, report in positions.items()},
            "retrieval": None if recall is None else recall.to_dict(),
            "tasks": scores,
            "versions": {name: package_version(name) for name in ("lizardzoo", "torch", "transformers")},
            "runs": [run_record(ctx, {**loaded, **({} if expected is None else {TEACHER: expected})}, begun)],
        }
        written = [REPORT]
        if made is not None:
            (made / REPORT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            for label, report in positions.items():
                suffix = "" if len(positions) == 1 else f"_{Path(label).name.partition('.')[0]}"
                written.append(report.plot(made / f"{POSITIONS}{suffix}.png").name)
            if recall is not None:
                written.append(recall.plot(made / RETRIEVAL).name)
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  rich would break long lines
        return
    for label, report in positions.items():
        out.print(f"[bold]{escape(label)}[/]", report.table(), sep="\n")
    if positions:
        out.print(next(iter(positions.values())).memory_table())
    if recall is not None:
        out.print(recall.table())
    if scores:
        out.print(_task_table(scores))
    if folder is not None:
        for file in written:
            out.print(f"wrote {escape(str(folder / file))}", soft_wrap=True, highlight=False)


def _labels(names: list[str]) -> dict[str, str]:
    """Each model or text under the last part of its name, or under all of it where that is taken."""
    last = [Path(name).name for name in names]
    return {
        name if last.count(short) > 1 or short in ("", TEACHER) else short: name for name, short in zip(names, last)
    }


def _counts(option: str, text: str | None, example: str, least: int = 1) -> list[int]:
    """Whole numbers out of "64,256"."""
    parts = [part.strip() for part in (text or "").split(",") if part.strip()]
    if wrong := [part for part in parts if not part.isdecimal() or int(part) < least]:
        raise LizardzooError(
            f"{option} {text!r} is no list of whole numbers of at least {least} ({wrong[0]!r}); write it as {example}"
        )
    return [int(part) for part in dict.fromkeys(parts)]


def _with_baselines(models: dict[str, Any], teacher: Any) -> dict[str, Any]:
    """The models, and for each a bare window with as many bytes of state; one where these are alike."""
    rows = dict(models)
    known: list[list[MixerSpec]] = []
    for label, model in models.items():
        if not mixers_of(model):
            continue
        try:
            layers = evaluate.matched_layers(model)
        except LizardzooError as error:
            raise LizardzooError(f"{label}: {error}; or --no-baseline") from error
        if layers not in known:
            known.append(layers)
            size = next(spec.window for spec in layers if isinstance(spec, Window))
            rows[f"bare window {size} (for {label})"] = linearize(teacher, layers, dtype=model.dtype)
    return rows


Scores = dict[str, dict[str, Any]]


@contextmanager
def _task_source(
    tasks: str | None, shots: list[int], few_shot_from: Path | None, limit: int | None, batch_size: int
) -> Iterator[Callable[[Any, Any], Scores] | None]:
    """A function from a model and its tokenizer to lm-eval's results; None without tasks.

    Where the number of examples is given, the tasks are named as "piqa, 5-shot".
    """
    if few_shot_from is not None and (tasks is None or not any(shots)):
        raise LizardzooError("--few-shot-from says where examples come from; give --tasks FILES and --few-shot N too")
    if tasks is None:
        yield None
        return
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    files = [name for name in names if name.endswith(SUFFIXES)]
    others = [name for name in names if name not in files]
    if few_shot_from is not None and others:
        raise LizardzooError(f"--few-shot-from is for files of questions, and {others[0]!r} is none; leave one of them")
    with tempfile.TemporaryDirectory(prefix="lizardzoo-") as folder:
        numbers: list[int | None] = [*shots] or [None]
        own = {number: Path(folder) / f"tasks-{number}" for number in numbers}
        local = {
            number: evaluate.question_tasks(files, place, few_shot=number or 0, examples=few_shot_from, limit=limit)
            for number, place in own.items()
            if files
        }

        def scores(model: Any, tokenizer: Any) -> Scores:
            found: Scores = {}
            for number, place in own.items():
                one: Scores = {}
                if files:
                    one |= evaluate.lm_eval(model, tokenizer, local[number], place, batch_size=batch_size)
                if others:
                    folder = others[0] if len(others) == 1 and Path(others[0]).is_dir() else None
                    settings: dict[str, Any] = {"num_fewshot": number, "limit": limit, "batch_size": batch_size}
                    one |= evaluate.lm_eval(model, tokenizer, None if folder else others, folder, **settings)
                found |= {name if number is None else f"{name}, {number}-shot": values for name, values in one.items()}
            return found

        yield scores


def _task_table(scores: dict[str, dict[str, dict[str, Any]]]) -> Table:
    table = Table(title="lm-eval")
    for column in ("task", "metric"):
        table.add_column(column, overflow="fold")
    for label in scores:
        table.add_column(escape(label), justify="right", overflow="fold")
    for task, metrics in next(iter(scores.values())).items():
        for metric, value in metrics.items():
            if isinstance(value, float) and "_stderr" not in metric:
                cells = (f"{each[task][metric]:.4f}" for each in scores.values())
                table.add_row(escape(task), escape(metric.removesuffix(",none")), *cells)
    return table
