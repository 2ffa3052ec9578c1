"""descent: sweeps over codes, row by row as long as they pay, that leave no row worse.

What `refine` (integers) and `block_refine` (GGUF's blocks) have in common. Rows do not touch each
other: each stops for itself when a sweep gains it next to nothing, and later sweeps see few of
them. A row whose gains are within reach of float32's rounding is compared with its first codes in
float64 and keeps those if they were better: the error never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.rounding.fieldwise import C, choose, differing_rows, each, put
from v4quant_kernels import dispatch

DEFAULT_SWEEPS = 12
ENOUGH = 2e-3
"""A sweep that lowers an error by less than this share of it is the last."""

# Gains are surely gains when they are this share of the error.
_CLEAR = 1e-3
# Rows go on in this part of all or multiples of it, filled up with rows that had stopped.
_PARTS = 32
# Channels whose pull is formed in one product: large enough for that to be a fast one.
_SPAN = 512


@dataclass(frozen=True)
class Some:
    """Some rows (int64 `[m, n]`) of some members (int64 `[m]`) of a batch; or all of all."""

    members: Tensor
    rows: Tensor
    whole: bool

    def take(self, values: Tensor) -> Tensor:
        """The rows of values `[B, N]` or `[B, K, N]`: themselves, not a copy, where all."""
        if self.whole:
            return values
        pairs = zip(self.members.tolist(), self.rows, strict=True)
        return torch.stack([values[i].index_select(-1, rows) for i, rows in pairs])

    def of(self, values: Tensor) -> Tensor:
        """What belongs to the members, of values `[B, ...]` that are the same for all rows."""
        return values if self.whole else values[self.members]

    def put(self, values: Tensor, new: Tensor) -> None:
        """Store the rows' new values."""
        if self.whole:
            values.copy_(new)
            return
        for i, rows, one in zip(self.members.tolist(), self.rows, new, strict=True):
            values[i].index_copy_(-1, rows, one)


Step = Callable[[Some, Tensor, C], tuple[Tensor, Tensor]]
"""A sweep over some rows' codes, in place, towards their target `[m, K, n]`: what every row gained,
and its error before, `[m, n]` both."""


def descend(
    target: Tensor,
    gram: Tensor,
    start: C,
    step: Step[C],
    values: Callable[[C], Tensor],
    sweeps: int,
) -> C:
    """Codes no worse than `start` for target `[B, K, N]` under moments `gram` (`[B, K, K]`).

    Codes are a dataclass of tensors `[B, ..., N]`; `values` says what they stand for, `[B, K, N]`.
    Arguments are left unchanged.
    """
    codes = each(start, torch.clone)
    gained, error = target.new_zeros(2, target.shape[0], target.shape[2])
    active = torch.ones_like(gained, dtype=torch.bool)
    for sweep in range(sweeps):
        for some in _still_moving(active):
            part = each(codes, some.take)
            gain, present = step(some, some.take(target), part)
            put(some.put, codes, part)
            some.put(active, gain > ENOUGH * present)
            some.put(gained, some.take(gained) + gain)
            if sweep == 0:
                error = present
    return _never_worse(target, gram, codes, start, values, gained > _CLEAR * error)


def spans(columns: int, group: int) -> Iterator[tuple[slice, list[slice]]]:
    """Channels whose pull is formed in one product, with the groups of channels in them."""
    wide = max(_SPAN // group, 1) * group
    for first in range(0, columns, wide):
        last = min(first + wide, columns)
        yield (
            slice(first, last),
            [slice(start, start + group) for start in range(first, last, group)],
        )


def row_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """e H e^T of every row e of float32 `[B, K, N]`, float64 `[B, N]`, one matrix at a time."""
    found = []
    for error, moments in zip(errors, gram, strict=True):
        wide = error.double()
        found.append((moments.double() @ wide).mul_(wide).sum(0))
    return torch.stack(found)


def rough_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """As `row_errors`, in float32 at half the cost: some five digits."""
    return dispatch.float32_product(gram, errors).mul_(errors).sum(1)


def _still_moving(active: Tensor) -> Iterator[Some]:
    """The rows worth another sweep, those of members with equally many together.

    How many rows of a member go on depends on this member alone, and so do its codes.
    """
    total = active.shape[1]
    step = -(-total // _PARTS)
    widths = [min(-(-count // step) * step, total) for count in active.sum(1).tolist()]
    order = active.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    for width in sorted(set(widths) - {0}):
        chosen = [i for i, w in enumerate(widths) if w == width]
        members = torch.tensor(chosen, device=active.device)
        whole = width == total and len(chosen) == len(active)
        yield Some(members, order[members, :width], whole)


def _never_worse(
    target: Tensor,
    gram: Tensor,
    codes: C,
    start: C,
    values: Callable[[C], Tensor],
    clear: Tensor,
) -> C:
    """`codes`, but those of `start` in rows (not `clear`, `[B, N]`) where these have less error."""
    doubtful = differing_rows(codes, start) & ~clear
    better = torch.ones_like(doubtful)
    for index in doubtful.any(1).nonzero()[:, 0].tolist():
        rows = doubtful[index].nonzero()[:, 0]
        one = slice(index, index + 1)

        def few(values: Tensor, one: slice = one, rows: Tensor = rows) -> Tensor:
            return values[one, :, rows]

        new, old = (
            row_errors(few(target) - values(each(c, few)), gram[one]) for c in (codes, start)
        )
        better[index, rows] = (new <= old)[0]
    return choose(better, codes, start)
