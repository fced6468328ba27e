"""`diagnose`, `select-layers` and `select-windows`: what is wrong with a student, and which hybrid suits a teacher."""

from __future__ import annotations

import json
from contextlib import nullcontext
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from torch import Tensor

from lizardzoo import evaluate
from lizardzoo.cli.base import app, new_folder, out, progress_bar
from lizardzoo.cli.models import (
    DeviceOption,
    Dtype,
    DtypeOption,
    is_linearized,
    load_model,
    load_tokenizer,
    read_layers,
)
from lizardzoo.diagnose import diagnose as look_at
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers import Window
from lizardzoo.selection import Selection, WindowSelection
from lizardzoo.selection import select_layers as choose_layers
from lizardzoo.selection import select_windows as choose_windows
from lizardzoo.selection.windows import ROUNDS

DIAGNOSIS, PICTURE = "diagnosis.json", "diagnosis.png"

# What the commands here share:
ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A student (of hybrids best after stage 1), or a teacher: folder or Hub id."),
]
TextOption = Annotated[Path, typer.Option(help="A text file (UTF-8, also .gz).")]
FileOption = Annotated[Path, typer.Option("--out", "-o", help="New .json file for the layers list.")]
TeacherOption = Annotated[
    str | None, typer.Option("--teacher", "-t", help="Of a student that has been through stage 2: its teacher.")
]
LayersOption = Annotated[
    str, typer.Option("--layers", "-l", help="The mixers of a teacher: a preset's name, or a .json or .py file.")
]
LengthOption = Annotated[int, typer.Option(help="Tokens per sequence; well beyond the windows.")]
LimitOption = Annotated[int, typer.Option(min=1, help="Read only so many sequences.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Sequences per forward pass.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")]
RecallOption = Annotated[
    list[int] | None,
    typer.Option(
        "--recall",
        help="Choose by the answers of questions about facts so many tokens back, in place of every token; repeatable.",
    ),
]
RecallShareOption = Annotated[
    float,
    typer.Option(
        help="With --recall: how much the answers count of all; at less than 1 every other token counts a little too."
    ),
]


@app.command()
def diagnose(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="The student: folder or Hub id.")],
    text: TextOption,
    teacher: Annotated[
        str | None,
        typer.Option("--teacher", "-t", help="What it is compared with; by default its own projections with softmax."),
    ] = None,
    start: Annotated[
        str | None, typer.Option(help="The student before its training, to tell exactly which parameters moved.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 2048,
    limit: Annotated[int, typer.Option(min=1, help="Read only so many sequences.")] = 4,
    questions: Annotated[
        Path | None, typer.Option(help="A .jsonl file of A, B, C, D questions: are all answered with one letter?")
    ] = None,
    few_shot: Annotated[int, typer.Option(min=0, help="Examples before each question.")] = 0,
    few_shot_from: Annotated[Path | None, typer.Option(help="Take the examples from this file.")] = None,
    question_limit: Annotated[int, typer.Option(min=1, help="Ask only so many questions.")] = 100,
    folder: Annotated[
        Path | None, typer.Option("--out", "-o", help=f"New folder for {DIAGNOSIS} and {PICTURE}.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table and the verdict.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Look at every layer of a student beside its teacher, and say what is wrong.

    Error of the attention output by head, the share of each branch in it, how
    long the gates remember, the mass on sinks, parameters that never moved; and
    with --questions whether the model answers all with one letter.

    \b
      lizardzoo diagnose runs/first/final --text novel.txt --start student \\
          --teacher HuggingFaceTB/SmolLM2-135M-Instruct --out report
    """
    if few_shot_from is not None and (questions is None or not few_shot):
        raise LizardzooError(
            "--few-shot-from says where examples come from; give --questions FILE and --few-shot N too"
        )
    with nullcontext() if folder is None else new_folder(folder) as made:
        tokenizer = load_tokenizer(model, teacher)
        ids = evaluate.sequences(text, tokenizer, length, limit)
        student, expected, before = (
            None if name is None else load_model(name, dtype, device) for name in (model, teacher, start)
        )
        with progress_bar("sequences", len(ids)) as progress:
            found = look_at(
                student, ids, teacher=expected, start=before, questions=questions, examples=few_shot_from,
                few_shot=few_shot, limit=question_limit, tokenizer=tokenizer, progress=progress,
            )  # fmt: skip
        if made is not None:
            (made / DIAGNOSIS).write_text(found.to_json() + "\n", encoding="utf-8")
            found.plot(made / PICTURE)
    if as_json:
        print(found.to_json())  # noqa: T201  rich would break long lines
        return
    out.print(found.table())
    if found.letters is not None:
        for who in ("right", "model", "teacher"):
            counts = getattr(found.letters, who)
            if counts is not None:
                out.print(
                    f"{who:>8}", "  ".join(f"{letter} {count}" for letter, count in counts.items()), highlight=False
                )
    out.print(escape(found.verdict), style="yellow" if found.findings else "green", soft_wrap=True, highlight=False)
    if folder is not None:
        for file in (DIAGNOSIS, PICTURE):
            out.print(f"wrote {escape(str(folder / file))}", soft_wrap=True, highlight=False)


@app.command("select-layers")
def select_layers(
    model: ModelArgument,
    text: TextOption,
    keep: Annotated[int, typer.Option("--keep", "-k", min=0, help="How many layers shall have softmax.")],
    file: FileOption,
    teacher: TeacherOption = None,
    layers: LayersOption = "recommended",
    window: Annotated[
        int | None,
        typer.Option(
            min=1, help="Give the chosen layers a window of so many tokens in place of softmax: memory stays fixed."
        ),
    ] = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="One layer after the other, each beside those chosen: better, and slower.")
    ] = False,
    recall: RecallOption = None,
    recall_share: RecallShareOption = 1.0,
    length: LengthOption = 2048,
    limit: LimitOption = 8,
    batch_size: BatchOption = 1,
    as_json: JsonOption = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Choose the layers whose softmax is worth most, by KL to the teacher on a text.

    \b
      lizardzoo select-layers HuggingFaceTB/SmolLM2-135M-Instruct \\
          --text novel.txt --keep 4 --out layers.json
      lizardzoo linearize HuggingFaceTB/SmolLM2-135M-Instruct \\
          --layers layers.json --out student

    A student is ranked as it is; a teacher is linearized with --layers first, which
    says less where mixers have parameters: untrained they lose what trained ones keep.
    What a few softmax layers give back is recall: with --recall 512 --recall 1536
    they are chosen by it. With --window 1024 it ends there, and memory does not grow.
    """
    _refuse_layers_file(file)
    ids, weights = _sequences(text, load_tokenizer(model, teacher), length, limit, recall, recall_share)
    subject = load_model(model, dtype, device)
    expected = None if teacher is None else load_model(teacher, dtype, device)
    with progress_bar("sequences", len(ids)) as progress:
        found = choose_layers(
            subject, ids, keep, layers=_mixers_for(subject, layers), teacher=expected, weights=weights,
            give="softmax" if window is None else Window(window=window), greedy=greedy, batch_size=batch_size,
            progress=progress,
        )  # fmt: skip
    _tell(found, file, as_json)


class SizeField(str, Enum):
    """Sizes that `select-windows` shares out."""

    window = "window"
    heavy = "heavy"


@app.command("select-windows")
def select_windows(
    model: ModelArgument,
    text: TextOption,
    file: FileOption,
    teacher: TeacherOption = None,
    layers: LayersOption = "recommended",
    field: Annotated[
        list[SizeField] | None,
        typer.Option(help="What is shared out: by default the windows; repeatable, all then come out of one budget."),
    ] = None,
    octaves: Annotated[int, typer.Option(min=1, help="How often a size may be halved or doubled.")] = 2,
    rounds: Annotated[
        int, typer.Option(min=1, help="How often to measure around what was chosen, while it gets better.")
    ] = ROUNDS,
    recall: RecallOption = None,
    recall_share: RecallShareOption = 1.0,
    length: LengthOption = 2048,
    limit: LimitOption = 8,
    batch_size: BatchOption = 1,
    as_json: JsonOption = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """Share the windows (or heavy tokens) out among the layers at the same state, by KL to the teacher on a text.

    \b
      lizardzoo select-windows HuggingFaceTB/SmolLM2-135M-Instruct \\
          --field heavy --text novel.txt --out layers.json

    With --field window --field heavy both share one budget. With --recall 512
    --recall 1536 sizes are chosen by what the model recalls from so far back, and
    with --recall-share 0.1 by the rest of the text as well. Each layer's sizes are run
    by themselves, through all sequences: the bar counts every run's.
    """
    _refuse_layers_file(file)
    ids, weights = _sequences(text, load_tokenizer(model, teacher), length, limit, recall, recall_share)
    subject = load_model(model, dtype, device)
    expected = None if teacher is None else load_model(teacher, dtype, device)
    with progress_bar("sequences", len(ids)) as progress:
        found = choose_windows(
            subject, ids, layers=_mixers_for(subject, layers), teacher=expected, weights=weights,
            field=[each.value for each in field or [SizeField.window]], octaves=octaves, rounds=rounds,
            batch_size=batch_size, progress=progress,
        )  # fmt: skip
    _tell(found, file, as_json)


def _refuse_layers_file(file: Path) -> None:
    if file.suffix != ".json":
        raise LizardzooError(
            f"--out {file} is to hold JSON, which `linearize --layers` knows by its name: end it in .json"
        )
    if file.exists():
        raise LizardzooError(f"--out {file} is there already; name a new file")


def _sequences(
    text: Path, tokenizer: Any, length: int, limit: int, recall: list[int] | None, share: float
) -> tuple[Tensor, Tensor | None]:
    """What is chosen on, and what its tokens count; None: all the same."""
    if recall:
        return evaluate.recall_sequences(text, tokenizer, length, limit, distances=recall, share=share)
    if share != 1:
        raise LizardzooError(
            f"--recall-share {share} says what answers count; say with --recall TOKENS how far back they lie"
        )
    return evaluate.sequences(text, tokenizer, length, limit), None


def _mixers_for(model: Any, layers: str) -> Any:
    """The layers of a teacher; a student has its own."""
    return "softmax" if is_linearized(model.config) else read_layers(layers, None, model.config.num_hidden_layers)


def _tell(found: Selection | WindowSelection, file: Path, as_json: bool) -> None:
    """Write the layers list, show the rest."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(found.to_dict()["layers"], indent=2) + "\n", encoding="utf-8")
    if as_json:
        print(found.to_json())  # noqa: T201  rich would break long lines
        return
    out.print(found.table())
    out.print(f"wrote {escape(str(file))}", soft_wrap=True, highlight=False)
