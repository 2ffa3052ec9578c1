"""Slices of a shard that is not on this disk: those that lie close together are one request.

An NVFP4 conversion ends with a scalar of four bytes for every expert matrix, asked for once per
engine: by themselves they would be hundreds of thousands of requests.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from v4quant.hub.remote import Remote

_AT_ONCE = 16
_GAP, _LARGEST_SPAN = 16 * 2**10, 4 * 2**20  # between slices read as one, and of such a one
_KEPT_SPAN, _KEPT_BYTES = 2**20, 16 * 2**20


def merge_slices(offsets: Sequence[int], count: int, size: int) -> list[tuple[int, int]]:
    """Spans (start, stop) of a file of `size` bytes that hold `count` bytes at each offset.

    Slices that are close to each other share a span: a request costs more than a few kilobytes that
    nobody needs. Sorted, disjoint.
    """
    spans: list[tuple[int, int]] = []
    for start in sorted(set(offsets)):
        stop = min(start + count, size)
        first, last = spans[-1] if spans else (start, start)
        if spans and start - last <= _GAP and stop - first <= _LARGEST_SPAN:
            spans[-1] = first, max(last, stop)
        else:
            spans.append((start, stop))
    return spans


class RemoteSlices:
    """Reads slices of a repository's files."""

    def __init__(self, remote: Remote) -> None:
        """Asks nothing yet."""
        self._remote = remote
        self._spans: dict[tuple[str, int, int], bytes] = {}
        self._lock = threading.Lock()

    def read(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """Up to `count` bytes at each offset. Raises HubError."""
        spans = merge_slices(offsets, count, self._remote.files[file].size)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            read = dict(zip(spans, pool.map(lambda s: self._span(file, *s), spans), strict=True))
        starts = [start for start, _ in spans]
        found = []
        for offset in offsets:
            span = spans[bisect_right(starts, offset) - 1]
            found.append(read[span][offset - span[0] :][:count])
        return found

    def _span(self, file: str, start: int, stop: int) -> bytes:
        """Bytes over the network; short ones are kept, for whoever asks again (each engine)."""
        data = self._spans.get((file, start, stop))
        if data is None:
            data = self._remote.read(file, start, stop - start)
            with self._lock:
                kept = sum(map(len, self._spans.values()))
                if len(data) <= _KEPT_SPAN and kept + len(data) <= _KEPT_BYTES:
                    self._spans[file, start, stop] = data
        return data
