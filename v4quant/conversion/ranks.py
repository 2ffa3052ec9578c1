"""Ranks: several processes (torchrun) carrying out one plan on one shared folder.

Shards are divided by bytes, largest first to the least loaded rank, so every rank computes the same
division without talking. Ranks meet only at barriers (gloo): before they write, so that rank 0 has
checked and locked the folder; and after, so that rank 0 finds every shard in place when it writes
the index. A rank that dies takes the group down; running the same command again, with any number of
ranks, makes up for it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch.distributed as dist

from v4quant.conversion.units import ShardPlan

# The slowest rank may work for hours after the fastest is done.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` processes; `run` is theirs and no other run's."""

    rank: int = 0
    size: int = 1
    run: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def is_first(self) -> bool:
        """Whether this rank checks, locks, prints and finishes."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.barrier()

    def share(self, shards: Sequence[ShardPlan]) -> list[ShardPlan]:
        """The shards this rank writes, in plan order."""
        load = [0] * self.size
        mine = set()
        for shard in sorted(shards, key=lambda s: (-s.nbytes, s.file)):
            target = min(range(self.size), key=lambda r: (load[r], r))
            load[target] += shard.nbytes
            if target == self.rank:
                mine.add(shard.file)
        return [s for s in shards if s.file in mine]


@contextmanager
def current_ranks(backend: str = "gloo") -> Iterator[Ranks]:
    """The ranks torchrun started (RANK, WORLD_SIZE), or a single one.

    backend: torch.distributed's, for what travels between them.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        run = [secrets.token_hex(8)]
        dist.broadcast_object_list(run, 0)
        yield Ranks(dist.get_rank(), size, run[0])
    finally:
        dist.destroy_process_group()
