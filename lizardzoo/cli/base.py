"""The app that the commands hang on: one red line for an error, output folders whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from lizardzoo.errors import LizardzooError
from lizardzoo.hub.training import package_version

out = Console()
"""Results, on the standard output."""
err = Console(stderr=True)
"""Progress, notes and errors."""


class Commands(TyperGroup):
    """Tells a mistake in one red line, with exit code 1; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (LizardzooError, OSError) as error:
            if ctx.params["debug"] or isinstance(error, BrokenPipeError):
                raise
            err.print("error:", one_line(error), style="red", soft_wrap=True, markup=False, highlight=False)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"lizardzoo {package_version('lizardzoo')}", highlight=False)
        raise typer.Exit


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Turn a pretrained softmax Transformer into one with constant memory, layer by layer.

    The usual way, from a model on the Hub (or in a folder) to one that speaks:

    \b
      lizardzoo linearize HuggingFaceTB/SmolLM2-135M-Instruct --out student
      lizardzoo distill student --data books.txt --out runs/first
      lizardzoo eval runs/first/final --text wiki.txt \\
          --teacher HuggingFaceTB/SmolLM2-135M-Instruct
      lizardzoo generate runs/first/final "Why do lizards lose their tails?"

    `lizardzoo COMMAND --help` explains each of them.
    """
    transformers_logging.disable_progress_bar()  # a bar for reading a file, in the middle of ours


def one_line(error: BaseException) -> str:
    """The first line of a message: transformers adds pages of advice."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def refuse_used_folder(folder: Path) -> None:
    """Raise unless the folder is missing or empty."""
    if folder.is_file():
        raise LizardzooError(f"--out {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise LizardzooError(f"--out {folder} is not empty; name a new folder, or empty it first")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into that takes the name `folder` only when all went well; a used one is refused."""
    refuse_used_folder(folder)
    folder = folder.absolute()
    made = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    made.mkdir(parents=True)
    try:
        yield made
        if folder.is_dir():
            folder.rmdir()
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def progress_bar(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on the standard error while something counts up; gives the function that is told (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done, total: bar.update(task, completed=done, total=total)
