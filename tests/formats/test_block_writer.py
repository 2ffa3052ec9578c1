"""BlockWriter: the bytes that were given, whatever the order, the threads and the disk."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.page_cache import pass_page_cache_by
from v4quant_formats import block_writer, file_hash
from v4quant_formats.block_writer import BlockWriter
from v4quant_formats.file_hash import IncrementalHash

BLOCK = 4 * 4096


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


@pytest.fixture
def rng() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    return random.Random(seed)


@pytest.fixture(params=["past the page cache", "through it"])
def direct(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Small blocks and few of them, written in both ways."""
    past = bool(request.param == "past the page cache")
    if past:
        pass_page_cache_by(monkeypatch, tmp_path, BLOCK)
    monkeypatch.setattr(block_writer, "BLOCKS", 3)
    return past


def pieces(rng: random.Random, begin: int, size: int) -> list[tuple[int, int]]:
    """Ranges that cover `begin:size`, none twice."""
    cuts = sorted({begin, size, *(rng.randrange(begin, size) for _ in range(60))})
    return list(itertools.pairwise(cuts))


@pytest.mark.usefixtures("direct")
def test_pieces_in_any_order_from_threads(file: int, tmp_path: Path, rng: random.Random) -> None:
    begin, size = rng.choice([0, 4096, 12345]), 20 * BLOCK + rng.randrange(BLOCK)
    content = rng.randbytes(size)
    os.pwrite(file, content[:begin], 0)
    writer = BlockWriter(file, tmp_path, size, begin)
    parts = pieces(rng, begin, size)
    rng.shuffle(parts)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda part: writer.write(content[part[0] : part[1]], part[0]), parts))
    writer.flush()
    assert (tmp_path / "f").read_bytes() == content


@pytest.mark.parametrize("shuffled", [False, True])
def test_the_hash_takes_what_is_in_memory(
    file: int,
    tmp_path: Path,
    rng: random.Random,
    direct: bool,
    shuffled: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 30 * BLOCK + 77
    content = bytearray(rng.randbytes(size))
    gaps = sorted((i * BLOCK * 3 + 500, i * BLOCK * 3 + 500 + rng.randrange(1, 99)) for i in (1, 4))
    for start, stop in gaps:
        content[start:stop] = bytes(stop - start)
    from_file: list[int] = []
    real = file_hash._hash_range
    monkeypatch.setattr(
        file_hash, "_hash_range", lambda *given: from_file.append(given[2]) or real(*given)
    )
    writer = BlockWriter(file, tmp_path, size, gaps=gaps, is_read=True)
    following = IncrementalHash(file, size, size, writer=writer)
    os.ftruncate(file, size)
    edges = sorted({0, size, *(edge for gap in gaps for edge in gap)})
    parts = [
        (start, stop) for start, stop in itertools.pairwise(edges)
        if (start, stop) not in gaps
    ]  # fmt: skip
    parts = [(s, min(s + 3000, e)) for start, e in parts for s in range(start, e, 3000)]
    if shuffled:
        rng.shuffle(parts)
    for start, stop in parts:
        writer.write(content[start:stop], start)
        if not shuffled:
            following.allow(stop)
    following.allow(size)
    writer.flush()
    os.fsync(file)
    assert following.digest() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "f").read_bytes() == content
    if direct and not shuffled:
        assert len(from_file) < 20, "most of it is hashed where it is"


def test_a_writer_from_front_to_back_fills_the_room_it_is_given(
    file: int, tmp_path: Path, rng: random.Random, direct: bool
) -> None:
    size = 9 * BLOCK + 1000
    content = rng.randbytes(size)
    writer, at, given = BlockWriter(file, tmp_path, size), 0, 0
    while at < size:
        room = writer.room()
        piece = memoryview(content)[at : at + rng.choice([1, 5000, BLOCK])]
        if room is not None and rng.random() < 0.8:
            piece = piece[: len(room)]
            room[: len(piece)] = piece
            given += len(piece)
            writer.write(room[: len(piece)], at)
        else:
            writer.write(piece, at)
        at += len(piece)
    writer.flush()
    assert (tmp_path / "f").read_bytes() == content
    assert bool(given) == direct


@pytest.mark.usefixtures("direct")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), OverflowError("odd")])
def test_whatever_fails_is_told(
    error: Exception, file: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what nobody expects: writers wait for the thread, so it must not die in silence."""

    def failing(*_: object) -> int:
        raise error

    monkeypatch.setattr(block_writer, "write_some_at", failing)
    monkeypatch.setattr(block_writer, "write_at", failing)
    writer = BlockWriter(file, tmp_path, 40 * BLOCK)
    with pytest.raises((OSError, OverflowError), match=r"No space left|odd"):
        for i in range(40):
            writer.write(bytes(BLOCK), i * BLOCK)
    writer.stop()


def test_a_file_system_that_refuses_and_one_that_writes_less(
    file: int, tmp_path: Path, rng: random.Random, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pages, parts of pages, or EINVAL: all of it arrives."""
    real, answers = block_writer.write_some_at, []

    def moody(handle: int, view: memoryview, offset: int) -> int:
        answers.append(offset)
        if len(answers) % 3 == 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(handle, view[:4096], offset)

    monkeypatch.setattr(block_writer, "write_some_at", moody)
    content = rng.randbytes(5 * BLOCK + 4097)
    writer = BlockWriter(file, tmp_path, len(content))
    writer.write(content, 0)
    writer.flush()
    assert (tmp_path / "f").read_bytes() == content and bool(answers) == direct


@pytest.mark.usefixtures("direct")
def test_what_is_given_up_leaves_nothing_running(file: int, tmp_path: Path) -> None:
    writer = BlockWriter(file, tmp_path, 9 * BLOCK)
    writer.write(bytes(3 * BLOCK + 1), 0)
    writer.stop()
    assert not writer._thread.is_alive()
