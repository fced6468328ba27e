"""The weight files of a model, found and checked before anything is allocated: safetensors, whole, in their folder.

huggingface_hub checks the size of a download, not its content; the hash of what has just come is checked here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from transformers.utils.hub import cached_file

from lizardzoo.errors import LizardzooError

HTTP_ERROR: Any = next(cls for cls in HfHubHTTPError.__mro__ if cls.__name__ == "HTTPError")
"""The base of all that the client's HTTP library raises, whichever library that is (httpx, httpx2)."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
"""Endings of files that run code when they are loaded."""
PICKLED_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""The arguments of from_pretrained that say where to look."""
HASH = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""By which the cache names a file: the sha256 of a large one, git's of any other."""


def where(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The part of from_pretrained's arguments that says where to look."""
    return {name: kwargs[name] for name in WHERE if kwargs.get(name) is not None}


def pinned(source: str | Path, **look: Any) -> dict[str, Any]:
    """`look` with the commit that the revision is now: all files then come from one, and none is asked for twice."""
    found = find_file(source, "config.json", **look)
    commit = None if found is None else re.search(r"/snapshots/([0-9a-f]{40})/", found.as_posix())
    return look if commit is None or Path(source).is_dir() else {**look, "revision": commit[1]}


def check_object(source: str | Path, name: str, **look: Any) -> None:
    """Refuse a JSON file of a model that holds no object; there need not be one."""
    path = find_file(source, name, **look)
    if path is None:
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise LizardzooError(f"{name} of {source} is not JSON ({error}); save the model again") from error
    if not isinstance(found, dict):
        raise LizardzooError(f"{name} of {source} holds no object of names and values; save the model again")


def weight_files(source: str | Path, stem: str = "model", variant: str | None = None, **look: Any) -> list[Path]:
    """The safetensors files of a model in a folder or on the Hub, downloaded if need be: one, or all its shards.

    Args:
        source: a folder or a Hub id.
        stem: "model"; the files are stem.safetensors, or those that stem.safetensors.index.json names.
        variant: as transformers' from_pretrained.
        look: see `where`.

    Raises:
        LizardzooError: there are none, or pickled ones only; an index that is damaged or names a path outside the
            folder; a shard that is missing; a download that is not what the Hub announced.
    """
    dotted = f".{variant}" if variant else ""
    single = find_file(source, f"{stem}{dotted}.safetensors", **look)
    if single is not None:
        return [single]
    index = find_file(source, f"{stem}.safetensors.index{dotted}.json", **look)
    if index is not None:
        names = shard_names(index, source)
        found = [(name, find_file(source, name, **look)) for name in names]
        if missing := [name for name, path in found if path is None]:
            raise LizardzooError(
                f"{source} is not whole: {missing[0]} ({len(missing)} of {len(names)} shards) is missing; "
                f"save or publish the model again"
            )
        return [path for _, path in found if path is not None]
    for name in PICKLED_WEIGHTS:
        if find_file(source, name, fetch=False, **look) is not None:
            raise LizardzooError(
                f"{source} has its weights in {name}, a pickle, which runs code when it is loaded; ask its author "
                f"for safetensors (save_pretrained writes them)"
            )
    raise LizardzooError(
        f"{source} holds no weights ({stem}.safetensors or its shards); is it the right revision, and all of it there?"
    )


def find_file(source: str | Path, name: str, fetch: bool = True, **look: Any) -> Path | None:
    """A file of a folder or a repository, None where there is none; a large one is checked when it has just come.

    `fetch=False` says only whether it is there (some path, or None).
    """
    folder = Path(source)
    if folder.is_dir():
        path = folder / (look.get("subfolder") or "") / name
        return path if path.is_file() else None
    if not fetch:
        return Path(name) if _is_listed(str(source), name, look) else None
    within = f"{look['subfolder']}/{name}" if look.get("subfolder") else name
    known = try_to_load_from_cache(str(source), within, cache_dir=look.get("cache_dir"), revision=look.get("revision"))
    quiet = {"_raise_exceptions_for_missing_entries": False}
    try:
        found = cached_file(str(source), name, **look, **quiet)
    except HTTP_ERROR as error:
        raise LizardzooError(
            f"{name} of {source} did not arrive: {str(error).splitlines()[0].strip()}; try again, and it goes on"
        ) from error
    if found is None:
        return None
    path = Path(found)
    blob = path.resolve()
    fresh = str(known) != found or look.get("force_download")
    large = len(blob.name) == 64
    if (
        fresh
        and HASH.fullmatch(blob.name)
        and blob.name != (file_hash(blob) if large else blob_hash(blob.read_bytes()))
    ):
        path.unlink()
        blob.unlink(missing_ok=True)
        raise LizardzooError(
            f"{name} of {source} arrived damaged: its hash is not {blob.name[:12]}..., which the Hub announced; "
            f"it was removed, try again"
        )
    return path


def _is_listed(source: str, name: str, look: Mapping[str, Any]) -> bool:
    within = f"{look['subfolder']}/{name}" if look.get("subfolder") else name
    try:
        return HfApi().file_exists(source, within, revision=look.get("revision"), token=look.get("token"))
    except (HfHubHTTPError, OfflineModeIsEnabled):
        return False


def shard_names(index: Path, source: str | Path) -> list[str]:
    """The files that an index names, each a plain name beside it."""
    try:
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(named.values()))
        plain = all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LizardzooError(f"{index.name} of {source} is damaged ({error}); save the model again") from error
    if not plain or not names:
        wrong = next((name for name in names if not re.fullmatch(r"[\w.-]+\.safetensors", name)), "nothing")
        raise LizardzooError(
            f"{index.name} of {source} names {wrong!r}; a shard is a safetensors file in the folder itself, "
            f"without a path: do not trust this model"
        )
    return names


def tensor_shapes(files: Sequence[Path]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        shapes |= _shapes(path)
    return shapes


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise LizardzooError(
            f"{path.name} is damaged or cut short ({error}); download or save the checkpoint again"
        ) from error


def file_hash(path: Path) -> str:
    """The sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def blob_hash(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
