"""IncrementalHash: the right hash, writers held back, a cache given back, failures told."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from v4quant_formats import file_hash as following
from v4quant_formats import system
from v4quant_formats.file_hash import IncrementalHash, hash_file

STEP, CACHED = 1 << 16, 1 << 18


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_STEP", STEP)
    monkeypatch.setattr(following, "_CACHED", CACHED)
    monkeypatch.setattr(following, "_AHEAD", STEP)
    monkeypatch.setattr(following, "_AHEAD_SHARE", 2**62)  # as if no memory were free


@pytest.fixture
def file(tmp_path: Path) -> Iterator[tuple[int, bytes]]:
    content = os.urandom(160 * STEP + 12345)
    handle = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield handle, content
    os.close(handle)


@pytest.mark.usefixtures("small")
def test_the_hash_of_a_file_written_in_uneven_pieces(
    file: tuple[int, bytes], tmp_path: Path
) -> None:
    handle, content = file
    following_hash = IncrementalHash(handle, len(content), 0)
    done = 0
    for size in (1, STEP - 2, 3 * STEP + 5, 7, len(content)):
        piece = content[done : done + size]
        os.pwrite(handle, piece, done)
        done += len(piece)
        following_hash.allow(done)
        following_hash.keep_up()
    os.fsync(handle)
    assert following_hash.digest() == hashlib.sha256(content).hexdigest()
    assert hash_file(tmp_path / "f") == hashlib.sha256(content).hexdigest()


def cached(handle: int, position: int) -> bool | None:
    """Whether a byte is in the page cache; None where the file system does not say."""
    try:
        return bool(os.preadv(handle, [bytearray(1)], position, os.RWF_NOWAIT))
    except BlockingIOError:
        return False
    except OSError:
        return None


@pytest.mark.usefixtures("small")
def test_the_beginning_leaves_the_cache_and_the_end_stays(file: tuple[int, bytes]) -> None:
    handle, content = file
    kept = 100
    for _ in range(5):  # only advice: now and then the system is busy with these pages
        os.pwrite(handle, content, 0)
        if not cached(handle, 0):
            pytest.skip("this file system does not say what is cached")
        following_hash = IncrementalHash(handle, len(content), 0)
        following_hash.allow(len(content))
        os.fsync(handle)
        following_hash.digest()
        assert cached(handle, len(content) - 4096)
        kept = min(kept, sum(bool(cached(handle, i * STEP)) for i in range(100)))
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached(handle, 0):
        pytest.skip("this file system keeps pages whatever is advised")
    assert kept < 50, f"{kept} of 100 early places are still cached"


@pytest.mark.usefixtures("small")
def test_a_file_that_is_read_soon_stays(
    file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload would read from the disk what was just in memory."""
    handle, content = file
    os.pwrite(handle, content, 0)
    forgotten: list[int] = []
    monkeypatch.setattr(following, "forget_cached", lambda *given: forgotten.append(given[1]))
    for stays in (True, False):
        following_hash = IncrementalHash(handle, len(content), 0, stays)
        following_hash.allow(len(content))
        following_hash.digest()
        assert bool(forgotten) != stays


@pytest.mark.usefixtures("small")
def test_writers_wait_for_a_hash_that_is_behind(
    file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, content = file
    os.pwrite(handle, content, 0)
    gate = threading.Event()
    real = following._hash_range

    def slow(*arguments: object) -> None:
        gate.wait(10)
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(following, "_hash_range", slow)
    following_hash = IncrementalHash(handle, len(content), largest=STEP)
    following_hash.allow(2 * STEP)
    following_hash.keep_up()  # no more ahead than it may be
    following_hash.allow(len(content))
    waiting = threading.Thread(target=following_hash.keep_up)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    gate.set()
    waiting.join(10)
    assert not waiting.is_alive()
    following_hash.stop()


@pytest.mark.usefixtures("small")
def test_a_write_that_fails_behind_us_is_told(
    file: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports it once, so whoever hears of it must say so."""
    handle, content = file
    os.pwrite(handle, content, 0)

    def full(*_: int) -> int:
        ctypes.set_errno(errno.ENOSPC)
        return -1

    monkeypatch.setattr(system, "_sync_file_range", lambda: full)
    following_hash = IncrementalHash(handle, len(content), 0)
    following_hash.allow(len(content))
    following_hash.keep_up()
    with pytest.raises(OSError, match="No space left"):
        following_hash.digest()


@pytest.mark.usefixtures("small")
def test_a_file_that_shrinks_and_one_given_up(file: tuple[int, bytes]) -> None:
    handle, content = file
    os.pwrite(handle, content[:STEP], 0)
    following_hash = IncrementalHash(handle, len(content), 0)
    following_hash.allow(len(content))
    with pytest.raises(OSError, match="shrank"):
        following_hash.digest()
    given_up = IncrementalHash(handle, len(content), 0)
    given_up.stop()
    given_up.keep_up()
