"""Diagnosis, selection and evaluation in chunks reach into attentions by name: they know every family."""

from __future__ import annotations

import pytest

import lizardzoo as lz
from tests.adapters import families
from tests.adapters.students import student, tokens


@pytest.mark.parametrize("family", [*families.FAMILIES, *families.VARIANTS])
def test_diagnosis_selection_and_chunked_evaluation_know_the_family(family: str) -> None:
    teacher, text = families.teacher(family), tokens(2, 32)
    model = student(teacher, [lz.Hybrid(window=6, keep=2), lz.Softmax(), lz.Window(window=9)])
    found = lz.diagnose(model, text, teacher=teacher)
    assert [layer.layer for layer in found.layers] == [0, 2]
    own = lz.diagnose(model, text)
    for a, b in zip(found.layers, own.layers, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-3)
        assert all(0 < error < 10 for error in a.error)
    near = found.layers[0].teacher_shares["window"]
    assert all(0 < share <= 1 for share in near)
    selection = lz.select_layers(model, text, keep=3, teacher=teacher)
    assert selection.curve[-1] == pytest.approx(0, abs=1e-6)
    assert selection.curve[0] > 1e-4
    whole, chunked = (
        lz.evaluate.by_position(model, text, teacher=teacher, chunk_size=size).overall for size in (32, 5)
    )
    assert whole.perplexity == pytest.approx(chunked.perplexity, rel=1e-4)
    assert whole.kl == pytest.approx(chunked.kl, rel=1e-3)
