"""Reads past the page cache, into memory of any place and length.

What is read once costs a fraction of what it does through the page cache, which must find pages for
it first. The system fills whole pages only. `memory_for` gives memory that lies in its pages as
the bytes do in theirs, so that all but the first and the last page are read where they belong;
everything else comes through a small buffer.
"""

from __future__ import annotations

import threading

import numpy as np

from v4quant_formats.system import large_pages, read_at, read_parts_at
from v4quant_kernels.late import torch

PAGE = 4096
_BUFFER = 2**21
_LARGE = 2**19  # bytes from which on a copy costs more than two pages
_own = threading.local()


def memory_for(count: int, offset: int) -> torch.Tensor:
    """uint8 [count], not filled, for bytes that lie at `offset` of a file."""
    if count < _LARGE or offset % 8:  # a tensor of larger elements must begin on one
        return torch.empty(count, dtype=torch.uint8)
    room = torch.empty(count + PAGE, dtype=torch.uint8)
    shift = (offset - room.data_ptr()) % PAGE
    return room[shift : shift + count]


def read_past_cache(handle: int, view: memoryview, offset: int) -> int:
    """As `system.read_at`, from a handle of `system.open_uncached`. Raises OSError."""
    if len(view) >= _LARGE and (address(view) - offset) % PAGE == 0:
        return _in_place(handle, view, offset)
    buffer = _buffer()
    first = offset - offset % PAGE
    skipped = offset - first
    wanted = min(len(view), len(buffer) - skipped)
    end = -(-(skipped + wanted) // PAGE) * PAGE
    count = max(0, min(wanted, read_at(handle, buffer[:end], first) - skipped))
    view[:count] = buffer[skipped : skipped + count]
    return count


def _in_place(handle: int, view: memoryview, offset: int) -> int:
    """Read whole pages into `view`, and what it has of the first and the last into a buffer."""
    before = offset % PAGE
    head = -before % PAGE  # bytes of the view in the first page, if that is not all its own
    tail = (len(view) - head) % PAGE
    first, last = _buffer()[:PAGE], _buffer()[PAGE : 2 * PAGE]
    whole = view[head : len(view) - tail]
    parts = [part for part, has in ((first, head), (whole, True), (last, tail)) if has]
    count = max(0, read_parts_at(handle, parts, offset - before) - before)
    count = min(count, len(view))
    view[: min(head, count)] = first[before : before + min(head, count)]
    beyond = count - len(view) + tail
    if beyond > 0:
        view[len(view) - tail : count] = last[:beyond]
    return count


def address(view: memoryview) -> int:
    """Where it begins."""
    return int(np.frombuffer(view, np.uint8).ctypes.data)


def _buffer() -> memoryview:
    """This thread's memory, which begins on a page."""
    found: memoryview | None = getattr(_own, "buffer", None)
    if found is None:
        found = _own.buffer = memoryview(large_pages(_BUFFER))
    return found
