"""What mkdocs makes of the package while it builds the site: the figures, and the command line's page."""

from __future__ import annotations

import functools
import html
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parent))

import figures

INDENTED = re.compile(r"\n\n\n((?:  .*\n)+)")  # what follows a \b in a command's help


def on_files(files: Files, config: Any) -> Files:
    """Add what is not in the folder."""
    for name in figures.FIGURES:
        files.append(File.generated(config, f"figures/{name}.svg", content=draw(name)))
    files.append(File.generated(config, "reference/cli.md", content=command_line()))
    return files


@functools.cache
def draw(name: str) -> bytes:
    """A figure; drawn once where `mkdocs serve` builds again and again."""
    return figures.svg(name)


@functools.cache
def command_line() -> str:
    """All commands with their options, as typer tells them; examples as blocks."""
    command = [sys.executable, "-m", "typer", "lizardzoo.cli", "utils", "docs", "--name", "lizardzoo"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def block(example: re.Match[str]) -> str:
        return f"\n\n```\n{textwrap.dedent(html.unescape(example[1]))}```\n"

    return INDENTED.sub(block, told.replace("# `lizardzoo`", "# Command line", 1))
