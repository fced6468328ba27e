"""Conversion shard by shard: the files of the conversion in memory, stopped or not; refusals that write nothing."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lizardzoo as lz
from lizardzoo import LizardzooError, streaming
from lizardzoo.streaming import INDEX, linearize_checkpoint, unfinished
from tests.adapters.families import FAMILIES, VARIANTS, teacher
from tests.adapters.students import LAYERS


class Stopped(Exception):
    """The machine went away."""


def contents(folder):
    """Every file by name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def in_memory(source, folder, layers, size, **given):
    """What `linearize` and `save_pretrained` write."""
    lz.linearize(source, layers, **given).save_pretrained(folder, max_shard_size=size)
    return contents(folder)


@pytest.fixture
def sharded(tiny_llama, tmp_path):
    """A bf16 Llama with tied embeddings in several files, the largest 60 kB, with a generation config of its own."""
    tiny_llama.generation_config.update(do_sample=True, top_k=7)
    tiny_llama.to(torch.bfloat16).save_pretrained(tmp_path / "teacher", max_shard_size=60_000)
    assert len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    return tmp_path / "teacher"


def largest(folder):
    return max(path.stat().st_size for path in folder.glob("*.safetensors"))


@pytest.mark.parametrize("layers", ["recommended", "hybrid", "softmax", "mixed"])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_the_files_are_those_of_the_conversion_in_memory(layers, dtype, sharded, tmp_path):
    layers = LAYERS.get(layers, layers) if layers == "mixed" else layers
    expected = in_memory(sharded, tmp_path / "expected", layers, largest(sharded), dtype=dtype)
    told = []
    report = linearize_checkpoint(
        sharded, tmp_path / "out", layers, dtype=dtype, progress=lambda done, total: told.append((done, total))
    )
    assert contents(tmp_path / "out") == expected
    assert report == lz.linearize(sharded, layers).conversion_report
    files = len([name for name in expected if name.endswith(".safetensors")])
    assert told == [(done, files) for done in range(files + 1)]
    assert not unfinished(tmp_path / "out").exists()


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_every_family_is_converted_as_in_memory(family, tmp_path):
    source = tmp_path / "teacher"
    teacher(family).save_pretrained(source)
    (source / "generation_config.json").unlink()
    expected = in_memory(source, tmp_path / "expected", "hybrid", "30KB")
    linearize_checkpoint(source, tmp_path / "out", "hybrid", max_shard_size="30KB")
    assert contents(tmp_path / "out") == expected
    one = in_memory(source, tmp_path / "one", "hybrid", "50GB")  # a teacher in one file
    linearize_checkpoint(source, tmp_path / "again", "hybrid")
    assert contents(tmp_path / "again") == one


def test_a_stopped_conversion_is_no_model_and_ends_in_the_same_files(sharded, tmp_path):
    linearize_checkpoint(sharded, tmp_path / "whole", "hybrid")
    out, part = tmp_path / "out", unfinished(tmp_path / "out")

    def stop(done, total):
        if done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        linearize_checkpoint(sharded, out, "hybrid", progress=stop)
    assert not out.exists()
    with pytest.raises((OSError, ValueError)):
        lz.from_pretrained(part)
    first, second = sorted(part.glob("*.safetensors"))
    second.write_bytes(second.read_bytes()[:-10])  # cut short
    (part / "model-00003-of-00009.safetensors.partial").write_bytes(b"torn")
    kept = first.stat().st_mtime_ns
    linearize_checkpoint(sharded, out, "hybrid")
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / first.name).stat().st_mtime_ns == kept
    assert not part.exists()


def test_an_unfinished_conversion_goes_on_with_its_own_only(sharded, tmp_path):
    out = tmp_path / "out"

    def stop(done, total):
        raise Stopped

    with pytest.raises(Stopped):
        linearize_checkpoint(sharded, out, progress=stop)
    before = contents(unfinished(out))
    for changes in ({"layers": "window"}, {"dtype": torch.float32}, {"max_shard_size": "20KB"}):
        with pytest.raises(LizardzooError, match=r"out.unfinished was begun with another teacher.*or delete it"):
            linearize_checkpoint(sharded, out, **changes)
    file = sorted(sharded.glob("*.safetensors"))[0]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(LizardzooError, match="was begun with another teacher"):
        linearize_checkpoint(sharded, out)
    assert contents(unfinished(out)) == before


def test_one_file_of_the_result_is_in_memory_at_a_time(sharded, tmp_path, monkeypatch):
    alive, most = set(), []
    original = streaming.save_file

    def save(tensors, path, metadata):
        alive.update(tensors)
        most.append(sum(tensor.nbytes for tensor in tensors.values()))
        original(tensors, path, metadata)

    monkeypatch.setattr(streaming, "save_file", save)
    linearize_checkpoint(sharded, tmp_path / "out", "hybrid", max_shard_size=40_000)
    assert len(alive) == 53  # every parameter, once
    assert max(most) <= 40_000
    assert len(most) > 4


def test_parameters_that_the_model_has_not_are_dropped_and_told(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    save_file({"rotary.inv_freq": torch.zeros(2)}, sharded / "model-extra.safetensors", {"format": "pt"})
    index["weight_map"]["rotary.inv_freq"] = "model-extra.safetensors"
    (sharded / INDEX).write_text(json.dumps(index))
    report = linearize_checkpoint(sharded, tmp_path / "out")
    assert report.dropped == ["rotary.inv_freq"]


def edit_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


def lose_a_parameter(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (folder / INDEX).write_text(json.dumps(index))


def lose_a_file(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def cut_a_file_short(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])


def swap_files(folder):
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    other = next(name for name in index["weight_map"].values() if name != file)
    index["weight_map"]["model.norm.weight"] = other
    (folder / INDEX).write_text(json.dumps(index))


def bad_generation_config(folder):
    (folder / "generation_config.json").write_text('{"max_new_tokens": -5}')


def name_a_path(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def lose_all(folder):
    for file in folder.glob("model*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lose_a_parameter, r"lacks 1 of the model's parameters \(first: model.norm.weight\), or names them otherwise"),
        (lose_a_file, r"lacks model-00002-of-\d+.safetensors, which its index names; download"),
        (cut_a_file_short, r"model-00002-of-\d+.safetensors is damaged or cut short"),
        (swap_files, r"lacks model.norm.weight, which the index says it holds"),
        (lose_all, r"holds no model.safetensors \(nor shards with an index\); convert it in memory"),
        (edit_config(intermediate_size=64), r"has the shape \[96, 48\], but its config says \[64, 48\]"),
        (bad_generation_config, r"generation_config.json is not valid \(.*max_new_tokens.*\); correct it"),
        (edit_config(model_type="gpt2"), "cannot linearize a 'gpt2' model"),
        (edit_config(quantization_config={"quant_method": "fp8"}), "are quantized; load them dequantized"),
        (lambda folder: (folder / INDEX).write_text("{}"), rf"{INDEX} of .* is damaged"),
        (name_a_path, r"names '\.\./model\.safetensors'; a shard is a safetensors file in the folder itself"),
    ],
)
def test_a_checkpoint_that_cannot_be_converted_is_refused_in_one_sentence(damage, words, sharded, tmp_path):
    damage(sharded)
    with pytest.raises(LizardzooError, match=words) as error:
        linearize_checkpoint(sharded, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_wrong_arguments_are_refused_before_anything_is_written(sharded, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("keep me")
    with pytest.raises(LizardzooError, match="used is not an empty folder; name a new one"):
        linearize_checkpoint(sharded, tmp_path / "used")
    with pytest.raises(LizardzooError, match="'5 apples' is not a size; write it as 5GB"):
        linearize_checkpoint(sharded, tmp_path / "out", max_shard_size="5 apples")
    with pytest.raises(LizardzooError, match="layers has 2 entries but the model has 3 layers"):
        linearize_checkpoint(sharded, tmp_path / "out", ["softmax", "softmax"])
    assert {path.name for path in tmp_path.iterdir()} == {"teacher", "used"}


def test_start_values_do_not_depend_on_the_dtype_of_the_weights(tiny_llama):
    for layers in ("hybrid", lz.GatedLinear(feature_dim=24)):  # more features than the head has dimensions
        wide, narrow = (lz.linearize(tiny_llama, layers, dtype=d) for d in (torch.float32, torch.bfloat16))
        for index, mixer in wide.mixers().items():
            for name, value in mixer.state_dict().items():
                assert torch.equal(value, narrow.mixers()[index].state_dict()[name]), name


def test_the_benchmark_makes_a_checkpoint_that_converts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    import streaming as benchmark

    for name, value in {"HIDDEN": 64, "MLP": 96, "HEADS": 4, "KV_HEADS": 2, "VOCABULARY": 300}.items():
        monkeypatch.setattr(benchmark, name, value)
    files = benchmark.make_teacher(tmp_path / "teacher", 400_000, 100_000)
    assert files == len(list((tmp_path / "teacher").glob("*.safetensors"))) > 2
    assert benchmark.convert(tmp_path / "teacher", tmp_path / "out", -1)["seconds"] > 0
    assert lz.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
