"""ShardCache: the few shards of a repository that lie on this disk at one time.

A Checkpoint reads its bytes here. Shards that are expected are fetched ahead, in order, by threads
of their own, as far as the cap allows; a shard that is acquired stays until it is released, and is
then deleted. Without such a plan (calibration, evaluation, comparison) a shard is fetched when it
is first read and the one not used for longest makes room. Short reads of a shard that is not here
(a norm, a slice for the digest) are ranges over the network and fetch nothing whole.

The cap is kept by reservation: a download counts with its full size before its first byte, so the
disk never holds more than the cap, whatever breaks. What an earlier run left counts as well, until
it is taken (its digest compared), and goes before it could block a shard that is needed sooner.
"""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from v4quant.hub.download import download, part_path
from v4quant.hub.errors import HubError
from v4quant.hub.fetched_shard import FetchedShard, open_cached, open_fetched
from v4quant.hub.remote import Remote
from v4quant.hub.slices import RemoteSlices
from v4quant.hub.stopping import Stop, join_all
from v4quant.own_folders import SameFolder, refuse_links
from v4quant_kernels.errors import V4QuantError

DOWNLOADS = 2  # at a time
RANGE_BYTES = 64 * 2**10  # reads up to this size need not fetch a shard,
RANGE_SHARE = 16  # unless they have added up to this fraction of it
_CLOSING_SECONDS = 1.0  # for downloads that were told to end
_GLANCE = 0.5  # seconds between looks whether to end
_NAME = re.compile(r"[0-9a-f]{16}-[^/]+\.(safetensors|gguf)(\.part)?")


class DiskCapError(V4QuantError):
    """The cap on disk space is too small for this source or this conversion."""


def remove_shards(folder: Path) -> None:
    """Remove the shards that a cache in this folder left, and the folder if nothing else is in it.

    For a folder that a record of ours names, and under its lock.
    """
    if folder.is_symlink() or folder.parent.is_symlink() or not folder.is_dir():
        return
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


class ShardCache:
    """Implements `ShardFiles` for a repository. Use as long as the checkpoint; then `close`."""

    is_local = False

    def __init__(
        self,
        remote: Remote,
        shards: Iterable[str],
        folder: Path,
        cap: int | None = None,
        cached: Mapping[str, Path] = {},
        keep: bool = False,
        lock: ExitStack | None = None,
        advance: Callable[[int], None] = lambda count: None,
    ) -> None:
        """`folder` takes the shards; cap: bytes (default three of the largest, or what is there).

        cached: shards that already lie on this disk, elsewhere. keep: what was fetched outlives
        `close`, for a later run. lock: closed by `close`. Raises DiskCapError.
        """
        self._remote, self._folder, self._cached = remote, folder, dict(cached)
        refuse_links(folder.parent, f"{folder.name}/shard")
        self._home = SameFolder(folder)
        self._names = set(shards)
        sizes = {n: remote.files[n].size for n in sorted(self._names)}
        largest = max(sizes.values(), default=0)
        self._left = {f: n for f, n in sizes.items() if f not in self._cached and self._is_left(f)}
        # What is here takes no more disk by staying, until whoever converts sets another cap.
        self.cap = max(3 * largest, sum(self._left.values())) if cap is None else cap
        foreign = [n for n in self._names if n not in self._cached and sizes[n] > self.cap]
        if foreign:
            raise DiskCapError(
                f"--disk-cap {self.cap:,} bytes does not hold {foreign[0]} "
                f"({sizes[foreign[0]]:,} bytes); give at least {largest:,}"
            )
        self.advance, self._keep, self._lock = advance, keep, lock
        self.stays = False  # what was fetched, although released: for a run of several passes
        self._here: dict[str, FetchedShard] = {}
        self._queue: deque[str] = deque()
        self._wanted: list[str] = []
        self._pinned: set[str] = set()
        self._fetching: set[str] = set()
        self._ranged: dict[str, int] = {}
        self._slices = RemoteSlices(remote)
        self._reserved, self._clock = 0, 0
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        self._first_comes, self._once = False, False
        self._stop = Stop()
        self._changed = threading.Condition()
        while sum(self._left.values()) > self.cap:
            self._drop_left(next(reversed(self._left)))

    @property
    def folder(self) -> Path:
        """Where its shards lie."""
        return self._folder

    @property
    def remote(self) -> Remote:
        """The repository at its commit."""
        return self._remote

    # -- what a Checkpoint asks

    def read_into(self, file: str, view: memoryview, offset: int, what: str) -> None:
        """Fill `view` from byte `offset` on. Raises HubError or what `download` raises."""
        with self._changed:
            if self._by_range(file, len(view)):
                shard = None
            else:
                shard = self._wait_for(file)
                shard.readers += 1
                self._clock += 1
                shard.used = self._clock
        if shard is None:
            view[:] = self._remote.read(file, offset, len(view))
            return
        try:
            shard.read_into(view, offset, f"{self._remote}: {file}", what, self._once)
        finally:
            with self._changed:
                shard.readers -= 1
                self._changed.notify_all()

    def slices(self, file: str, offsets: Sequence[int], count: int) -> list[bytes]:
        """Up to `count` bytes at each offset; from the network unless the shard is here."""
        with self._changed:
            if file in self._cached and file not in self._here:
                self._open_cached(file)
            shard = self._here.get(file)
            if shard is not None:
                shard.readers += 1
        if shard is not None:
            try:
                return [shard.slice(offset, count) for offset in offsets]
            finally:
                with self._changed:
                    shard.readers -= 1
        return self._slices.read(file, offsets, count)

    def expect(self, files: Sequence[str], once: bool) -> None:
        """Begin to fetch these, in this order; everything else in the cache makes room.

        once: what is read again would be better off in the page cache.
        """
        with self._changed:
            self._queue, self._once = deque(files), once
            self._first_comes = not self._here
            self._sweep(set(files))
            self._start()

    def acquire(self, files: Sequence[str]) -> None:
        """Wait until all of these are here; they stay until released. Raises DiskCapError."""
        need = sum(self._remote.files[f].size for f in files if f not in self._cached)
        if need > self.cap:
            raise DiskCapError(
                f"{self._remote}: one output shard needs {need:,} bytes of source shards at once, "
                f"--disk-cap leaves {self.cap:,} for them; raise it"
            )
        with self._changed:
            self._pinned.update(files)
            for file in files:
                self._wait_for(file)

    def spent(self, file: str, offset: int, count: int) -> None:
        """Take these bytes out of the page cache; the file keeps them.

        What arrives and what is written then takes the very memory that this frees: it costs a
        fraction of memory that lay idle, above all in a virtual machine.
        """
        with self._changed:
            shard = self._here.get(file)
            if shard is not None:
                shard.forget(offset, count)

    def release(self, file: str) -> None:
        """Delete a shard unless all stay; expected ones take its place."""
        with self._changed:
            self._pinned.discard(file)
            self._queue = deque(f for f in self._queue if f != file)
            shard = self._here.get(file)
            if shard is not None and not shard.readers and not self.stays:
                self._drop(file)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop fetching and close the files; reading afterwards begins anew."""
        with self._changed:
            self._stop.set()
            self._queue.clear()
            self._wanted.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        join_all(threads, _CLOSING_SECONDS)
        with self._changed:
            for file in list(self._here):
                if self._keep:
                    self._here.pop(file).close()
                else:
                    self._drop(file)
            self._pinned.clear()
            self._reserved = 0
            self._left.clear()
            if self._lock is not None:
                self._lock.close()
            self._threads, self._stop, self._error = [], Stop(), None

    # -- below, the lock is held

    def _by_range(self, file: str, count: int) -> bool:
        """Whether to read over the network what is asked of a shard that is not here."""
        near = file in self._here or file in self._cached or file in self._fetching
        if near or file in self._pinned or count > RANGE_BYTES:
            return False
        self._ranged[file] = self._ranged.get(file, 0) + count
        return self._ranged[file] <= self._remote.files[file].size // RANGE_SHARE

    def _wait_for(self, file: str) -> FetchedShard:
        if file in self._cached and file not in self._here:
            self._open_cached(file)
        while file not in self._here:
            if self._error is not None:
                raise self._error
            if self._stop():
                raise HubError(f"{self._remote}: {file}: stopped")
            if file not in self._wanted and file not in self._fetching:
                self._wanted.append(file)
                self._start()
            self._changed.wait(_GLANCE)
        return self._here[file]

    def _open_cached(self, file: str) -> None:
        path = self._cached[file]
        try:
            self._here[file] = open_cached(path)
        except OSError as error:
            raise HubError(f"{path}: cannot be read ({error.strerror})") from None

    def _start(self) -> None:
        self._changed.notify_all()
        while len(self._threads) < DOWNLOADS:
            thread = threading.Thread(
                target=self._work, args=(self._stop,), name="download", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    def _work(self, stop: Stop) -> None:
        """A downloading thread."""

        def ended() -> bool:
            return stop() or self._error is not None

        while True:
            with self._changed:
                while (file := None if ended() else self._next()) is None:
                    if ended():
                        return
                    self._changed.wait(_GLANCE)
                size = self._remote.files[file].size
                self._reserved += size
                self._left.pop(file, None)
                self._fetching.add(file)
            path = self._path(file)
            try:
                self._home.require()
                with stop.governs():
                    download(self._remote, self._remote.files[file], path, ended, self.advance)
                shard = open_fetched(path, size)
            except BaseException as error:  # noqa: BLE001  (handed to whoever waits)
                with self._changed:
                    self._fetching.discard(file)
                    if not stop():
                        self._error = self._error or error
                    self._changed.notify_all()
                return
            with self._changed:
                if stop():  # closed meanwhile
                    shard.close()
                    return
                self._fetching.discard(file)
                self._first_comes = False
                self._clock += 1
                shard.used = self._clock
                self._here[file] = shard
                self._changed.notify_all()

    def _next(self) -> str | None:
        """The next file to fetch, room for it made; it leaves its list."""
        self._wanted = [f for f in self._wanted if f not in self._here and f not in self._fetching]
        if self._wanted:
            file = self._wanted[0]
            if not self._make_room(file, True):
                return None
            self._queue = deque(f for f in self._queue if f != file)
            return self._wanted.pop(0)
        while self._queue:
            if self._first_comes and self._fetching:
                return None  # the work waits for this one: it gets the whole line
            file = self._queue[0]
            if file in self._here or file in self._fetching or file in self._cached:
                self._queue.popleft()
                continue
            if not self._make_room(file, False):
                return None
            return self._queue.popleft()
        return None

    def _path(self, file: str) -> Path:
        """Where a shard lies: its digest is part of the name."""
        told = self._remote.files[file]
        return self._folder / f"{(told.sha256 or told.blob)[:16]}-{file}"

    def _make_room(self, file: str, urgent: bool) -> bool:
        """Delete what is not needed until the file fits.

        Only an urgent wish evicts; what an earlier run left of other files makes room for any.
        """
        size = self._remote.files[file].size

        def held() -> int:
            return self._reserved + sum(n for f, n in self._left.items() if f != file)

        while held() + size > self.cap and (others := [f for f in self._left if f != file]):
            self._drop_left(others[-1])
        idle = [
            f for f, s in self._here.items() if s.path and not s.readers and f not in self._pinned
        ]
        idle.sort(key=lambda f: self._here[f].used, reverse=True)
        while urgent and held() + size > self.cap and idle:
            self._drop(idle.pop())
        return held() + size <= self.cap

    def _drop_left(self, file: str) -> None:
        del self._left[file]
        for path in (self._path(file), part_path(self._path(file))):
            path.unlink(missing_ok=True)

    def _drop(self, file: str) -> None:
        shard = self._here.pop(file)
        shard.close()
        if shard.path is not None:
            shard.path.unlink(missing_ok=True)
            self._reserved -= shard.size

    def _sweep(self, keep: set[str]) -> None:
        """Delete what an earlier run left and this one does not need soon; count the rest."""
        if self.stays:
            self._left |= {
                f: self._remote.files[f].size
                for f in self._names - {*self._here, *self._fetching}
                if self._is_left(f)
            }
            return
        for file, shard in list(self._here.items()):
            if file not in keep and not shard.readers and file not in self._pinned:
                self._drop(file)
        busy = {*self._here, *self._fetching}
        left = [f for f in self._names - busy if self._is_left(f)]
        self._left = {f: self._remote.files[f].size for f in self._queue if f in left}
        ahead = 0
        for file in self._queue:  # those that will be fetched first fit beside each other
            ahead += 0 if file in self._cached else self._remote.files[file].size
            if ahead > self.cap and file in self._left:
                self._drop_left(file)
        for file in set(left) - self._left.keys():
            self._left[file] = 0
            self._drop_left(file)

    def _is_left(self, file: str) -> bool:
        path = self._path(file)
        return any(os.path.lexists(p) for p in (path, part_path(path)))
