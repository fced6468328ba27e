"""The benchmark of several GPUs, on two CPU processes: it measures both stages and knows when losses disagree."""

import json
from pathlib import Path

import pytest


@pytest.fixture
def scaling(script, monkeypatch):
    """benchmarks/scaling.py, whose processes import this checkout and see no GPU."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return script("scaling")


def test_one_process_and_two_with_shared_weights_learn_the_same(scaling, tmp_path):
    arguments = [
        "--processes",
        "2",
        "--size",
        "tiny",
        "--tokens",
        "192",
        "--batch",
        "2",
        "--micro",
        "1",
        "--steps",
        "3",
        "--skip",
        "1",
    ]
    scaling.work(scaling.parse([*arguments, "--worker", "one", "--out", str(tmp_path / "one.json")]))
    one = json.loads((tmp_path / "one.json").read_text())
    sharded = scaling.launch(scaling.parse(arguments), "sharded")
    assert "error" not in sharded, sharded["output"]
    assert scaling.problems({"one": one, "sharded": sharded}) == []
    for stage in scaling.STAGES:
        for result in (one, sharded):
            assert len(result[stage]["losses"]) == 3
            assert result[stage]["losses"][-1] > 1e-3
            assert result[stage]["tokens_per_s"] > 0


def test_losses_that_disagree_and_cases_that_fail_are_red(scaling, monkeypatch, tmp_path, capsys):
    def result(*losses):
        return {stage: {"tokens_per_s": 1.0, "peak_bytes": 1, "losses": list(losses)} for stage in scaling.STAGES}

    made = {"one": result(1.0, 0.5), "whole": result(1.001, 0.5), "sharded": {"error": "exit code 1", "output": "why"}}
    monkeypatch.setattr(scaling, "launch", lambda given, case: made[case])
    assert scaling.main(["--processes", "2", "--out", str(tmp_path / "out.json")]) == 1
    printed = capsys.readouterr().out
    assert "RED: whole, transfer: losses differ by 1.0e-03 in step 1" in printed
    assert "RED: sharded failed: exit code 1" in printed
    made |= {"whole": result(1.0, float("nan")), "sharded": result(1.0, 0.51)}
    assert scaling.problems(made) == [
        f"whole, {s}: losses differ by 0.0e+00 in step 1, at most nan" for s in made["one"]
    ]


def test_one_process_alone_has_nothing_to_be_compared_with(scaling):
    with pytest.raises(SystemExit, match="start it with torchrun --nproc-per-node 2"):
        scaling.main(["--processes", "1"])
