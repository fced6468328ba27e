"""A folder goes up in one commit: what is on the Hub is the whole model before it, or the whole model after it.

Large files are sent first, each checked by its hash; a file that is there already is not sent again, so an upload that
was interrupted goes on when it is repeated.
"""

from __future__ import annotations

import fnmatch
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HFValidationError

from lizardzoo.config import LINEARIZED
from lizardzoo.errors import LizardzooError
from lizardzoo.hub.card import README, is_by_hand, read_card
from lizardzoo.hub.difference import DIFFERENCE, difference_of, on_hub
from lizardzoo.hub.low_rank import LOW_RANK
from lizardzoo.hub.render import render_card
from lizardzoo.hub.weights import HTTP_ERROR, PICKLES, blob_hash, file_hash, tensor_shapes, weight_files

NOT_SENT = ("*.part", "*.partial", "checkpoints/*", "runs/*", LOW_RANK)
REPLACED = ("*.safetensors", "*.safetensors.index.json")
"""Files of an earlier model that must not stay beside a new one: fewer shards, or a difference after a whole."""
FAILURES: Any = (HTTP_ERROR, OSError, RuntimeError, ValueError)
TEXTS = (".json", ".jsonl", ".md", ".py", ".txt", ".jinja", ".yaml", ".yml")


class Pushed(NamedTuple):
    """Where the model lies, which commit it is, and whether a README of the repository's own was left as it was."""

    repo_id: str
    url: str
    commit: str
    kept_readme: bool


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    commit_description: str | None = None,
    create_pr: bool = False,
    force: bool = False,
) -> Pushed:
    """Publish a folder that holds a linearized model, in one commit.

    Args:
        folder: what `save_pretrained` wrote, and all that lies beside it (tokenizer, README.md, evaluation.json).
        repo_id: "me/name", or "name" in the own namespace; made if it is not there.
        private: of a new repository. True for one that is public already is refused.
        token: the account's; by default the one that `hf auth login` stored.
        revision: a branch, made if it is not there; main by default.
        create_pr: propose the commit instead of making it.
        force: replace a README.md on the Hub that lizardzoo did not write.

    Raises:
        LizardzooError: the folder is not whole or holds a pickle or the token; the Hub refuses or fails. The folder is
            left as it is, and the repository as it was.
    """
    folder = Path(folder)
    files = published_files(folder)
    _check(folder, files, token)
    api = HfApi(library_name="lizardzoo")
    try:
        repo_id = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, token=token, exist_ok=True)
        before = api.repo_info(repo_id, revision=revision, token=token)
        if private and not before.private:
            raise LizardzooError(
                f"{repo_id} exists and is public, private=True asks for a private one; choose another name, or make it "
                f"private first"
            )
        there = [file.rfilename for file in before.siblings]
        contents: dict[str, bytes | Path] = {path.relative_to(folder).as_posix(): path for path in files}
        contents["config.json"] = _without_local_base(folder / "config.json")
        readme = _card(folder, repo_id)
        if readme is not None:
            contents[README] = readme.encode()
        kept = not force and README in there and not _may_replace(api, repo_id, revision, token, contents)
        if kept:
            contents.pop(README, None)
        stale = [
            name for name in there if name not in contents and any(fnmatch.fnmatch(name, each) for each in REPLACED)
        ]
        try:
            commit = api.create_commit(
                repo_id,
                [
                    *(CommitOperationDelete(name) for name in stale),
                    *(CommitOperationAdd(name, content) for name, content in sorted(contents.items())),
                ],
                commit_message=commit_message,
                commit_description=commit_description,
                token=token,
                revision=revision,
                create_pr=create_pr,
                parent_commit=before.sha,  # a commit of another's in between is not mixed with this one
            )
        except FAILURES as error:
            try:
                now = None if create_pr else _arrived(api, repo_id, revision, token, before.sha, contents)
            except FAILURES:
                raise LizardzooError(
                    f"it cannot be seen whether {repo_id} was changed: {_line(error, token)}, and the Hub answers no "
                    f"more; push again, and only what is missing is sent"
                ) from error
            if now is None:
                raise
            return Pushed(repo_id, f"{api.endpoint}/{repo_id}/commit/{now}", now, kept)  # only the answer was lost
    except HFValidationError as error:
        raise LizardzooError(f"{repo_id!r} is no name of a repository: {_line(error, token)}") from error
    except LizardzooError:
        raise
    except FAILURES as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        way_out = "push again, and only what is missing is sent"
        if status in (401, 403):
            way_out = "log in with `hf auth login`, or pass a token that may write there"
        raise LizardzooError(f"{repo_id} was not changed: {_line(error, token)}; {way_out}") from error
    return Pushed(repo_id, str(commit.pr_url or commit.commit_url), commit.oid, kept)


def _arrived(
    api: HfApi,
    repo_id: str,
    revision: str | None,
    token: str | bool | None,
    before: str,
    contents: Mapping[str, bytes | Path],
) -> str | None:
    """The commit that holds `contents`, where it was made and only the answer got lost."""
    now = api.repo_info(repo_id, revision=revision, token=token).sha
    if now == before:
        return None
    found = {file.path: file for file in api.list_repo_tree(repo_id, recursive=True, revision=now, token=token)}
    for name, content in contents.items():
        file = found.get(name)
        if file is None:
            return None
        if file.lfs is not None:
            same = isinstance(content, Path) and file.lfs.sha256 == file_hash(content)
        else:
            same = file.blob_id == blob_hash(content.read_bytes() if isinstance(content, Path) else content)
        if not same:
            return None
    return now


def _card(folder: Path, repo_id: str) -> str | None:
    """The folder's card under the name it now has; None where a person wrote it. The folder is left as it is."""
    return None if is_by_hand(folder) else render_card(folder, repo_id=repo_id).text


def _without_local_base(path: Path) -> bytes:
    """config.json; a folder of this machine tells nobody what the base is, and more than its owner may want."""
    content = path.read_bytes()
    config = json.loads(content)
    base = config.get("base_model_name_or_path")
    if base is None or on_hub(base):
        return content
    config["base_model_name_or_path"] = None
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def published_files(folder: Path) -> list[Path]:
    """What is published: all files but hidden and unfinished ones."""
    if not folder.is_dir():
        raise LizardzooError(f"there is no folder {folder}; save the model first")
    found = []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        hidden = any(part.startswith(".") or part == "__pycache__" for part in inside.parts)
        if path.is_file() and not hidden and not any(fnmatch.fnmatch(inside.as_posix(), each) for each in NOT_SENT):
            found.append(path)
    return found


def _check(folder: Path, files: list[Path], token: str | bool | None) -> None:
    """Refuse what nobody could load, or nobody should."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        linearized = str(config["model_type"]).startswith(LINEARIZED)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LizardzooError(f"{folder} holds no config.json of a model ({error}); save the model first") from error
    if not linearized:
        raise LizardzooError(f"{folder} holds a plain {config['model_type']!r} model, not a linearized one")
    if pickles := [path.name for path in files if path.suffix in PICKLES]:
        raise LizardzooError(
            f"{folder} holds {pickles[0]}, a pickle, which runs code on whoever loads it; remove it, or save the model "
            f"again (save_pretrained writes safetensors)"
        )
    tensor_shapes(weight_files(folder, stem=DIFFERENCE if difference_of(config) else "model"))
    secret = token if isinstance(token, str) else get_token()
    for path in files:
        if secret and path.suffix in TEXTS and secret.encode() in path.read_bytes():
            raise LizardzooError(f"{path} holds your access token; remove it from there before you publish")


def _may_replace(
    api: HfApi, repo_id: str, revision: str | None, token: str | bool | None, contents: dict[str, Any]
) -> bool:
    """Whether the README.md on the Hub is one that lizardzoo (or transformers, by itself) wrote, or is the new one."""
    with tempfile.TemporaryDirectory() as place:
        try:
            path = api.hf_hub_download(repo_id, README, revision=revision, token=token, local_dir=place)
        except EntryNotFoundError:
            return True
        old = Path(path).read_text(encoding="utf-8", errors="replace")
    new = contents.get(README)
    if isinstance(new, Path):
        new = new.read_bytes()
    return new == old.encode() or not read_card(old).by_hand


def _line(error: BaseException, token: str | bool | None) -> str:
    """The first line of what went wrong, and of its cause, without the token."""
    parts = [error, error.__cause__] if error.__cause__ is not None else [error]
    lines = [
        next((line.strip() for line in str(part).splitlines() if line.strip()), type(part).__name__) for part in parts
    ]
    text = " ".join(line.rstrip(".") + "." for line in dict.fromkeys(lines)).rstrip(".")
    return text.replace(token, "***") if isinstance(token, str) and token else text
