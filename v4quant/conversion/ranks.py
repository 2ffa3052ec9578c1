"""Ranks: several processes (torchrun) carrying out one plan on one shared folder.

Shards are divided by bytes, largest first to the least loaded rank, so every rank computes the same
division without talking. Ranks meet before they write, so that rank 0 has checked and locked the
folder; and after, so that rank 0 finds every shard in place when it writes the index. What else
they tell each other is little (board.py). A rank that dies takes the group down; running the same
command again, with any number of ranks, makes up for it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar, cast

from torch.distributed.rendezvous import rendezvous

from v4quant.conversion.board import Board
from v4quant.conversion.units import ShardPlan

_STORE_PATIENCE = timedelta(seconds=90)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """This process's place among `size` processes; `run` is theirs and no other run's.

    on_machine: how many of them share this machine and its disk. board: None for a single process.
    """

    rank: int = 0
    size: int = 1
    run: str = field(default_factory=lambda: secrets.token_hex(8))
    on_machine: int = 1
    board: Board | None = None

    @property
    def is_first(self) -> bool:
        """Whether this rank checks, locks, prints and finishes."""
        return self.rank == 0

    def barrier(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank is here; check() is called meanwhile.

        Raises RankLost, and what check raises.
        """
        if self.board is not None:
            self.board.meet(check)

    def check(self) -> None:
        """Raise RankLost when another rank has failed or cannot be reached."""
        if self.board is not None:
            self.board.check()

    def first_then_others(self, action: Callable[[], Result]) -> Result:
        """Do something on rank 0, and when that is done on the others."""
        if not self.is_first:
            self.barrier()
            return action()
        result = action()
        self.barrier()
        return result

    def agree(self, topic: str, value: str | None) -> str:
        """What rank 0 says of a topic, which is for this one use; the others give None."""
        if self.board is None or value is not None:
            if self.board is not None:
                self.board.tell(topic, value or "")
            return value or ""
        return self.board.wait_told(topic)

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
def current_ranks() -> Iterator[Ranks]:
    """The ranks torchrun started (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE), or a single one."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    store, rank, size = _store()
    with Board(store, rank, size) as board:
        run = Ranks(rank, size, board=board).agree("run", None if rank else secrets.token_hex(8))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        yield Ranks(rank, size, run, max(1, min(here, size)), board)


def _store() -> tuple[Any, int, int]:
    """The store of torchrun (or of rank 0, where the variables were set by hand); rank and size."""
    found = next(iter(rendezvous("env://", timeout=_STORE_PATIENCE)))
    return cast(tuple[Any, int, int], found)
