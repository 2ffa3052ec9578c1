"""Hubs that want the token, the memory or the time of whoever asks them."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email.utils import formatdate
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.utils import close_session

import v4quant.hub.client
import v4quant.hub.lines
import v4quant.hub.patience
import v4quant.hub.remote
import v4quant.hub.session
from tests.support.fake_hub import TOKEN, USER, FakeHub
from v4quant.hub.errors import HubError
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import open_remote
from v4quant.hub.slices import merge_slices
from v4quant.hub.source import open_hub
from v4quant.publishing.publisher import RepoFile, push
from v4quant_formats.errors import SourceChanged

REF = HubRef("maker/V4-Tiny")
NAME = "model-top.safetensors"


@pytest.fixture
def hub(plain_hub: FakeHub, model_files: dict[str, bytes]) -> FakeHub:
    plain_hub.add_repo(REF.repo, model_files)
    return plain_hub


@pytest.fixture
def two_hosts(
    online: Callable[[FakeHub], None], model_files: dict[str, bytes]
) -> Iterator[FakeHub]:
    """A hub with a second host beside it."""
    with FakeHub(cdn=True) as hub:
        online(hub)
        hub.add_repo(REF.repo, model_files)
        yield hub
    close_session()


def a_shard(folder: Path, count: int) -> RepoFile:
    """A file of zeros that goes into large storage."""
    shard = folder / "model.safetensors"
    shard.write_bytes(bytes(count))
    return RepoFile(shard.name, count, hashlib.sha256(bytes(count)).hexdigest(), shard)


def hosts_with_token(hub: FakeHub) -> set[str]:
    return {s.host for s in hub.log if TOKEN in str(s.headers)}


def test_a_listing_that_goes_on_elsewhere(two_hosts: FakeHub) -> None:
    assert two_hosts.cdn is not None
    link = f'<{two_hosts.cdn}/api/models/{REF.repo}/tree/main?cursor=x>; rel="next"'
    two_hosts.answers["tree"] = lambda handler: handler._json([], headers={"Link": link})
    with pytest.raises(HubError, match="another host"):
        open_remote(REF)
    assert hosts_with_token(two_hosts) == {two_hosts.url.removeprefix("http://")}


def test_uploads_confirmed_elsewhere(two_hosts: FakeHub, tmp_path: Path) -> None:
    """The address comes from the hub's own answer, and still gets no token."""
    assert two_hosts.cdn is not None
    two_hosts.verify_url = two_hosts.cdn
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"x" * 1000)
    file = RepoFile(shard.name, 1000, hashlib.sha256(b"x" * 1000).hexdigest(), shard)
    push(f"{USER}/new", [file])
    verified = [s for s in two_hosts.log if s.route == "lfs_verify"]
    assert verified and all(s.host.startswith("localhost") for s in verified)
    assert hosts_with_token(two_hosts) == {two_hosts.url.removeprefix("http://")}


@pytest.mark.parametrize("status", [302, 307, 308])
@pytest.mark.parametrize("route", ["info", "tree", "whoami", "preupload", "lfs_batch", "commit"])
def test_answers_that_are_elsewhere(
    route: str, status: int, two_hosts: FakeHub, tmp_path: Path
) -> None:
    """Whatever the hub says about where to ask, the token stays with it."""
    assert two_hosts.cdn is not None

    def elsewhere(handler: Any) -> None:
        if handler.headers["Host"].startswith("localhost"):
            handler._send(404, b"", {})
        else:
            handler._send(status, b"", {"Location": f"{two_hosts.cdn}{handler.path}"})

    two_hosts.answers[route] = elsewhere
    with suppress(HubError):
        open_remote(REF)
    with suppress(HubError):
        push(f"{USER}/new", [a_shard(tmp_path, 1000)])
    asked = {s.host for s in two_hosts.log if s.route == route}
    assert two_hosts.url.removeprefix("http://") in asked
    assert hosts_with_token(two_hosts) == {two_hosts.url.removeprefix("http://")}


def test_a_listing_without_end(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v4quant.hub.remote, "_MAX_PAGES", 30)
    hub.answers["tree"] = lambda handler: handler._json(
        [], headers={"Link": f'<{hub.url}{handler.path}>; rel="next"'}
    )
    with pytest.raises(HubError, match="has no end"):
        open_remote(REF)


@pytest.mark.parametrize(
    "page", [{}, [1], [{"type": "file"}], [{"type": "file", "path": 3, "size": 1, "oid": "x"}],
             [{"type": "file", "path": "a", "size": True, "oid": "x"}],
             [{"type": "file", "path": "a", "size": 1, "oid": {}}]],
    ids=str,
)  # fmt: skip
def test_listings_of_another_form(page: object, hub: FakeHub) -> None:
    hub.answers["tree"] = lambda handler: handler._json(page)
    with pytest.raises(HubError):
        open_remote(REF)


@pytest.mark.parametrize("route", ["info", "tree"])
@pytest.mark.parametrize("kind", ["bomb", "large", "slow", "deep", "digits"])
def test_answers_that_fill_memory_or_take_for_ever(
    kind: str, route: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4quant.hub.session, "MAX_ANSWER_BYTES", 2**20)
    monkeypatch.setattr(v4quant.hub.session, "MAX_ANSWER_SECONDS", 0.3)

    def answer(handler: Any) -> None:
        if kind == "bomb":
            handler._send(200, gzip.compress(bytes(2**24)), {"Content-Encoding": "gzip"})
        elif kind == "large":
            handler._send(200, b" " * 2**21, {})
        elif kind == "deep":
            handler._send(200, b"[" * 200_000, {})
        elif kind == "digits":
            handler._send(200, b"9" * 5000, {})
        else:
            handler.send_response(200)
            handler.send_header("Content-Length", "1000")
            handler.end_headers()
            pause = time.sleep.__closure__[0].cell_contents  # type: ignore[union-attr]
            for _ in range(100):
                handler.wfile.write(b" ")
                pause(0.02)

    hub.answers[route] = answer
    started = time.monotonic()
    with pytest.raises(HubError):
        open_remote(REF)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "location",
    ["http://[", "http://h:99999999/x", "ftp://h/x", "", "http://", "//", "javascript:x", "\x7f"],
)
def test_redirects_to_what_is_no_address(location: str, hub: FakeHub) -> None:
    remote = open_remote(REF)
    hub.answers["resolve"] = lambda handler: handler._send(302, b"", {"Location": location})
    with pytest.raises(HubError):
        remote.read(NAME, 0, 8)


@pytest.mark.parametrize("route", ["info", "tree", "resolve", "lfs_batch", "lfs_put", "commit"])
@pytest.mark.parametrize(
    "told",
    ["9999999", "9" * 400, formatdate(time.time() + 1e6, usegmt=True)],
    ids=["seconds", "digits", "date"],  # a name with the time in it differs between workers
)
def test_waits_of_days_are_refused_at_once(
    told: str, route: str, hub: FakeHub, tmp_path: Path
) -> None:
    """Also where the client itself would sleep for as long."""
    hub.answers[route] = lambda handler: handler._send(429, b"", {"Retry-After": told})
    started = time.monotonic()
    with pytest.raises(HubError, match=r"asks to wait [0-9,.]+ hours"):
        open_remote(REF).read(NAME, 0, 8)
        push(f"{USER}/new", [a_shard(tmp_path, 1000)])
    assert time.monotonic() - started < 10
    assert hub.count(route) == 1


def test_a_server_may_pause(
    hub: FakeHub, model_files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Longer than a slow line is borne, but not than the timeout, and however little came before;
    and whoever takes the bytes may be slow, too."""
    monkeypatch.setattr(v4quant.hub.lines, "SLOW_SECONDS", 0.2)
    remote, data = open_remote(REF), model_files[NAME]
    pause = time.sleep.__closure__[0].cell_contents  # type: ignore[union-attr]

    def hesitate(handler: Any) -> None:
        handler.send_response(206)
        handler.send_header("Content-Length", str(len(data)))
        handler.send_header("Content-Range", f"bytes 0-{len(data) - 1}/{len(data)}")
        handler.end_headers()
        for start, stop in ((0, 1), (1, 2), (2, len(data))):
            handler.wfile.write(data[start:stop])
            pause(0.3)

    hub.answers["resolve"] = hesitate
    found = bytearray()
    for piece in remote.stream(NAME, 0, len(data)):
        found += piece
        pause(0.25)
    assert found == data
    assert hub.count("resolve") == 1


def test_a_few_bytes_a_second_are_no_progress(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4quant.hub.lines, "SLOW_SECONDS", 0.2)
    remote = open_remote(REF)
    pause = time.sleep.__closure__[0].cell_contents  # type: ignore[union-attr]

    def drip(handler: Any) -> None:
        handler.send_response(206)
        size = remote.files[NAME].size
        start = int(handler.headers["Range"][6:].partition("-")[0])
        handler.send_header("Content-Length", str(size - start))
        handler.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        handler.end_headers()
        for _ in range(100):
            handler.wfile.write(b"x")
            pause(0.02)

    hub.answers["resolve"] = drip
    started = time.monotonic()
    with pytest.raises(HubError, match="fewer than"):
        remote.read(NAME, 0, remote.files[NAME].size)
    assert time.monotonic() - started < 15


def test_a_hub_that_is_not_there_is_told_soon(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten tries are for a hub that has answered before."""
    monkeypatch.setitem(v4quant.hub.patience._state, "answered", False)
    hub.fail("info", "drop", 50)
    with pytest.raises(HubError, match="failed 3 times"):
        open_remote(REF)
    assert hub.count("info") <= 3


def test_scalars_are_asked_for_together(hub: FakeHub, model_files: dict[str, bytes]) -> None:
    """Thousands of four-byte slices of a shard are a few requests, and are asked for once."""
    with open_hub(REF) as remote:
        file = max((n for n in model_files if n.endswith(".safetensors")), key=len)
        size = len(model_files[file])
        offsets = [*range(size - 4000, size - 2, 12), 8, size - 2, 40, 8]
        hub.log.clear()
        for _ in range(3):
            found = remote.shards.slices(file, offsets, 4)
            assert found == [model_files[file][o : o + 4] for o in offsets]
        assert len(hub.log) <= 4  # two spans, each read twice over plain HTTP


def test_merged_spans_cover_every_slice(generator: Any) -> None:
    for size in (1, 100, 10**5, 10**8):
        raw = torch.randint(size, (500,), generator=generator).tolist()
        spans = merge_slices(raw, 64, size)
        for one, two in pairwise(spans):
            assert one[0] < two[0]
        for offset in raw:
            assert any(a <= offset and min(offset + 64, size) <= b for a, b in spans)


def test_the_card_stops_no_commit(
    hub: FakeHub, model_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from v4quant.cli import cli
    from v4quant.publishing import hub_delivery

    def fail(*_: object) -> None:
        raise HubError("ten failures in a row")

    monkeypatch.setattr(hub_delivery, "open_published", fail)
    command = ["quantize", f"hf://{REF.repo}", f"hf://{USER}/out", "--scheme", "mxfp4"]
    cli.main([*command, "--scratch", str(tmp_path / "s")], standalone_mode=False)
    assert "model.safetensors.index.json" in hub.files(f"{USER}/out")


def test_verify_takes_a_repository(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import v4quant as library

    target = f"hf://{USER}/verified"
    library.quantize(f"hf://{REF.repo}", target, scheme="mxfp4", scratch=tmp_path / "s")
    found = library.verify(target, source=f"hf://{REF.repo}")
    assert found.ok and found.values is not None and found.values.compared > 0
    assert library.verify(target, engine="vllm").preflight is not None
    # One shard of other bytes, put there by somebody else.
    shard = min(n for n in hub.files(f"{USER}/verified") if n.endswith(".safetensors"))
    data = hub.read(f"{USER}/verified", shard)
    hub.add_repo(f"{USER}/verified", {shard: data[:-1] + bytes([data[-1] ^ 1])})
    found = library.verify(target)
    assert found.values is not None
    assert [f.where for f in found.values.findings] == [shard]
    manifest = json.loads(hub.read(f"{USER}/verified", "v4quant.json"))
    assert found.values.files == len(manifest["files"])


@pytest.mark.parametrize(
    ("route", "does"),
    [("info", "hangs"), ("tree", "hangs"), ("commit", "hangs"), ("lfs_put", "hangs"),
     ("lfs_batch", "hangs"), ("lfs_put", "takes nothing"), ("tree", "lists nothing"),
     ("info", "goes in circles"), ("tree", "goes in circles")],
    ids=str,
)  # fmt: skip
def test_servers_that_never_come_to_an_end(
    route: str, does: str, hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client itself sets no limits, and tries again after its own errors without a word."""
    silence = {"GET": 0.2, "HEAD": 0.2}
    monkeypatch.setattr(v4quant.hub.session, "LONGEST_SILENCE", silence)
    monkeypatch.setattr(v4quant.hub.session, "LONGEST_WORK", 0.4)
    monkeypatch.setattr(v4quant.hub.lines, "SLOW_SECONDS", 0.2)
    monkeypatch.setattr(v4quant.hub.patience, "DEFAULT_SECONDS", 2.0)
    pause = time.sleep.__closure__[0].cell_contents  # type: ignore[union-attr]
    over = threading.Event()
    link = f'<{hub.url}/api/models/{REF.repo}/tree/main>; rel="next"'

    def answer(handler: Any) -> None:
        if does == "goes in circles":
            handler._send(302, b"", {"Location": handler.path})
        elif does == "lists nothing":
            pause(0.03)
            handler._json([], headers={"Link": link})
        else:
            over.wait(60)

    if does == "takes nothing":
        hub.slow = lambda name: float(not over.wait(60))
    else:
        hub.answers[route] = answer
    shard = a_shard(tmp_path, 2**24)  # more than the buffers of a connection hold
    started = time.monotonic()
    try:
        with pytest.raises(HubError):
            open_remote(REF)
            push(f"{USER}/new", [shard])
    finally:
        over.set()
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "answer",
    [{}, [], None, 5, {"url": {}}, {"warnings": [3]}, {"name": USER, "auth": 5, "orgs": 5},
     {"name": USER, "auth": {"accessToken": "x"}, "orgs": [3, {"name": {}}]}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("route", ["whoami", "create", "yaml", "preupload", "lfs_batch", "commit"])
def test_answers_of_another_form(route: str, answer: object, hub: FakeHub, tmp_path: Path) -> None:
    """The client takes them as they are and fails in its own ways."""
    hub.answers[route] = lambda handler: handler._json(answer)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"x" * 1000)
    files = [
        RepoFile(shard.name, 1000, hashlib.sha256(b"x" * 1000).hexdigest(), shard),
        RepoFile("README.md", 8, hashlib.sha256(b"---\n---\n").hexdigest(), b"---\n---\n"),
    ]
    with suppress(HubError):
        push(f"{USER}/new", files)
        usable = route == "whoami" and isinstance(answer, dict) and answer.get("name") == USER
        assert usable or route in ("create", "yaml"), "nothing was published"


@pytest.mark.parametrize("part", ["status", "headers"])
def test_headers_that_come_a_byte_at_a_time(
    part: str, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4quant.hub.lines, "SLOW_SECONDS", 0.3)
    pause = time.sleep.__closure__[0].cell_contents  # type: ignore[union-attr]

    def drip(handler: Any) -> None:
        handler.wfile.write(b"H" if part == "status" else b"HTTP/1.1 200 OK\r\nX-Long: ")
        for _ in range(1000):
            handler.wfile.write(b"T" if part == "status" else b"a")
            handler.wfile.flush()
            pause(0.02)

    hub.answers["info"] = drip
    started = time.monotonic()
    with pytest.raises(HubError):
        open_remote(REF)
    assert time.monotonic() - started < 30


def test_a_flipped_byte_in_a_range_decides_nothing(
    hub: FakeHub, model_files: dict[str, bytes]
) -> None:
    """Over plain HTTP each range is read until two answers agree."""
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    with open_hub(REF) as checkpoint:
        digest = checkpoint.digest()
    asked = hub.count("resolve")
    for _ in range(4):
        chosen, seen = set(rng.sample(range(asked), 6)), 0

        def flip(route: str, path: str, chosen: set[int] = chosen) -> None:
            nonlocal seen
            if route == "resolve":
                if seen in chosen and path.endswith(".safetensors"):
                    hub.fail("resolve", "flip")
                seen += 1

        hub.on_request = flip
        with open_hub(REF) as checkpoint:
            assert checkpoint.digest() == digest
        assert hub.count("resolve") > asked
    hub.on_request = lambda route, path: None
    size = len(model_files[NAME])
    remote = open_remote(REF)
    for times in range(4):  # the end of a file is the end of every wider range, too
        hub.fail("resolve", "flip", times)
        assert remote.read(NAME, size - 8, 8) == model_files[NAME][-8:]

    def other_bytes(handler: Any) -> None:
        first, last = map(int, handler.headers["Range"][6:].split("-"))
        told = {"Content-Range": f"bytes {first}-{last}/{size}"}
        handler._send(206, rng.randbytes(last - first + 1), told)

    hub.answers["resolve"] = other_bytes
    with pytest.raises(SourceChanged, match="others at every reading"):
        open_remote(REF).read(NAME, 0, 8)


def test_files_are_sent_in_large_pieces(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "model.safetensors"
    data = bytes(3 * 2**20 + 5)
    shard.write_bytes(data)
    written: list[int] = []
    real = v4quant.hub.lines._Line.write

    def write(line: Any, buffer: bytes, timeout: float | None = None) -> None:
        written.append(len(buffer))
        real(line, buffer, timeout)

    monkeypatch.setattr(v4quant.hub.lines._Line, "write", write)
    push(f"{USER}/new", [RepoFile(shard.name, len(data), hashlib.sha256(data).hexdigest(), shard)])
    assert [n for n in written if n > 2**17] == [2**20] * 3
