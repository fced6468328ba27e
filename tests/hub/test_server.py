"""The Hub on loopback does what the real client expects of the real one."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.server import Fault, LoopbackHub

LARGE = bytes(range(256)) * 400


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_alice")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "folder"
    (made / "sub").mkdir(parents=True)
    (made / "model.safetensors").write_bytes(LARGE)
    (made / "README.md").write_text("# A model\n")
    (made / "sub" / "a.json").write_text("{}")
    return made


def test_a_folder_goes_up_and_comes_back(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/m")
    api.create_repo("alice/m", exist_ok=True)
    commit = api.upload_folder(repo_id="alice/m", folder_path=folder)
    back = Path(snapshot_download("alice/m"))
    assert back.name == commit.oid == api.model_info("alice/m").sha
    for path in folder.rglob("*.*"):
        assert (back / path.relative_to(folder)).read_bytes() == path.read_bytes()
    assert (back / "model.safetensors").resolve().name == api.get_paths_info("alice/m", "model.safetensors")[
        0
    ].lfs.sha256
    uploads = hub.count("PUT", "/lfs/")
    api.upload_folder(repo_id="alice/m", folder_path=folder)
    assert hub.count("PUT", "/lfs/") == uploads == 1  # what is there already is not sent again
    snapshot_download("alice/m")
    assert hub.count("GET", "resolve.*safetensors") == 1  # nor fetched


def test_branches_trees_and_deletions(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/m")
    first = api.upload_folder(repo_id="alice/m", folder_path=folder).oid
    api.create_branch("alice/m", branch="other", exist_ok=True)
    api.delete_file("sub/a.json", "alice/m")
    assert set(api.list_repo_files("alice/m")) == {".gitattributes", "README.md", "model.safetensors"}
    assert "sub/a.json" in api.list_repo_files("alice/m", revision="other")
    assert "sub/a.json" in {entry.path for entry in api.list_repo_tree("alice/m", recursive=True, revision=first)}
    assert {entry.path for entry in api.list_repo_tree("alice/m", "sub", revision=first)} == {"sub/a.json"}
    assert {branch.name for branch in api.list_repo_refs("alice/m").branches} == {"main", "other"}
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("alice/m", "sub/a.json")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("alice/m", "README.md", revision="nowhere")


def test_a_private_repository_opens_to_its_owner_only(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/secret", private=True)
    api.upload_folder(repo_id="alice/secret", folder_path=folder)
    assert hf_hub_download("alice/secret", "README.md", token="hf_alice")
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("alice/secret", "model.safetensors", token=token)
    with pytest.raises(HfHubHTTPError, match="rights"):
        HfApi(endpoint=hub.url, token="hf_bob").create_repo("alice/stolen")
    assert "alice/stolen" not in hub.repos


@pytest.mark.parametrize("fault", [Fault.ERROR, Fault.CUT, Fault.SLOW])
def test_the_client_rides_out_a_fault_of_an_upload(hub: LoopbackHub, api: HfApi, folder: Path, fault: Fault) -> None:
    api.create_repo("alice/m")
    hub.fail("PUT", "/lfs/", fault)
    api.upload_folder(repo_id="alice/m", folder_path=folder)
    assert hub.files("alice/m")["model.safetensors"] == LARGE
    assert not any(trouble.times for trouble in hub.troubles)  # it was met


def test_a_corrupt_upload_is_never_committed(hub: LoopbackHub, api: HfApi, folder: Path) -> None:
    api.create_repo("alice/m")
    hub.fail("PUT", "/lfs/", Fault.CORRUPT)
    with pytest.raises((HfHubHTTPError, RuntimeError)):
        api.upload_folder(repo_id="alice/m", folder_path=folder)
    assert set(hub.files("alice/m")) == {".gitattributes"}


def test_a_cut_download_goes_on_where_it_broke(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.put("alice/m", {"model.safetensors": LARGE})
    hub.fail("GET", "safetensors", Fault.CUT)
    assert Path(hf_hub_download("alice/m", "model.safetensors")).read_bytes() == LARGE
    assert hub.requests[-1].status == 206


def test_offline_only_what_was_fetched_is_there(hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.put("alice/m", {"a.json": b"{}", "b.json": b"{}"})
    hf_hub_download("alice/m", "a.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert Path(hf_hub_download("alice/m", "a.json")).read_bytes() == b"{}"
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download("alice/m", "b.json")
