"""A model hub on loopback, small enough to read, for huggingface_hub's real client.

It keeps repositories as lists of commits in memory and answers the routes that the client calls for
whoami, create, list, download (ranges too) and upload (regular files and LFS). Faults are put in by
route: `hub.fail("resolve", "drop", 3)` breaks the next three downloads in the middle. What was
asked, with which headers, is in `hub.log`. With `cdn=True` downloads are redirected to a second
port, which is another origin for the client, and that must never see a token.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_TheGoodTokenOfTheTests"
USER = "tester"
LFS_SUFFIXES = (".safetensors", ".gguf", ".onnx", ".bin")


@dataclass(frozen=True)
class Entry:
    """One file of a commit."""

    sha256: str
    oid: str
    size: int
    lfs: bool


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    oid: str
    title: str
    files: dict[str, Entry]


@dataclass
class Repo:
    """Commits of main, oldest first."""

    commits: list[Commit]
    private: bool = False
    card: dict[str, Any] = field(default_factory=dict)

    def at(self, revision: str) -> Commit | None:
        """The commit a branch or commit name means."""
        if revision == "main":
            return self.commits[-1]
        return next((c for c in self.commits if c.oid == revision), None)


@dataclass(frozen=True)
class Seen:
    """A request that came in."""

    host: str
    method: str
    route: str
    path: str
    headers: Message
    size: int


def git_oid(data: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class FakeHub:
    """The hub's state and its server; use as a context manager."""

    def __init__(self, cdn: bool = False) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.log: list[Seen] = []
        self.tokens = {TOKEN}
        self.role = "write"
        self.xet_store: Path | None = None  # a folder: offer xet, whose library writes there
        self.lock = threading.RLock()
        self.slow: Callable[[str], float] = lambda route: 0.0
        self.on_request: Callable[[str, str], None] = lambda route, path: None
        self.answers: dict[str, Callable[[Any], None]] = {}  # route -> what answers in its place
        self.verify_url = ""  # where clients are told to confirm an upload; default: here
        self._faults: dict[str, deque[str]] = {}
        self.masks = itertools.cycle(range(1, 256))  # no two flips near each other are alike
        handler = type("Handler", (_Handler,), {"hub": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(1 + cdn)]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._servers[0].server_port}"
        # Another name for the same machine: another origin.
        self.cdn = f"http://localhost:{self._servers[1].server_port}" if cdn else None

    def __enter__(self) -> FakeHub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def fail(self, route: str, kind: str, times: int = 1) -> None:
        """Break the next requests of a route: 503, 500, 429, 401, drop, truncate, flip, hang."""
        self._faults.setdefault(route, deque()).extend([kind] * times)

    def pending_faults(self) -> int:
        """Faults that have not happened yet."""
        return sum(map(len, self._faults.values()))

    def take_fault(self, route: str) -> str:
        """The fault for this request, if any."""
        with self.lock:
            queue = self._faults.get(route)
            return queue.popleft() if queue else ""

    def add_repo(
        self, name: str, files: Mapping[str, bytes], private: bool = False, **card: Any
    ) -> str:
        """Create or extend a repository by one commit; its name."""
        with self.lock:
            repo = self.repos.setdefault(name, Repo([Commit(_oid(name), "initial commit", {})]))
            repo.private, repo.card = private, card or repo.card
            old = repo.commits[-1]
            new = {path: self.store(path, data) for path, data in files.items()}
            oid = _oid(repr((old.oid, sorted(new.items()))))
            repo.commits.append(Commit(oid, "files", {**old.files, **new}))
            return oid

    def store(self, path: str, data: bytes, lfs: bool | None = None) -> Entry:
        """Keep a file's bytes."""
        sha = hashlib.sha256(data).hexdigest()
        self.blobs[sha] = data
        lfs = path.endswith(LFS_SUFFIXES) if lfs is None else lfs
        return Entry(sha, git_oid(pointer(sha, len(data)) if lfs else data), len(data), lfs)

    def read(self, repo: str, path: str, revision: str = "main") -> bytes:
        """A file's bytes."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return self.blobs[commit.files[path].sha256]

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """All files of a commit."""
        commit = self.repos[repo].at(revision)
        assert commit is not None
        return {path: self.blobs[e.sha256] for path, e in commit.files.items()}

    def count(self, route: str) -> int:
        """How often a route was asked."""
        return sum(seen.route == route for seen in self.log)


def pointer(sha: str, size: int) -> bytes:
    """The text git keeps for a file in LFS."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha}\nsize {size}\n"
    return text.encode()


def _oid(text: str) -> str:
    return hashlib.sha1(text.encode()).hexdigest()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "") -> None:
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    """Routes are methods; `ROUTES` says which."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Stay silent; `hub.log` has it all."""

    def _dispatch(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.query = parse_qs(url.query)
        method = "GET" if self.command == "HEAD" else self.command
        self.fault = ""
        try:
            for name, wanted, pattern in self.ROUTES:
                if wanted == method and (match := re.fullmatch(pattern, path)):
                    self._run(name, match.groups())
                    return
            self._read_body()
            self._json({"error": f"no route {path}"}, 404)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code} if refused.code else {}
            if refused.status == 429:
                headers["Retry-After"] = "0"
            self._json({"error": refused.code or "refused"}, refused.status, headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _dispatch

    def _run(self, name: str, groups: tuple[str, ...]) -> None:
        if name == "lfs_put" and (delay := self.hub.slow(name)):
            time.sleep(delay)
        self.body = self._read_body()
        host = str(self.headers["Host"])
        self.hub.log.append(Seen(host, self.command, name, self.path, self.headers, len(self.body)))
        self.hub.on_request(name, self.path)
        self.fault = self.hub.take_fault(name)
        if self.fault.isdigit():
            raise _Refused(int(self.fault), "Injected")
        if self.fault == "drop" and name not in ("resolve", "cdn"):
            self._hang_up()
            return
        if self.fault == "late drop":  # the work is done, the answer is lost
            self._lost = True
        if name in self.hub.answers:
            self.hub.answers[name](self)
            return
        getattr(self, name)(*groups)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.connection.shutdown(2)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            out = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                out += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return out
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        if self.fault == "late drop":
            self._hang_up()
            return
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault in ("drop", "truncate"):
            self.wfile.write(data[: len(data) // 2])
            self._hang_up()
            return
        if self.fault == "flip" and data:
            data = data[:-1] + bytes([data[-1] ^ next(self.hub.masks)])
        self.wfile.write(data)

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        self._send(
            status, json.dumps(value).encode(), {"Content-Type": "application/json", **headers}
        )

    def _authorised(self) -> bool:
        given = self.headers.get("Authorization", "")
        if given and given.removeprefix("Bearer ") not in self.hub.tokens:
            raise _Refused(401, "InvalidToken")
        return bool(given)

    def _repo(self, name: str, write: bool = False) -> Repo:
        known = self._authorised()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not known):
            raise _Refused(404 if known else 401, "RepoNotFound")
        if write and (not known or self.hub.role != "write"):
            raise _Refused(403 if known else 401, "Forbidden")
        return repo

    def _commit(self, name: str, revision: str, write: bool = False) -> tuple[Repo, Commit]:
        repo = self._repo(name, write)
        commit = repo.at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        return repo, commit

    # -- identity and repositories

    def whoami(self) -> None:
        if not self._authorised():
            raise _Refused(401, "Unauthorized")
        token = {"displayName": "t", "role": self.hub.role}
        auth = {"type": "access_token", "accessToken": token}
        orgs = [{"name": "team", "roleInOrg": "write"}, {"name": "readers", "roleInOrg": "read"}]
        self._json({"type": "user", "name": USER, "orgs": orgs, "auth": auth})

    def yaml(self) -> None:
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        if not self._authorised():
            raise _Refused(401, "Unauthorized")
        request = json.loads(self.body)
        name = f"{request.get('organization') or USER}/{request['name']}"
        private = bool(request.get("private") or request.get("visibility") == "private")
        answer = {"url": f"{self.hub.url}/{name}", "name": name, "id": name}
        with self.hub.lock:
            if name in self.hub.repos:
                self._json({"error": "exists", **answer}, 409)
                return
            self.hub.repos[name] = Repo([Commit(_oid(name), "initial commit", {})], private)
        self._json(answer)

    # -- upload

    def preupload(self, name: str, revision: str) -> None:
        _, commit = self._commit(name, revision, write=True)
        rows = []
        for item in json.loads(self.body)["files"]:
            lfs = item["path"].endswith(LFS_SUFFIXES) or item["size"] > 10 * 2**20
            old = commit.files.get(item["path"])
            rows.append({
                "path": item["path"], "uploadMode": "lfs" if lfs else "regular",
                "shouldIgnore": False, "oid": old and (old.sha256 if old.lfs else old.oid),
            })  # fmt: skip
        self._json({"files": rows})

    def lfs_batch(self, name: str) -> None:
        self._repo(name, write=True)
        rows, verify = [], self.hub.verify_url or self.hub.url
        for item in json.loads(self.body)["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.blobs:
                href = f"{self.hub.url}/lfs/{item['oid']}?X-Amz-Signature=secretsignature"
                row["actions"] = {
                    "upload": {"href": href, "header": {}},
                    "verify": {"href": f"{verify}/lfs-verify/{item['oid']}", "header": {}},
                }
            rows.append(row)
        self._json({"transfer": "basic", "objects": rows})

    def xet_write_token(self, name: str, revision: str) -> None:
        self._repo(name, write=True)
        if self.hub.xet_store is None:
            raise _Refused(404)
        url, later = f"local://{self.hub.xet_store}", int(time.time()) + 3600
        self._json({"casUrl": url, "accessToken": "t", "exp": later})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "BadDigest")
        self.hub.blobs[oid] = self.body
        self._send(200, b"", {})

    def lfs_verify(self, oid: str) -> None:
        good = len(self.hub.blobs.get(oid, b"")) == json.loads(self.body)["size"]
        self._json({}, 200 if good else 404)

    def commit(self, name: str, revision: str) -> None:
        with self.hub.lock:
            repo, head = self._commit(name, revision, write=True)
            files, title = dict(head.files), ""
            for line in self.body.splitlines():
                operation = json.loads(line)
                value = operation["value"]
                match operation["key"]:
                    case "header":
                        title = value["summary"]
                        if value.get("parentCommit") not in (None, head.oid):
                            raise _Refused(412, "ParentMismatch")
                    case "file":
                        data = base64.b64decode(value["content"])
                        files[value["path"]] = self.hub.store(value["path"], data, lfs=False)
                    case "lfsFile":
                        sha, size = value["oid"], value["size"]
                        if sha not in self.hub.blobs and self.hub.xet_store is None:
                            raise _Refused(400, "MissingObject")
                        files[value["path"]] = Entry(sha, git_oid(pointer(sha, size)), size, True)
                    case "deletedFile":
                        files.pop(value["path"], None)
            oid = _oid(repr((head.oid, title, sorted(files.items()))))
            repo.commits.append(Commit(oid, title, files))
        url = f"{self.hub.url}/{name}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})

    # -- download

    def info(self, name: str, revision: str = "main") -> None:
        repo, commit = self._commit(name, revision)
        self._json({
            "_id": commit.oid[:24], "id": name, "modelId": name, "sha": commit.oid,
            "private": repo.private, "tags": [], "downloads": 0, "likes": 0,
            "lastModified": "2026-01-01T00:00:00.000Z", "createdAt": "2026-01-01T00:00:00.000Z",
            "cardData": repo.card, "siblings": [{"rfilename": p} for p in sorted(commit.files)],
        })  # fmt: skip

    def tree(self, name: str, revision: str, folder: str) -> None:
        _, commit = self._commit(name, revision)
        rows = []
        for path, entry in sorted(commit.files.items()):
            row: dict[str, Any] = {
                "type": "file",
                "path": path,
                "oid": entry.oid,
                "size": entry.size,
            }
            if entry.lfs:
                row["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            rows.append(row)
        self._json(rows)

    def resolve(self, name: str, revision: str, path: str) -> None:
        _, commit = self._commit(name, revision)
        entry = commit.files.get(path)
        if entry is None:
            raise _Refused(404, "EntryNotFound")
        headers = {
            "X-Repo-Commit": commit.oid,
            "ETag": f'"{entry.sha256 if entry.lfs else entry.oid}"',
        }
        if self.hub.cdn and entry.lfs:
            location = f"{self.hub.cdn}/cdn/{entry.sha256}?Signature=secretsignature"
            linked = {"X-Linked-Size": str(entry.size), "X-Linked-ETag": f'"{entry.sha256}"'}
            self._send(302, b"", {**headers, **linked, "Location": location})
            return
        self._bytes(self.hub.blobs[entry.sha256], headers)

    def cdn(self, sha: str) -> None:
        self._bytes(self.hub.blobs[sha], {})

    def _bytes(self, data: bytes, headers: Mapping[str, str]) -> None:
        if delay := self.hub.slow("resolve"):
            time.sleep(delay)
        status, total = 200, len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(wanted[1]), int(wanted[2] or total - 1) + 1
            if start >= total:
                raise _Refused(416, "Range")
            data, status = data[start:stop], 206
            headers = {**headers, "Content-Range": f"bytes {start}-{start + len(data) - 1}/{total}"}
        self._send(status, data, {**headers, "Accept-Ranges": "bytes"})

    ROUTES: ClassVar[list[tuple[str, str, str]]] = [
        ("whoami", "GET", r"/api/whoami-v2"),
        ("yaml", "POST", r"/api/validate-yaml"),
        ("create", "POST", r"/api/repos/create"),
        ("preupload", "POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)"),
        ("commit", "POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)"),
        ("lfs_batch", "POST", r"/(.+)\.git/info/lfs/objects/batch"),
        ("xet_write_token", "GET", r"/api/models/([^/]+/[^/]+)/xet-write-token/(.+)"),
        ("lfs_put", "PUT", r"/lfs/([0-9a-f]{64})"),
        ("lfs_verify", "POST", r"/lfs-verify/([0-9a-f]{64})"),
        ("tree", "GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)"),
        ("info", "GET", r"/api/models/([^/]+/[^/]+)/revision/(.+)"),
        ("info", "GET", r"/api/models/([^/]+/[^/]+)"),
        ("resolve", "GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)"),
        ("cdn", "GET", r"/cdn/([0-9a-f]{64})"),
    ]
