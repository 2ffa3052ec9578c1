"""Work on the network ends at once when it is told to, whatever it waits for."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import v4quant.hub.stopping
from tests.support.fake_hub import USER, FakeHub
from v4quant.hub.errors import HubError
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import open_remote
from v4quant.hub.shard_cache import ShardCache
from v4quant.hub.stopping import Stop, end_network, is_stopped, pause
from v4quant.publishing.publisher import CommitPlan, Publisher, RepoFile

REPO, NAME = "maker/V4-Tiny", "model.safetensors"
BODY = bytes(2**24)  # more than the buffers of a connection hold
SECONDS = 15.0  # a small part of one on a machine with nothing else to do


@pytest.fixture
def hub(plain_hub: FakeHub) -> FakeHub:
    plain_hub.add_repo(REPO, {NAME: BODY})
    return plain_hub


@pytest.fixture
def stalled(hub: FakeHub) -> Iterator[Callable[[str, str], threading.Event]]:
    """Make a route stall before its answer, in the middle of it, or before what it is sent is read;
    returns an event that says when it does."""
    over = threading.Event()

    def stall(route: str, where: str) -> threading.Event:
        reached = threading.Event()

        def wait() -> None:
            reached.set()
            over.wait(60)

        def answer(handler: Any) -> None:
            if where == "body":
                handler.send_response(206)
                handler.send_header("Content-Length", str(len(BODY)))
                handler.send_header("Content-Range", f"bytes 0-{len(BODY) - 1}/{len(BODY)}")
                handler.end_headers()
                handler.wfile.write(BODY[:5000])
            wait()

        def unread(name: str) -> float:
            wait()
            return 0.0

        if where == "upload":
            hub.slow = unread
        else:
            hub.answers[route] = answer
        return reached

    yield stall
    over.set()


@pytest.mark.parametrize("where", ["answer", "body"])
def test_a_cache_closes_while_the_hub_says_nothing(
    where: str, hub: FakeHub, stalled: Callable[[str, str], threading.Event], tmp_path: Path
) -> None:
    cache = ShardCache(open_remote(HubRef(REPO)), [NAME], tmp_path / "shards")
    reached = stalled("resolve", where)
    waiting: list[BaseException] = []

    def read() -> None:
        try:
            cache.acquire([NAME])
        except HubError as error:
            waiting.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert reached.wait(30)
    downloads, started = list(cache._threads), time.monotonic()
    cache.close()
    for thread in [*downloads, reader]:
        thread.join(30)
    assert time.monotonic() - started < SECONDS
    assert waiting and not any(t.is_alive() for t in [*downloads, reader])
    # The next reading begins anew, and works.
    hub.answers.clear()
    cache.acquire([NAME])
    cache.close()


@pytest.mark.parametrize("whole_process", [False, True])
@pytest.mark.parametrize(
    ("route", "where"),
    [("lfs_put", "upload"), ("lfs_put", "answer"), ("commit", "answer"), ("tree", "answer")],
)
def test_an_upload_ends(
    route: str, where: str, whole_process: bool, hub: FakeHub, tmp_path: Path,
    stalled: Callable[[str, str], threading.Event], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(v4quant.hub.stopping, "_process", v4quant.hub.stopping._Process())
    hub.add_repo(f"{USER}/new", {})
    shard = tmp_path / NAME
    shard.write_bytes(BODY + b"x")
    sha = hashlib.sha256(BODY + b"x").hexdigest()
    plan = CommitPlan("Add", (RepoFile(NAME, len(BODY) + 1, sha, shard),))
    reached, stop = stalled(route, where), Stop()
    publisher, said = Publisher(f"{USER}/new", stop), []

    def send() -> None:
        try:
            with stop.governs():
                publisher.commit(plan)
        except Exception as error:  # noqa: BLE001
            said.append(error)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert reached.wait(30)
    time.sleep(0.1)
    started = time.monotonic()
    end_network() if whole_process else stop.set()
    sender.join(30)
    assert not sender.is_alive() and time.monotonic() - started < SECONDS
    assert isinstance(said[0], HubError) and "stopped" in str(said[0])


def test_waiting_for_the_next_try_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # sleeps as they are
    stop = Stop()
    threading.Timer(0.2, stop.set).start()
    started = time.monotonic()
    pause(60, stop)
    assert time.monotonic() - started < SECONDS
    assert stop() and not is_stopped()
    with stop.governs():
        assert is_stopped()
