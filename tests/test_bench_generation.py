"""The benchmark of whole models: what it times is verified, what fails is reported, its tables are its figures."""

import json

import pytest
import torch


@pytest.fixture
def bench(script, monkeypatch):
    """benchmarks/bench_generation.py; nothing is timed."""
    monkeypatch.setattr(script("measure"), "timed", lambda run, repeats=1: (run(), 1.0)[1])
    return script("bench_generation")


@pytest.fixture
def call(bench, tmp_path):
    def run(*arguments):
        bench.main([*map(str, ("--tiny", "--out", tmp_path, *arguments))])
        return json.loads((tmp_path / "generation.json").read_text())

    return run


def test_it_measures_and_writes_again_what_it_wrote(call, bench, tmp_path):
    found = call("--batches", 1, 3)
    assert [entry["contender"] for entry in found["verified"] if entry["right"]] == [
        "teacher",
        "teacher, static cache",
        "student",
    ]
    assert len(found["decode"]) == 2 * 2 * 3 and len(found["prefill"]) == 2 * 2 * 2
    sizes = {(e["contender"], e["batch"], e["context"]): e["cache MiB"] for e in found["decode"]}
    assert sizes["student", 1, 64] == sizes["student", 1, 128] == sizes["student", 3, 128] / 3
    assert sizes["teacher", 1, 128] == 2 * sizes["teacher", 1, 64] == 2 * 2 * 128 * 2 * 16 * 4 / 2**20
    assert [mark["tokens"] for mark in found["long"]["marks"]] == [148, 156, 164]
    tables, picture = tmp_path / "generation.md", tmp_path / "generation.png"
    written = tables.read_text()
    assert found["machine"]["device"] in written and "3 x 128" in written
    tables.unlink()
    picture.unlink()
    bench.main(["--render", str(tmp_path / "generation.json")])
    assert tables.read_text() == written and picture.stat().st_size > 10_000


def test_the_long_text_is_what_generate_gives(bench):
    arguments = bench.parse(["--tiny"])
    student = bench.linearized(bench.obtain(arguments), "auto")
    prompt = bench.random_tokens(student, 1, 140)  # longer than the window, and than the teacher's positions
    marks, text, _ = bench.generation.generate(student, prompt, 20, mark=8)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    expected = student.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert torch.equal(torch.cat([prompt, text], 1), expected)
    assert [mark["tokens"] for mark in marks] == [148, 156, 160]


def test_what_is_wrong_is_not_timed_and_what_does_not_fit_is_said(call, bench, monkeypatch, tmp_path):
    def forget(layer, keys, values, *_, **__):
        return layer.keys, layer.values  # the last slot stays empty

    def too_much(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.generation.FullLayer, "update", forget)
    monkeypatch.setattr(bench.generation, "drawn_static_cache", too_much)
    found = call("--batches", 1, "--contexts", 64, "--no-long")
    assert [entry["contender"] for entry in found["verified"] if not entry["right"]] == ["teacher"]
    assert {entry["contender"] for entry in found["decode"]} == {"teacher, static cache", "student"}
    missing = {e.get("missing") for e in found["decode"] if e["contender"] != "student"}
    assert missing == {"out of memory"}
    assert "long" not in found and {e["contender"] for e in found["prefill"]} == {"student"}
    written = (tmp_path / "generation.md").read_text()
    assert "out of memory" in written and "RED, not timed" in written


def test_the_teacher_is_not_read_where_that_takes_minutes(bench, monkeypatch):
    teacher = bench.obtain(bench.parse(["--tiny"]))
    monkeypatch.setattr(bench, "READ_AT_ONCE", 100)
    assert bench.read_figures(teacher, bench.random_tokens(teacher, 2, 51)) == {"missing": "not timed above 100 tokens"}
    assert bench.read_figures(teacher, bench.random_tokens(teacher, 2, 50))["ms"] > 0
    assert bench.read_figures(bench.linearized(teacher, "auto"), bench.random_tokens(teacher, 2, 51))["ms"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--teacher", "here", "--tiny"], "leave out --random and --tiny"), ([], "CUDA device")],
)
def test_what_it_cannot_do_is_said(bench, monkeypatch, arguments, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=words):
        bench.main(arguments)


def test_a_teacher_whose_cache_forgets_is_refused(bench, tiny_folder, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=16, sliding_window=8)
    MistralForCausalLM(config).save_pretrained(tmp_path / "sliding")
    with pytest.raises(SystemExit, match="sliding windows"):
        bench.obtain(bench.parse(["--teacher", str(tmp_path / "sliding")]))
    assert bench.obtain(bench.parse(["--teacher", str(tiny_folder)])).config.model_type == "llama"
