"""What a model, a run and a report say of their own making, and that the commands take it again."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters.bases import base_hash
from lizardzoo.cli.make import _read_recipe
from lizardzoo.cli.models import read_layers
from lizardzoo.distill.recipe import recipe_from
from tests.hub.conftest import QUESTIONS, TEXT, command, refused


@pytest.fixture(scope="module")
def student(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A window of 8 in the first and last layer."""
    folder = tmp_path_factory.mktemp("reproducing") / "student"
    command("linearize", tiny_folder, "--layers", "heavy", "--softmax", "1", "--out", folder)
    return folder


def run_of(folder: Path) -> dict[str, Any]:
    (run,) = json.loads((folder / "report.json").read_text())["runs"]
    return run


def test_layers_are_taken_from_a_models_config(student: Path, tiny_folder: Path, tmp_path: Path) -> None:
    expected = lz.from_pretrained(student).config.specs
    assert read_layers(str(student / "config.json"), None, 3) == expected
    command("linearize", tiny_folder, "--layers", student / "config.json", "--out", tmp_path / "again")
    assert lz.from_pretrained(tmp_path / "again").config.specs == expected
    with pytest.raises(LizardzooError, match="type"):  # a plain model's
        read_layers(str(tiny_folder / "config.json"), None, 3)


def test_a_recipe_is_taken_from_a_run(measured: Path) -> None:
    """Which holds more than the recipe."""
    expected = recipe_from(json.loads((measured / "mine.json").read_text()))
    for path in (measured / "mine.json", measured / "run" / "recipe.json"):
        assert recipe_from(_read_recipe(str(path))) == expected


def test_a_report_says_what_it_was_asked_and_nothing_of_the_machine(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """And asked the same again, it says the same."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text, old.txt").write_text(TEXT)
        for questions in ("sums", "more"):
            rows = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
            (tmp_path / name / f"{questions}.jsonl").write_text(rows)

    def evaluate(name: str, *arguments: Any) -> dict[str, Any]:
        place = tmp_path / name
        command("eval", student, "-t", tiny_folder, *arguments, "--out", place / "report", "--device", "cpu")
        return json.loads((place / "report" / "report.json").read_text())

    text, sums, more = (tmp_path / "a" / name for name in ("text, old.txt", "sums.jsonl", "more.jsonl"))
    options = ("--length", 48, "--limit", 1, "--ablate", "--no-baseline", "--dtype", "float32")
    first = evaluate("a", "--text", text, *options, "--tasks", f"{sums},{more}", "--few-shot", "1")
    run = run_of(tmp_path / "a" / "report")
    assert str(tmp_path) not in json.dumps(run)
    assert run["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (text, sums, more)}
    assert run["device"] == "cpu"
    assert run["seconds"] > 0
    assert run["versions"].keys() == {"lizardzoo", "torch", "transformers", "lm_eval"}
    model = lz.from_pretrained(student)
    assert run["weights"].keys() == {"student", "teacher"}
    assert run["weights"]["student"] == run["weights"]["teacher"] == base_hash(model)  # heavy has none of its own
    words = list(run["arguments"])
    for name in run["files"]:
        words = [word.replace(name, str(tmp_path / "b" / name)) for word in words]
    again = evaluate("b", *words)
    assert run_of(tmp_path / "b" / "report")["arguments"] == run["arguments"]
    for part in ("positions", "tasks"):
        assert again[part] == first[part] != {}


def test_files_are_known_by_their_options_also_where_typer_holds_them_as_strings(student: Path, tmp_path: Path) -> None:
    """As some versions of it do in lists."""
    import click

    from lizardzoo.cli.record import run_record

    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = click.Command(
        "eval", params=[click.Option(["--text", "texts"], multiple=True), click.Option(["--tasks"])]
    )
    record = run_record(
        command.make_context("eval", ["--text", str(text)]), {"student": lz.from_pretrained(student)}, 0
    )
    assert record["arguments"] == ["--text", "text.txt"]
    assert record["files"] == {"text.txt": hashlib.sha256(text.read_bytes()).hexdigest()}


def test_retrieval_goes_alone_with_a_text_to_put_the_facts_into(
    student: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    common = ("eval", student, "-t", tiny_folder, "--distances", "8", "--samples", 2)
    command(*common, "--filler", text, "--out", tmp_path / "alone")
    command(*common, "--text", text, "--length", 48, "--limit", 1, "--out", tmp_path / "both")
    alone, both = (json.loads((tmp_path / name / "report.json").read_text()) for name in ("alone", "both"))
    assert alone["retrieval"] == both["retrieval"]
    assert [row["name"].partition(" ")[0] for row in alone["retrieval"]["rows"]] == ["teacher", "student", "bare"]
    assert (alone["positions"], alone["texts"]) == ({}, {})
    assert "give --text FILE, or --filler FILE alone" in refused("eval", student, "--distances", "8")


def test_numbers_of_examples_are_measured_each_and_named(student: Path, tmp_path: Path) -> None:
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for shots in ("0,2", "2", "0"):
        command("eval", student, "--tasks", sums, "--few-shot", shots, "--out", tmp_path / shots)
    found = {shots: json.loads((tmp_path / shots / "report.json").read_text())["tasks"]["student"] for shots in "02"}
    both = json.loads((tmp_path / "0,2" / "report.json").read_text())["tasks"]["student"]
    assert list(both) == ["sums, 0-shot", "sums, 2-shot"]
    assert both == found["0"] | found["2"]
    for wrong in ("two", "-1", "1.5"):
        said = refused("eval", student, "--tasks", sums, "--few-shot", wrong)
        assert f"--few-shot '{wrong}' is no list of whole numbers of at least 0" in said
        assert "write it as 5, or 0,5" in said
