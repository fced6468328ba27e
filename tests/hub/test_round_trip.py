"""A model goes to the Hub and comes back the same: by every way to load it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.adapters import publishing
from tests.adapters.families import FAMILIES, teacher
from tests.hub.server import LoopbackHub

IDS = torch.arange(3, 43)[None] % 50
MIXED = ["hybrid", "softmax", lz.GatedLinear()]


@pytest.fixture
def alice(monkeypatch: pytest.MonkeyPatch, hub: LoopbackHub) -> None:
    """Logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_alice")


def student(family: str = "llama", layers: Any = MIXED, seed: int = 1) -> Any:
    """A linearized model whose mixers are not at their start values."""
    model = lz.linearize(teacher(family), layers)
    torch.manual_seed(seed)
    with torch.no_grad():
        for mixer in model.mixers().values():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def downloads(hub: LoopbackHub) -> int:
    """Files that were sent so far."""
    return sum(r.method == "GET" and "/resolve/" in r.path and r.status in (200, 206) for r in hub.requests)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("alice")
def test_a_model_of_every_family_comes_back_the_same_and_the_second_time_nothing_is_sent(
    hub: LoopbackHub, family: str
) -> None:
    model = student(family)
    done = model.push_to_hub("alice/m")
    assert (done.repo_id, done.commit) == ("alice/m", hub.repos["alice/m"].branches["main"])
    again = lz.from_pretrained("alice/m")
    assert torch.equal(logits(again), logits(model))
    assert again.config.specs == model.config.specs
    before = downloads(hub)
    assert before > 0
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained("alice/m")), logits(model))
    base = AutoModel.from_pretrained("alice/m")
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, model.model(IDS).last_hidden_state)
    assert downloads(hub) == before


@pytest.mark.usefixtures("alice")
def test_tokenizer_generation_config_and_shards_travel_along(
    hub: LoopbackHub, tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    model = lz.linearize(tiny_llama, MIXED)
    model.generation_config.max_new_tokens, model.generation_config.pad_token_id = 7, 0
    model.push_to_hub("alice/m", tokenizer=tiny_tokenizer, max_shard_size="20KB")
    names = set(hub.files("alice/m"))
    assert "model.safetensors" not in names
    assert sum(name.endswith(".safetensors") for name in names) > 2
    again, tokenizer = lz.from_pretrained("alice/m"), AutoTokenizer.from_pretrained("alice/m")
    assert again.generation_config.max_new_tokens == 7
    prompt = tiny_tokenizer("Why do lizards lose their tails?", return_tensors="pt")
    assert torch.equal(
        tokenizer("Why do lizards lose their tails?", return_tensors="pt")["input_ids"], prompt["input_ids"]
    )
    assert tokenizer.chat_template == tiny_tokenizer.chat_template
    assert torch.equal(again.generate(**prompt, do_sample=False), model.generate(**prompt, do_sample=False))
    model.push_to_hub("alice/m", tokenizer=tiny_tokenizer)  # in one file now: no shard stays beside it
    assert [name for name in hub.files("alice/m") if name.endswith(("safetensors", "index.json"))] == [
        "model.safetensors"
    ]
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))


@pytest.mark.usefixtures("alice")
def test_a_revision_is_a_branch_or_a_commit(hub: LoopbackHub) -> None:
    first, second = student(seed=1), student(seed=2)
    commit = first.push_to_hub("alice/m").commit
    second.push_to_hub("alice/m", revision="wider")
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(first))
    assert torch.equal(logits(lz.from_pretrained("alice/m", revision="wider")), logits(second))
    second.push_to_hub("alice/m")
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(second))
    assert torch.equal(logits(lz.from_pretrained("alice/m", revision=commit)), logits(first))


@pytest.mark.usefixtures("alice")
def test_a_private_model_opens_with_its_owners_token_only(hub: LoopbackHub) -> None:
    model = student()
    model.push_to_hub("alice/m", private=True)
    assert hub.repos["alice/m"].private
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))
    for token in (False, "hf_bob"):
        with pytest.raises(OSError, match="alice/m"):
            lz.from_pretrained("alice/m", token=token)
    for token in (False, "hf_bob", "hf_nobody"):
        with pytest.raises(
            LizardzooError, match=r"^alice/other was not changed: .*log in with `hf auth login`, or pass"
        ):
            model.push_to_hub("alice/other", token=token)
    assert "alice/other" not in hub.repos
    model.push_to_hub("alice/open")
    with pytest.raises(LizardzooError, match="alice/open exists and is public, private=True asks for a private one"):
        model.push_to_hub("alice/open", private=True)


@pytest.mark.usefixtures("alice")
def test_save_pretrained_pushes_too_and_no_path_of_this_machine_goes_along(
    hub: LoopbackHub, tiny_folder: Path, tmp_path: Path
) -> None:
    model = lz.linearize(tiny_folder, MIXED)
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="alice/m")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "saved")
    model.push_to_hub("alice/n", tokenizer=AutoTokenizer.from_pretrained(tiny_folder))
    for repo in ("alice/m", "alice/n"):
        for name, content in hub.files(repo).items():
            assert str(tiny_folder).encode() not in content, name
            assert str(tmp_path).encode() not in content, name
        assert torch.equal(logits(lz.from_pretrained(repo)), logits(model))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["base_model_name_or_path"] == str(tiny_folder)


@pytest.mark.usefixtures("alice")
def test_new_parameters_stay_fp32_and_weights_keep_their_dtype(hub: LoopbackHub, tmp_path: Path) -> None:
    model = lz.linearize(teacher("llama"), MIXED, dtype=torch.bfloat16)
    model.push_to_hub("alice/m")
    (tmp_path / "m").write_bytes(hub.files("alice/m")["model.safetensors"])
    with safe_open(tmp_path / "m", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.get_tensor(name).dtype == (torch.float32 if ".mixer." in name else torch.bfloat16), name
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(model))


@pytest.mark.usefixtures("alice")
def test_what_was_fetched_loads_offline(hub: LoopbackHub) -> None:
    model = student()
    model.push_to_hub("alice/m")
    lz.from_pretrained("alice/m")
    hub.requests.clear()
    assert torch.equal(logits(lz.from_pretrained("alice/m", local_files_only=True)), logits(model))
    assert hub.requests == []


@pytest.mark.usefixtures("alice")
def test_all_files_of_a_load_are_of_one_commit(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = student(seed=1), student(seed=2)
    second.push_to_hub("alice/n")
    first.push_to_hub("alice/m")
    look = publishing.find_file

    def meanwhile(source: Any, name: str, **kwargs: Any) -> Any:
        hub.put("alice/m", hub.files("alice/n"))
        return look(source, name, **kwargs)

    monkeypatch.setattr(publishing, "find_file", meanwhile)
    assert torch.equal(logits(lz.from_pretrained("alice/m")), logits(first))
