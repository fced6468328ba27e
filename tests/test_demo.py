"""The parts of the demo that are fast: where its text comes from, and what its closing table says."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.distill import recipe_from
from lizardzoo.errors import LizardzooError

EXAMPLES = Path(__file__).parents[1] / "examples"
pytest.importorskip("rich")


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/demo.py as a module, found as a script finds its neighbours."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import demo

    return demo


@pytest.fixture
def stdlib_text(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/stdlib_text.py as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import stdlib_text

    return stdlib_text


def write_library(folder: Path, **sources: str) -> None:
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")


@pytest.fixture
def library(stdlib_text, monkeypatch, tmp_path) -> Path:
    """A standard library of two modules, the second one held out."""
    monkeypatch.setattr(stdlib_text.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(stdlib_text, "TRAIN", ("seen",))
    monkeypatch.setattr(stdlib_text, "HELD_OUT", ("unseen",))
    return tmp_path


def test_the_text_is_enough_always_the_same_and_split_by_module(stdlib_text):
    train, held_out = stdlib_text.documentation()
    assert (train, held_out) == stdlib_text.documentation()
    assert not set(stdlib_text.TRAIN) & set(stdlib_text.HELD_OUT)
    assert len(set(stdlib_text.TRAIN)) == len(stdlib_text.TRAIN) == len(train)
    # A token of SmolLM2 has 3.5 characters of this text.
    recipe = recipe_from("demo")
    needed = sum(stage.steps * stage.batch_size * stage.sequence_length for stage in (recipe.transfer, recipe.finetune))
    assert sum(map(len, train)) > 10 * needed
    assert min(map(len, held_out)) > 5 * 2048
    said, unsaid = (
        {text for module in modules for _, text in stdlib_text._entries(module)}
        for modules in (stdlib_text.TRAIN, stdlib_text.HELD_OUT)
    )
    kept = "\n\n\n".join([*held_out, ""])
    for text in said & unsaid:
        assert f"\n\n{text}\n\n\n" not in kept
    assert all(text in kept for text in unsaid - said)


def test_a_document_is_titles_and_documentation_in_the_order_of_the_source(stdlib_text, library):
    seen = '"""The module."""\n\ndef f(a, *, b=1):\n    """What f does."""\n\ndef silent(): ...\n\nclass C:\n'
    seen += '    """About C."""\n\n    async def g(self):\n        """What g\n        does."""\n'
    write_library(library, seen=seen, unseen='"""Another."""')
    train, held_out = stdlib_text.documentation()
    assert held_out == ["unseen\n\nAnother."]
    assert train == [
        "seen\n\nThe module.\n\n\nseen.f(a, *, b=1)\n\nWhat f does.\n\n\nseen.C\n\nAbout C.\n\n\n"
        "seen.C.g(self)\n\nWhat g\ndoes."
    ]


def test_what_training_says_too_is_not_held_out(stdlib_text, library):
    write_library(library, seen='def f():\n    """Close it."""', unseen='"""Own."""\ndef g():\n    """Close it."""')
    assert stdlib_text.documentation()[1] == ["unseen\n\nOwn."]


def test_a_python_without_the_sources_of_its_library_is_told_so(stdlib_text, library):
    with pytest.raises(LizardzooError, match=r"seen\.py.*use a Python with the sources"):
        stdlib_text.documentation()


def test_pooled_buckets_are_the_bucket_of_all(demo, tiny_llama):
    """Cut in two or left whole: the same means."""
    student = lz.linearize(tiny_llama, lz.Hybrid(window=8, keep=2))
    ids = torch.randint(300, (2, 60))
    parts = evaluate.by_position(student, ids, teacher=tiny_llama, buckets=(8, 19, 41))
    whole = evaluate.by_position(student, ids, teacher=tiny_llama, buckets=(8,))
    perplexity, kl = demo.pooled(parts.buckets[1:])
    assert kl > 1e-4
    assert math.isclose(perplexity, whole.buckets[1].perplexity, rel_tol=1e-9)
    assert math.isclose(kl, whole.buckets[1].kl, rel_tol=1e-9)


def test_the_closing_table_separates_inside_from_beyond(demo, tiny_llama):
    models = {
        "narrow": lz.linearize(tiny_llama, lz.Window(window=8, keep=0)),
        "wide": lz.linearize(tiny_llama, lz.Window(window=64, keep=0)),
    }
    report = evaluate.compare(models, tiny_llama, torch.randint(300, (2, 60)), buckets=(8, 30))
    teacher, narrow, wide = demo.summarize(report, 8)
    assert [line.name for line in (teacher, narrow, wide)] == ["teacher", "narrow", "wide"]
    assert abs(narrow.kl_inside) < 1e-5 < narrow.kl_beyond  # inside its window it is the teacher
    assert abs(wide.kl_beyond) < 1e-5
    assert math.isclose(wide.perplexity_beyond, teacher.perplexity_beyond, rel_tol=1e-4)
    assert narrow.memory[2048] == narrow.memory[32768] < teacher.memory[2048] < teacher.memory[32768]
    table = demo.closing_table([teacher, narrow, wide], 8)
    assert table.row_count == 3


@pytest.mark.parametrize(
    ("kl", "broken"),
    [
        ((1.0, 0.15, 0.13, 0.12, 0.4, 0.3), []),
        ((1.0, 0.13, 0.13, 0.12, 0.4, 0.3), ["recommended, untrained"]),
        ((1.0, 0.15, 0.13, 0.14, 0.4, 0.3), ["recommended, after stage 2"]),
        ((0.4, 0.15, 0.13, 0.12, 0.4, 0.3), ["hybrid, untrained"]),
        ((1.0, 0.15, 0.13, 0.12, 0.4, 0.4), ["hybrid, after stage 1"]),
        ((1.0, 0.12, 0.13, math.nan, 0.4, 0.3), ["recommended, untrained", "recommended, after stage 2"]),
    ],
)
def test_the_demo_fails_where_a_stage_does_not_help(demo, kl, broken):
    names = ("window 128", "window 259", demo.UNTRAINED, demo.FINETUNED, demo.HYBRID, demo.TRANSFERRED)
    lines = [demo.Summary(name, 1.0, 1.0, 0.0, value, {}) for name, value in zip(names, kl, strict=True)]
    found = demo.broken_promises(lines, "window 128", "window 259")
    assert len(found) == len(broken)
    assert all(f"{name} has " in sentence for name, sentence in zip(broken, found, strict=True))


def test_the_demo_runs_from_end_to_end(demo, tiny_llama, tiny_tokenizer, monkeypatch, tmp_path):
    """On a tiny random teacher, of which it promises nothing."""
    recipe = recipe_from("demo")
    few = {"steps": 2, "sequence_length": 300}
    stages = {name: replace(getattr(recipe, name), **few) for name in ("transfer", "finetune")}
    monkeypatch.setattr(demo, "load_teacher", lambda: (tiny_llama, tiny_tokenizer))
    monkeypatch.setattr(demo, "documentation", lambda: (["A window, a gate, a state. " * 200], ["A head. " * 400] * 2))
    for name, value in {"RECIPE": replace(recipe, **stages), "EVALUATION": (2, 400), "NEW_TOKENS": 5}.items():
        monkeypatch.setattr(demo, name, value)
    monkeypatch.setattr(demo, "CALIBRATION", (1, 300))
    monkeypatch.setattr(demo, "broken_promises", lambda *_: [])
    demo.run(tmp_path / "demo")
    found = json.loads((tmp_path / "demo" / "results.json").read_text())
    names = [line["name"] for line in found["summary"]]
    assert names[:2] == ["teacher", "window 128"] and names[2].endswith(", 4 kept")
    assert names[3:] == [demo.UNTRAINED, demo.FINETUNED, demo.HYBRID, demo.TRANSFERRED]
    beyond = {line["name"]: line["kl_beyond"] for line in found["summary"]}
    assert len(set(beyond.values())) == len(beyond)  # each is another model
    assert all(abs(line["kl_inside"]) < 1e-5 for line in found["summary"] if line["name"] != demo.FINETUNED)
    assert lz.from_pretrained(tmp_path / "demo" / "final").config.specs == [lz.Heavy()] * 3
    assert lz.from_pretrained(tmp_path / "demo" / "hybrid" / "transfer").config.specs == [lz.Hybrid()] * 3
    assert found["samples"].keys() == {"question", "teacher", demo.FINETUNED}


def test_a_used_folder_is_left_alone(demo, tmp_path):
    wanted = tmp_path / "demo"
    assert demo.free_folder(wanted) == wanted
    wanted.mkdir()
    assert demo.free_folder(wanted) == wanted
    (wanted / "file").touch()
    (tmp_path / "demo-2").touch()
    assert demo.free_folder(wanted) == tmp_path / "demo-3"


def test_reloading_compares_the_logits(demo, tiny_llama, tmp_path):
    student = lz.linearize(tiny_llama, lz.Hybrid(window=8))
    student.save_pretrained(tmp_path)
    probe = torch.arange(20)[None]
    demo.reload(tmp_path, student, probe)
    with torch.no_grad():
        student.lm_head.weight += 0.1
    with pytest.raises(LizardzooError, match="other logits than the model that was saved"):
        demo.reload(tmp_path, student, probe)


def test_help_is_there_without_a_teacher():
    result = subprocess.run(
        [sys.executable, EXAMPLES / "demo.py", "--help"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "--out" in result.stdout
