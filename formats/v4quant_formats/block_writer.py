"""BlockWriter: a file written past the page cache, in whole blocks from memory of our own.

What is written once and read later, or by others, gains nothing from lying in the page cache. To
copy it there costs a quarter to a whole CPU-second per GB, since the system must find the pages,
and a virtual machine ask its host for them; blocks that the disk takes from memory in use cost a
fiftieth. What is still in memory can be hashed there, too.

Any piece may be written at any place, from any thread. A block that is complete goes to the disk on
a thread of this file's own. Few blocks are kept: where pieces lie so far apart that more would have
to be, the rest goes through the page cache, block by block, so that no page is written both ways.
Where the system knows no such writing, or the disk is too slow to read back (`disk_speed.py`), all
of it does.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from v4quant_formats.block_reader import PAGE, address
from v4quant_formats.disk_speed import open_past_cache, took
from v4quant_formats.system import large_pages, write_at, write_some_at

BLOCK = 2**21
BLOCKS = 12  # of one file in memory at a time


class _Block:
    """One block's memory and what of it is written."""

    def __init__(self, memory: mmap.mmap, start: int, stop: int) -> None:
        self.memory, self.start, self.stop = memory, start, stop
        self.missing = stop - start
        self.spans: list[tuple[int, int]] = []
        self.is_on_disk = False

    def view(self, start: int, stop: int) -> memoryview:
        base = self.start - self.start % BLOCK
        return memoryview(self.memory)[start - base : stop - base]

    def put(self, piece: memoryview, offset: int) -> None:
        """Take bytes, unless they are in place already: they were put into `room`."""
        place = self.view(offset, offset + len(piece))
        if address(place) != address(piece):
            place[:] = piece


class BlockWriter:
    """Writes one file. `flush` when all is written; `stop` gives up; both before the handle closes.

    Errors of the disk are raised by whichever call of `write` or `flush` comes next: OSError.
    """

    def __init__(
        self,
        handle: int,
        folder: Path,
        size: int,
        begin: int = 0,
        gaps: Iterable[tuple[int, int]] = (),
        is_read: bool = False,
    ) -> None:
        """`handle` stays the caller's; `folder`: where the file lies; `size`: bytes it will have.

        begin: bytes that are there already. gaps: ranges that nobody writes, which read as zero.
        is_read: somebody takes the bytes in order, with `memory` and `passed`.
        """
        self._handle, self._size, self._begin, self._is_read = handle, size, begin, is_read
        self._folder, self._bytes, self._seconds = folder, 0, 0.0
        self._direct = open_past_cache(handle, folder, size - begin)
        self._blocks: dict[int, _Block] = {}
        self._cached: set[int] = set()  # blocks that go through the page cache
        self._free: list[mmap.mmap] = []
        self._full: deque[_Block] = deque()
        self._gaps = _by_block(gaps)
        self._busy, self._ended, self._next = False, False, begin
        self._place, self._reader_comes = begin, False
        self._error: OSError | None = None
        self._changed = threading.Condition()
        # Writers of one file wait for each other in the system anyway, which is busy meanwhile.
        self._writing = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="write", daemon=True)
        if self._direct is not None:
            self._thread.start()

    def write(self, data: Any, offset: int) -> None:
        """Write an object with the buffer interface whole. Thread-safe; each place once."""
        view = memoryview(data).cast("B")
        if self._direct is None:
            self._write_cached(view, offset)
            return
        while view:
            piece = view[: BLOCK - offset % BLOCK]
            block = self._claim(offset // BLOCK)
            if block is None:
                self._write_cached(piece, offset)
            else:
                block.put(piece, offset)
                self._count(block, offset, len(piece))
            view, offset = view[len(piece) :], offset + len(piece)
        self._next = offset

    def room(self) -> memoryview | None:
        """Memory for the bytes that follow those written last, which `write` then need not copy;
        none where they go through the page cache. For one thread that writes front to back."""
        if self._direct is None:
            return None
        offset = self._next
        block = self._claim(offset // BLOCK)
        return None if block is None else block.view(offset, block.stop)

    def memory(self, start: int) -> memoryview | None:
        """The bytes from `start` to the end of its block, if they are here; valid until `passed`.

        Only of what was written: those that come later are not there yet.
        """
        with self._changed:
            self._place = start
            block = self._blocks.get(start // BLOCK)
            return None if block is None else block.view(start, block.stop)

    def passed(self, place: int, comes: bool) -> None:
        """Nobody asks `memory` for bytes before `place` any more.

        comes: writers who are far ahead may wait for the reader, who has work and will be back.
        """
        with self._changed:
            self._place, self._reader_comes = place, comes
            for index, block in list(self._blocks.items()):
                if block.is_on_disk and block.stop <= place:
                    self._release(index)
            self._changed.notify_all()

    def flush(self) -> None:
        """Hand everything to the system; durable it is after an fsync."""
        if self._direct is None:
            return
        self._end(drop=False)
        self._refuse_failed()
        with self._changed:
            unwritten = [block for block in self._blocks.values() if not block.is_on_disk]
        for block in unwritten:
            for start, stop in block.spans:
                write_at(self._handle, block.view(start, stop), start)
            block.is_on_disk = True

    def stop(self) -> None:
        """Give up what the system does not have yet."""
        if self._direct is not None:
            self._end(drop=True)

    def _write_cached(self, view: memoryview, offset: int) -> None:
        with self._writing:
            write_at(self._handle, view, offset)

    def _claim(self, index: int) -> _Block | None:
        """The block to write to; None where that is the page cache."""
        with self._changed:
            while True:
                self._refuse_failed()
                if index in self._cached:
                    return None
                if block := self._blocks.get(index):
                    return block
                if len(self._blocks) < BLOCKS or self._drop_one():
                    return self._new(index)
                if not self._full and not self._busy and not self._reader_comes:
                    self._cached.add(index)  # all that are here wait for somebody
                    return None
                self._changed.wait()

    # -- the lock is held

    def _new(self, index: int) -> _Block:
        memory = self._free.pop() if self._free else large_pages(BLOCK)
        start, stop = index * BLOCK, min(self._size, (index + 1) * BLOCK)
        block = self._blocks[index] = _Block(memory, max(start, self._begin), stop)
        if gaps := self._gaps.get(index):
            memory[:] = bytes(BLOCK)
            block.missing -= sum(stop - start for start, stop in gaps)
        return block

    def _drop_one(self) -> bool:
        """Give up the memory of a block whose reader is far behind: the disk has it."""
        if self._reader_comes:
            return False
        here = self._place // BLOCK
        far = [i for i, block in self._blocks.items() if block.is_on_disk and i != here]
        if far:
            self._release(max(far))
        return bool(far)

    def _release(self, index: int) -> None:
        memory = self._blocks.pop(index).memory
        if not self._ended:
            self._free.append(memory)

    def _refuse_failed(self) -> None:
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror)

    def _count(self, block: _Block, offset: int, count: int) -> None:
        with self._changed:
            spans, block.missing = block.spans, block.missing - count
            if spans and spans[-1][1] == offset:
                spans[-1] = spans[-1][0], offset + count
            else:
                spans.append((offset, offset + count))
            assert block.missing >= 0, "written twice"
            if not block.missing:
                self._full.append(block)
                self._changed.notify_all()

    # -- the thread

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._full or self._ended)
                if not self._full:
                    return
                block, self._busy = self._full.popleft(), True
            try:
                self._put(block)
            except Exception as error:  # noqa: BLE001  (writers wait for this thread: they are told)
                told = error if isinstance(error, OSError) else OSError(errno.EIO, str(error))
                with self._changed:
                    self._error = self._error or told
                    self._full.clear()
            with self._changed:
                self._busy, block.is_on_disk = False, True
                if not self._is_read or block.stop <= self._place:
                    self._release(block.start // BLOCK)
                self._changed.notify_all()

    def _put(self, block: _Block) -> None:
        """Write a whole block: what is aligned past the page cache, the rest through it."""
        at, end = block.start, block.stop - block.stop % PAGE
        while self._direct is not None and not at % PAGE and at < end:
            try:
                began, start = time.perf_counter(), at
                at += write_some_at(self._direct, block.view(at, end), at)
                self._bytes += at - start
                self._seconds += time.perf_counter() - began
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                break  # the file system opened it so, and does not write so
        write_at(self._handle, block.view(at, block.stop), at)

    def _end(self, drop: bool) -> None:
        with self._changed:
            self._ended = True
            self._free.clear()
            if drop:
                self._full.clear()
            self._changed.notify_all()
        self._thread.join()
        if self._direct is not None:
            took(self._folder, self._bytes, self._seconds)
            os.close(self._direct)
            self._direct = None


def _by_block(gaps: Iterable[tuple[int, int]]) -> dict[int, list[tuple[int, int]]]:
    found: dict[int, list[tuple[int, int]]] = {}
    for start, stop in gaps:
        for index in range(start // BLOCK, -(-stop // BLOCK)):
            part = max(start, index * BLOCK), min(stop, (index + 1) * BLOCK)
            found.setdefault(index, []).append(part)
    return found
