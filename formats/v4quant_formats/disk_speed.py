"""Whether a disk gives back fast what is written past the page cache; asked of the disk itself.

What does not lie in the page cache must be read again by whoever needs it next: a conversion of
what was fetched, an upload of what was written. A disk that is hardly faster than the line would
then bound the whole. So only one that writes and reads well above any line's speed is used so.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from v4quant_formats.system import create_nameless, open_uncached, read_at, write_some_at

SMALL = 2**26  # a file below this size goes through the page cache
SLOW = 100e6  # bytes a second on average at which a disk turned out not to be fast at all
_ENOUGH = 2**28  # bytes after which that is known
FAST = 600e6  # bytes a second: above a disk on SATA, below one on PCIe
_PIECE, _PIECES = 2**22, 8


def open_past_cache(handle: int, folder: Path, size: int) -> int | None:
    """Another handle on an open file of `folder` for reads and writes that pass the page cache by
    (`system.open_uncached`); None where that does not pay, or does not exist.
    """
    return open_uncached(handle) if size >= SMALL and reads_back_fast(folder) else None


def reads_back_fast(folder: Path) -> bool:
    """Whether the disk of a folder is fast enough, and takes such writing at all.

    Asked once per disk, with 32 MiB in a file without a name. The fastest piece counts: whatever
    else the machine does makes disks slower, never faster.
    """
    try:
        device = folder.stat().st_dev
        if device not in _answers:
            _answers[device] = min(_speeds(folder)) >= FAST
        return _answers[device]
    except OSError:
        return False


def took(folder: Path, count: int, seconds: float) -> None:
    """How long the disk of a folder took to write bytes past the page cache.

    Some disks are fast until their own cache is full; those are not used so any longer.
    """
    if count >= _ENOUGH and count < SLOW * seconds:
        with suppress(OSError):
            _answers[folder.stat().st_dev] = False


_answers: dict[int, bool] = {}


def _speeds(folder: Path) -> tuple[float, float]:
    """Bytes a second of writing and of reading; zeros where the system has no such file.

    Raises OSError.
    """
    handle = create_nameless(folder)
    if handle is None:
        return 0.0, 0.0
    try:
        direct = open_uncached(handle)
        if direct is None:
            return 0.0, 0.0
        try:
            return _fastest(direct, write_some_at), _fastest(direct, read_at)
        finally:
            os.close(direct)
    finally:
        os.close(handle)


def _fastest(handle: int, transfer: Callable[[int, memoryview, int], int]) -> float:
    memory = memoryview(mmap.mmap(-1, _PIECE))
    seconds = []
    for i in range(_PIECES):
        began = time.perf_counter()
        if transfer(handle, memory, i * _PIECE) < _PIECE:
            return 0.0
        seconds.append(time.perf_counter() - began)
    return _PIECE / min(seconds)
