"""The benchmark of one layer: what is wrong is never timed, and its tables are its figures."""

import json
from functools import partial

import pytest
import torch


@pytest.fixture
def bench(script):
    """benchmarks/bench_attention.py."""
    return script("bench_attention")


@pytest.fixture
def inputs(bench):
    torch.manual_seed(0)
    return bench.draw(bench.Shape(4, 2, 16, 16), 1, 200, "cpu")


def spoiled(make, of, inputs):
    """A contender whose output, or whose gradient of v alone, is wrong by a tenth."""
    function = make(inputs)

    def run(i):
        y = function.run(i if of == "output" else i._replace(v=i.v * 1.1 - 0.1 * i.v.detach()))
        return 1.1 * y if of == "output" else y

    return function._replace(run=run)


@pytest.mark.parametrize("name", ["lizardzoo hybrid", "lizardzoo heavy", "lizardzoo heavy mixer"])
def test_what_is_wrong_is_not_timed(bench, inputs, capsys, name):
    contender = bench.ours("reference")[name]
    assert bench.verdict_on(name, contender, inputs, "full")["right"]
    for of, told in [("output", "output"), ("gradient", "v")]:
        wrong = contender._replace(make=partial(spoiled, contender.make, of))
        verdict = bench.verdict_on(name, wrong, inputs, "full")
        assert not verdict["right"] and told in verdict["red"]
        assert "RED, not timed" in capsys.readouterr().out
        noted = bench.verdict_on(name, wrong._replace(note="known to be wrong"), inputs, "full")
        assert noted["right"] == (of == "gradient")  # a note excuses gradients, which are then marked in the tables


@pytest.mark.parametrize("kind", ["hybrid", "heavy"])
def test_a_step_is_verified_before_it_is_timed(bench, monkeypatch, kind):
    import decoding

    monkeypatch.setattr(decoding, "DEVICE", "cpu")
    shape = bench.Shape(4, 2, 16, 16)
    assert decoding.verify_step(kind, shape, "reference")["error"] < decoding.TOLERANCE
    build = decoding.build_mixer
    monkeypatch.setattr(decoding, "build_mixer", lambda *a: forgetful(build(*a)))
    assert decoding.verify_step(kind, shape, "reference")["error"] > decoding.TOLERANCE


def forgetful(mixer):
    """Its steps do not move the state on."""
    step = mixer.step_

    def without_state(inputs, state):
        import decoding

        return step(inputs, decoding.copied(state, {}))

    mixer.step_ = without_state
    return mixer


def test_the_tables_say_what_was_measured(bench):
    """Ratios are of the device's times, ours against each peer; what failed says so; a note marks its row."""
    times = {"sdpa": (2.0, 9.0), "composed peer": (3.0, 12.0), "lizardzoo hybrid": (1.0, 4.0)}
    results = [
        {
            "shape": "1b", "batch": 8, "tokens": 2048, "contender": name, "forward graph ms": forward,
            "forward + backward graph ms": both, "forward ms": 7.0, "forward + backward ms": 7.0,
            **({"note": "wrong gradients"} if name == "composed peer" else {}),
        }
        for name, (forward, both) in times.items()
    ]  # fmt: skip
    results.append({"shape": "1b", "batch": 8, "tokens": 2048, "contender": "lizardzoo heavy", "missing": "no memory"})
    machine = {"device": "a device", "torch": "2"}
    sizes = {"window": 128, "keep": 4, "heavy": 128, "half_life": 256.0}
    text = bench.markdown({"machine": machine, **sizes, "verified": [], "decode": [], "results": results})
    rows = [line for line in text.splitlines() if line.startswith("| 1b, 8 x 2,048 |")]
    assert rows[0].split(" | ")[1:] == ["2 / 9", "3 / 12†", "1 / 4", "no memory |"]
    assert rows[1].split(" | ")[1:] == ["3.00x / 3.00x", "2.00x / 2.25x", "- / -", "- / - |"]
    assert "† wrong gradients" in text


def test_runs_of_a_shape_each_become_one(bench, tmp_path):
    """Only those of one kind of machine: ratios count within a run, and a shape is of one."""

    def written(name, shape, device="a device"):
        verified = [{"shape": shape, "contender": "sdpa"}, {"shape": shape, "contender": "lizardzoo heavy"}]
        machine = {"device": device, "copy TB/s": len(name)}
        run = {"machine": machine, "window": 128, "verified": verified, "results": [shape], "decode": []}
        path = tmp_path / name
        path.write_text(json.dumps(run))
        return path

    one, other = written("one.json", "1b"), written("other.json", "8b")
    assert bench.joined([one, other])["results"] == ["1b", "8b"]
    with pytest.raises(SystemExit, match="another machine or other sizes"):
        bench.joined([one, written("elsewhere.json", "8b", "another")])
    with pytest.raises(SystemExit, match="shape 1b is in two of the files"):
        bench.joined([one, written("again.json", "1b")])
