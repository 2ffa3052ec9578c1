"""Target: a repository that receives a conversion while it is made.

Each shard is committed as soon as it is journaled, and then deleted here; the next one is written
meanwhile. What this disk holds of the output is counted by reservation from before a shard's first
byte until it is gone, and never exceeds the cap. What the repository lists with the right digest is
the journal of what was sent, so a crash loses at most the shards in flight. Config, index, manifest
and card come in the last commit, after all digests of shards were compared.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from v4quant.conversion.plan import Plan
from v4quant.hub.errors import HubError
from v4quant.hub.remote import RemoteFile
from v4quant.hub.shard_cache import DiskCapError
from v4quant.hub.source import open_published
from v4quant.own_folders import remove_if_empty
from v4quant.publishing.card import CardRequest, render_card
from v4quant.publishing.publisher import (
    SHARD_SUFFIXES,
    CommitPlan,
    Publisher,
    RepoFile,
    card_file,
    repo_files,
)
from v4quant.publishing.serving import accepted_engines
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.shards import WrittenFile

_PATIENCE = 2.0  # seconds for the upload in flight when the job was interrupted


class HubDelivery:
    """A `Delivery` into a repository on the hub."""

    reads_again = True

    def __init__(
        self,
        repo: str,
        out: Path,
        cap: int,
        request: CardRequest,
        private: bool = True,
    ) -> None:
        """`out`: the job's output folder; cap: bytes of output shards it may hold.

        request: what goes onto the card besides the manifest. Checks token, owner and repository;
        raises HubError and its kinds before any work is done.
        """
        self.repo, self._out, self._cap, self._request = repo, out, cap, request
        self._stopping = threading.Event()
        self._publisher = Publisher(repo, self._stopping.is_set)
        self._publisher.preflight(private)
        self._there: dict[str, RemoteFile] = self._publisher.files()
        self._held = 0
        self._changed = threading.Condition()
        self._queue: queue.Queue[WrittenFile | None] = queue.Queue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def manifest(self, out: Path) -> dict[str, Any] | None:
        """The repository's manifest, which came with its last commit."""
        if MANIFEST_NAME not in self._there:
            if INDEX_NAME not in self._there:
                return None
            raise HubError(
                f"hf://{self.repo}: already holds a checkpoint that v4quant did not write; name a "
                "new repository"
            )
        with TemporaryDirectory(prefix="v4quant-") as folder:
            self._publisher.read_small(MANIFEST_NAME, Path(folder) / MANIFEST_NAME)
            return read_manifest(Path(folder))

    def refuse_other(self, plan: Plan) -> None:
        """Raise HubError when the repository holds another checkpoint, or shards of one."""
        found = self.manifest(self._out)
        names = {s.file for s in plan.shards}
        foreign = [n for n in self._there if n.endswith(SHARD_SUFFIXES) and n not in names]
        if foreign or (found is not None and found.get("plan") != plan.digest):
            raise HubError(
                f"hf://{self.repo}: already holds a checkpoint of another source, recipe or "
                "version; name a new repository"
            )

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

    def make_room(self, nbytes: int) -> None:
        """Wait for uploads until the cap allows another shard. Raises what an upload raised."""
        if nbytes > self._cap:
            raise DiskCapError(
                f"--disk-cap leaves {self._cap:,} bytes for output shards, but one has {nbytes:,}"
            )
        with self._changed:
            while self._held + nbytes > self._cap:
                self._raise()
                self._changed.wait()
            self._raise()
            self._held += nbytes

    def take(self, file: WrittenFile) -> None:
        """Send a shard in the background, then delete it here."""
        self._raise()
        self._queue.put(file)

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Wait for the shards, compare them, make the last commit, compare everything.

        What was published is then deleted here, and nothing else of the folder.
        """
        self._queue.put(None)
        self._thread.join()
        self._raise()
        files = repo_files(out, manifest)
        self._publisher.compare(p for p in files if p.is_shard)
        request = self._request
        if (out / INDEX_NAME).exists():  # other containers have no headers that engines check
            # What only serves the card stops no conversion that took hours; a push renders it anew.
            with suppress(HubError), open_published(self.repo, out) as published:
                request = replace(request, engines=accepted_engines(published))
        files.append(card_file(render_card(manifest, request)))
        rest = tuple(p for p in files if not p.is_shard)
        self._publisher.commit(CommitPlan("Config, index, manifest and card", rest))
        self._publisher.compare(files)
        for file in files:
            if isinstance(file.content, Path):
                file.content.unlink(missing_ok=True)
                for above in PurePosixPath(file.name).parents[:-1]:
                    remove_if_empty(out / above)

    def stop(self) -> None:
        """End the upload thread; what it is sending is sent again by the next run."""
        self._stopping.set()
        self._queue.put(None)
        self._thread.join(_PATIENCE)

    def _work(self) -> None:
        while (file := self._queue.get()) is not None and not self._stopping.is_set():
            try:
                title = f"Add {file.name}"
                self._publisher.commit(CommitPlan(title, (_repo_file(self._out, file),)))
                (self._out / file.name).unlink(missing_ok=True)
            except BaseException as error:  # noqa: BLE001  (handed to the job)
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._held -= file.nbytes
                self._changed.notify_all()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error


def _repo_file(out: Path, file: WrittenFile) -> RepoFile:
    return RepoFile(file.name, file.nbytes, file.sha256, out / file.name)
