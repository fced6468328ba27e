"""A mixer that lives outside the package: by decorator, by entry point, and under every law."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.config import MIXERS, spec_from_dict
from lizardzoo.testing import check_mixer

SOURCE = Path(__file__).parent / "plugin" / "toy_mixer.py"


@pytest.fixture
def toy() -> Iterator[Any]:
    """The plug-in's module, imported under a name of its own and forgotten afterwards."""
    spec = importlib.util.spec_from_file_location("toy_mixer_by_decorator", SOURCE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    MIXERS.remove("toy_mean")
    del sys.modules[spec.name]


def test_a_decorated_mixer_obeys_every_law(toy: Any) -> None:
    check_mixer(toy.ToyMean, examples=10)


def test_the_laws_catch_a_mixer_that_ignores_padding(toy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = toy.ToyMixer.branches
    monkeypatch.setattr(toy.ToyMixer, "branches", lambda s, i, *a: honest(s, i._replace(mask=None), *a))
    with pytest.raises(AssertionError):
        check_mixer(toy.ToyMean, examples=10)


def test_a_decorated_mixer_is_linearized_saved_and_loaded(toy: Any, tiny_llama: Any, tmp_path: Path) -> None:
    ids = torch.arange(5, 35)[None]
    model = lz.linearize(tiny_llama, [toy.ToyMean(start=0.5), {"type": "toy_mean"}, "softmax"])
    model.save_pretrained(tmp_path)
    again = lz.from_pretrained(tmp_path)
    assert again.config.specs[0] == toy.ToyMean(start=0.5)
    assert torch.equal(again(ids).logits, model(ids).logits)
    cached = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(cached, model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=False))


def test_a_taken_name_is_refused(toy: Any) -> None:
    with pytest.raises(LizardzooError, match="'window' is already taken"):
        lz.register_mixer("window")(toy.ToyMean)


def test_an_unknown_mixer_lists_what_exists() -> None:
    with pytest.raises(
        LizardzooError, match="unknown mixer 'toy_mean'; there are: gated_linear, hybrid, softmax, window"
    ):
        spec_from_dict({"type": "toy_mean"})


def test_an_installed_package_announces_its_mixer(tmp_path: Path) -> None:
    """By entry point, in a fresh process; importing lizardzoo alone does not import the plug-in."""
    shutil.copy(SOURCE, tmp_path / "toy_package.py")
    info = tmp_path / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lizardzoo.mixers]\ntoy_mean = toy_package:ToyMean\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "import lizardzoo as lz, lizardzoo.config as config\n"
        "assert 'toy_package' not in sys.modules\n"
        "config.spec_from_dict({'type': 'window', 'window': 3})\n"
        "assert 'toy_package' not in sys.modules\n"
        "spec = config.spec_from_dict({'type': 'toy_mean', 'start': 0.25})\n"
        "assert 'toy_package' in sys.modules and spec.to_dict() == {'type': 'toy_mean', 'start': 0.25}\n"
        "assert 'toy_mean' in config.MIXERS.names()\n"
    )
    root = str(Path(lz.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr
