"""What can go wrong between here and the Hub: it is ridden out, or said in one sentence, and trying again completes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

import lizardzoo as lz
from lizardzoo import LizardzooError
from lizardzoo.hub import push_folder
from tests.hub.server import Fault, LoopbackHub
from tests.hub.test_round_trip import logits, student
from tests.hub.test_strangers import published, write

CREATE, BATCH = ("POST", "/repos/create"), ("POST", "/info/lfs")
SEND, COMMIT = ("PUT", "/lfs/"), ("POST", "/commit/")
UPLOADS = [
    *(
        (request, Fault.ERROR, times)
        for request in (CREATE, ("POST", "/preupload/"), BATCH, SEND, COMMIT)
        for times in (1, 99)
    ),
    *((request, Fault.CUT, times) for request in (SEND, COMMIT) for times in (1, 99)),
    *((request, fault, 1) for request in (SEND, COMMIT) for fault in (Fault.SLOW, Fault.CORRUPT)),
]
CONFIG, WEIGHTS = ("GET", r"/config\.json"), ("GET", "safetensors")
DOWNLOADS = [
    *((request, Fault.ERROR, times) for request in (("HEAD", r"config\.json"), CONFIG, WEIGHTS) for times in (1, 99)),
    *((request, Fault.CUT, times) for request in (CONFIG, WEIGHTS) for times in (1, 99)),
    *((request, fault, 1) for request in (CONFIG, WEIGHTS) for fault in (Fault.SLOW, Fault.CORRUPT)),
]


def name(value: object) -> str:
    return value.name if isinstance(value, Fault) else " ".join(value) if isinstance(value, tuple) else str(value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student in a folder, in shards."""
    folder = tmp_path_factory.mktemp("saved")
    student().save_pretrained(folder, max_shard_size="70KB")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(("request_", "fault", "times"), UPLOADS, ids=name)
def test_an_upload_is_all_there_or_nothing_and_again_completes(
    hub: LoopbackHub, saved: Path, request_: tuple[str, str], fault: Fault, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.put("alice/m", published())  # an earlier model, in one file
    before, local = hub.files("alice/m"), contents(saved)
    whole = local | {"README.md": b"any"}
    hub.fail(*request_, fault, times=times, after=1 if request_ is SEND else 0)
    said = ""
    try:
        push_folder(saved, "alice/m", token="hf_alice")
    except LizardzooError as error:
        said = str(error)
    assert hub.troubles[0].times < times  # it was met
    assert contents(saved) == local
    if said:
        assert said.startswith("alice/m was not changed: ")
        assert said.endswith("; push again, and only what is missing is sent")
        assert "\n" not in said
        assert hub.files("alice/m") == before
    else:
        assert hub.files("alice/m") | {"README.md": b"any"} == whole
    assert "hf_alice" not in said + caplog.text
    hub.troubles.clear()
    known = set(hub.blobs)
    push_folder(saved, "alice/m", token="hf_alice")
    assert hub.files("alice/m") | {"README.md": b"any"} == whole
    sent = {r.path.rpartition("/")[2] for r in hub.requests if r.method == "PUT" and r.status == 200}
    assert hub.count("PUT", "/lfs/") - len(sent) <= times  # each went up once but where it failed
    if not said:
        assert {digest for digest in hub.blobs if digest not in known} == set()


@pytest.mark.parametrize("difference", [False, True], ids=["whole", "difference"])
def test_a_model_pushed_again_is_the_same_files_and_only_the_missing_are_sent(
    hub: LoopbackHub, measured: Path, tiny_folder: Path, difference: bool
) -> None:
    hub.put("org/base", contents(tiny_folder))
    model = lz.from_pretrained(measured / "run" / "final")
    given = {"token": "hf_alice", "base": "org/base", "difference": difference, "max_shard_size": "70KB"}
    hub.fail("POST", "/commit/", Fault.ERROR, times=99)
    with pytest.raises(LizardzooError, match=r"^alice/m was not changed: "):
        model.push_to_hub("alice/m", **given)
    sent = hub.count("PUT", "/lfs/")
    assert sent >= 1
    hub.troubles.clear()
    model.push_to_hub("alice/m", **given)
    assert hub.count("PUT", "/lfs/") == sent
    assert torch.equal(logits(lz.from_pretrained("alice/m", token="hf_alice")), logits(model))


def test_where_the_hub_falls_silent_after_a_commit_nothing_is_claimed(hub: LoopbackHub, saved: Path) -> None:
    hub.put("alice/m", published())
    hub.fail("POST", "/commit/", Fault.CORRUPT)
    hub.fail("GET", "^/api/models/alice/m$", Fault.ERROR, times=99, after=1)
    with pytest.raises(LizardzooError, match=r"^it cannot be seen whether alice/m was changed: .*push again"):
        push_folder(saved, "alice/m", token="hf_alice")
    hub.troubles.clear()
    push_folder(saved, "alice/m", token="hf_alice")
    assert hub.files("alice/m") | {"README.md": b"any"} == contents(saved) | {"README.md": b"any"}


@pytest.mark.parametrize(("request_", "fault", "times"), DOWNLOADS, ids=name)
def test_a_download_is_the_model_or_an_error_and_again_completes(
    hub: LoopbackHub, saved: Path, request_: tuple[str, str], fault: Fault, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    hub.put("alice/m", contents(saved), private=True)
    hub.fail(*request_, fault, times=times)
    expected = logits(student())
    said = ""
    try:
        assert torch.equal(logits(lz.from_pretrained("alice/m", token="hf_alice")), expected)
    except (LizardzooError, OSError) as error:
        said = str(error)
        assert said
    assert hub.troubles[0].times < times  # it was met
    never_retried = (fault is Fault.ERROR and request_[0] == "GET") or fault is Fault.CORRUPT  # by huggingface_hub
    assert bool(said) == (times > 1 or never_retried)
    assert "hf_alice" not in said + caplog.text
    hub.troubles.clear()
    assert torch.equal(logits(lz.from_pretrained("alice/m", token="hf_alice")), expected)


def test_what_was_never_finished_is_no_model(hub: LoopbackHub, saved: Path, tmp_path: Path) -> None:
    files = contents(saved)
    shards = sorted(each for each in files if each.endswith(".safetensors"))
    hub.put("alice/m", {each: content for each, content in files.items() if each != shards[1]})
    with pytest.raises(LizardzooError, match=rf"alice/m is not whole: {shards[1]} \(1 of {len(shards)} shards\)"):
        lz.from_pretrained("alice/m")
    hub.put("alice/n", {"config.json": files["config.json"]})
    with pytest.raises(LizardzooError, match="alice/n holds no weights"):
        lz.from_pretrained("alice/n")
    cut = write(tmp_path, files | {shards[0]: files[shards[0]][:-9]})
    for use in (lz.from_pretrained, lambda folder: push_folder(folder, "alice/m", token="hf_alice")):
        with pytest.raises(LizardzooError, match=f"{shards[0]} is damaged or cut short"):
            use(cut)
    (cut / shards[0]).unlink()
    with pytest.raises(LizardzooError, match="is not whole"):
        push_folder(cut, "alice/m", token="hf_alice")
