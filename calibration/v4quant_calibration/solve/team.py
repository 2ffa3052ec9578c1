"""team: the processes that solve one checkpoint together, on one machine or several.

Every rank streams its own part of the text, whole windows in order. When a layer's inputs are
there, rows and routing of all ranks are laid end to end in the text's order on every rank, so each
expert is solved on exactly the rows that one process would have; and experts are divided. What a
rank has solved goes to a file of its own in the solution's folder, which all must see, and the
first rank joins these into the stage's file. A file that is there is not solved again, so running
the same command once more, with any number of ranks, makes up for one that died.

Codes can differ from one process's in what is nearly a tie: a product of matrices rounds
differently when it has other numbers of rows, and sums over all tokens of a dense matrix's moments
are taken rank by rank.

Tensors travel by torch.distributed's default group (gloo for the CPU's, nccl for GPUs') as bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from v4quant_kernels.errors import V4QuantError

T = TypeVar("T")

_PIECE = 1 << 28  # bytes broadcast at a time


class TeamLost(V4QuantError):
    """Another process of the team is gone."""


@contextmanager
def _together() -> Iterator[None]:
    """What the library says of a connection that broke, in one line."""
    try:
        yield
    except RuntimeError as error:
        first = (re.sub(r"^\[\S+\] ", "", str(error)).splitlines() or [type(error).__name__])[0]
        raise TeamLost(
            f"another process of this run is gone ({first[:200]}); the same command, with any "
            "number of processes, goes on"
        ) from None


@dataclass(frozen=True)
class Team:
    """This process's place among `size`; alone where there is only one."""

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this rank joins what all have made."""
        return self.rank == 0

    def windows(self, all_windows: Sequence[Tensor]) -> list[Tensor]:
        """This rank's windows: consecutive ones, about an equal share of the tokens.

        Every rank gets one at least where there are as many windows as ranks.
        """
        total, taken, cut = sum(map(len, all_windows)), 0, [0]
        for index, ids in enumerate(all_windows):
            left = len(all_windows) - index
            if len(cut) < self.size and index > cut[-1]:
                due = taken + len(ids) / 2 >= total * len(cut) / self.size
                if due or left <= self.size - len(cut):
                    cut.append(index)
            taken += len(ids)
        cut += [len(all_windows)] * (self.size + 1 - len(cut))
        return list(all_windows[cut[self.rank] : cut[self.rank + 1]])

    def share(self, things: Sequence[T]) -> list[T]:
        """What of a sequence this rank does: every size-th."""
        return list(things[self.rank :: self.size])

    def gather(self, rows: Tensor) -> Tensor:
        """Rows `[n, ...]` of all ranks, end to end by rank; on every rank."""
        if self.size == 1:
            return rows
        counts = torch.zeros(self.size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = rows.shape[0]
        with _together():
            dist.all_reduce(counts)
        ends = counts.cumsum(0).tolist()
        whole = rows.new_empty(ends[-1], *rows.shape[1:])
        for rank, end in enumerate(ends):
            part = whole[end - int(counts[rank]) : end]
            if rank == self.rank:
                part.copy_(rows)
            for piece in part.view(-1).view(torch.uint8).split(_PIECE):
                with _together():
                    dist.broadcast(piece, rank)
        return whole

    def total(self, values: Tensor) -> Tensor:
        """The sum of equal-shaped tensors over all ranks, on every rank."""
        if self.size > 1:
            values = values.contiguous()
            with _together():
                dist.all_reduce(values)
        return values

    def largest(self, values: Tensor) -> Tensor:
        """The element-wise largest of all ranks, on every rank."""
        if self.size > 1:
            with _together():
                dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def tell(self, said: T) -> T:
        """What the first rank says, on every rank."""
        if self.size == 1:
            return said
        box = [said]
        with _together():
            dist.broadcast_object_list(box, 0)
        return box[0]

    def agree(self, yes: bool) -> bool:
        """Whether the first rank says so."""
        return self.tell(yes)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            with _together():
                dist.barrier()


ALONE = Team()
