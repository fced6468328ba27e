"""Tests against the Hub on loopback: this process's client is pointed at it, with a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from tests.hub.server import LoopbackHub


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A fresh Hub where alice (token "hf_alice") and bob have accounts; retries of the client wait for nothing."""
    from huggingface_hub import file_download, hf_api
    from huggingface_hub.utils import _http
    from transformers.utils import hub as transformers_hub

    with LoopbackHub() as server:
        cache = tmp_path / "cache"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(cache),
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr(transformers_hub, "_hf_api", None)
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)
        hasty = SimpleNamespace(**vars(time) | {"sleep": lambda _: None})
        for module in (_http, file_download):
            monkeypatch.setattr(module, "time", hasty)
        yield server


@pytest.fixture
def fresh_process(hub: LoopbackHub, tmp_path: Path) -> Callable[..., str]:
    """Run code in a new interpreter whose Hub is the one on loopback; its standard output."""

    def run(code: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-W", "error::UserWarning", "-c", code],
            env=os.environ
            | {
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "home"),
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "OMP_NUM_THREADS": "1",
            }
            | environment,
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run
