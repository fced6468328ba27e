"""The page on publishing is run against the Hub on loopback."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import lizardzoo as lz
from lizardzoo.hub import check_card
from tests.hub.server import LoopbackHub
from tests.hub.test_round_trip import logits
from tests.test_docs import DOCS, run

BASE, NAME = "HuggingFaceTB/SmolLM2-135M-Instruct", "me/Lizard-SmolLM2-135M"


def test_the_page_publishes(
    hub: LoopbackHub, tiny_folder: Path, measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From what `distill` and `eval` leave of a student of BASE, by an account named me."""
    hub.put(BASE, {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
    hub.put(BASE, {"README.md": b"---\nlicense: cc-by-4.0\n---\n# A base\n"})
    hub.tokens["hf_me"] = "me"
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    shutil.copytree(measured / "run", tmp_path / "runs" / "first")
    shutil.copytree(measured / "report", tmp_path / "report")
    config = tmp_path / "runs" / "first" / "final" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": BASE}))
    run(DOCS / "howto" / "publish.md", tmp_path, monkeypatch)
    model = lz.from_pretrained(tmp_path / "runs" / "first" / "final")
    for name, weights in ((NAME, "model.safetensors"), (f"{NAME}-difference", "difference.safetensors")):
        files = hub.files(name)
        assert {"config.json", "tokenizer.json", weights} <= set(files)
        told = {"evaluation.json", "recipe.json"} if name == NAME else set()  # what the page gives
        assert {each for each in files if each in ("evaluation.json", "recipe.json")} == told
        assert "license: cc-by-4.0" in files["README.md"].decode()
        assert check_card(files["README.md"].decode()) == []
        assert torch.equal(logits(lz.from_pretrained(name)), logits(model))
