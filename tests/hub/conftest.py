"""Tests against the Hub on loopback: this process's client is pointed at it, with a cache of its own.

`measured` is what a user has in hands before publishing: a model that the command line made, trained and measured.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from typer.testing import CliRunner

from lizardzoo.cli import app
from lizardzoo.distill.recipe import RECIPES
from tests.hub.server import LoopbackHub

TEXT = "The lizard lay on the warm stone, and it lost its tail to the cat that had come for it. " * 60
QUESTIONS = [
    {"query": f"{i} and {i} are", "choices": [f"{2 * i}", f"{i} tails", "none"], "gold": i % 3} for i in range(6)
]


def command(*arguments: Any) -> str:
    """What a command says, all of it; it must succeed."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.output


def refused(*arguments: Any) -> str:
    """What a command says that fails."""
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 1
    return " ".join(result.output.split())


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """student/ as converted, run/ of its distillation, report/ of run/final; read them, never write into them."""
    home = tmp_path_factory.mktemp("measured")
    layers, recipe, text, questions = (
        home / name for name in ("layers.json", "mine.json", "text.txt", "questions.jsonl")
    )
    layers.write_text(json.dumps([{"type": "hybrid", "window": 8}, "softmax", "gated-linear"]))
    text.write_text(TEXT)
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    short = {"steps": 2, "batch_size": 2, "sequence_length": 32}
    made = RECIPES["recommended"]
    made = replace(
        made, name="mine", transfer=replace(made.transfer, **short), finetune=replace(made.finetune, **short)
    )
    recipe.write_text(json.dumps(made.to_dict()))
    command("linearize", tiny_folder, "--layers", layers, "--out", home / "student")
    command("distill", home / "student", "--data", text, "--recipe", recipe, "--out", home / "run")
    command(
        "eval", home / "run" / "final", "-t", tiny_folder, "--text", text, "--length", 64, "--limit", 2, "--window", 8,
        "--ablate", "--distances", "8,32", "--samples", 2, "--tasks", questions, "--out", home / "report",
    )  # fmt: skip
    return home


@contextmanager
def connected(cache: Path) -> Iterator[LoopbackHub]:
    """A fresh Hub, with this process's client pointed at it; retries of the client wait for nothing."""
    from huggingface_hub import file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    with LoopbackHub() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            patch.setattr(constants, name, value)
        patch.setattr(transformers_hub, "_hf_api", None)
        patch.setattr(hf_api.api, "endpoint", server.url)
        hasty = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
        for module in (_http, file_download):
            patch.setattr(module, "time", hasty)
        yield server


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    """A Hub where alice (token "hf_alice") and bob have accounts."""
    with connected(tmp_path / "cache") as server:
        yield server
