"""Text that a teacher wrote: an answer for each prompt, the same whether it was stopped or not; data for distill."""

import gzip
import json
import sys
from pathlib import Path

import pytest

from lizardzoo.distill import load_data

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def write_text(monkeypatch):
    """benchmarks/write_text.py as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import write_text

    yield write_text
    sys.modules.pop("write_text", None)


@pytest.fixture
def call(write_text, tiny_folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl.gz"
    rows = [{"instruction": f"Name {i} lizards.", "input": "x" if i % 2 else ""} for i in range(7)]
    prompts.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))

    def run(out, *arguments):
        common = ("--prompts", prompts, "--teacher", tiny_folder, "--dtype", "float32", "--batch", 3, "--tokens", 12)
        write_text.main([*map(str, (*common, "--out", tmp_path / out, *arguments))])
        return (tmp_path / out).read_text() if (tmp_path / out).exists() else None

    return run


def test_each_prompt_is_answered_and_the_result_is_training_data(call, tiny_tokenizer, tmp_path):
    rows = [json.loads(line) for line in call("a.jsonl").splitlines()]
    assert [row["instruction"] for row in rows] == [f"Name {i} lizards." for i in range(7)]
    assert len({row["output"] for row in rows}) == 7
    assert not any("Name" in row["output"] for row in rows)
    assert len(load_data(tmp_path / "a.jsonl", tiny_tokenizer, 32)) > 0


def test_stopping_and_going_on_gives_the_same_text(call, capsys):
    whole = call("a.jsonl")
    assert call("b.jsonl", "--minutes", 0) is None
    first = call("b.jsonl", "--count", 3)
    assert whole.startswith(first)
    assert call("b.jsonl") == whole
    assert call("b.jsonl") == whole
    assert "holds all 7 answers" in capsys.readouterr().out
    assert call("c.jsonl", "--seed", 1) != whole
    call("d.jsonl", "--count", 4)
    with pytest.raises(SystemExit, match="4 answers, which is no whole number of batches"):
        call("d.jsonl")
