"""The comparison driver: it measures what it says, goes on where it was stopped; its variants are what they claim."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

import lizardzoo as lz
from lizardzoo import evaluate
from lizardzoo.cache import state_bytes
from lizardzoo.config import PRESETS
from lizardzoo.distill import plots


@pytest.fixture
def compare(script):
    """benchmarks/compare.py."""
    return script("compare")


@pytest.fixture
def variants(script):
    return script("variants")


@pytest.fixture
def comparison(script):
    return script("comparison")


@pytest.fixture
def report(script):
    return script("compare_report")


@pytest.fixture
def call(compare, variants, tiny_folder, tmp_path, monkeypatch):
    """The driver on the tiny Llama and windows that its short texts leave; returns results.json."""
    small = replace(PRESETS.get("hybrid"), window=8)
    monkeypatch.setitem(PRESETS._entries, "hybrid", small)
    monkeypatch.setattr(
        compare,
        "VARIANTS",
        [
            variants.Variant("hybrid", small, ""),
            variants.Variant("bare", variants.at_state_of(lz.Window(), small), "bare"),
            variants.Variant("softmax-2", small, "two kept", chosen=2),
            variants.Variant("shared", small, "shared windows", share=("window",)),
            variants.Variant("heavy-shared", lz.Heavy(window=8, heavy=8), "heavy tokens", share=("heavy",)),
            variants.Variant("heavy-softmax", lz.Heavy(window=8, heavy=8), "one kept", chosen=1),
        ],
    )
    monkeypatch.setattr(plots, "plot", lambda folder: None)  # nobody looks at them here
    for name in ("train", "text"):
        sentences = (f"A {name} is what lizard {number} on the wall reads. " for number in range(80))
        (tmp_path / f"{name}.txt").write_text("".join(sentences))

    def run(*arguments, out="out"):
        compare.main(
            [
                "--teacher", str(tiny_folder), "--dtype", "float32", "--train", str(tmp_path / "train.txt"),
                "--text", f"{tmp_path / 'text.txt'}:48:2", "--steps", "2", "2", "--batch", "2", "--tokens", "384",
                "--out", str(tmp_path / out), *map(str, arguments),
            ]
        )  # fmt: skip
        path = tmp_path / out / "results.json"
        return json.loads(path.read_text()) if path.is_file() else None

    return run


def without_times(results):
    for run in results["runs"].values():
        for stage in run["stages"].values():
            stage.pop("seconds", None)
            stage.pop("seconds of measuring", None)
    return results


def test_every_variant_is_trained_measured_and_told(call, tiny_folder, tiny_tokenizer, tmp_path):
    results = call("--stages", 2, "--distances", 8)
    assert {name: list(run["stages"]) for name, run in results["runs"].items()} == {
        "hybrid, 0": ["start", "transfer", "finetune"],
        "bare, 0": ["start", "transfer", "finetune"],
        "softmax-2, 0": ["start", "transfer", "finetune"],
        "shared, 0": ["start", "transfer", "finetune"],
        "heavy-shared, 0": ["start", "transfer", "finetune"],
        "heavy-softmax, 0": ["start", "transfer", "finetune"],
    }
    bare = results["runs"]["bare, 0"]["stages"]
    assert (
        bare["transfer"]["texts"] == bare["start"]["texts"] != bare["finetune"]["texts"]
    )  # nothing to learn in stage 1
    teacher = AutoModelForCausalLM.from_pretrained(tiny_folder)
    ids = evaluate.sequences(tmp_path / "text.txt", tiny_tokenizer, 48, 2)
    trained = lz.from_pretrained(tmp_path / "out" / "runs" / "hybrid-0" / "final")
    overall = evaluate.by_position(trained, ids, teacher=teacher).overall
    stage = results["runs"]["hybrid, 0"]["stages"]["finetune"]
    found = stage["texts"]["text, 48 tokens"]
    assert found["all"]["kl"] == pytest.approx(overall.kl, rel=1e-4)
    assert found["all"]["perplexity"] == pytest.approx(overall.perplexity, rel=1e-4)
    assert [row["name"] for row in stage["retrieval"]] == ["teacher", "student"]
    kept = [i for i, spec in enumerate(results["runs"]["softmax-2, 0"]["layers"]) if spec["type"] == "softmax"]
    assert kept == sorted(results["selection"]["hybrid"]["kept"][:2])
    sizes = results["sizes"]
    assert results["selection"]["hybrid"]["of"] == sizes["shared"]["of"] == "hybrid after stage 1"
    assert results["selection"]["heavy"]["of"] == sizes["heavy-shared"]["of"] == "heavy"
    shared = results["runs"]["shared, 0"]
    assert [spec["window"] for spec in shared["layers"]] == list(sizes["shared"]["sizes"]["window"].values())
    heavy = [spec["heavy"] for spec in results["runs"]["heavy-shared, 0"]["layers"]]
    assert heavy == list(sizes["heavy-shared"]["sizes"]["heavy"].values())
    kept = [i for i, spec in enumerate(results["runs"]["heavy-softmax, 0"]["layers"]) if spec["type"] == "softmax"]
    assert kept == results["selection"]["heavy"]["kept"][:1]
    assert shared["state bytes"] <= results["runs"]["hybrid, 0"]["state bytes"]
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["hybrid-0"]
    told = (tmp_path / "out" / "results.md").read_text()
    for name in ("hybrid", "bare", "softmax-2", "After stage 2", "recall at 8", "shared: sizes by layer"):
        assert name in told
    assert f"{overall.kl:.3f}<br>" in told
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(call, comparison, monkeypatch):
    """Stopped by its time, then in the middle of a variant; what was done is not done again, nor text read again."""
    whole = call("--stages", 1, out="whole")
    assert call("--stages", 1, "--minutes", 0) is None
    measure, calls = comparison.Comparison.measure, []

    def interrupted(self, model):
        calls.append(model)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(comparison.Comparison, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call("--stages", 1)

    def again(*_, **__):
        raise AssertionError("the text was read again")

    monkeypatch.setattr(comparison.evaluate, "sequences", again)
    monkeypatch.setattr(comparison, "load_data", again)
    assert without_times(call("--stages", 1)) == without_times(whole)
    assert (
        len(calls) == 5 + 5
    )  # stage 1 of the variant that was stopped, both of the next, and the start of two without parameters
    monkeypatch.setattr(comparison.lz, "distill", again)
    assert without_times(call("--stages", 1)) == without_times(whole)
    assert len(calls) == 10


def test_sizes_are_shared_out_by_recall_in_both_fields_and_beside_wide_layers(
    call, compare, comparison, variants, tiny_llama, monkeypatch
):
    """What the selection is asked for is what the variant says, and what is measured is what it has chosen."""
    spec, wide = lz.Heavy(window=8, heavy=8), lz.Window(window=16)
    monkeypatch.setitem(comparison.OCTAVES, "heavy", 1)
    monkeypatch.setitem(comparison.OCTAVES, "window", 1)
    both = {"share": ("window", "heavy"), "rounds": 2}
    rows = [
        variants.Variant("by-recall", spec, "", by_recall=1.0, **both),
        variants.Variant("mixed-beside-wide", spec, "", by_recall=0.25, chosen=1, give=wide, **both),
    ]
    monkeypatch.setattr(compare, "VARIANTS", rows)
    asked, choose = [], lz.select_windows

    def select_windows(*arguments, **options):
        asked.append(options)
        return choose(*arguments, **options)

    monkeypatch.setattr(comparison.lz, "select_windows", select_windows)
    results = call("--stages", 0)
    recall, mixed = asked
    assert set(recall["weights"].unique().tolist()) == {0.0, 1.0}
    answers = mixed["weights"] == 1
    assert float(mixed["weights"][answers].sum() / mixed["weights"].sum()) == pytest.approx(0.25)
    kept = results["selection"]["heavy"]["kept"][:1]
    assert mixed["layers"] == [wide if i in kept else spec for i in range(3)]
    for name, begun in (("by-recall", [spec] * 3), ("mixed-beside-wide", mixed["layers"])):
        run, found = results["runs"][f"{name}, 0"], results["sizes"][name]
        assert run["layers"] == found["layers"]
        assert list(found["sizes"]) == ["window", "heavy"]
        assert found["curve"][-1] <= found["curve"][0]
        assert run["state bytes"] <= state_bytes(lz.linearize(tiny_llama, begun))
    assert all(options["rounds"] == 2 for options in asked)


def test_seeds_have_other_batches_and_one_row(call, report):
    results = call("--stages", 1, "--variants", "hybrid", "--seeds", 0, 1)
    one, other = (run["stages"]["transfer"]["texts"] for run in results["runs"].values())
    assert one != other
    ((name, row),) = report.rows_of(results, "text, 48 tokens", "transfer")
    assert name == "hybrid"
    assert len(row["far"]) == 2
    assert " ± " in report.table([(name, row)])


def test_what_does_not_fit_is_refused(call):
    with pytest.raises(SystemExit, match="no variant is called 'lizzard'"):
        call("--variants", "lizzard")
    call("--stages", 0, "--variants", "bare")
    with pytest.raises(SystemExit, match="comparison with another batch; choose a new --out"):
        call("--stages", 0, "--batch", 4)


def test_variants_are_told_apart_and_have_the_state_they_claim(compare, variants, tiny_llama):
    names = [variant.name for variant in variants.VARIANTS]
    assert len(set(names)) == len(names)
    assert len(
        {(repr(v.spec), v.chosen, v.give, v.share, v.by_recall, v.rounds, v.loss) for v in variants.VARIANTS}
    ) == len(names)
    tiny_llama.config.num_hidden_layers = 300  # sizes are worked out from the shapes alone
    by_name = {variant.name: variant.spec_for(tiny_llama) for variant in variants.VARIANTS}
    tiny_llama.config.num_hidden_layers = 3
    for spec in by_name.values():
        assert lz.linearize(tiny_llama, spec).config.specs == [spec] * 3
    equal = {
        "bare": "hybrid",
        "features-16-same-state": "hybrid",
        "bare-64": "window-64",
        "bare-512": "window-512",
    }
    for name, other in equal.items():
        bytes_, budget = (variants.state_of(tiny_llama, by_name[each]) for each in (name, other))
        wider = replace(by_name[name], window=by_name[name].window + 1)
        assert bytes_ <= budget < variants.state_of(tiny_llama, wider), name


def test_of_smollm2_every_size_that_is_shared_out_can_be_halved_so_often(comparison, variants):
    heads = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "num_hidden_layers": 30}
    teacher = SimpleNamespace(config=SimpleNamespace(head_dim=64, **heads), dtype=torch.bfloat16)
    shared = [variant for variant in variants.VARIANTS if variant.share]
    assert len(shared) > 5
    for variant in shared:
        part = 2 ** max(comparison.OCTAVES[field] for field in variant.share)
        specs = [variant.spec_for(teacher), *([variant.give] if variant.chosen else [])]
        sizes = [getattr(spec, field) for spec in specs for field in variant.share if hasattr(spec, field)]
        assert all(size % part == 0 for size in sizes), variant.name


def test_wide_windows_in_few_layers_take_their_bytes_from_the_others(variants, tiny_llama):
    tiny_llama.config.num_hidden_layers = 300
    (wide,) = (variant for variant in variants.VARIANTS if variant.name == "heavy-wide-4")
    spec = wide.spec_for(tiny_llama)

    def total(spec):
        return 4 * variants.state_of(tiny_llama, wide.give) + 296 * variants.state_of(tiny_llama, spec)

    budget = 300 * variants.state_of(tiny_llama, variants.HYBRID)
    assert total(spec) <= budget < total(replace(spec, heavy=spec.heavy + 1))
    tiny_llama.config.num_hidden_layers = 4
    with pytest.raises(SystemExit, match="the others are made smaller, and the teacher has 4 layers"):
        wide.spec_for(tiny_llama)


def test_the_table_orders_by_what_is_far_and_puts_what_diverged_last(report):
    def run(name, near, far):
        cells = {
            "0-511": {"kl": near, "perplexity": 2.0, "tokens": 512},
            "512-1023": {"kl": far, "perplexity": 3.0, "tokens": 500},
            "1024-1099": {"kl": 2 * far, "perplexity": 3.0, "tokens": 100},
            "all": {"kl": 9.0, "perplexity": 3.0, "tokens": 1112},
        }
        cells |= {f"teacher {label}": {**cell, "perplexity": 2.0} for label, cell in cells.items()}
        stages = {"transfer": {"texts": {"wiki": cells}}}
        return {"variant": name, "seed": 0, "differs": "", "state bytes": 2**20, "stages": stages}

    runs = [run("diverged", 0.0, float("nan")), run("worse", 0.0, 0.6), run("better", 1.0, 0.3)]
    settings = {"batch": 2, "tokens": 32, "steps": [1, 1], "dtype": "float32"}
    results = {
        "settings": settings,
        "selection": {},
        "sizes": {},
        "runs": {str(i): r for i, r in enumerate(runs)},
    }
    rows = list(report.rows_of(results, "wiki", "transfer"))
    assert [name for name, _ in rows] == ["better", "worse", "diverged"]
    assert rows[0][1]["far"] == [pytest.approx((0.3 * 500 + 0.6 * 100) / 600)]
    told = report.markdown(results)
    assert "| better |  | 1.00 MiB | 1.000<br>1.00x | 0.300<br>1.50x |" in told
    widths = {line.count("|") for line in told.splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_torch_is_seeded_by_the_run(call):
    """The same seed gives the same start of LoRA, whatever ran before."""
    torch.manual_seed(5)
    first = call("--stages", 2, "--variants", "bare", out="a")
    torch.manual_seed(6)
    assert without_times(call("--stages", 2, "--variants", "bare", out="b")) == without_times(first)
