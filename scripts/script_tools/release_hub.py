"""A hub on loopback that serves a release nobody has on disk, and drops what is uploaded.

Source shards are made when their bytes are asked for: header and tensors of the synthetic release,
the same bytes at every request, their SHA-256 in the listing. Of an uploaded shard the hub keeps
size, hash and header, and a few modules cut out of the stream as it passes; small files it keeps
whole. It knows the routes that huggingface_hub and v4quant use, and one token.
"""

from __future__ import annotations

import base64
import hashlib
import json
import mmap
import random
import re
import struct
import threading
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import torch

from v4quant.synthetic.configs import make_config
from v4quant.synthetic.inventory import shards_of
from v4quant.synthetic.values import Faults, pieces
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import index_json
from v4quant_formats.shards import FilePlan, plan_shard
from v4quant_formats.spec import TensorSpec

TOKEN, USER = "hf_TokenOfTheReleaseHub", "tester"
SOURCE = "maker/release"
_KEPT = 8  # tensors in memory: neighbours are asked for together
_LARGE = 256 << 20  # bytes of a tensor that is made before the first request: clients do not wait
_AT_ONCE = 2  # tensors being made
_CHUNK = 2**20


@dataclass(frozen=True)
class Entry:
    """A file in a repository; `sha256` for large storage."""

    size: int
    blob: str
    sha256: str = ""


@dataclass
class Uploaded:
    """What is kept of an uploaded object: its size, its header (and that with its length, as
    bytes), and some tensors by name."""

    size: int
    front: bytes = b""
    header: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, bytes] = field(default_factory=dict)


class Release:
    """A release's files, made on demand."""

    def __init__(
        self, release: str, overrides: dict[str, int], tiny: bool, folder: Path | None = None
    ) -> None:
        """overrides: integer fields of config.json. tiny: the layout in small.

        folder: where the few large tensors are kept; needed if there are any.
        """
        self.config = make_config(release, tiny, overrides, None)
        self.experts = int(self.config.get("n_routed_experts", 0))
        chosen = shards_of(release, self.config)
        self.plans: dict[str, FilePlan] = {
            f"model-{i:05d}-of-{len(chosen):05d}.safetensors": plan_shard(specs)
            for i, specs in enumerate(chosen, 1)
        }
        where = {s.name: file for file, plan in self.plans.items() for s in plan.specs}
        total = sum(s.nbytes for plan in self.plans.values() for s in plan.specs)
        self.small = {
            "config.json": json.dumps(self.config).encode(),
            INDEX_NAME: index_json(where, total),
        }
        self._made: OrderedDict[str, bytes] = OrderedDict()
        self._making: dict[str, threading.Lock] = {}
        self._makers = threading.BoundedSemaphore(_AT_ONCE)
        self._lock = threading.Lock()
        self._large: dict[str, memoryview] = {}
        for spec in (s for plan in self.plans.values() for s in plan.specs):
            if spec.nbytes >= _LARGE:
                assert folder is not None, f"{spec.name} needs a folder"
                self._keep(spec, folder)

    def _keep(self, spec: TensorSpec, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / hashlib.sha1(spec.name.encode()).hexdigest()
        with path.open("w+b") as file:
            for piece in pieces(spec, 0, self.experts, Faults()):
                file.write(piece.view(-1).view(torch.uint8).numpy().data)
            file.flush()
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._large[spec.name] = memoryview(data)

    def tensor(self, spec: TensorSpec) -> bytes | memoryview:
        """A tensor's bytes."""
        if spec.name in self._large:
            return self._large[spec.name]
        with self._lock:
            making = self._making.setdefault(spec.name, threading.Lock())
        # Slices of one tensor are asked for side by side; it is made once, and few at a time.
        with making:
            with self._lock:
                found = self._made.get(spec.name)
            if found is None:
                with self._makers:
                    parts = pieces(spec, 0, self.experts, Faults())
                    found = b"".join(p.view(-1).view(torch.uint8).numpy().tobytes() for p in parts)
                with self._lock:
                    self._made[spec.name] = found
                    while len(self._made) > _KEPT:
                        self._made.popitem(last=False)
        return found

    def read(self, file: str, start: int, stop: int) -> Iterator[bytes | memoryview]:
        """Bytes `start:stop` of a shard."""
        plan, at = self.plans[file], 0
        for piece, offset, nbytes in [
            (None, 0, len(plan.header)), *((s, s.offset, s.nbytes) for s in plan.specs)
        ]:  # fmt: skip
            assert offset == at, "planned shards have no gaps"
            at += nbytes
            if offset < stop and at > start:
                data = plan.header if piece is None else self.tensor(piece)
                yield data[max(0, start - offset) : stop - offset]

    def digests(self, kept: Path | None = None) -> dict[str, str]:
        """SHA-256 of every shard: all of the release is made once.

        kept: a file of digests found before, which the same release reads; written if absent.
        """
        headers = {f: hashlib.sha256(p.header).hexdigest() for f, p in self.plans.items()}
        if kept is not None and kept.is_file():
            known = json.loads(kept.read_text(encoding="utf-8"))
            if known["headers"] == headers:
                digests: dict[str, str] = known["digests"]
                return digests

        def digest(file: str) -> str:
            sha = hashlib.sha256()
            for data in self.read(file, 0, self.plans[file].nbytes):
                sha.update(data)
            return sha.hexdigest()

        with ThreadPoolExecutor(2) as pool:
            found = dict(zip(self.plans, pool.map(digest, self.plans), strict=True))
        if kept is not None:
            text = json.dumps({"headers": headers, "digests": found})
            kept.write_text(text, encoding="utf-8")
        return found


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

    def wanted(self, header: dict[str, Any]) -> set[str]:
        """Tensors of a shard's header that are kept: whole modules, by the seed."""
        modules = sorted({n.rpartition(".")[0] for n in header if n != "__metadata__"})
        rng = random.Random(f"{self.seed}|{modules[:1]}|{len(modules)}")
        chosen = set(rng.sample(modules, min(self.samples, len(modules))))
        return {n for n in header if n.rpartition(".")[0] in chosen and n != "__metadata__"}


class _Stream:
    """An uploaded shard passing by: hashed, counted, samples cut out."""

    def __init__(self, hub: ReleaseHub) -> None:
        self.hub, self.sha, self.kept = hub, hashlib.sha256(), Uploaded(0)
        self._front = b""
        self._cuts: list[tuple[int, int, str]] = []
        self._parts: dict[str, bytearray] = {}

    def add(self, data: bytes) -> None:
        self.sha.update(data)
        start, self.kept.size = self.kept.size, self.kept.size + len(data)
        if not self.kept.header:
            self._front += data
            if len(self._front) < 8 or len(self._front) < 8 + self._length():
                return
            length = self._length()
            self.kept.front = self._front[: 8 + length]
            self.kept.header = json.loads(self.kept.front[8:])
            for name in self.hub.wanted(self.kept.header):
                first, last = self.kept.header[name]["data_offsets"]
                self._cuts.append((8 + length + first, 8 + length + last, name))
                self._parts[name] = bytearray()
            start, data, self._front = 0, self._front, b""
        for first, last, name in self._cuts:
            if first < start + len(data) and last > start:
                self._parts[name] += data[max(0, first - start) : last - start]

    def _length(self) -> int:
        length: int = struct.unpack("<Q", self._front[:8])[0]
        return length

    def end(self) -> Uploaded:
        self.kept.tensors = {name: bytes(part) for name, part in self._parts.items()}
        return self.kept


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
        stream = _Stream(self.hub)
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
