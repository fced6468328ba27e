"""What a stranger publishes may be anything: refused in one sentence, before it costs memory or runs code."""

from __future__ import annotations

import functools
import json
import pickle
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters.llama import LizardLlamaForCausalLM
from lizardzoo.hub import push_folder
from tests.adapters.families import FAMILIES, teacher
from tests.hub.server import LoopbackHub

LAYERS = ["hybrid", "softmax", "gated-linear"]
WAYS = {"lizardzoo": lz.from_pretrained, "transformers": AutoModelForCausalLM.from_pretrained}


@functools.cache
def published(family: str = "llama") -> dict[str, bytes]:
    """The files of a saved student."""
    with tempfile.TemporaryDirectory() as place:
        lz.linearize(teacher(family), LAYERS).save_pretrained(place)
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


def changed(family: str = "llama", **fields: Any) -> dict[str, bytes]:
    """The same with another config.json."""
    files = published(family)
    return files | {"config.json": json.dumps(json.loads(files["config.json"]) | fields).encode()}


def write(folder: Path, files: dict[str, bytes]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that was really allocated."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor) and each.device.type != "meta":
                self.elements = max(self.elements, each.untyped_storage().nbytes() // each.element_size())
        return result


ODD: list[Any] = [
    None, 0, -1, 3, 2**20, 2**40, 10**30, 0.5, 1e300, float("nan"), True, "", "softmax", "org/kernel", "../..", [], [1],
    ["a"], {}, {"a": 1}, ["hybrid"] * 3, "flash_attention_2", "bfloat16", {"load_in_4bit": True},
    {"rope_type": "llama3"}, {"rope_type": "yarn", "factor": 1e30, "rope_theta": 1e4},
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 9, "rope_theta": 1e4},
]  # fmt: skip
MORE = (
    "attn_implementation",
    "quantization_config",
    "rope_scaling",
    "is_encoder_decoder",
    "difference",
    "specs",
    "num_labels",
)
VALUES = st.one_of(st.sampled_from(ODD), st.integers(-9, 2**17), st.floats(), st.text(max_size=9))


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A saved student of some family, one or two of whose config's values (or a layer's) are anything at all."""
    config = json.loads(published(draw(st.sampled_from(sorted(FAMILIES))))["config.json"])
    for _ in range(draw(st.integers(1, 2))):
        layers = config.get("layers")
        inside = [layer for layer in layers if isinstance(layer, dict)] if isinstance(layers, list) else []
        place = draw(st.sampled_from([config, config, *inside]))
        key = draw(st.sampled_from(sorted({*place, *(MORE if place is config else ())})))
        place[key] = draw(VALUES)
    return config


def tokens_of(config: dict[str, Any]) -> int:
    """How many tokens the layers say they keep."""
    layers = config["layers"] if isinstance(config.get("layers"), list) else []
    counts = [layer.get(name) for layer in layers if isinstance(layer, dict) for name in ("window", "keep")]
    return sum(count for count in counts if isinstance(count, int))


@given(configs())
def test_any_config_runs_or_is_refused_in_a_sentence_and_takes_no_memory_that_it_does_not_declare(
    config: dict[str, Any],
) -> None:
    family = str(config.get("model_type")).removeprefix("lizard_")
    files = published(family if family in FAMILIES else "llama") | {"config.json": json.dumps(config).encode()}
    said = "fine"
    with tempfile.TemporaryDirectory() as place, Largest() as largest:
        folder = write(Path(place), files)
        try:
            model = lz.from_pretrained(folder)
            model(torch.arange(5)[None])
            model.generate(torch.arange(5)[None], max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
        except LizardzooError as error:
            said = str(error)
    assert said.strip()
    assert len(said) < 1000
    assert "\n" not in said
    assert largest.elements < 100_000 + 64 * tokens_of(config)  # the largest of the files has 15,000


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": -48}, "hidden_size=-48 must be a whole number from 1"),
        ({"hidden_size": "48", "head_dim": None}, "describes no model: Validation error for field 'hidden_size'"),
        ({"vocab_size": 10**12}, "vocab_size=1000000000000 must be"),
        ({"num_hidden_layers": 10**6, "layers": "softmax"}, "num_hidden_layers=1000000 must be"),
        ({"num_hidden_layers": 900, "layers": "softmax"}, "has 3 layers, and its config.json says 900"),
        ({"vocab_size": 2**22}, "does not fit its config"),
        ({"layers": [{"type": "window", "window": 2**40}] * 3}, "window=1099511627776 is more than 131072"),
        ({"layers": [{"type": "window", "window": -4}] * 3}, "window"),
        ({"layers": [{"type": "nobody's"}] * 3}, "unknown mixer \"nobody's\"; there are:"),
        ({"layers": [{"type": "window", "_init_": 3}] * 3}, "has no field '_init_'"),
        ({"layers": ["softmax"] * 2}, "layers has 2 entries but the model has 3 layers"),
        ({"layers": [{"type": "gated_linear", "feature_dim": 2**30}] * 3}, "feature_dim=1073741824 is more than"),
        ({"attn_implementation": "someone/kernel"}, "attn_implementation='someone/kernel' is not the name"),
        ({"transformers_weights": "../model.safetensors"}, "transformers_weights='../model.safetensors' is not"),
        ({"teacher_layer_types": ["full_attention"]}, "teacher_layer_types"),
        ({"hidden_act": "softmax"}, "hidden_act='softmax' is no activation"),
        ({"dtype": "int8"}, "dtype='int8' is no dtype of weights"),
        ({"pad_token_id": 10**6}, "describes no model: Padding_idx"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0]}},
         "1 entries in short_factor, and heads of 16 dimensions need 8"),
        ({"num_labels": 2**40}, "num_labels=1099511627776 must be"),
        ({"output_hidden_states": "yes"}, "output_hidden_states='yes' must be true or false"),
        ({"return_dict": False}, "return_dict is not true"),
        ({"configuration_files": [1]}, "describes no model"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"quantization_config": {"load_in_4bit": True}}, "names no quant_method"),
        ({"model_type": ["llama"]}, "plain .* model"),
        ({"difference": {"base": "../..", "revision": None, "sha256": "0" * 64}}, "is not a base"),
        ({"difference": {"base": "a/b", "revision": "x?y", "sha256": "0" * 64}}, "is not a base"),
        ({"difference": {"base": "a/b", "revision": None}}, "is not a base"),
    ],
)  # fmt: skip
def test_what_a_config_cannot_mean_is_said_before_anything_is_allocated(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    folder = write(tmp_path, changed(**fields))
    with Largest() as largest, pytest.raises(LizardzooError, match=message):
        lz.from_pretrained(folder)
    assert largest.elements < 100


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"3", b"{", b"\xff", b"[" * 100_000, b'{"a": ' * 9000],
    ids=["empty", "list", "number", "cut", "no text", "deep list", "deep object"],
)
def test_a_json_file_that_is_no_object_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    folder = write(tmp_path, published() | {name: content})
    with pytest.raises(LizardzooError, match=rf"^{name} of .* (is not JSON|holds no object)[^\n]*$"):
        lz.from_pretrained(folder)


@pytest.mark.parametrize("way", WAYS)
def test_a_file_of_other_shapes_or_names_is_refused_before_the_model_is_allocated(tmp_path: Path, way: str) -> None:
    folder = write(tmp_path, published())
    weights = load_file(folder / "model.safetensors")
    lost = weights.pop("model.layers.0.mlp.up_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with Largest() as largest, pytest.raises(LizardzooError, match=r"1 missing .*layers\.0\.mlp\.up_proj"):
        WAYS[way](folder)
    save_file(weights | {"model.layers.0.mlp.up_proj.weight": lost.T.contiguous()}, folder / "model.safetensors")
    with largest, pytest.raises(LizardzooError, match="1 of another shape"):
        WAYS[way](folder)
    assert largest.elements < 100


class Bomb:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("where", ["folder", "hub"])
def test_a_pickle_is_never_read(hub: LoopbackHub, tmp_path: Path, way: str, where: str) -> None:
    trace = tmp_path / "trace"
    files = published() | {"pytorch_model.bin": pickle.dumps(Bomb(trace))}
    both, alone = files, {name: content for name, content in files.items() if name != "model.safetensors"}
    sources = {"both": both, "alone": alone}
    for name, content in sources.items():
        hub.put(f"eve/{name}", content)
        write(tmp_path / name, content)
    names = {name: f"eve/{name}" if where == "hub" else str(tmp_path / name) for name in sources}
    load = WAYS[way]
    load(names["both"])  # the safetensors are there
    with pytest.raises(LizardzooError, match=r"has its weights in pytorch_model\.bin, a pickle, which runs code"):
        load(names["alone"])
    with pytest.raises(LizardzooError, match="use_safetensors=False asks for pickled weights"):
        load(names["both"], use_safetensors=False)
    assert not trace.exists()
    assert hub.count("GET", "bin") == 0  # not even fetched
    with pytest.raises(LizardzooError, match=r"holds pytorch_model\.bin, a pickle"):
        push_folder(tmp_path / "both", "alice/m", token="hf_alice")
    assert "alice/m" not in hub.repos


@pytest.mark.parametrize(
    "name", ["../../../evil.safetensors", "/tmp/evil.safetensors", "sub/evil.safetensors", "evil.bin", 3]
)
@pytest.mark.parametrize("way", WAYS)
def test_a_shard_lies_in_its_folder(hub: LoopbackHub, way: str, name: Any, tmp_path: Path) -> None:
    index = json.dumps({"metadata": {}, "weight_map": dict.fromkeys(["a", "b"], name)}).encode()
    files = published() | {"model.safetensors.index.json": index}
    del files["model.safetensors"]
    hub.put("eve/m", files)
    before = {path for path in tmp_path.rglob("*") if "models--eve--m" not in str(path)}
    for source in ("eve/m", write(tmp_path / "folder", files)):
        with pytest.raises(LizardzooError, match=r"index\.json of .* (names|is damaged)"):
            WAYS[way](source)
    after = {path for path in tmp_path.rglob("*") if "models--eve--m" not in str(path)}
    assert {path.name for path in after - before} <= {"folder", "cache", ".locks", "CACHEDIR.TAG", *files}
    assert hub.count("GET", "evil") == 0


@pytest.mark.parametrize("load", [lz.from_pretrained, LizardLlamaForCausalLM.from_pretrained])
def test_an_adapter_config_does_not_bring_other_weights(hub: LoopbackHub, load: Any) -> None:
    hub.put("eve/other", published())
    adapter = json.dumps({"base_model_name_or_path": "eve/other", "peft_type": "LORA"}).encode()
    hub.put("eve/m", published() | {"adapter_config.json": adapter})
    with pytest.raises(LizardzooError, match=r"holds adapter_config\.json, by which weights of another model"):
        load("eve/m")
    assert hub.count("GET", "eve/other") == 0


@pytest.mark.parametrize("way", WAYS)
def test_no_code_of_a_repository_runs_without_trust(hub: LoopbackHub, tmp_path: Path, way: str) -> None:
    trace = tmp_path / "trace"
    code = f"import pathlib\npathlib.Path({str(trace)!r}).touch()\n".encode()
    foreign = {"AutoConfig": "eve/code--modeling.C", "AutoModelForCausalLM": "eve/code--modeling.M"}
    hub.put("eve/code", {"modeling.py": code})
    hub.put("eve/m", changed(auto_map=foreign) | {"modeling_lizardzoo.py": code})
    WAYS[way]("eve/m")
    assert not trace.exists()
    assert hub.count("GET", r"\.py") == 0
    with pytest.raises(LizardzooError, match="runs no code of a repository"):
        lz.from_pretrained("eve/m", trust_remote_code=True)


def test_a_name_out_of_a_config_imports_no_plug_in_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    info = site / "plugged-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugged\nVersion: 1.0\n")
    entries = "[lizardzoo.mixers]\nplugged = plugged:X\n[lizardzoo.adapters]\nplugged = plugged:X\n"
    (info / "entry_points.txt").write_text(entries)
    (site / "plugged.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.syspath_prepend(site)
    for fields in ({"layers": [{"type": "plugged.X"}] * 3}, {"layers": ["os"] * 3}, {"model_type": "lizard_os"}):
        with pytest.raises(LizardzooError, match=r"there are: .*|plain 'lizard_os'"):
            lz.from_pretrained(write(tmp_path / "m", changed(**fields)))
    assert "plugged" not in sys.modules
    with pytest.raises(SystemExit, match="imported"):  # the name that its owner installed
        lz.from_pretrained(write(tmp_path / "m", changed(layers=[{"type": "plugged"}] * 3)))
