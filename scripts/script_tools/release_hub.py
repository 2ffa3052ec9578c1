"""A hub on loopback that serves a release nobody has on disk, and drops what is uploaded.

Source shards are made when their bytes are asked for (releases.py), their SHA-256 is in the
listing. Of an uploaded shard the hub keeps size, hash and header, and a few modules (uploads.py);
small files it keeps whole. It knows the routes that huggingface_hub and v4quant use, and one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from script_tools.releases import Release
from script_tools.uploads import Uploaded, UploadStream

TOKEN, USER = "hf_TokenOfTheReleaseHub", "tester"
SOURCE = "maker/release"
_CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """A file in a repository; `sha256` for large storage."""

    size: int
    blob: str
    sha256: str = ""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A killed client hangs up: nothing to tell."""


class ReleaseHub:
    """The server and what it holds; use as a context manager. seed: which modules are kept."""

    def __init__(
        self, release: Release, seed: int, samples: int, hashes: Path | None = None
    ) -> None:
        """hashes: as `Release.digests` keeps them."""
        self.release, self.seed, self.samples = release, seed, samples
        shas = release.digests(hashes)
        files = {n: Entry(p.nbytes, "0" * 40, shas[n]) for n, p in release.plans.items()}
        files |= {n: Entry(len(d), _blob(d)) for n, d in release.small.items()}
        self.repos: dict[str, dict[str, Entry]] = {SOURCE: files}
        self.small = {_blob(d): d for d in release.small.values()}
        self.objects: dict[str, Uploaded] = {}
        self.sent = self.received = self.requests = 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> ReleaseHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit_of(self, repo: str) -> str:
        """A name for the state of a repository."""
        return hashlib.sha1(repr(sorted(self.repos[repo].items())).encode()).hexdigest()


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: ReleaseHub

    def log_message(self, *args: object) -> None:
        """Silent."""

    def _json(self, value: object, status: int = 200) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body(self) -> Iterator[bytes]:
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            data = self.rfile.read(min(left, _CHUNK))
            if not data:
                raise ConnectionResetError("the client is gone")
            left -= len(data)
            yield data

    def _dispatch(self) -> None:
        self.hub.requests += 1
        path = unquote(urlsplit(self.path).path)
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, action in _ROUTES:
            if method == wanted and (match := re.fullmatch(pattern, path)):
                try:
                    action(self, *match.groups())
                except (BrokenPipeError, ConnectionResetError):
                    self.close_connection = True
                return
        for _ in self._body():
            pass
        self._json({"error": "no such route"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _dispatch

    def whoami(self) -> None:
        token = {"accessToken": {"role": "write"}}
        self._json({"name": USER, "type": "user", "orgs": [], "auth": token})

    def yaml(self) -> None:
        for _ in self._body():
            pass
        self._json({"errors": [], "warnings": []})

    def create(self) -> None:
        asked = json.loads(b"".join(self._body()))
        repo = f"{asked.get('organization') or USER}/{asked['name']}"
        self.hub.repos.setdefault(repo, {})
        self._json({"url": f"{self.hub.url}/{repo}", "name": repo})

    def info(self, repo: str, revision: str = "") -> None:
        if repo not in self.hub.repos:
            self._json({"error": "RepoNotFound"}, 404)
            return
        commit, files = self.hub.commit_of(repo), self.hub.repos[repo]
        self._json({
            "_id": commit[:24], "id": repo, "modelId": repo, "sha": commit, "private": False,
            "tags": [], "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "siblings": [{"rfilename": n} for n in sorted(files)],
        })  # fmt: skip

    def tree(self, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            self._json({"error": "RepoNotFound"}, 404)
            return
        rows: list[dict[str, Any]] = []
        for name, entry in sorted(self.hub.repos[repo].items()):
            row = {"type": "file", "path": name, "oid": entry.blob, "size": entry.size}
            large = {"oid": entry.sha256, "size": entry.size, "pointerSize": 134}
            rows.append({**row, "lfs": large} if entry.sha256 else row)
        self._json(rows)

    def resolve(self, repo: str, revision: str, name: str) -> None:
        entry = self.hub.repos.get(repo, {}).get(name)
        if entry is None:
            self._json({"error": "EntryNotFound"}, 404)
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(asked[1]), int(asked[2]) + 1) if asked else (0, entry.size)
        stop = min(stop, entry.size)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(stop - start))
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{entry.size}")
        self.end_headers()
        if self.command != "HEAD":
            for data in self._content(repo, name, entry, start, stop):
                self.wfile.write(data)
                self.hub.sent += len(data)

    def _content(
        self, repo: str, name: str, entry: Entry, start: int, stop: int
    ) -> Iterator[bytes | memoryview]:
        if repo == SOURCE and name in self.hub.release.plans:
            yield from self.hub.release.read(name, start, stop)
        elif not entry.sha256:
            yield self.hub.small[entry.blob][start:stop]
        else:  # of what was uploaded there is the header; tensors that were dropped read as zeros
            front = self.hub.objects[entry.sha256].front
            yield front[start:stop]
            left = stop - max(start, len(front))
            while left > 0:
                yield bytes(min(left, _CHUNK))
                left -= _CHUNK

    def preupload(self, repo: str, revision: str) -> None:
        rows = [
            {"path": f["path"], "shouldIgnore": False, "oid": None,
             "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular"}
            for f in json.loads(b"".join(self._body()))["files"]
        ]  # fmt: skip
        self._json({"files": rows})

    def batch(self, repo: str) -> None:
        rows = []
        for item in json.loads(b"".join(self._body()))["objects"]:
            row: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.objects:
                row["actions"] = {"upload": {"href": f"{self.hub.url}/put/{item['oid']}"}}
            rows.append(row)
        self._json({"transfer": "basic", "objects": rows})

    def put(self, oid: str) -> None:
        stream = UploadStream(self.hub.seed, self.hub.samples)
        for data in self._body():
            stream.add(data)
            self.hub.received += len(data)
        right = stream.sha.hexdigest() == oid
        if right:
            self.hub.objects[oid] = stream.end()
        self._json({}, 200 if right else 400)

    def commit(self, repo: str, revision: str) -> None:
        files = self.hub.repos[repo]
        for line in b"".join(self._body()).splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                if value.get("parentCommit") not in (None, self.hub.commit_of(repo)):
                    self._json({"error": "ParentMismatch"}, 412)
                    return
            elif operation["key"] == "file":
                data = base64.b64decode(value["content"])
                self.hub.small[_blob(data)] = data
                files[value["path"]] = Entry(len(data), _blob(data))
            elif operation["key"] == "lfsFile":
                files[value["path"]] = Entry(value["size"], "0" * 40, value["oid"])
        oid = self.hub.commit_of(repo)
        url = f"{self.hub.url}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url})


_REPO = r"([^/]+/[^/]+)"
_ROUTES: list[tuple[str, str, Any]] = [
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/validate-yaml", _Handler.yaml),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_REPO}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/put/([0-9a-f]{64})", _Handler.put),
    ("GET", rf"/api/models/{_REPO}/tree/([^/]+)/?", _Handler.tree),
    ("GET", rf"/api/models/{_REPO}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{_REPO}", _Handler.info),
    ("GET", rf"/{_REPO}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
