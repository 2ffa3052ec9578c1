"""Target: a repository that receives a conversion while it is made.

Each shard is committed as soon as it is journaled, and then deleted here; the next one is written
meanwhile. What this disk holds of the output is counted by reservation from before a shard's first
byte until it is gone, and never exceeds the cap. What the repository lists with the right digest is
the journal of what was sent, so a crash loses at most the shards in flight. With several ranks each
keeps to a share of the cap, and rank 0 sends and commits what the others leave in the shared
folder. Config, index, manifest and card come in the last commit, after all digests of shards were
compared.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path, PurePosixPath
from typing import Any

from v4quant.conversion.board import Board
from v4quant.conversion.plan import Plan
from v4quant.hub.errors import HubError
from v4quant.hub.remote import RemoteFile
from v4quant.hub.shard_cache import DiskCapError
from v4quant.hub.source import open_published
from v4quant.hub.stopping import Stop, is_stopped, join_all
from v4quant.own_folders import remove_if_empty
from v4quant.publishing.card import CardRequest, card_files
from v4quant.publishing.publisher import (
    SHARD_SUFFIXES,
    CommitPlan,
    Publisher,
    RepoFile,
    repo_files,
)
from v4quant.publishing.serving import accepted_engines
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.shards import WrittenFile

UPLOADS = 2  # at a time
_CLOSING_SECONDS = 1.0  # for uploads that were told to end
_GLANCE = 1.0  # seconds between looks at the other ranks
_SENT, _COMMITTED = "sent", "committed"  # what ranks tell each other


class _Repository:
    """What the repository already holds, and how much of the disk a rank's shards take."""

    reads_again = True

    def __init__(self, repo: str, out: Path, cap: int, stopped: Callable[[], bool]) -> None:
        """`out`: the job's output folder. cap: bytes of shards it may hold. Asks nothing yet."""
        self.repo, self._out, self._cap = repo, out, cap
        self._held = 0
        self._changed = threading.Condition()
        self._publisher = Publisher(repo, stopped)
        self._there: dict[str, RemoteFile] = {}

    def look(self) -> None:
        """Read the repository's listing. Raises HubError."""
        self._there = self._publisher.files()

    def manifest(self, out: Path) -> dict[str, Any] | None:
        """The repository's manifest, which came with its last commit."""
        if MANIFEST_NAME not in self._there:
            if INDEX_NAME not in self._there:
                return None
            raise HubError(
                f"hf://{self.repo}: already holds a checkpoint that v4quant did not write; name a "
                "new repository"
            )
        with TemporaryFolder() as folder:
            self._publisher.read_small(MANIFEST_NAME, folder / MANIFEST_NAME)
            return read_manifest(folder)

    def has(self, file: WrittenFile) -> bool:
        """Whether the repository lists this shard with its digest."""
        return _repo_file(self._out, file).is_same(self._there.get(file.name))

    def space(self, sizes: Sequence[int]) -> int:
        """The cap, or less when all of them are less."""
        return min(sum(sizes), self._cap)

    def has_room(self, nbytes: int) -> bool:
        """Whether the cap allows another shard now."""
        with self._changed:
            return self._held + nbytes <= self._cap


class HubDelivery(_Repository):
    """A `Delivery` into a repository on the hub: the one of rank 0, which alone commits."""

    def __init__(
        self,
        repo: str,
        out: Path,
        cap: int,
        request: CardRequest,
        private: bool = True,
        board: Board | None = None,
    ) -> None:
        """cap: bytes of output shards that this rank may have in `out`.

        request: what goes onto the card besides the manifest. board: where other ranks tell of the
        shards they finished. Checks token, owner and repository; raises HubError and its kinds
        before any work is done.
        """
        self._stop = Stop()
        super().__init__(repo, out, cap, self._stop)
        self._request, self._board = request, board
        self._publisher.preflight(private)
        self._there = self._publisher.look()
        self._pending = 0
        self._queue: queue.Queue[tuple[WrittenFile, bool] | None] = queue.Queue()
        self._error: BaseException | None = None
        self._threads = [
            threading.Thread(target=self._work, name="upload", daemon=True) for _ in range(UPLOADS)
        ]
        for thread in self._threads:
            thread.start()
        if board is not None:
            board.listen(self._heard)

    def refuse_other(self, plan: Plan) -> None:
        """Raise HubError when the repository holds another checkpoint, or shards of one."""
        found = self.manifest(self._out)
        names = {s.file for s in plan.shards}
        if found is not None:  # perhaps made under another name of the source
            names |= {file["name"] for file in found["files"]}
        foreign = [n for n in self._there if n.endswith(SHARD_SUFFIXES) and n not in names]
        if foreign or (found is not None and found.get("plan") != plan.digest):
            raise HubError(
                f"hf://{self.repo}: already holds a checkpoint of another source, recipe or "
                "version; name a new repository"
            )

    def make_room(self, nbytes: int) -> None:
        """Wait for uploads until the cap allows another shard. Raises what an upload raised."""
        _refuse_larger(nbytes, self._cap)
        with self._changed:
            while self._held + nbytes > self._cap:
                self._raise()
                self._changed.wait()
            self._raise()
            self._held += nbytes

    def take(self, file: WrittenFile) -> None:
        """Send a shard in the background, then delete it here."""
        with self._changed:
            self._raise()
            self._pending += 1
        self._queue.put((file, True))

    def settle(self) -> None:
        """Wait until this rank's shards are committed. Raises what an upload raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or not self._pending)
            self._raise()

    def check(self) -> None:
        """Raise what an upload raised."""
        with self._changed:
            self._raise()

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Wait for the shards, compare them, make the last commit, compare everything.

        What was published is then deleted here, and nothing else of the folder.
        """
        self._end()
        for thread in self._threads:
            thread.join()
        self._raise()
        files = repo_files(out, manifest)
        self._publisher.compare(p for p in files if p.is_shard)
        request = self._request
        if (out / INDEX_NAME).exists():  # other containers have no headers that engines check
            # What only serves the card stops no conversion that took hours; a push renders it anew.
            with suppress(HubError), open_published(self.repo, out) as published:
                request = replace(request, engines=accepted_engines(published))
        files += card_files(manifest, request)
        rest = tuple(p for p in files if not p.is_shard)
        self._publisher.commit(CommitPlan("Config, index, manifest and card", rest))
        self._publisher.compare(files)
        for file in files:
            if isinstance(file.content, Path):
                file.content.unlink(missing_ok=True)
                for above in PurePosixPath(file.name).parents[:-1]:
                    remove_if_empty(out / above)

    def stop(self) -> None:
        """End the upload threads; what they are sending is sent again by the next run."""
        self._stop.set()
        self._end()
        join_all(self._threads, _CLOSING_SECONDS)

    def _end(self) -> None:
        for _ in self._threads:
            self._queue.put(None)

    def _heard(self, rank: int, topic: str, value: str) -> None:
        if topic == _SENT:
            self._queue.put((WrittenFile(**json.loads(value)), False))

    def _work(self) -> None:
        """An uploading thread."""
        while (item := self._queue.get()) is not None and not self._stop():
            file, mine = item
            try:
                title = f"Add {file.name}"
                plan = CommitPlan(title, (_repo_file(self._out, file),))
                with self._stop.governs():
                    self._publisher.commit(plan)
                (self._out / file.name).unlink(missing_ok=True)
            except BaseException as error:  # noqa: BLE001  (handed to the job)
                with self._changed:
                    self._error = self._error or error
                    self._changed.notify_all()
                return
            if not mine and self._board is not None:
                self._board.tell(_COMMITTED, file.name)
            with self._changed:
                self._held -= file.nbytes if mine else 0
                self._pending -= mine
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


class RankDelivery(_Repository):
    """The `Delivery` of the other ranks: their shards wait in the shared folder for rank 0."""

    def __init__(self, repo: str, out: Path, cap: int, board: Board) -> None:
        """As of HubDelivery, which has checked the repository. Raises HubError."""
        super().__init__(repo, out, cap, is_stopped)
        self._board = board
        self._waiting: dict[str, int] = {}
        board.listen(self._heard)
        self.look()

    def make_room(self, nbytes: int) -> None:
        """Wait for rank 0 until the cap allows another shard. Raises RankLost or DiskCapError."""
        _refuse_larger(nbytes, self._cap)
        self._wait(lambda: self.has_room(nbytes))
        with self._changed:
            self._held += nbytes

    def take(self, file: WrittenFile) -> None:
        """Tell rank 0 of a shard that is whole and journaled."""
        with self._changed:
            self._waiting[file.name] = file.nbytes
        self._board.tell(_SENT, json.dumps(asdict(file)))

    def settle(self) -> None:
        """Wait until rank 0 has committed this rank's shards. Raises RankLost."""
        self._wait(lambda: not self._waiting)

    def check(self) -> None:
        """Return: whatever can fail is rank 0's."""

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Never called: rank 0 finishes."""
        raise NotImplementedError

    def stop(self) -> None:
        """Return: nothing runs in the background."""

    def _wait(self, done: Callable[[], bool]) -> None:
        while not done():
            self._board.check()
            with self._changed:
                self._changed.wait(_GLANCE)

    def _heard(self, rank: int, topic: str, value: str) -> None:
        if topic == _COMMITTED:
            with self._changed:
                self._held -= self._waiting.pop(value, 0)
                self._changed.notify_all()


def _refuse_larger(nbytes: int, cap: int) -> None:
    if nbytes > cap:
        raise DiskCapError(
            f"--disk-cap leaves {cap:,} bytes for output shards, but one has {nbytes:,}"
        )


def _repo_file(out: Path, file: WrittenFile) -> RepoFile:
    return RepoFile(file.name, file.nbytes, file.sha256, out / file.name)
