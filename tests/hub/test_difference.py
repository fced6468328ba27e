"""A repository may hold only what its base does not: together they are the model, bit for bit, or nothing is loaded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.loading import read_tokenizer
from tests.adapters.families import FAMILIES, teacher
from tests.conftest import make_tokenizer
from tests.hub.conftest import command
from tests.hub.server import LoopbackHub
from tests.hub.test_round_trip import IDS, MIXED, downloads, logits
from tests.hub.test_strangers import Largest

TIED = "qwen2, sliding above, tied"
BASES = [*FAMILIES, TIED]


def saved(model: Any, dtype: torch.dtype = torch.float32) -> dict[str, bytes]:
    """A model's files, its weights in that dtype."""
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        for path in Path(place).glob("*.safetensors"):
            weights = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
            save_file(weights, path, metadata={"format": "pt"})
        config = Path(place) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}))
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


@pytest.fixture
def base(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A small Llama on the Hub; alice is logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    hub.put("org/base", saved(teacher("llama")))
    return "org/base"


def trained(base: str, layers: Any = MIXED, **kwargs: Any) -> Any:
    """A student some of whose old weights moved too, as where LoRA was merged."""
    model = lz.linearize(base, layers, **kwargs)
    with torch.no_grad():
        for mixer in model.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.model.layers[0].self_attn.q_proj.weight.mul_(1.01)
    return model


def names(content: bytes, tmp_path: Path) -> set[str]:
    (tmp_path / "read.safetensors").write_bytes(content)
    with safe_open(tmp_path / "read.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(
    ("family", "dtype"), [*((family, torch.bfloat16) for family in BASES), ("llama", torch.float32)], ids=str
)
@pytest.mark.usefixtures("base")
def test_base_and_difference_are_the_model(hub: LoopbackHub, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    hub.put("org/tiny", saved(teacher(family), dtype))
    model = trained("org/tiny")
    model.generation_config.max_new_tokens = 7
    model.push_to_hub("alice/m", difference=True)
    files = hub.files("alice/m")
    assert {name for name in files if name.endswith((".safetensors", ".bin"))} == {"difference.safetensors"}
    expected = {name for name in model.state_dict() if ".mixer." in name} | {"model.layers.0.self_attn.q_proj.weight"}
    assert names(files["difference.safetensors"], tmp_path) == expected
    again = lz.from_pretrained("alice/m")
    assert torch.equal(logits(again), logits(model))
    assert {name: p.dtype for name, p in again.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}
    assert again.generation_config.max_new_tokens == 7
    before = downloads(hub)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/m")), logits(model))
    inner = AutoModel.from_pretrained("alice/m", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(inner(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert downloads(hub) == before  # of both
    again.save_pretrained(tmp_path / "whole")  # a whole model, and no difference any more
    assert (tmp_path / "whole" / "model.safetensors").is_file()
    assert "difference" not in json.loads((tmp_path / "whole" / "config.json").read_text())
    assert torch.equal(logits(lz.from_pretrained(tmp_path / "whole")), logits(model))


def test_the_base_is_the_very_one(hub: LoopbackHub, base: str) -> None:
    model = trained(base)
    model.push_to_hub("alice/m", difference=True)
    files, first = hub.files("alice/m"), hub.repos[base].branches["main"]
    other = lz.linearize(teacher("llama"), "softmax")
    with torch.no_grad():
        other.model.norm.weight.mul_(1.001)
        for parameter in other.parameters():
            parameter.add_(0.01)
    changed = saved(teacher("llama")) | {"model.safetensors": saved(other)["model.safetensors"]}
    hub.put(base, changed)  # its author goes on
    assert json.loads(files["config.json"])["difference"]["revision"] == first
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))  # to the commit it was made to
    with pytest.raises(LizardzooError, match=r"not one weight of this model is that of org/base \(revision"):
        model.push_to_hub("alice/n", difference=True)
    assert "alice/n" not in hub.repos
    model.push_to_hub("alice/n", difference=True, base_revision=first)
    assert torch.equal(logits(lz.from_pretrained("alice/n")), logits(model))
    config = json.loads(files["config.json"])
    config["difference"]["revision"] = None
    hub.put("alice/m", {"config.json": json.dumps(config).encode()})
    with pytest.raises(LizardzooError, match=r"org/base \(revision main\) is not the base that alice/m was made to"):
        lz.from_pretrained("alice/m")
    hub.put(base, saved(teacher("qwen3")))
    with pytest.raises(
        LizardzooError, match="the base org/base is a 'qwen3' model, and this one was made from a 'llama'"
    ):
        lz.from_pretrained("alice/m")
    config["difference"]["base"] = "org/nowhere"
    hub.put("alice/m", {"config.json": json.dumps(config).encode()})
    with pytest.raises(OSError, match="org/nowhere"):
        lz.from_pretrained("alice/m")


def test_a_difference_that_lacks_or_adds_a_tensor_is_refused(hub: LoopbackHub, base: str, tmp_path: Path) -> None:
    trained(base).save_difference(tmp_path)
    path = tmp_path / "difference.safetensors"
    weights = load_file(path)
    first = next(name for name in sorted(weights) if ".mixer." in name)
    rest = {name: tensor for name, tensor in weights.items() if name != first}
    for change, message in (
        (rest, rf"1 missing \(first: {first}\)"),
        (weights | {"extra": torch.ones(2)}, r"1 unexpected \(first: extra\)"),
        (weights | {first: torch.ones(2, 3, 4, 5)}, rf"1 of another shape \(first: {first}\)"),
    ):
        save_file(change, path, metadata={"format": "pt"})
        with pytest.raises(LizardzooError, match=message):
            lz.from_pretrained(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LizardzooError, match="damaged or cut short"):
        lz.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(LizardzooError, match=r"holds no weights \(difference\.safetensors"):
        lz.from_pretrained(tmp_path)


def test_a_strangers_base_is_checked_before_it_costs_memory_or_code(hub: LoopbackHub, base: str) -> None:
    trained(base).push_to_hub("alice/m", difference=True)
    config = json.loads(hub.files("alice/m")["config.json"])
    config["difference"]["revision"] = None
    hub.put("alice/m", {"config.json": json.dumps(config).encode()})
    files = hub.files(base)
    fields = json.loads(files["config.json"])
    sizes: list[tuple[dict[str, Any], str]] = [
        ({"attn_implementation": "eve/kernel"}, "attn_implementation='eve/kernel' is not the name"),
        ({"quantization_config": {"load_in_4bit": True}}, "the weights of the base org/base are quantized"),
        ({"transformers_weights": "../x.safetensors"}, "transformers_weights='../x.safetensors' is not supported"),
        ({"vocab_size": 2**22}, "the checkpoint org/base does not fit its config"),
        ({"vocab_size": 2**40}, "vocab_size=1099511627776 must be"),
        ({"num_hidden_layers": 300}, "has 3 layers, and its config.json says 300"),
        ({"hidden_size": -1}, "describes no model"),
        ({"hidden_act": "nope"}, "hidden_act='nope' is no activation"),
    ]
    changes = [({"config.json": json.dumps(fields | change).encode()}, message) for change, message in sizes]
    changes += [
        ({"adapter_config.json": b"{}"}, "the base org/base holds adapter_config.json"),
        ({"config.json": b"[]"}, "config.json of org/base holds no object"),
        ({"model.safetensors": files["model.safetensors"][:-9]}, "model.safetensors is damaged or cut short"),
    ]
    hub.requests.clear()
    for change, message in changes:
        hub.put("org/base", change)
        with Largest() as largest, pytest.raises(LizardzooError, match=message) as error:
            lz.from_pretrained("alice/m")
        assert largest.elements < 100
        assert "\n" not in str(error.value)
        hub.repos.pop("org/base")
        hub.put("org/base", files)
    assert hub.count("GET", "eve") == 0
    assert lz.from_pretrained("alice/m").config.num_hidden_layers == 3


def test_a_base_that_others_cannot_fetch_is_refused_and_nothing_written(
    hub: LoopbackHub, base: str, tiny_folder: Path, tmp_path: Path
) -> None:
    model = trained(str(tiny_folder))
    for use in (lambda: model.save_difference(tmp_path / "d"), lambda: model.push_to_hub("alice/m", difference=True)):
        with pytest.raises(LizardzooError, match=r"names its base by its id on the Hub.*pass base="):
            use()
    assert not (tmp_path / "d").exists()
    hub.put("org/qwen", saved(teacher("qwen2")))
    with pytest.raises(LizardzooError, match="the base org/qwen is a 'qwen2' model"):
        model.save_difference(tmp_path / "d", base="org/qwen")
    assert not (tmp_path / "d").exists()
    assert "alice/m" not in hub.repos
    hub.put("org/tiny", {path.name: path.read_bytes() for path in tiny_folder.iterdir()})
    model.push_to_hub("alice/m", difference=True, base="org/tiny")
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))


def test_a_difference_without_a_tokenizer_has_its_bases(hub: LoopbackHub, base: str, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path / "t")
    hub.put(base, {path.name: path.read_bytes() for path in (tmp_path / "t").iterdir()})
    trained(base).save_difference(tmp_path / "d")
    trained(base).push_to_hub("alice/m", difference=True)
    hub.put(base, {"tokenizer_config.json": b"{}"})  # of another commit than the difference's
    for place in (tmp_path / "d", "alice/m"):
        assert read_tokenizer(place).chat_template == make_tokenizer().chat_template


def test_the_bases_license_is_noted(hub: LoopbackHub, base: str, tmp_path: Path) -> None:
    for license, noted in (("cc-by-4.0", "cc-by-4.0"), ("[a, b]", None), ("'two words'", None)):
        hub.put(base, {"README.md": f"---\nlicense: {license}\n---\n# A base\n".encode()})
        folder = tmp_path / license
        trained(base).save_difference(folder)
        assert json.loads((folder / "config.json").read_text())["difference"].get("license") == noted


def test_the_command_line_pushes_a_difference_with_its_card_and_a_whole_model_after_it(
    hub: LoopbackHub, base: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    model = trained(base)
    model.save_pretrained(tmp_path / "student")
    tiny_tokenizer.save_pretrained(tmp_path / "student")
    command("card", tmp_path / "student", "--license", "mit", "--dataset", "a book", "--dataset", "o/d")
    local = {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()}
    command("push", tmp_path / "student", "alice/m", "--difference")
    assert {path.name: path.read_bytes() for path in (tmp_path / "student").iterdir()} == local
    text = hub.files("alice/m")["README.md"].decode()
    assert "only what differs from [org/base](https://huggingface.co/org/base)" in text
    assert "base_model_relation: adapter" in text
    assert "license: mit" in text
    assert "Data: a book, o/d." in text
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))
    assert AutoTokenizer.from_pretrained("alice/m").get_vocab() == tiny_tokenizer.get_vocab()
    (tmp_path / "student" / "README.md").write_text("# By hand\n")
    command("push", tmp_path / "student", "alice/n", "--difference")
    assert hub.files("alice/n")["README.md"] == b"# By hand\n"
    assert torch.equal(logits(lz.from_pretrained("alice/n")), logits(model))
    command("push", tmp_path / "student", "alice/m", "--force")
    assert {name for name in hub.files("alice/m") if name.endswith(".safetensors")} == {"model.safetensors"}
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))
