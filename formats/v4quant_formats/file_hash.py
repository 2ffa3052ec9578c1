"""IncrementalHash: the SHA-256 of a file while it is written, and a light hand on the page cache.

A thread goes through the file from the front, as far as it is complete, so that the hash is ready
shortly after the last byte. It takes the bytes from the writer's memory while they are there, else
from the file. What it has read from the page cache it sends to the disk at once, and what lies
further behind it takes out of the cache. Thus the disk works from the first second,
the last flush finds little to do, and a shard of gigabytes lives in the same few megabytes of
memory: pages just used are much cheaper than ones the system must find, clear or (in a virtual
machine) ask its host for, and nobody else's cached files are pushed out. A small file, and the end
of a large one, stays cached.

Hashing may be the slowest part. Then the rest of a file is hashed while the next one is written, as
far as memory is free; beyond that writers, who ask `keep_up`, wait.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from v4quant_formats.block_writer import BLOCK, BlockWriter
from v4quant_formats.system import (
    available_memory_bytes,
    begin_writing,
    finish_writing,
    forget_cached,
    open_for_reading,
    open_regular,
    read_at,
)

_BUFFER = 2**20
_STEP = 8 * 2**20  # bytes hashed, then sent to the disk, at a time
_CACHED = 64 * 2**20  # bytes that stay in the page cache behind the hash
_AHEAD = 64 * 2**20  # bytes that writers may always be ahead, beside the largest tensor,
_ALONE = 0.8  # of its time a thread works that has a core of its own
_AHEAD_SHARE = 8  # and one part of the memory nobody uses, where that is more


class IncrementalHash(threading.Thread):
    """Hashes a file from the front while it is written, never beyond what `allow` said."""

    def __init__(
        self,
        handle: int,
        size: int,
        largest: int,
        cached: bool = False,
        writer: BlockWriter | None = None,
    ) -> None:
        """`handle` stays the caller's; `largest`: the longest stretch that completes at once.

        cached: leave the file in the page cache, for somebody who reads it soon. writer: whoever
        may have the bytes in memory.
        """
        super().__init__(name="hash", daemon=True)
        self._handle, self._size, self._writer = handle, size, writer
        spare = min(size, available_memory_bytes() // _AHEAD_SHARE)
        self._ahead, self._cached = max(_AHEAD + largest, spare), cached
        self._allowed, self._done, self._stopped = 0, 0, False
        self._changed = threading.Condition()
        self._sha = hashlib.sha256()
        self._error: OSError | None = None
        self.start()

    def allow(self, position: int) -> None:
        """Bytes before `position` will not change any more."""
        with self._changed:
            self._allowed = position
            self._changed.notify_all()

    def keep_up(self) -> None:
        """Wait until no more is complete, and not hashed, than may be."""
        with self._changed:
            self._changed.wait_for(lambda: self._ended or self._allowed - self._done <= self._ahead)

    def digest(self) -> str:
        """Wait for the end of the file; its SHA-256. Raises OSError when reading or writing failed.

        Call it when the file is flushed: only then all of it can leave the page cache.
        """
        self.join()
        if self._error is not None:
            raise self._error
        if not self._cached:
            forget_cached(self._handle, 0, self._size - _CACHED)
        return self._sha.hexdigest()

    def stop(self) -> None:
        """Give up."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.join()

    def run(self) -> None:
        """The thread's work."""
        buffer = mmap.mmap(-1, _BUFFER)
        try:
            while self._done < self._size:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._allowed > self._done)
                    if self._stopped:
                        return
                    end = min(self._allowed, self._done - self._done % _STEP + _STEP)
                self._take(end, buffer)
                if end % _STEP == 0:
                    self._send(end - _STEP)
                with self._changed:
                    self._done = end
                    self._changed.notify_all()
        except OSError as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()
        finally:
            if self._writer is not None:
                self._writer.passed(self._done, comes=False)

    def _take(self, end: int, buffer: mmap.mmap) -> None:
        """Hash up to `end`."""
        if self._writer is None:
            _hash_range(self._sha, self._handle, self._done, end, buffer)
            return
        place = self._done
        while place < end:
            began, worked = time.perf_counter(), time.thread_time()
            stop = min(end, place - place % BLOCK + BLOCK)
            there = self._writer.memory(place)
            if there is None:
                _hash_range(self._sha, self._handle, place, stop, buffer)
            else:
                self._sha.update(there[: stop - place])
            # Writers may wait for a hash that waits for a core itself: that leaves it theirs. One
            # that is slow on a core of its own holds nobody up.
            share = (time.thread_time() - worked) / (time.perf_counter() - began)
            with self._changed:
                more = not self._stopped and self._allowed > stop
            self._writer.passed(stop, comes=more and share < _ALONE)
            place = stop

    @property
    def _ended(self) -> bool:
        return self._stopped or self._error is not None

    def _send(self, start: int) -> None:
        """Begin to write a step to the disk; what is far enough behind leaves the cache."""
        begin_writing(self._handle, start, _STEP)
        behind = start - _CACHED
        if behind >= 0:
            finish_writing(self._handle, behind, _STEP)
            if not self._cached:
                forget_cached(self._handle, behind, _STEP)


def hash_file(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    sha, buffer = hashlib.sha256(), mmap.mmap(-1, _BUFFER)
    handle = open_for_reading(path)
    try:
        _hash_range(sha, handle, 0, os.fstat(handle).st_size, buffer)
    finally:
        os.close(handle)
    return sha.hexdigest()


def file_pieces(path: Path) -> Iterator[bytes]:
    """The bytes of a file from its front, at most 1 MiB at a time. Raises OSError."""
    with open_regular(path) as opened:
        while piece := opened.read(_BUFFER):
            yield piece


def _hash_range(sha: hashlib._Hash, handle: int, start: int, end: int, buffer: mmap.mmap) -> None:
    # A mapped buffer begins on a page: some processors copy several times slower to elsewhere.
    view = memoryview(buffer)
    while start < end:
        count = read_at(handle, view[: end - start], start)
        if not count:
            raise OSError(errno.EIO, "file shrank while it was hashed")
        sha.update(view[:count])
        start += count
