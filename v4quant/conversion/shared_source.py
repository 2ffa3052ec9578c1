"""SharedSource: the source's shards, read by one or several conversions, given back by the last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from v4quant.conversion.units import ShardPlan, Unit
from v4quant_formats.shard_files import ShardFiles

_OFTEN = 1.5  # readings of a tensor, on average, from which on the page cache pays


class SharedSource:
    """Counts who still needs a shard, and a tensor, of the source. For one thread."""

    def __init__(self, files: ShardFiles, shards: Sequence[ShardPlan]) -> None:
        """shards: of all conversions that read `files`, those that are still to be written."""
        self._files = files
        self._shards = Counter(file for shard in shards for file in shard.source_files)
        self._tensors = Counter(
            part.name
            for shard in shards
            for unit in shard.units
            for stored in unit.sources
            for part in stored.parts.values()
        )

    def expect(self) -> None:
        """Say in which order shards will be needed first."""
        readings, tensors = sum(self._tensors.values()), len(self._tensors)
        self._files.expect(list(self._shards), once=readings < _OFTEN * tensors)

    def acquire(self, shard: ShardPlan) -> None:
        """Wait until what a shard of the output is made of can be read."""
        self._files.acquire(shard.source_files)

    def read(self, unit: Unit) -> None:
        """A unit is converted: give up the tensors that no other one needs."""
        for part in (p for stored in unit.sources for p in stored.parts.values()):
            self._tensors[part.name] -= 1
            if not self._tensors[part.name] and not part.stride:
                self._files.spent(part.file, part.offset, part.nbytes)

    def leave(self, shard: ShardPlan) -> None:
        """A shard of the output is computed: give back what no other one needs."""
        for file in shard.source_files:
            self._shards[file] -= 1
            if not self._shards[file]:
                self._files.release(file)
