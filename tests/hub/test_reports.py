"""Several reports of one model become one, or are refused: nothing is counted twice, and no two models are mixed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lizardzoo import LizardzooError
from lizardzoo.hub.reports import read_report


@pytest.fixture(scope="module")
def whole(measured: Path) -> dict[str, Any]:
    """A report with positions, retrieval and tasks."""
    return json.loads((measured / "report" / "report.json").read_text())


def parts_of(whole: dict[str, Any]) -> list[dict[str, Any]]:
    """The same, as if measured in three goes."""
    empty = {"positions": {}, "retrieval": None, "tasks": {}, "texts": {}}
    return [
        {**copy.deepcopy(whole), **empty, "positions": whole["positions"], "texts": whole["texts"]},
        {**copy.deepcopy(whole), **empty, "retrieval": whole["retrieval"]},
        {**copy.deepcopy(whole), **empty, "tasks": whole["tasks"]},
    ]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_what_was_measured_in_several_goes_is_what_was_measured_in_one(
    whole: dict[str, Any], order: tuple[int, ...], tmp_path: Path
) -> None:
    parts = parts_of(whole)
    expected = read_report(whole, tmp_path, "final")
    found = read_report([parts[index] for index in order], tmp_path, "final")
    assert expected is not None
    assert found is not None
    assert {**found.raw, "runs": None} == {**expected.raw, "runs": None}
    assert found.raw["runs"] == 3 * expected.raw["runs"]
    assert found.measured_with() == expected.measured_with()  # alike, and said once
    assert sorted(map(str, found.figures())) == sorted(map(str, expected.figures()))


def test_the_same_task_by_other_names_stands_in_one_table(whole: dict[str, Any], tmp_path: Path) -> None:
    """As 0-shot and 5-shot of two goes are."""
    first, second = parts_of(whole)[2], parts_of(whole)[2]
    second["tasks"] = {row: {"questions, 5-shot": values["questions"]} for row, values in second["tasks"].items()}
    found = read_report([first, second], tmp_path, "final")
    assert found is not None
    tasks = found.tasks()
    assert tasks is not None
    assert [row[0] for row in tasks["rows"]] == ["questions"] * 2 + ["questions, 5-shot"] * 2


def called(report: Any, name: str) -> Any:
    """The same report of a model in a folder of another name."""
    return json.loads(json.dumps(report).replace('"final"', f'"{name}"').replace("(for final)", f"(for {name})"))


def test_one_model_in_two_folders_is_known_by_its_weights(whole: dict[str, Any], tmp_path: Path) -> None:
    """By the first one's name, in every table."""
    parts = parts_of(whole)
    expected = read_report(parts, tmp_path, "final")
    found = read_report([parts[0], *(called(part, "elsewhere") for part in parts[1:])], tmp_path, None)
    assert found is not None and expected is not None
    assert found.row == "final"
    assert found.raw == expected.raw


def other_model(report: dict[str, Any]) -> None:
    report["models"] = {"other": "runs/other"}
    report["positions"] = {}


def other_weights(report: dict[str, Any]) -> None:
    report["runs"][0]["weights"]["final"] = "0" * 64


def other_teacher(report: dict[str, Any]) -> None:
    report["runs"][0]["weights"]["teacher"] = "1" * 64


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, None, r"two of the reports have the text 'text\.txt'; leave one out"),
        (1, None, r"two of the reports measure retrieval; leave one out"),
        (2, None, r"two of the reports have the task 'questions'; leave one out"),
        (1, other_model, r"the reports call this model 'final' and 'other', and do not say that"),
        (1, other_weights, r"the reports measure 'final' with other weights \([0-9a-f]{12}\.\.\. and 0{12}\.\.\.\)"),
        (1, other_teacher, r"the reports measure 'teacher' with other weights"),
        (1, lambda report: report.update(runs=[3]), r"the report is not one that lizardzoo eval wrote"),
        (1, lambda report: report.update(runs=[{"weights": [3]}]), r"the report is not one that lizardzoo eval wrote"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    whole: dict[str, Any], index: int, change: Any, message: str, tmp_path: Path
) -> None:
    one, other = parts_of(whole)[0 if change else index], parts_of(whole)[index]
    if change:
        change(other)
    with pytest.raises(LizardzooError, match=message) as error:
        read_report([one, other], tmp_path, None)
    assert "\n" not in str(error.value)
