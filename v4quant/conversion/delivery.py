"""Delivery: where finished shards go.

A conversion into a folder leaves them where they are written. A conversion to the hub sends each as
soon as it is journaled and deletes it here, so that a small disk takes a large model
(`v4quant.publishing.hub_delivery`). The job knows only this interface, and one way of working.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.manifest import MANIFEST_NAME, read_manifest
from v4quant_formats.shards import WrittenFile


class Delivery(Protocol):
    """What the job asks of a destination.

    reads_again: whether finished shards are read here once more, from the page cache if they can.
    """

    reads_again: bool

    def manifest(self, out: Path) -> dict[str, Any] | None:
        """The manifest of a whole checkpoint at the destination, if one is there."""

    def has(self, file: WrittenFile) -> bool:
        """Whether a shard that is not in the output folder needs no more work."""

    def space(self, sizes: Sequence[int]) -> int:
        """Bytes of disk that shards of these sizes will take at one time."""

    def has_room(self, nbytes: int) -> bool:
        """Whether another shard may be written now."""

    def make_room(self, nbytes: int) -> None:
        """Wait until another shard may be written, and count it."""

    def take(self, file: WrittenFile) -> None:
        """A shard lies whole in the output folder, counted before."""

    def settle(self) -> None:
        """Wait until every shard that was taken is where it belongs."""

    def check(self) -> None:
        """Raise what failed in the background."""

    def look(self) -> None:
        """Ask the destination again what it has: other ranks delivered, too."""

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """All shards are taken and every other file of the checkpoint is in `out`."""

    def stop(self) -> None:
        """The job failed: end what runs in the background."""


class LocalDelivery:
    """The output folder is the destination."""

    reads_again = False

    def manifest(self, out: Path) -> dict[str, Any] | None:
        """The folder's own, when its index, if it has one, says that it is whole."""
        if not (out / MANIFEST_NAME).exists():
            return None
        found = read_manifest(out)
        indexed = any(f["name"] == INDEX_NAME for f in found["files"])
        return found if (out / INDEX_NAME).exists() or not indexed else None

    def has(self, file: WrittenFile) -> bool:
        """False: shards are in the folder only."""
        return False

    def space(self, sizes: Sequence[int]) -> int:
        """The shards stay, so the disk needs room for every one."""
        return sum(sizes)

    def has_room(self, nbytes: int) -> bool:
        """True: space was checked before the work began."""
        return True

    def make_room(self, nbytes: int) -> None:
        """Return at once: no shard leaves the folder."""

    def take(self, file: WrittenFile) -> None:
        """Leave the file where it is."""

    def settle(self) -> None:
        """Return at once."""

    def check(self) -> None:
        """Return: nothing runs in the background."""

    def look(self) -> None:
        """Return: shards are in the folder only."""

    def finish(self, out: Path, manifest: dict[str, Any]) -> None:
        """Do nothing more: the index has been written."""

    def stop(self) -> None:
        """Do nothing: no thread runs."""
