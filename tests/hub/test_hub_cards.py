"""A published model is a folder of a few files: its card is what its JSON says, and its commands make it again."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

import lizardzoo as lz
from lizardzoo.distill.recipe import RECIPES
from lizardzoo.hub import read_card, write_card
from lizardzoo.hub.low_rank import read
from lizardzoo.hub.stub import STUB
from tests.hub.conftest import QUESTIONS, TEXT, command, connected
from tests.hub.published import HUB_CARDS, WEIGHTS, problems, published
from tests.hub.server import LoopbackHub
from tests.hub.test_round_trip import logits
from tests.test_docs import run

LAYERS = [{"type": "heavy", "window": 8, "heavy": 4}, "softmax", {"type": "heavy", "window": 8, "heavy": 4}]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = "hub_cards/tiny"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Iterator[LoopbackHub]:
    """With org/base, whose license is known."""
    with connected(tmp_path_factory.mktemp("client")) as server:
        server.put("org/base", {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
        server.put("org/base", {"README.md": b"---\nlicense: mit\n---\n# A base\n", "onnx/model.onnx": b"large"})
        yield server


@pytest.fixture(scope="module")
def home(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line leaves of a student without parameters of its own: hub_cards/tiny, measured in two goes."""
    home = tmp_path_factory.mktemp("home")
    (home / "data").mkdir()
    (home / "data" / "text.txt").write_text(TEXT)
    (home / "data" / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (home / "layers.json").write_text(json.dumps(LAYERS))
    made = RECIPES["recommended"]
    stage = replace(made.finetune, steps=3, batch_size=4, sequence_length=32, lora_rank=2)
    (home / "mine.json").write_text(json.dumps(replace(made, name="mine", finetune=stage).to_dict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        command("linearize", "org/base", "--layers", "layers.json", "--out", "student")
        command(
            "distill", "student", "--data", "data/text.txt", "--recipe", "mine.json", "--stage", "finetune",
            "--micro-batch-size", 2, "--out", "runs/tiny",
        )  # fmt: skip
        command("difference", "runs/tiny/final", "--out", TINY)
        common = ("eval", TINY, "--teacher", "org/base")
        text = home / "data" / "text.txt"
        command(*common, "--text", text, "--length", 64, "--limit", 2, "--window", 8, "--out", "texts")
        command(
            *common, "--distances", "8,32", "--filler", text, "--samples", 2, "--tasks", "data/sums.jsonl",
            "--few-shot", "0,2", "--task-limit", 4, "--out", "tasks",
        )  # fmt: skip
        command("card", TINY, "--report", "texts/report.json", "--report", "tasks/report.json")
    return home


def copy_of(home: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(home / TINY, tmp_path / "tiny"))


def test_every_published_model_is_what_its_json_says() -> None:
    """And there is no other way for a card to get there; there may be none."""
    assert {path.name: found for path in published() if (found := problems(path))} == {}


def test_what_the_command_line_made_is_a_published_model(home: Path) -> None:
    assert problems(home / TINY) == []
    card = (home / TINY / "README.md").read_text()
    assert read_card(card).data["license"] == "mit"
    for shown in (
        "| sums, 0-shot | 4 | acc |",
        "| sums, 2-shot | 4 | acc |",
        "bare window",
        "(2 texts at each, 1 fact",
    ):
        assert shown in card
    assert re.search(r"- finetune: \d+ seconds, lizardzoo .*, on cpu\n", card)
    assert "Data: text.txt." in card
    assert "Measured with lizardzoo" in card
    (names,) = re.findall(r"^from .* import (.*)$", (home / TINY / STUB).read_text(), re.MULTILINE)
    assert names.split(", ") == sorted(names.split(", "))  # the linter reads these files too


def test_a_figure_changed_by_hand_or_a_path_is_seen(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, tmp_path)

    def changed(name: str, old: str, new: str) -> list[str]:
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        found = problems(folder)
        path.write_text(text)
        return found

    card = ["README.md is not what its JSON files say; write it again with `lizardzoo card`"]
    accuracy = json.loads((folder / "evaluation.json").read_text())["tasks"]["tiny"]["sums, 0-shot"]["acc,none"]
    assert changed("README.md", f"{accuracy:.4f}", "0.9900") == card
    assert changed("README.md", "## Limits", "## No limits") == card
    assert changed("evaluation.json", '"perplexity": ', '"perplexity": 1') == card
    assert changed("recipe.json", '"seconds": ', '"seconds": 77') == card
    assert changed("config.json", '"heavy": 4', '"heavy": 5') == card
    assert "recipe.json names a path of a machine" in changed("recipe.json", "text.txt", "/home/me/text.txt")
    assert changed("config.json", '"difference"', '"nothing"')[0] == "config.json names no base"
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])
    assert "damaged or cut short" in problems(folder)[0]
    (folder / "notes.txt").write_text("")
    (folder / "evaluation.json").unlink()
    assert problems(folder) == ["evaluation.json is missing", "notes.txt is no file of a published model"]


def test_a_card_is_the_same_on_every_machine(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is installed there, and without a network: all that it says is in the folder."""
    monkeypatch.setattr("lizardzoo.hub.training.version", lambda name: "99")
    monkeypatch.setattr("lizardzoo.hub.render.license_of", lambda model: None)
    assert problems(copy_of(home, tmp_path)) == []


def test_a_student_without_parameters_of_its_own_weighs_its_factors(home: Path) -> None:
    whole, updates = read(home / TINY / WEIGHTS)
    assert whole == {}
    model = lz.from_pretrained(home / "runs" / "tiny" / "final")
    assert not any(".mixer." in name for name, _ in model.named_parameters())
    projections = [name for name in model.state_dict() if re.search(r"\.[qkvo]_proj\.weight$", name)]
    assert updates.keys() == set(projections)
    numbers = sum(2 * sum(model.get_parameter(name).shape) for name in projections)  # of rank 2
    assert sum(tensor.numel() for tensor in load_file(home / TINY / WEIGHTS).values()) == numbers
    header = 300 * len(projections)
    assert (home / TINY / WEIGHTS).stat().st_size < 4 * numbers + header
    assert torch.equal(logits(lz.from_pretrained(home / TINY)), logits(model))


def test_smollm2s_factors_are_less_than_eight_megabytes() -> None:
    """Of rank 8 and fp32, 30 layers, hidden 576, 9 query and 3 key heads of 64."""
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576)]
    assert 4 * 30 * sum(8 * (out + inside) for out, inside in shapes) == 3_686_400 < 8e6


@pytest.mark.slow
def test_the_commands_on_the_card_make_the_model_again(home: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    """In a shell, byte for byte, and what is measured is the same; the base has moved on since."""
    card = (home / TINY / "README.md").read_text()
    (script,) = (code for language, code in BLOCK.findall(card) if language == "bash")
    for path in (*(home / TINY / name for name in ("config.json", "recipe.json")), *(home / "data").iterdir()):
        shutil.copyfile(path, tmp_path / path.name)
    (tmp_path / "bin").mkdir()
    for name, called in (("lizardzoo", "-m lizardzoo.cli"), ("python", "")):
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {called} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)
    hub.put("org/base", {"generation_config.json": b'{"max_new_tokens": 1}'})
    where = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    where |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HUB_CARDS.parent)}
    done = subprocess.run(
        ["bash", "-eu", "-c", script],
        env={**os.environ, **where, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "text.txt: OK" in done.stdout
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "tiny" / name).read_bytes() == (home / TINY / name).read_bytes(), name
    again, first = (json.loads((place / "evaluation.json").read_text()) for place in (tmp_path / "tiny", home / TINY))
    for part in ("positions", "retrieval", "tasks"):
        assert again[part] == first[part], part
    assert hub.count("GET", "onnx") == 0  # not what the commands need


def test_changed_data_stop_the_commands(home: Path, tmp_path: Path) -> None:
    card = (home / TINY / "README.md").read_text()
    (script,) = (code for language, code in BLOCK.findall(card) if language == "bash")
    for path in (home / "data").iterdir():
        (tmp_path / path.name).write_text(path.read_text() + " ")
    checked = script.partition("TEACHER=")[0]
    done = subprocess.run(["bash", "-e", "-c", checked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "text.txt: FAILED" in done.stdout


def test_the_folders_page_is_run(
    home: Path, tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hub_cards/README.md, with the tiny model under the name that stands there."""
    page = HUB_CARDS / "README.md"
    (name,) = set(re.findall(r'"hub_cards/([\w-]+)"', page.read_text()))
    shutil.copytree(home / TINY, tmp_path / "hub_cards" / name)
    monkeypatch.setattr("lizardzoo.smollm2.teacher_folder", lambda source: "org/base")
    run(page, tmp_path, monkeypatch)


@pytest.mark.slow
def test_every_published_model_loads_and_its_snippet_runs(
    smollm2: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(HUB_CARDS.parent)
    for folder in published():
        (snippet,) = (
            code for language, code in BLOCK.findall((folder / "README.md").read_text()) if language == "python"
        )
        exec(compile(snippet, folder / "README.md", "exec"), {})
        assert "Why do lizards lose their tails?" in capsys.readouterr().out


def test_a_card_given_names_of_data_keeps_them(home: Path, tmp_path: Path) -> None:
    folder = copy_of(home, tmp_path)
    for _ in range(2):
        assert "Data: text.txt." in write_card(folder).read_text()
    for given in ({"datasets": ["o/d"]}, {}):
        assert "Data: o/d." in write_card(folder, **given).read_text()
