"""A tiny student whose window is shorter than its sequences, text, and a recipe of a few steps."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import lizardzoo as lz
from lizardzoo.config import PRESETS
from lizardzoo.distill import Finetune, Recipe, Stage, distill

LENGTH = 48


@pytest.fixture(scope="session")
def layers():
    """Layer 1 keeps its softmax."""
    hybrid = dataclasses.replace(PRESETS.get("hybrid"), window=8)
    return [hybrid, lz.Softmax(), hybrid]


@pytest.fixture
def student(tiny_llama, layers):
    """Always the same one."""
    torch.manual_seed(0)
    return lz.linearize(tiny_llama, layers)


@pytest.fixture(scope="session")
def texts():
    """Sixty short documents of random words: always the same."""
    generator = torch.Generator().manual_seed(0)
    words = ["window", "gate", "state", "token", "head", "sink", "mass", "decay", "feature", "map", "layer"]
    draws = [torch.randint(len(words), (30,), generator=generator).tolist() for _ in range(60)]
    return [" ".join(words[i] for i in draw) for draw in draws]


@pytest.fixture
def batch(texts, tiny_tokenizer):
    """Token ids [4, LENGTH]."""
    ids = tiny_tokenizer(" ".join(texts), return_tensors="pt")["input_ids"][0]
    return ids[: 4 * LENGTH].view(4, LENGTH)


@pytest.fixture(scope="session")
def recipe():
    """Ten steps and six steps of 4 x 48 tokens, at rates that show in so few."""
    fast = {"scalar_rate": 0.05, "projection_rate": 0.05, "feature_map_rate": 0.05}
    return Recipe(
        name="tiny",
        transfer=Stage(steps=10, batch_size=4, sequence_length=LENGTH, **fast),
        finetune=Finetune(steps=6, batch_size=4, sequence_length=LENGTH, lora_rate=2e-3, **fast),
    )


@pytest.fixture
def pictures():
    """For a test that looks at a run's pictures; they take half of its time, so the others go without."""


@pytest.fixture(autouse=True)
def _no_pictures(request):
    from lizardzoo.distill import plots

    with pytest.MonkeyPatch.context() as patch:
        if "pictures" not in request.fixturenames:
            patch.setattr(plots, "plot", lambda folder: None)
        yield


@pytest.fixture
def train(student, texts, recipe, tiny_tokenizer, tmp_path):
    """`distill` with everything tiny; arguments may be replaced. `train.log(stage)` reads what it logged."""
    defaults = {"tokenizer": tiny_tokenizer, "data": texts, "recipe": recipe, "progress": False}
    defaults |= {"output_dir": tmp_path / "out"}

    def call(model=student, **changes):
        return distill(model, **{**defaults, **changes})

    def log(stage, folder=tmp_path / "out"):
        lines = (Path(folder) / "log.jsonl").read_text().splitlines()
        return [entry for entry in map(json.loads, lines) if entry["stage"] == stage]

    call.log, call.folder = log, tmp_path / "out"
    return call


@pytest.fixture
def at_step(monkeypatch):
    """`at_step(stage, step, action)`: run action(model) right after that step has been logged."""
    from lizardzoo.distill.trainer import StepLog

    def install(stage, step, action):
        original = StepLog.on_log

        def on_log(self, args, state, control, **kwargs):
            original(self, args, state, control, **kwargs)
            if (self.stage, state.global_step) == (stage, step):
                action(kwargs["model"])

        monkeypatch.setattr(StepLog, "on_log", on_log)

    return install
