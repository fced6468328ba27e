"""The page on publishing is run against the Hub on loopback."""

from pathlib import Path

import pytest

import lizardzoo as lz
from tests.hub.server import LoopbackHub
from tests.test_docs import DOCS, run


def test_the_page_publishes(
    hub: LoopbackHub, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the folder that `distill` leaves, by an account named me."""
    from transformers import AutoTokenizer

    hub.tokens["hf_me"] = "me"
    monkeypatch.setenv("HF_TOKEN", "hf_me")
    final = tmp_path / "runs" / "first" / "final"
    lz.linearize(tiny_folder).save_pretrained(final)
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(final)
    run(DOCS / "howto" / "publish.md", tmp_path, monkeypatch)
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files("me/Lizard-SmolLM2-135M"))
