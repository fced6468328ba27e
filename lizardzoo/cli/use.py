"""`eval` and `generate`: what a student can do."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor
from transformers import TextStreamer, set_seed

from lizardzoo import evaluate
from lizardzoo.cli.base import app, err, new_folder, out, package_version
from lizardzoo.cli.models import DeviceOption, Dtype, DtypeOption, load_model, load_tokenizer
from lizardzoo.config import MixerSpec
from lizardzoo.errors import LizardzooError
from lizardzoo.evaluate.ablation import mixers_of
from lizardzoo.evaluate.report import TEACHER
from lizardzoo.linearize import linearize
from lizardzoo.mixers.window import Window

REPORT, PLOT = "report.json", "by_position.png"


@app.command("eval")
def eval_(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids.")],
    teacher: Annotated[
        str | None, typer.Option("--teacher", "-t", help="Folder or Hub id; KL is measured from it.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="A text file (UTF-8, also .gz).")] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    limit: Annotated[int | None, typer.Option(help="Read only so many sequences.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")] = 1,
    window: Annotated[
        int | None, typer.Option(help="End of the first position bucket; by default the narrowest window.")
    ] = None,
    ablate: Annotated[bool, typer.Option("--ablate", help="Also with each branch switched off.")] = False,
    baseline: Annotated[
        bool, typer.Option(help="Also a bare window of the teacher's with as many bytes of state.")
    ] = True,
    tasks: Annotated[
        str | None,
        typer.Option(help="lm-eval tasks: names as piqa,arc_easy, or a folder of task files (which may run code)."),
    ] = None,
    few_shot: Annotated[int | None, typer.Option(min=0, help="Examples in each task's prompt.")] = None,
    task_limit: Annotated[int | None, typer.Option(min=1, help="Questions per task.")] = None,
    folder: Annotated[Path | None, typer.Option("--out", "-o", help=f"New folder for {REPORT} and {PLOT}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Measure perplexity and KL to the teacher by position, memory, and lm-eval tasks.

    \b
      lizardzoo eval runs/first/transfer runs/first/final \\
          --teacher HuggingFaceTB/SmolLM2-135M-Instruct --text wiki.txt \\
          --limit 32 --ablate --out report
      lizardzoo eval runs/first/final --tasks piqa,arc_easy --json

    Judge by KL beyond the window: inside it a hybrid is its teacher by
    construction, and perplexity alone also rewards fitting the training text.
    The bare window of equal state is what a linear branch has to beat.
    """
    if text is None and tasks is None:
        raise LizardzooError("there is nothing to measure; give --text FILE, --tasks NAMES or both")
    with nullcontext() if folder is None else new_folder(folder) as made:
        tokenizer = load_tokenizer(models[0])
        ids = None if text is None else evaluate.sequences(text, tokenizer, length, limit)
        loaded = {label: load_model(name, dtype, device) for label, name in _labels(models).items()}
        expected = None if teacher is None else load_model(teacher, dtype, device)
        report = None
        if ids is not None:
            report = _positions(loaded, expected, ids, baseline, ablate=ablate, window=window, batch_size=batch_size)
        scores = {}
        if tasks is not None:
            settings = {"num_fewshot": few_shot, "limit": task_limit, "batch_size": batch_size}
            everyone = loaded if expected is None else {TEACHER: expected, **loaded}
            scores = {label: _scores(model, tokenizer, tasks, settings) for label, model in everyone.items()}
        result = {
            "models": _labels(models),
            "teacher": teacher,
            "text": None if text is None else str(text),
            "positions": None if report is None else report.to_dict(),
            "tasks": scores,
            "versions": {name: package_version(name) for name in ("lizardzoo", "torch", "transformers")},
        }
        if made is not None:
            (made / REPORT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            if report is not None:
                report.plot(made / PLOT)
    if as_json:
        print(json.dumps(result, indent=2))  # noqa: T201  rich would break long lines
        return
    if report is not None:
        out.print(report.table(), report.memory_table())
    if scores:
        out.print(_task_table(scores))
    if folder is not None:
        for file in (REPORT, PLOT)[: 1 if report is None else 2]:
            out.print(f"wrote {escape(str(folder / file))}", soft_wrap=True, highlight=False)


def _labels(names: list[str]) -> dict[str, str]:
    """Each model under the last part of its name, or under all of it where that is taken."""
    last = [Path(name).name for name in names]
    return {
        name if last.count(short) > 1 or short in ("", TEACHER) else short: name for name, short in zip(names, last)
    }


def _positions(
    models: dict[str, Any], teacher: Any, ids: Tensor, baseline: bool, *, ablate: bool, **settings: Any
) -> evaluate.Report:
    rows = dict(models)
    if baseline and teacher is not None:
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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task("sequences", total=len(ids))
        return evaluate.compare(
            rows,
            teacher,
            ids,
            ablate=list(models) if ablate else False,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            **settings,
        )


def _scores(model: Any, tokenizer: Any, tasks: str, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if Path(tasks).is_dir():
        return evaluate.lm_eval(model, tokenizer, None, tasks, **settings)
    return evaluate.lm_eval(model, tokenizer, [name.strip() for name in tasks.split(",") if name.strip()], **settings)


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


@app.command()
def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or Hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to answer, or to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 256,
    chat: Annotated[
        bool | None,
        typer.Option(help="Put the prompt as a question to a chat model; by default where there is a chat template."),
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Let a model speak; the text appears as it is made.

    \b
      lizardzoo generate runs/first/final "Why do lizards lose their tails?"
      lizardzoo generate runs/first/final "Once upon a time" --no-chat \\
          --temperature 0.8 --seed 1
    """
    tokenizer = load_tokenizer(model)
    if chat and not tokenizer.chat_template:
        raise LizardzooError(f"the tokenizer of {model!r} has no chat template; use --no-chat")
    if chat or (chat is None and tokenizer.chat_template):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[-1] == 0:
        raise LizardzooError("the prompt is empty; write something to continue")
    speaker = load_model(model, dtype, device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    set_seed(seed)
    speaker.generate(
        input_ids=inputs["input_ids"].to(speaker.device),
        attention_mask=inputs["attention_mask"].to(speaker.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
