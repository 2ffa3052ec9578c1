"""Where the bytes of a checkpoint's shards come from: files of a folder, or something further away.

A Checkpoint knows tensors and offsets; a `ShardFiles` brings bytes. The one here reads files that
lie in a folder, by positioned reads into fresh memory, and notices when a file changes underneath.
`v4quant.hub` has another, which fetches shards as they are needed and deletes them afterwards. Work
that goes through whole shards in a known order says so (`expect`), asks for each before it begins
(`acquire`) and gives it back (`release`); for local files these do nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from v4quant_formats.errors import FormatError, SourceChanged
from v4quant_formats.system import bytes_at, open_for_reading, read_at


@dataclass(frozen=True)
class FileState:
    """Identity of an opened shard, to notice when it changes underneath."""

    size: int
    mtime_ns: int = 0
    inode: int = 0
    ctime_ns: int = 0
    links: int = 0

    def is_same(self, other: FileState) -> bool:
        """Whether a file is as it was.

        Writing moves the time of change (ctime), which no call can set back, even where the time of
        modification is restored. Giving a file another name, or removing one, moves it as well; the
        count of names then tells, and the bytes of an open file are still what they were.
        """
        known = (self.size, self.mtime_ns, self.inode) == (other.size, other.mtime_ns, other.inode)
        return known and (self.ctime_ns == other.ctime_ns or self.links != other.links)


def file_state(stat: os.stat_result) -> FileState:
    """The identity `stat` tells."""
    # Windows keeps the time of creation under this name.
    changed = 0 if sys.platform == "win32" else stat.st_ctime_ns
    return FileState(stat.st_size, stat.st_mtime_ns, stat.st_ino, changed, stat.st_nlink)


@dataclass(frozen=True)
class Origin:
    """The repository and the commit a checkpoint is read from."""

    repo: str
    revision: str
    license: str = ""


class ShardFiles(Protocol):
    """Reads bytes of shards by file name. Thread-safe."""

    @property
    def is_local(self) -> bool:
        """Whether reading a few bytes anywhere costs next to nothing."""

    def read_into(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from byte `offset` on; `what` is read, for messages.

        Raises FormatError or SourceChanged.
        """

    def slices(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """Up to `count` bytes at each offset (fewer at the file's end)."""

    def expect(self, files: Sequence[str], once: bool) -> None:
        """These shards will be acquired, in this order; a later call replaces the list.

        once: hardly any of their bytes will be read twice.
        """

    def acquire(self, files: Sequence[str]) -> None:
        """Return when all of these can be read at once; they stay until released."""

    def spent(self, file: str, offset: int, count: int) -> None:
        """These bytes of a shard will not be read again."""

    def release(self, file: str) -> None:
        """This shard will not be read again."""

    def close(self) -> None:
        """Let go of handles and scratch space; reading afterwards opens again."""


class HeadersOnly:
    """Stands where a checkpoint's bytes would come from, of one that is known by headers alone.

    Whoever needs bytes to decide asks `Checkpoint.has_data` before.
    """

    is_local = False

    def read_into(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """There is nothing to read."""
        raise AssertionError(f"{file}: only headers are known, not {what}")

    def slices(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """There is nothing to read."""
        raise AssertionError(f"{file}: only headers are known")

    def expect(self, files: Sequence[str], once: bool) -> None:
        """Nothing to prepare."""

    def acquire(self, files: Sequence[str]) -> None:
        """Nothing to wait for."""

    def spent(self, file: str, offset: int, count: int) -> None:
        """Nothing to let go of."""

    def release(self, file: str) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """Nothing to close."""


class LocalShards:
    """Shards that lie in a folder."""

    is_local = True

    def __init__(self, folder: Path, states: Mapping[str, FileState]) -> None:
        """`states`: every file's identity when its header was read."""
        self._folder, self._states = folder, states
        self._handles: dict[str, int] = {}
        self._lock = threading.Lock()

    def read_into(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from byte `offset` on; `what` is read, for messages.

        Raises FormatError or SourceChanged.
        """
        read_whole(self._handle(file), view, offset, f"{self._folder / file}", what)

    def slices(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """Up to `count` bytes at each offset."""
        handle = self._handle(file)
        return [bytes_at(handle, count, offset) for offset in offsets]

    def expect(self, files: Sequence[str], once: bool) -> None:
        """Nothing to prepare."""

    def acquire(self, files: Sequence[str]) -> None:
        """They are here."""

    def spent(self, file: str, offset: int, count: int) -> None:
        """They stay: others may want what is cached of them."""

    def release(self, file: str) -> None:
        """They stay."""

    def close(self) -> None:
        """Close the files."""
        with self._lock:
            for handle in self._handles.values():
                os.close(handle)
            self._handles.clear()

    def _handle(self, file: str) -> int:
        with self._lock:
            handle = self._handles.get(file)
            if handle is None:
                try:
                    handle = open_for_reading(self._folder / file)
                except OSError as error:
                    raise SourceChanged(
                        f"{self._folder / file}: vanished after it was opened ({error.strerror})"
                    ) from None
                self._handles[file] = handle
        if not file_state(os.fstat(handle)).is_same(self._states[file]):
            raise SourceChanged(
                f"{self._folder / file}: changed while it was in use; start again from a stable "
                "copy"
            )
        return handle


def read_whole(
    handle: int,
    view: memoryview,
    offset: int,
    path: str,
    what: str,
    read: Callable[[int, memoryview, int], int] = read_at,
) -> None:
    """Fill `view` from an open file. Raises FormatError or SourceChanged with both names."""
    done = 0
    while done < len(view):
        try:
            got = read(handle, view[done:], offset + done)
        except OSError as error:
            raise FormatError(f"{path}: reading '{what}' failed ({error.strerror})") from None
        if got == 0:
            raise SourceChanged(
                f"{path}: ends inside tensor '{what}'; the file shrank while it was read"
            )
        done += got
