"""A shard of a repository on this disk, open for reading."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from v4quant_formats.block_reader import read_past_cache
from v4quant_formats.disk_speed import open_past_cache
from v4quant_formats.shard_files import read_whole
from v4quant_formats.system import bytes_at, forget_cached, open_for_reading


@dataclass
class FetchedShard:
    """Its handles, and who uses it: the cache's affair.

    path: None for one of the hub's own cache, which is not ours to delete.
    """

    handle: int
    direct: int | None
    path: Path | None
    size: int
    readers: int = 0
    used: int = 0

    def read_into(self, view: memoryview, offset: int, name: str, what: str, once: bool) -> None:
        """Fill `view` from byte `offset` on; past the page cache what is read only once.

        Raises FormatError or SourceChanged.
        """
        if once and self.direct is not None:
            read_whole(self.direct, view, offset, name, what, read_past_cache)
        else:
            read_whole(self.handle, view, offset, name, what)

    def slice(self, offset: int, count: int) -> bytes:
        """Up to `count` bytes, fewer at the file's end. Raises OSError."""
        return bytes_at(self.handle, count, offset)

    def forget(self, offset: int, count: int) -> None:
        """Take bytes out of the page cache; the file keeps them."""
        if self.path is not None:
            forget_cached(self.handle, offset, count)

    def close(self) -> None:
        """Close the handles."""
        os.close(self.handle)
        if self.direct is not None:
            os.close(self.direct)


def open_cached(path: Path) -> FetchedShard:
    """One that somebody else keeps. Raises OSError."""
    return FetchedShard(open_for_reading(path), None, None, 0)


def open_fetched(path: Path, size: int) -> FetchedShard:
    """One that was fetched to `path`. Raises OSError."""
    handle = open_for_reading(path)
    return FetchedShard(handle, open_past_cache(handle, path.parent, size), path, size)
