"""The benchmark of training: what it times computes the same, what is wrong or does not fit is said."""

import json

import pytest
import torch

from lizardzoo.config import MIXERS
from lizardzoo.errors import LizardzooError
from lizardzoo.mixers import Hybrid


@pytest.fixture
def bench(script):
    """benchmarks/bench_training.py."""
    yield script("bench_training")
    MIXERS.remove("dense")


@pytest.fixture
def call(bench, tmp_path):
    def run(*arguments):
        code = bench.main(["--check", "--out", str(tmp_path), *arguments])
        return code, json.loads((tmp_path / "training.json").read_text())

    return run


def test_each_contender_is_verified_and_takes_a_step_of_each_stage(call, bench, tmp_path, capsys):
    code, run = call()
    assert code == 0
    assert max(run["verified"].values()) < 1e-12
    losses = {(entry["contender"], entry["stage"]): entry["loss"] for entry in run["results"]}
    assert len(losses) == 2 * len(bench.CONTENDERS) - 1  # heavy tokens have no stage 1
    for (name, stage), loss in losses.items():
        like = bench.CONTENDERS[name].like
        assert like is None or loss == pytest.approx(losses[like, stage], rel=1e-4)
    assert len({f"{loss:.3g}" for loss in losses.values()}) == 7  # what is not the same function learns otherwise
    assert all(entry["tokens/s"] > 0 for entry in run["results"])
    written = (tmp_path / "training.md").read_text()
    assert all(f"| {name} |" in written for name in bench.CONTENDERS)
    capsys.readouterr()
    assert bench.main(["--render", str(tmp_path / "training.json")]) == 0
    assert capsys.readouterr().out == written


@pytest.mark.parametrize(
    "fields",
    [
        {"merge": "none", "gate": "query_head", "log_scale": None},
        {"merge": "sum", "gate": "token", "alpha": "head", "sinks": 3, "maps": "layer"},
        {"activation": "exp", "input_gate": False, "window_rope": False, "disjoint": False},
        {"gate": None, "feature_rope": True, "log_scale": "head", "feature_dim": 8},
    ],
)
def test_a_dense_mixer_is_the_hybrid_of_any_fields(bench, monkeypatch, fields):
    fields = {"window": 24, **fields}
    import dense

    contenders = {"a": bench.Contender(Hybrid(**fields)), "b": bench.Contender(dense.Dense(**fields), like="a")}
    monkeypatch.setattr(bench, "CONTENDERS", contenders)
    assert bench.verify("b") < bench.EXACT


def test_a_dense_mixer_that_is_wrong_is_not_timed(call, bench, monkeypatch, capsys):
    import dense

    masks = dense.DenseMixer.masks

    def one_late(self, tokens, device):
        near, far = masks(self, tokens, device)
        return near, far.roll(1, 0)

    monkeypatch.setattr(dense.DenseMixer, "masks", one_late)
    code, run = call("--only", "lolcats", "lolcats, dense", "--stages", "transfer")
    assert code == 1
    assert [entry["contender"] for entry in run["results"]] == ["lolcats"]
    assert "RED: lolcats, dense: error" in capsys.readouterr().out
    run["results"] += [{**run["results"][0], "contender": "lolcats, dense", "loss": 0.9}]
    assert any("the first loss is 0.9, by the kernels" in problem for problem in bench.problems(run))


def test_what_does_not_fit_is_tried_in_smaller_pieces_and_said(call, bench, monkeypatch, tmp_path):
    import dense

    forward, largest = dense.DenseMixer.forward, 1

    def limited(self, inputs, *others, **kwargs):
        if inputs.q.dtype == torch.float32 and len(inputs.q) > largest:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, inputs, *others, **kwargs)

    monkeypatch.setattr(dense.DenseMixer, "forward", limited)
    code, run = call("--only", "lizard, dense")
    assert code == 0
    assert [(entry["micro"], entry["too large"]) for entry in run["results"]] == [(1, [2])] * 2
    assert "(1 at a time)" in (tmp_path / "training.md").read_text()
    largest = 0
    code, run = call("--only", "lizard, dense", "--stages", "finetune")
    assert code == 0
    assert run["results"][0]["missing"] == "does not fit"
    assert "| does not fit |" in (tmp_path / "training.md").read_text()


def test_what_it_cannot_do_is_said(bench, capsys, monkeypatch):
    from contenders import build_mixer
    from dense import dense_of

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="CUDA device"):
        bench.main([])
    with pytest.raises(SystemExit):
        bench.main(["--micro", "3"])
    assert "--micro has to divide --batch 8, got 3" in capsys.readouterr().err
    with pytest.raises(LizardzooError, match="whole sequences of single documents"):
        build_mixer(dense_of("hybrid"), bench.SMALL, 64, "cpu", "reference")(None, need_state=True)


@pytest.mark.gpu
def test_the_kernels_learn_what_dense_computation_does(call, bench):
    code, run = call()
    assert code == 0
    assert all(entry["peak MiB"] > 0 for entry in run["results"])
    assert len(run["results"]) == 2 * len(bench.CONTENDERS) - 1
