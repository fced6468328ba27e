"""A mixer and an adapter that live outside the package: by decorator, by entry point, and under every law."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters import ADAPTERS
from lizardzoo.cli import app
from lizardzoo.config import MIXERS, spec_from_dict
from lizardzoo.testing import MODEL_LAWS, check_mixer, check_model_law, tiny_teacher
from tests.adapters.test_conformance import QUICK

SOURCE = Path(__file__).parent / "plugin" / "toy_mixer.py"
FAMILY = Path(__file__).parent / "plugin" / "toy_family.py"


@contextmanager
def imported(source: Path) -> Iterator[Any]:
    """A plug-in's module, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"{source.stem}_by_decorator", source)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def toy() -> Iterator[Any]:
    """The mixer's module; what it registers is forgotten afterwards."""
    with imported(SOURCE) as module:
        yield module
    MIXERS.remove("toy_mean")


@pytest.fixture
def family() -> Iterator[Any]:
    """The adapter's module; what it registers is forgotten afterwards."""
    with imported(FAMILY) as module:
        yield module
    ADAPTERS.remove("gemma")


def test_a_decorated_mixer_obeys_every_law(toy: Any) -> None:
    check_mixer(toy.ToyMean, examples=10)


@pytest.mark.parametrize("law", QUICK)
def test_a_decorated_mixer_obeys_every_law_of_models(toy: Any, law: str) -> None:
    check_model_law(MODEL_LAWS[law], tiny_teacher(), [toy.ToyMean(start=0.4), "softmax", toy.ToyMean()], examples=1)


@pytest.mark.parametrize("law", QUICK)
def test_a_decorated_adapter_obeys_every_law_of_models(family: Any, law: str) -> None:
    check_model_law(MODEL_LAWS[law], tiny_teacher("gemma", head_dim=16), examples=1)


def test_a_mixer_whose_fields_have_no_defaults_can_be_tried(toy: Any) -> None:
    def required(name: str, kind: Any) -> Any:
        """ToyMean and another field, which has to be given."""
        fields = {"__annotations__": {name: kind}, "type_name": "toy_required"}
        return dataclass(frozen=True, kw_only=True)(type("Required", (toy.ToyMean,), fields))

    spec = required("rank", int)
    MIXERS.add("toy_required", spec)
    try:
        check_mixer(spec, examples=5)
    finally:
        MIXERS.remove("toy_required")
    with pytest.raises(LizardzooError, match=r"for the field 'path' of type .*str.*: give it a default"):
        check_mixer(required("path", str), examples=1)


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


def test_a_taken_architecture_is_refused(family: Any) -> None:
    with pytest.raises(LizardzooError, match="'llama' is already taken"):
        lz.adapters.register_adapter("llama")(family.LizardGemmaForCausalLM)


def test_an_unknown_mixer_lists_what_exists() -> None:
    with pytest.raises(
        LizardzooError, match="unknown mixer 'toy_mean'; there are: gated_linear, heavy, hybrid, softmax, window"
    ):
        spec_from_dict({"type": "toy_mean"})


def install(folder: Path, source: Path, group: str, entry: str) -> None:
    """A module as an installed distribution that announces an entry point."""
    shutil.copy(source, folder / "toy_package.py")
    info = folder / "toy_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{group}]\n{entry}\n")


def run(folder: Path, program: str) -> None:
    """In a fresh process that finds the distributions of `folder`."""
    program = f"import sys; sys.path.insert(0, {str(folder)!r})\n{program}"
    root = str(Path(lz.__file__).parents[1])
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root, check=False)
    assert result.returncode == 0, result.stderr


def test_an_installed_package_announces_its_mixer(tmp_path: Path) -> None:
    """Importing lizardzoo alone does not import the plug-in."""
    install(tmp_path, SOURCE, "lizardzoo.mixers", "toy_mean = toy_package:ToyMean")
    run(
        tmp_path,
        "import lizardzoo as lz, lizardzoo.config as config\n"
        "assert 'toy_package' not in sys.modules\n"
        "config.spec_from_dict({'type': 'window', 'window': 3})\n"
        "assert 'toy_package' not in sys.modules\n"
        "spec = config.spec_from_dict({'type': 'toy_mean', 'start': 0.25})\n"
        "assert 'toy_package' in sys.modules and spec.to_dict() == {'type': 'toy_mean', 'start': 0.25}\n"
        "assert 'toy_mean' in config.MIXERS.names()\n",
    )


def test_an_installed_package_announces_its_adapter(family: Any, tmp_path: Path) -> None:
    """Its checkpoints load in a process that has imported lizardzoo only, and its teachers are converted there."""
    install(tmp_path, FAMILY, "lizardzoo.adapters", "gemma = toy_package:LizardGemmaForCausalLM")
    teacher = tiny_teacher("gemma", head_dim=16)
    teacher.save_pretrained(tmp_path / "teacher")
    lz.linearize(teacher, "recommended").save_pretrained(tmp_path / "student")
    run(
        tmp_path,
        "import lizardzoo as lz, torch\n"
        "assert 'toy_package' not in sys.modules\n"
        f"model = lz.from_pretrained({str(tmp_path / 'student')!r})\n"
        "assert type(model).__name__ == 'LizardGemmaForCausalLM' and 'toy_package' in sys.modules\n"
        f"again = lz.linearize({str(tmp_path / 'teacher')!r}, 'recommended')\n"
        "ids = torch.arange(5, 25)[None]\n"
        "torch.testing.assert_close(again(ids).logits, model(ids).logits)\n",
    )


def test_info_of_a_mixer_that_names_no_kernels_says_so(toy: Any, tiny_llama: Any, tmp_path: Path) -> None:
    lz.linearize(tiny_llama, toy.ToyMean()).save_pretrained(tmp_path)
    result = CliRunner().invoke(app, ["info", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "(the mixer does not say)" in result.output
