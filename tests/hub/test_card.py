"""The card says what was configured, trained and measured, and nothing that a person wrote is lost to it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.distill.recipe import RECIPES
from lizardzoo.hub import check_card, push_folder, read_card, write_card
from tests.hub.conftest import command, refused
from tests.hub.server import LoopbackHub

BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
OWN = "# My lizard\n\nWritten with care.\n"


@pytest.fixture
def student(measured: Path, tmp_path: Path) -> Path:
    """A copy of what was distilled and measured."""
    return Path(shutil.copytree(measured / "run" / "final", tmp_path / "student"))


def figures(report: dict[str, Any], name: str) -> list[float]:
    """All that was measured of a model, in the order of the report."""
    found = []
    for each in report["positions"].values():
        for row in each["rows"]:
            if row["name"] == name:
                for cell in (*row["result"]["buckets"], row["result"]["overall"]):
                    found += [cell["perplexity"], cell["kl"]]
    for row in report["retrieval"]["rows"]:
        if row["name"] == name:
            found += [point["accuracy"] for point in row["points"]]
    return found + [report["tasks"][name]["questions"][f"{metric},none"] for metric in ("acc", "acc_norm")]


def cells(text: str, name: str) -> list[str]:
    """The table cells of the rows of that name."""
    rows = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [part for row in rows if row[0].strip("*") == name for cell in row[1:] for part in cell.split("<br>")]


def test_every_figure_is_the_reports(measured: Path, student: Path) -> None:
    report = json.loads((measured / "report" / "report.json").read_text())
    write_card(student, report=measured / "report" / "report.json", repo_id="me/student", license="mit", base="o/b")
    card = ModelCard.load(student / "README.md")
    assert [result.metric_value for result in card.data.eval_results] == figures(report, "final")
    assert card.data.model_name == "student"
    positions = report["positions"]["text.txt"]["rows"]
    names = [row["name"] for row in positions]
    assert len(names) >= 4  # teacher, student, its ablations, the bare window
    for row in positions:
        numbers = [
            value
            for cell in (*row["result"]["buckets"], row["result"]["overall"])
            for value in (cell["perplexity"], cell["kl"])
        ]
        shown = cells(card.text, row["name"])
        assert [float(cell) for cell in shown[: len(numbers)]] == pytest.approx(numbers, abs=5.1e-3, rel=5e-3)
        if row["without"] is None:
            assert f"{row['memory']['2048'] / 2**20:,.1f} MiB" in shown
    for row in report["retrieval"]["rows"]:
        assert all(f"{point['accuracy']:.4f}" in cells(card.text, row["name"]) for point in row["points"])
    scores = report["tasks"]
    names = [name for name in scores if name in ("teacher", "final") or "without" in name]
    assert len(names) == len(scores) == 4
    for metric in ("acc", "acc_norm"):
        pairs = [[scores[name]["questions"][f"{metric}{of},none"] for of in ("", "_stderr")] for name in names]
        values = " | ".join(f"{value:.4f} ± {error:.4f}" for value, error in pairs)
        assert f"| questions | 6 | {metric} | {values} |" in card.text
    beside = json.loads((student / "evaluation.json").read_text())
    assert beside["row"] == "final"
    assert figures(beside, "final") == figures(report, "final")
    assert str(measured) not in (student / "evaluation.json").read_text() + card.content  # whose paths are nobody's
    assert check_card(card.content) == []


def test_a_card_written_again_says_the_same(measured: Path, student: Path) -> None:
    given = {"repo_id": "me/m", "license": "mit", "base": "o/b", "datasets": ["o/d", "a book"], "tags": ["tiny"]}
    write_card(student, report=measured / "report" / "report.json", **given)
    first = (student / "README.md").read_text()
    write_card(student, repo_id="me/m")
    assert (student / "README.md").read_text() == first
    data = read_card(first).data
    assert (data["license"], data["base_model"], data["datasets"]) == ("mit", "o/b", ["o/d"])
    assert {"lizardzoo", "tiny"} <= set(data["tags"])
    assert "constant-memory" not in data["tags"]  # one layer keeps softmax
    assert "constant memory" not in first
    assert "1 of 3 layers keep softmax" in first


def test_layers_and_recipe_are_told(student: Path, tmp_path: Path) -> None:
    recipe = RECIPES["recommended"]
    run = tmp_path / "run"
    run.mkdir()
    manifest = {"recipe": recipe.to_dict(), "data": {"transfer": "0", "finetune": "1"}}
    (run / "recipe.json").write_text(json.dumps(manifest))
    for folder, stages in (("transfer", ["transfer"]), ("final", ["transfer", "finetune"])):
        shutil.copytree(student, run / folder)
        text = write_card(run / folder).read_text()
        assert "| 0 | hybrid window=8 |\n| 1 | softmax |\n| 2 | gated-linear |" in text
        assert f"Recipe `{recipe.name}`" in text
        for stage in ("transfer", "finetune"):
            values = getattr(recipe, stage)
            tokens = values.steps * values.batch_size * values.sequence_length
            row = f"| {stage} | {values.steps:,} | {values.batch_size} | {values.sequence_length:,} | {tokens:,} |"
            assert (row in text) == (stage in stages)
    assert "No recipe was recorded" in write_card(student).read_text()


def test_the_snippet_runs_as_it_stands(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.chdir(student.parent)
    command("card", "student")
    command("push", "student", "alice/Lizard")
    for text in (Path("student/README.md").read_text(), hub.files("alice/Lizard")["README.md"].decode()):
        (snippet,) = BLOCK.findall(text)
        exec(compile(snippet, "README.md", "exec"), {})
        assert "Why do lizards lose their tails?" in capsys.readouterr().out
    assert '"alice/Lizard"' in snippet
    assert "# Lizard\n" in hub.files("alice/Lizard")["README.md"].decode()
    assert hub.count("GET", "alice/Lizard/resolve/.*/model.safetensors") == 1


def test_what_a_person_wrote_stays(hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    ours = write_card(student, license="mit", base="o/b").read_text()
    by_hand = [
        OWN,
        "---\nlicense: [mit\n---\n# Mine\n",
        ours.replace("## Limits", "## Known limits"),
        ours.replace("license: mit", "license: gpl-3.0"),
    ]
    for text in by_hand:
        assert read_card(text).by_hand
        (student / "README.md").write_text(text)
        assert "was written or changed by hand; keep it, or replace it" in refused("card", student)
        assert (student / "README.md").read_text() == text
    command("push", student, "alice/m")  # a person's goes up as it is
    assert hub.files("alice/m")["README.md"].decode() == by_hand[-1]
    command("card", student, "--force", "--license", "mit")
    assert not read_card((student / "README.md").read_text()).by_hand
    said = command("push", student, "alice/m")
    assert "README.md on the Hub was written by hand and stays; --force replaces it" in said
    assert hub.files("alice/m")["README.md"].decode() == by_hand[-1]
    assert "note" not in command("push", student, "alice/m", "--force")
    assert read_card(hub.files("alice/m")["README.md"].decode()).data["license"] == "mit"
    write_card(student, license="apache-2.0")
    command("push", student, "alice/m")  # our own is replaced unasked
    assert read_card(hub.files("alice/m")["README.md"].decode()).data["license"] == "apache-2.0"
    model = lz.from_pretrained(student)
    hub.put("alice/m", {"README.md": OWN.encode()})
    assert model.push_to_hub("alice/m").kept_readme
    assert hub.files("alice/m")["README.md"].decode() == OWN


def test_base_and_license_are_those_of_the_base_models_card(
    hub: LoopbackHub, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_folder.iterdir()}
    hub.put("org/base", files | {"README.md": b"---\nlicense: cc-by-4.0\n---\n# Base\n"})
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    lz.linearize("org/base", "recommended").push_to_hub("alice/m")
    data = read_card(hub.files("alice/m")["README.md"].decode()).data
    assert (data["base_model"], data["license"], data["base_model_relation"]) == ("org/base", "cc-by-4.0", "finetune")
    assert "constant-memory" in data["tags"]


def test_check_says_what_is_missing(student: Path) -> None:
    said = command("card", student)
    assert "note: no license is named; pass --license" in said
    assert "note: no base model on the Hub is named; pass --base" in said
    assert "note" not in command("card", student, "--license", "mit", "--base", "o/b")
    text = (student / "README.md").read_text()
    assert check_card(text.replace("import lizardzoo as lz", "import lizardzoo as")) != []
    assert "the metadata cannot be read" in check_card(text.replace("license: mit", "license: [mit"))[0]
    assert check_card(BLOCK.sub("", text)) == ["there is no Python snippet"]


HOSTILE = "x|y`<!-- z -->\n## Free money"


def test_names_cannot_write_the_card(measured: Path, student: Path) -> None:
    report = json.loads((measured / "report" / "report.json").read_text().replace("text.txt", "PLACE"))
    report = {**report, "positions": {HOSTILE: report["positions"]["PLACE"]}, "versions": {HOSTILE: HOSTILE}}
    recipe = {**RECIPES["recommended"].to_dict(), "name": HOSTILE}
    text = write_card(student, report=report, row="final", recipe=recipe, datasets=[HOSTILE]).read_text()
    assert "\n## Free money" not in read_card(text).body
    assert HOSTILE not in read_card(text).body
    assert not read_card(text).by_hand
    assert yaml.safe_load(text.split("---\n")[1])["model-index"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"report": "nowhere.json"}, "there is no report file nowhere.json"),
        ({"report": {"positions": {"t": {"rows": [{"name": 3}]}}}}, "the report is not one that lizardzoo eval wrote"),
        ({"report": {"models": {"a": "a", "b": "b"}}}, "the report measures a, b, and 'none of them' is not"),
        ({"report": {"models": {"a": "a"}}, "row": "c"}, "the report measures a, and 'c' is not this model's row"),
        ({"recipe": {"recipe": {"name": "x"}}}, "is not one of lizardzoo.distill"),
    ],
)
def test_wrong_input_writes_nothing(student: Path, given: dict[str, Any], message: str) -> None:
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    with pytest.raises(LizardzooError, match=re.escape(message)):
        write_card(student, **given)
    assert {path.name: path.read_bytes() for path in student.iterdir()} == before


def test_what_is_no_student_gets_no_card_and_is_not_pushed(hub: LoopbackHub, tiny_folder: Path, tmp_path: Path) -> None:
    for use in (write_card, lambda folder: push_folder(folder, "alice/m", token="hf_alice")):
        with pytest.raises(LizardzooError, match="holds a plain 'llama' model, not a linearized one"):
            use(tiny_folder)
        with pytest.raises(LizardzooError, match=r"there is no folder|holds no config.json"):
            use(tmp_path / "nowhere")
    assert hub.repos == {}


def test_the_token_stays_here(
    hub: LoopbackHub, student: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    caplog.set_level("DEBUG")
    before = {path.name: path.read_bytes() for path in student.iterdir()}
    said = command("push", student, "alice/m", "--private")
    assert {path.name: path.read_bytes() for path in student.iterdir()} == before
    assert lz.from_pretrained("alice/m").config.num_hidden_layers == 3
    assert "hf_alice" not in said + caplog.text
    assert not any(b"hf_alice" in content for content in hub.files("alice/m").values())
    (student / "notes.txt").write_text("my token is hf_alice")
    assert "notes.txt holds your access token; remove it" in refused("push", student, "alice/m")
    assert "notes.txt" not in hub.files("alice/m")
    (student / "notes.txt").unlink()
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    assert "hf_nobody" not in refused("push", student, "alice/m")
