"""One clock for all that brings nothing: silence, tries that fail, waits between them."""

from __future__ import annotations

import hashlib
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

import v4quant.hub.patience
from tests.support.fake_hub import USER, FakeHub
from v4quant.hub.client import persistently
from v4quant.hub.errors import HubError, PassingFailure
from v4quant.hub.failures import passing
from v4quant.hub.patience import Patience, patience_seconds
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import open_remote
from v4quant.publishing.publisher import RepoFile, push


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def pass_by(self, seconds: float, stopped: Callable[[], bool] | None = None) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(v4quant.hub.patience.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(v4quant.hub.patience, "pause", clock.pass_by)
    monkeypatch.setattr(v4quant.hub.patience, "DEFAULT_SECONDS", 50.0)
    monkeypatch.setitem(v4quant.hub.patience._state, "answered", True)
    return clock


def failing(clock: Clock, silence: Callable[[], float], wait: float | None = None) -> int:
    """Try what is silent for so long and then fails, until it is given up; the tries."""
    patience, tries = Patience("work"), 0
    while True:
        tries += 1
        clock.pass_by(min(silence(), max(0.0, patience.left())))  # as connections do
        patience.wait(PassingFailure("HTTP 503", wait))


@pytest.mark.parametrize("silence", [0.0, 0.3, 3.0, 10.0, 20.0, 49.0, 1000.0])
def test_nothing_for_fifty_seconds_is_the_end(silence: float, clock: Clock) -> None:
    with pytest.raises(HubError, match=r"work failed .*without progress in \d+ s: HTTP 503"):
        failing(clock, lambda: silence)
    assert 40 < clock.now - 1000 < 51


def test_whatever_fails_a_minute_is_enough(clock: Clock) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(200):
        began = clock.now
        wait = rng.choice([None, None, rng.uniform(0, 100)])
        with pytest.raises(HubError):
            failing(clock, lambda: rng.choice([0.0, rng.expovariate(1 / 5)]), wait)
        assert clock.now - began < 51


def test_a_server_that_is_busy_for_a_while_is_waited_for(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(v4quant.hub.patience, "DEFAULT_SECONDS", 45.0)

    def busy() -> str:
        if clock.now < 1030:
            raise PassingFailure("HTTP 503")
        return "done"

    assert persistently("work", busy) == "done"
    told = r"HTTP 503; the hub asks to wait 60 seconds, until .*; .*V4QUANT_PATIENCE=(\d+min) it"
    with pytest.raises(HubError, match=told) as caught:
        failing(clock, lambda: 0.0, 60.0)
    found = re.search(told, str(caught.value))
    assert found
    monkeypatch.setenv("V4QUANT_PATIENCE", found[1])
    began = clock.now
    Patience("work").wait(PassingFailure("HTTP 503", 60.0))
    assert clock.now == began + 60


@pytest.mark.parametrize("wait", [3600.0, 9.9e8])
def test_waits_of_hours_and_years_are_told(wait: float, clock: Clock) -> None:
    with pytest.raises(HubError, match="hours, until"):
        Patience("work").wait(PassingFailure("HTTP 429", wait))


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"Retry-After": "3", "RateLimit": '"api";r=0;t=30'}, 3),
        (429, {"RateLimit": '"api";r=0;t=55'}, 55),
        (429, {"RateLimit": '"pages";r=0;t=20, "api"; r=0; t=30, "files";r=9;t=100'}, 30),
        (429, {"RateLimit": "limit=100, remaining=0, reset=50"}, 50),
        (429, {"RateLimit-Reset": "17"}, 17),
        (429, {"RateLimit": '"api";r=3;t=9'}, None),
        (429, {"RateLimit": '"api";r=0;t=5.5'}, None),
        (429, {"RateLimit": '"api";r=0;t=99999999999999999999'}, None),
        (429, {"RateLimit": "\x1b[31m;;t=,=r=0" + ",t=" * 10**5}, None),
        (429, {"RateLimit-Reset": "soon"}, None),
        (503, {"RateLimit": '"api";r=0;t=55'}, None),
    ],
)
def test_when_a_limit_ends(status: int, headers: dict[str, str], seconds: float | None) -> None:
    failure = passing(httpx2.Response(status, headers=headers))
    assert failure is not None and failure.wait == seconds


def test_a_line_that_breaks_but_brings_something_goes_on(clock: Clock) -> None:
    patience = Patience("work")
    for _ in range(100):  # 500 bytes a second
        clock.pass_by(40)
        patience.flowed(20_000)
        patience.gained(20_000)
        patience.wait(PassingFailure("broken"))
    little = Patience("little", nbytes=400)
    for _ in range(100):
        clock.pass_by(40)
        little.gained(101)
        little.wait(PassingFailure("broken"))
    with pytest.raises(HubError):
        for _ in range(100):  # a byte a second
            clock.pass_by(20)
            patience.flowed(20)
            patience.gained(20)
            patience.wait(PassingFailure("broken"))


def test_what_is_sent_again_from_its_beginning_is_no_progress(clock: Clock) -> None:
    """However long sending takes, which is not waiting."""
    patience = Patience("work")
    with pytest.raises(HubError, match=r"\d+ times in a row"):
        for _ in range(100):
            for _ in range(30):
                clock.pass_by(10)
                patience.flowed(2**20)
            patience.wait(PassingFailure("HTTP 503"))


def test_a_part_of_other_work_has_no_more_time_than_that(clock: Clock) -> None:
    outer = Patience("outer")
    clock.pass_by(30)
    with outer.governs():
        inner = Patience("inner")
        assert inner.left() == pytest.approx(20)
        with inner.governs():
            clock.pass_by(15)
        assert outer.left() == pytest.approx(50)  # it came to its end
        clock.pass_by(10)
        with outer.stands_still():
            clock.pass_by(1000)
    assert outer.left() == pytest.approx(40)


@pytest.mark.parametrize(("told", "seconds"), [("", 45), ("90", 90), ("90s", 90), ("10min", 600)])
def test_the_variable(told: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4QUANT_PATIENCE", told)
    assert patience_seconds() == seconds


@pytest.mark.parametrize("told", ["0", "-3", "1e9", "soon", "9" * 30, "5 days", "\x1b[31m"])
def test_values_that_are_no_time(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("V4QUANT_PATIENCE", told)
    with pytest.raises(HubError, match="V4QUANT_PATIENCE") as caught:
        Patience("work")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("kind", ["503", "429", "drop"])
@pytest.mark.parametrize("route", ["info", "preupload", "lfs_batch", "lfs_put", "lfs_verify"])
def test_each_try_is_ours_and_shown(
    route: str, kind: str, plain_hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The client's own tries would be silent, and would multiply with ours."""
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(bytes(3 * 2**20))
    sha = hashlib.sha256(bytes(3 * 2**20)).hexdigest()
    times = 1 if route == "lfs_verify" else 3  # asked again, the hub says that all is there
    plain_hub.fail(route, kind, times)
    with caplog.at_level(logging.WARNING, "v4quant"):
        push(f"{USER}/new", [RepoFile(shard.name, 3 * 2**20, sha, shard)])
    assert sum("retrying in" in r.getMessage() for r in caplog.records) == times
    assert plain_hub.read(f"{USER}/new", shard.name) == shard.read_bytes()
    assert not plain_hub.pending_faults()
    # Only the part that failed was sent again.
    assert plain_hub.count("lfs_batch") == {"lfs_batch": 4, "lfs_verify": 2}.get(route, 1)


def test_a_limit_is_waited_for(
    plain_hub: FakeHub, model_files: dict[str, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    plain_hub.add_repo("maker/V4-Tiny", model_files)

    def limited(handler: Any) -> None:
        del plain_hub.answers["tree"]
        handler._send(429, b"", {"RateLimit": '"api";r=0;t=7', "RateLimit-Policy": '"api";q=5;w=9'})

    plain_hub.answers["tree"] = limited
    with caplog.at_level(logging.WARNING, "v4quant"):
        assert open_remote(HubRef("maker/V4-Tiny")).files
    assert "HTTP 429; retrying in 7.0 s" in caplog.text
    assert plain_hub.count("tree") == 2


def test_the_hub_is_asked_as_often_as_it_is_said(
    plain_hub: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def never(handler: Any) -> None:
        handler._send(503, b"", {})

    plain_hub.answers["lfs_put"] = never
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(b"x")
    file = RepoFile(shard.name, 1, hashlib.sha256(b"x").hexdigest(), shard)
    with (
        caplog.at_level(logging.WARNING, "v4quant"),
        pytest.raises(
            HubError,
            match=r"new: sending model\.safetensors \(to 127.*\) failed .* times in a row.*503",
        ),
    ):
        push(f"{USER}/new", [file])
    tries = plain_hub.count("lfs_put")
    assert 8 <= tries <= 12
    assert sum("retrying in" in r.getMessage() for r in caplog.records) == tries - 1
