"""The Hub on loopback: enough of huggingface.co for the real huggingface_hub client, in memory, standard library only.

    with LoopbackHub() as hub:            # hub.url is what HF_ENDPOINT would say
        hub.fail("PUT", "/lfs/", Fault.ERROR, times=2)

What it knows: repositories (public, and private with a token), branches and commits, preupload, LFS batch, upload and
verification, resolve with ranges and the headers that clients cache by, tree, paths-info, model info, and faults on
demand. See DIFFERENCES below for what the real Hub does otherwise.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import RLock, Thread
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

DIFFERENCES = """
What the real Hub does otherwise, and what was not tried against it (no account, no network here):

- Storage is Xet: clients with hf-xet ask /xet-write-token and upload chunks to another host. Here HF_HUB_DISABLE_XET=1
  is NEEDED: huggingface_hub 1.33 and 2.4 take Xet whenever hf-xet is installed, and do not fall back to LFS on a 404.
  So resumption by chunks (Xet) and multipart LFS uploads (files above 5 GB) were not tried: here a retry goes on with
  the next file.
- A download is a redirect to a CDN with signed URLs; here /resolve answers itself.
- The card's YAML is validated by the server; here /api/validate-yaml accepts everything.
- Rate limits (429), gated repositories, organisations' rights, storage quotas, pull requests, LFS locks, repository
  moves (307), DMCA blocks and malware scans do not exist here.
- A file is LFS here by its suffix (.safetensors, .bin, .gguf, .pt, .h5) or above 10 MB.
- Commit ids are SHA-1 of a counter, not git's; there is no history to browse, no tags, no squashing.
- Tokens are not scoped: a known token may read and write all that belongs to its user.
- Plain HTTP. TLS, proxies and HTTP/2 were not tried.
"""

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".h5")
LFS_SIZE = 10_000_000


class Fault(Enum):
    """What can go wrong with a request."""

    ERROR = "the server answers 500"
    CUT = "the connection breaks half way through the body"
    SLOW = "the body crawls"
    CORRUPT = "one byte of the body is another, sent or received"


@dataclass
class Trouble:
    """A fault for the next `times` requests of `method` whose path matches `pattern`, after `after` that go well."""

    method: str
    pattern: str
    fault: Fault
    times: int
    after: int = 0


@dataclass
class Repo:
    """One repository: branch -> commit id -> path -> sha256 of the content."""

    owner: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, str]] = field(default_factory=dict)

    def files(self, revision: str) -> tuple[str, dict[str, str]] | None:
        """The commit that a branch name or commit id means, and its files."""
        commit = self.branches.get(revision, revision)
        return (commit, self.commits[commit]) if commit in self.commits else None


class Request(NamedTuple):
    """A request that was answered, for tests to count."""

    method: str
    path: str
    status: int


class LoopbackHub:
    """The server and its state; a context manager."""

    def __init__(self) -> None:
        self.tokens = {"hf_alice": "alice", "hf_bob": "bob"}
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.troubles: list[Trouble] = []
        self.lock = RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def fail(self, method: str, pattern: str, fault: Fault, *, times: int = 1, after: int = 0) -> None:
        """Let the next requests of that kind go wrong."""
        self.troubles.append(Trouble(method, pattern, fault, times, after))

    def trouble(self, method: str, path: str) -> Fault | None:
        """The fault that this request meets, used up."""
        with self.lock:
            for trouble in self.troubles:
                if trouble.method == method and trouble.times > 0 and re.search(trouble.pattern, path):
                    if trouble.after > 0:
                        trouble.after -= 1
                        continue
                    trouble.times -= 1
                    return trouble.fault
        return None

    def put(self, repo_id: str, files: dict[str, bytes], *, private: bool = False, branch: str = "main") -> str:
        """Write files into a repository directly, as a stranger with a client of his own might; the commit's id."""
        repo = self.repos.setdefault(repo_id, Repo(repo_id.split("/")[0], private))
        hashes = {path: self.store(content) for path, content in files.items()}
        return self.commit(repo, branch, hashes, [])

    def store(self, content: bytes) -> str:
        """Keep a content under its sha256."""
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        return digest

    def commit(self, repo: Repo, branch: str, added: dict[str, str], deleted: list[str]) -> str:
        """One step of a branch, all or nothing."""
        with self.lock:
            before = repo.commits.get(repo.branches.get(branch, ""), {})
            files = {path: digest for path, digest in before.items() if path not in deleted} | added
            oid = hashlib.sha1(f"{len(repo.commits)} {sorted(files.items())}".encode()).hexdigest()
            repo.commits[oid] = files
            repo.branches[branch] = oid
            return oid

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        found = self.repos[repo_id].files(revision) if repo_id in self.repos else None
        return {path: self.blobs[digest] for path, digest in found[1].items()} if found else {}

    def count(self, method: str, pattern: str) -> int:
        """Answered requests of that kind."""
        return sum(r.method == method and bool(re.search(pattern, r.path)) for r in self.requests)


class _Stop(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    """One connection; HTTP/1.1 with a length on every answer, as clients keep connections open."""

    hub: LoopbackHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else a body waits 40 ms for the acknowledgement of its headers
    fault: Fault | None = None
    body = b""

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def answer(self) -> None:
        """Read the request, meet its fault, route it, write the answer."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.fault = self.hub.trouble(self.command, path)
        length = int(self.headers.get("Content-Length") or 0)
        if self.fault is Fault.CUT and self.command in ("PUT", "POST"):
            self.rfile.read(length // 2)
            return self.cut(path)
        self.body = self._read(length)
        if self.fault is Fault.ERROR:
            return self.send(path, 500, b'{"error":"out of order"}', {"Content-Type": "application/json"})
        try:
            status, content, headers = self.route(path, parse_qs(url.query, keep_blank_values=True))
        except _Stop as stop:
            headers = {"X-Error-Message": str(stop)} | ({"X-Error-Code": stop.code} if stop.code else {})
            status, content = stop.status, json.dumps({"error": str(stop)}).encode()
        self.send(path, status, content, headers)
        return None

    def _read(self, length: int) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            content = b""
            while size := int(self.rfile.readline().strip(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        if self.fault is Fault.SLOW:
            parts = []
            while length > 0:
                time.sleep(0.01)
                parts.append(self.rfile.read(min(length, 1 << 14)))
                length -= len(parts[-1])
            return b"".join(parts)
        return self.rfile.read(length)

    def cut(self, path: str) -> None:
        """Hang up."""
        self.hub.requests.append(Request(self.command, path, 0))
        self.close_connection = True
        self.connection.shutdown(2)

    def send(self, path: str, status: int, content: bytes, headers: dict[str, str]) -> None:
        """The answer, with a Content-Length of all of it."""
        self.hub.requests.append(Request(self.command, path, status))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        if self.fault is Fault.CUT:
            self.wfile.write(content[: len(content) // 2])
            return self.cut(path)
        if self.fault is Fault.CORRUPT:
            content = _flipped(content)
        step = 1 << 14 if self.fault is Fault.SLOW else max(1, len(content))
        for start in range(0, len(content), step):
            self.wfile.write(content[start : start + step])
            if self.fault is Fault.SLOW:
                time.sleep(0.01)
        return None

    def route(self, path: str, query: dict[str, list[str]]) -> tuple[int, bytes, dict[str, str]]:
        """Which of the endpoints answers."""
        for methods, pattern, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                return action(self, query, **match.groupdict())
        raise _Stop(404, None, f"no endpoint {self.command} {path}")

    # --- who may do what

    def user(self) -> str | None:
        """Whose token it is."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise _Stop(401, None, "Invalid username or password.")
        return self.hub.tokens.get(given)

    def repo(self, repo_id: str, write: bool = False) -> Repo:
        """The repository, if this user may see it (and, to write, owns it)."""
        user, repo = self.user(), self.hub.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise _Stop(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and repo.owner != user:
            raise _Stop(403 if user else 401, None, f"You have no write access to {repo_id}")
        return repo

    def revision(self, repo_id: str, revision: str) -> tuple[Repo, str, dict[str, str]]:
        """The repository, the commit and its files."""
        repo = self.repo(repo_id)
        found = repo.files(revision)
        if found is None:
            raise _Stop(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, *found

    # --- endpoints

    def whoami(self, _: Any) -> tuple[int, bytes, dict[str, str]]:
        name = self.user()
        if name is None:
            raise _Stop(401, None, "Invalid username or password.")
        auth = {"accessToken": {"role": "write", "displayName": "test"}}
        return _json({"type": "user", "name": name, "orgs": [], "auth": auth})

    def create(self, _: Any) -> tuple[int, bytes, dict[str, str]]:
        user, wanted = self.user(), json.loads(self.body)
        if user is None:
            raise _Stop(401, None, "Invalid username or password.")
        owner = wanted.get("organization") or user
        repo_id = f"{owner}/{wanted['name']}"
        if owner != user:
            raise _Stop(403, None, f"You don't have the rights to create a model under the namespace {owner!r}")
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id, "id": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                return _json({"error": "You already created this model repo", **answer}, 409)
            private = bool(wanted.get("private")) or wanted.get("visibility") == "private"
            repo = self.hub.repos[repo_id] = Repo(owner, private)
            self.hub.commit(repo, "main", {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n")}, [])
        return _json(answer)

    def branch(self, _: Any, repo: str, rev: str) -> tuple[int, bytes, dict[str, str]]:
        target = self.repo(repo, write=True)
        if rev in target.branches:
            return _json({"error": "Reference already exists"}, 409)
        target.branches[rev] = target.branches["main"]
        return _json({})

    def accept(self, _: Any) -> tuple[int, bytes, dict[str, str]]:
        return _json({"errors": [], "warnings": []})

    def preupload(self, _: Any, repo: str, rev: str) -> tuple[int, bytes, dict[str, str]]:
        found = self.repo(repo, write=True).files(rev)
        if found is None:
            raise _Stop(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        answer = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(LFS_SUFFIXES) or file["size"] > LFS_SIZE
            digest = found[1].get(file["path"])
            oid = None if digest is None else digest if large else _git_oid(self.hub.blobs[digest])
            mode = "lfs" if large else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": answer})

    def batch(self, _: Any, repo: str) -> tuple[int, bytes, dict[str, str]]:
        self.repo(repo, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.url}/lfs-verify/{repo}", "header": {}},
                }
            objects.append(entry)
        return _json({"transfer": "basic", "objects": objects})

    def upload(self, _: Any, oid: str) -> tuple[int, bytes, dict[str, str]]:
        content = _flipped(self.body) if self.fault is Fault.CORRUPT else self.body
        self.fault = None
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Stop(400, None, "the content's hash is not the one announced (BadDigest)")
        self.hub.store(content)
        return 200, b"", {}

    def verify(self, _: Any, repo: str) -> tuple[int, bytes, dict[str, str]]:
        self.repo(repo, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.blobs.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Stop(404, None, "the object was not uploaded whole")
        return _json({})

    def do_commit(self, _: Any, repo: str, rev: str) -> tuple[int, bytes, dict[str, str]]:
        target = self.repo(repo, write=True)
        added: dict[str, str] = {}
        deleted: list[str] = []
        for line in filter(None, self.body.split(b"\n")):
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                added[value["path"]] = self.hub.store(base64.b64decode(value["content"]))
            elif entry["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise _Stop(400, None, f"LFS object {value['oid']} of {value['path']} was not uploaded")
                added[value["path"]] = value["oid"]
            elif entry["key"] == "deletedFile":
                deleted.append(value["path"])
        oid = self.hub.commit(target, rev, added, deleted)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        return _json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def resolve(self, _: Any, repo: str, rev: str, file: str) -> tuple[int, bytes, dict[str, str]]:
        _, commit, files = self.revision(repo, rev)
        if file not in files:
            raise _Stop(404, "EntryNotFound", f"Entry not found: {file}")
        content = self.hub.blobs[files[file]]
        large = file.endswith(LFS_SUFFIXES) or len(content) > LFS_SIZE
        etag = files[file] if large else _git_oid(content)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if large:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return 200, content, headers
        first, last = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if first > last:
            return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers

    def info(self, _: Any, repo: str, rev: str | None = None) -> tuple[int, bytes, dict[str, str]]:
        target, commit, files = self.revision(repo, rev or "main")
        day = "2026-01-01T00:00:00.000Z"
        return _json(
            {"_id": repo, "id": repo, "modelId": repo, "author": target.owner, "sha": commit, "private": target.private,
             "gated": False, "disabled": False, "tags": [], "downloads": 0, "likes": 0, "lastModified": day,
             "createdAt": day, "siblings": [{"rfilename": path} for path in sorted(files)]}
        )  # fmt: skip

    def refs(self, _: Any, repo: str) -> tuple[int, bytes, dict[str, str]]:
        branches = self.repo(repo).branches.items()
        listed = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches]
        return _json({"branches": listed, "tags": [], "converts": []})

    def tree(self, query: Any, repo: str, rev: str, sub: str | None = None) -> tuple[int, bytes, dict[str, str]]:
        _, _, files = self.revision(repo, rev)
        prefix = f"{sub}/" if sub else ""
        inside = {path: digest for path, digest in files.items() if path.startswith(prefix)}
        if sub and not inside:
            raise _Stop(404, "EntryNotFound", f"{sub} does not exist on {rev}")
        recursive = query.get("recursive", ["false"])[0].lower() in ("true", "1")
        return _json(self.entries(inside, prefix, recursive))

    def paths_info(self, _: Any, repo: str, rev: str) -> tuple[int, bytes, dict[str, str]]:
        _, _, files = self.revision(repo, rev)
        is_json = "json" in self.headers.get("Content-Type", "")
        wanted = (json.loads(self.body) if is_json else parse_qs(self.body.decode())).get("paths", [])
        return _json(self.entries({path: files[path] for path in wanted if path in files}, "", True))

    def entries(self, files: dict[str, str], prefix: str, recursive: bool) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, digest in sorted(files.items()):
            first, _, deeper = path.removeprefix(prefix).partition("/")
            if deeper:
                found[prefix + first] = {"type": "directory", "path": prefix + first, "size": 0, "oid": "0" * 40}
                if not recursive:
                    continue
            content = self.hub.blobs[digest]
            found[path] = {"type": "file", "path": path, "size": len(content), "oid": _git_oid(content)}
            if path.endswith(LFS_SUFFIXES) or len(content) > LFS_SIZE:
                found[path]["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return list(found.values())


_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = [
    (("GET",), "/api/whoami-v2", _Handler.whoami),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.accept),
    (("POST",), f"/api/models/{_REPO}/branch/(?P<rev>.+)", _Handler.branch),
    (("POST",), f"/api/models/{_REPO}/preupload/(?P<rev>.+)", _Handler.preupload),
    (("POST",), f"/api/models/{_REPO}/commit/(?P<rev>.+)", _Handler.do_commit),
    (("POST",), f"/api/models/{_REPO}/paths-info/(?P<rev>.+)", _Handler.paths_info),
    (("GET",), f"/api/models/{_REPO}/tree/(?P<rev>[^/]+)(?:/(?P<sub>.+))?", _Handler.tree),
    (("GET",), f"/api/models/{_REPO}/refs", _Handler.refs),
    (("GET",), f"/api/models/{_REPO}(?:/revision/(?P<rev>.+))?", _Handler.info),
    (("POST",), f"/{_REPO}\\.git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/lfs/(?P<oid>[0-9a-f]{64})", _Handler.upload),
    (("POST",), f"/lfs-verify/{_REPO}", _Handler.verify),
    (("GET", "HEAD"), f"/{_REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)", _Handler.resolve),
]


def _json(value: Any, status: int = 200) -> tuple[int, bytes, dict[str, str]]:
    return status, json.dumps(value).encode(), {"Content-Type": "application/json"}


def _git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _flipped(content: bytes) -> bytes:
    """The same length, the last byte another."""
    return content[:-1] + bytes([content[-1] ^ 1]) if content else content
