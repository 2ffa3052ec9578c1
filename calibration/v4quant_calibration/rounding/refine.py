"""refine: coordinate descent on codes and scales, after GPTQ, until nothing gets better.

GPTQ never comes back to a channel. Refinement does: with all other codes fixed, the error
(t - s q) H (t - s q)^T of a row is a parabola in any one code and in any one scale, so each has a
best value in closed form: the nearest integer to q_i + (r H)_i / (s H_ii), and the nearest
bfloat16 to s + (q . r H) / (q H q) over the group, where r is the row's remaining error. No step
can raise the error. (The code step is that of QuantEase, arXiv 2309.01885; scale steps between
code steps are the usual alternating least squares.)

Nearly all the work is the pull r H, K^2 multiplications a row and sweep. It is formed for a few
groups when their turn comes, so nothing is carried along that could drift, and what a group's
change c gains is known exactly: c . (pull before + pull after). Rows do not touch each other:
each stops for itself when a sweep gains it next to nothing, and later sweeps see few of them. A
row whose gains are within reach of float32's rounding is compared with its first codes in float64
and keeps those if they were better: the error never rises.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.rounding.gptq import Codes, Grid
from v4quant_kernels import dispatch
from v4quant_kernels.ref.intq import storable_scale

DEFAULT_SWEEPS = 12
ENOUGH = 2e-3
"""A sweep that lowers an error by less than this share of it is the last."""

# Gains are surely gains when they are this share of the error.
_CLEAR = 1e-3
# Rows go on in this part of all or multiples of it, filled up with rows that had stopped.
_PARTS = 32
# Channels whose pull is formed in one product: large enough for that to be a fast one.
_SPAN = 512


def refine(
    target: Tensor, gram: Tensor, start: Codes, grid: Grid, sweeps: int = DEFAULT_SWEEPS
) -> Codes:
    """Better codes for target `[B, K, N]` under moments `gram` (`[B, K, K]`), from `start`.

    The Gram-weighted error of no row rises. Arguments are left unchanged.
    """
    codes = Codes(start.integers.clone(), start.scale.clone())
    batch, _, rows = target.shape
    gained, error = target.new_zeros(2, batch, rows)
    active = torch.ones_like(gained, dtype=torch.bool)
    for sweep in range(sweeps):
        for some in _still_moving(active):
            part = Codes(some.take(codes.integers), some.take(codes.scale))
            moments = gram if some.whole else gram[some.members]
            gain, present = _sweep(some.take(target), moments, part, grid)
            some.put(codes.integers, part.integers)
            some.put(codes.scale, part.scale)
            some.put(active, gain > ENOUGH * present)
            some.put(gained, some.take(gained) + gain)
            if sweep == 0:
                error = present
    return _never_worse(target, gram, codes, start, grid, gained > _CLEAR * error)


@dataclass(frozen=True)
class _Some:
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

    def put(self, values: Tensor, new: Tensor) -> None:
        """Store the rows' new values."""
        if self.whole:
            values.copy_(new)
            return
        for i, rows, one in zip(self.members.tolist(), self.rows, new, strict=True):
            values[i].index_copy_(-1, rows, one)


def _still_moving(active: Tensor) -> Iterator[_Some]:
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
        yield _Some(members, order[members, :width], whole)


def _never_worse(
    target: Tensor, gram: Tensor, codes: Codes, start: Codes, grid: Grid, clear: Tensor
) -> Codes:
    """`codes`, but those of `start` in rows (not `clear`, `[B, N]`) where these have less error."""
    moved = (codes.integers != start.integers).any(1) | (codes.scale != start.scale).any(1)
    doubtful = moved & ~clear
    better = torch.ones_like(doubtful)
    for index in doubtful.any(1).nonzero()[:, 0].tolist():
        rows = doubtful[index].nonzero()[:, 0]
        one = slice(index, index + 1)
        new, old = (
            gram_error(
                target[one, :, rows],
                gram[one],
                Codes(c.integers[one, :, rows], c.scale[one, :, rows]),
                grid,
            )
            for c in (codes, start)
        )
        better[index, rows] = (new <= old)[0]
    return choose(better, codes, start)


def choose(mask: Tensor, codes: Codes, others: Codes) -> Codes:
    """`codes` in the rows where mask (`[B, N]`) holds, `others` elsewhere."""
    where = mask.unsqueeze(1)
    return Codes(
        torch.where(where, codes.integers, others.integers),
        torch.where(where, codes.scale, others.scale),
    )


def gram_error(target: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> Tensor:
    """As `row_errors`, of codes."""
    return row_errors(target - codes.values(grid.group), gram)


def row_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """e H e^T of every row e of float32 `[B, K, N]`, float64 `[B, N]`, one matrix at a time."""
    found = []
    for error, moments in zip(errors, gram, strict=True):
        wide = error.double()
        found.append((moments.double() @ wide).mul_(wide).sum(0))
    return torch.stack(found)


def rough_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """As `row_errors`, in float32 at half the cost: some five digits."""
    return (gram @ errors).mul_(errors).sum(1)


def _sweep(goal: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> tuple[Tensor, Tensor]:
    """One pass over all groups: the codes of a group in turn, then its scale. In place.

    Returns what every row gained, and its error as the groups found it, `[B, N]` both.
    """
    left = goal - codes.values(grid.group)
    gained, error = torch.zeros_like(goal[:, 0]), torch.zeros_like(goal[:, 0])
    columns = goal.shape[1]
    wide = max(_SPAN // grid.group, 1) * grid.group
    for start in range(0, columns, grid.group):
        part, inside = slice(start, start + grid.group), start % wide
        if not inside:
            span = slice(start, min(start + wide, columns))
            pulls = dispatch.float32_product(gram[:, span], left)
        before = left[:, part].clone()
        own = pulls[:, inside : inside + grid.group]
        error += (before * own).sum(1)
        first = own.clone()
        _group_steps(goal[:, part], before, own, gram[:, part, part], codes, part, grid)
        left[:, part] = goal[:, part] - _values(codes, part, grid)
        change = before.sub_(left[:, part])
        gained += first.add_(own).mul_(change).sum(1)
        if part.stop < span.stop:
            rest = pulls[:, inside + grid.group :]
            rest.baddbmm_(gram[:, part.stop : span.stop, part], change, alpha=-1)
    return gained, error


def _group_steps(
    goal: Tensor, left: Tensor, pull: Tensor, gram: Tensor, codes: Codes, part: slice, grid: Grid
) -> None:
    """The codes and the scale of one group to their best values; keeps its `pull` right.

    goal, left, pull: `[B, group, N]`, left the errors that the pull belongs to.
    """
    scale = codes.scale[:, part.start // grid.group]
    integers = codes.integers[:, part]
    dispatch.code_steps(pull.clone(), scale, gram, grid.low, grid.high, integers)
    moved = left - goal + _values(codes, part, grid)
    pull.baddbmm_(gram, moved, alpha=-1)
    _scale_step(pull, gram, codes, part, grid)


def _values(codes: Codes, part: slice, grid: Grid) -> Tensor:
    return codes.integers[:, part] * codes.scale[:, part.start // grid.group].unsqueeze(1)


def _scale_step(pull: Tensor, gram: Tensor, codes: Codes, part: slice, grid: Grid) -> None:
    """A group's scale to its best bfloat16 value; a group of zero codes keeps its scale.

    Keeps the group's pull right.
    """
    index = part.start // grid.group
    integers, scale = codes.integers[:, part], codes.scale[:, index]
    curve = gram @ integers
    steepness = (curve * integers).sum(1)
    best = scale + (integers * pull).sum(1) / steepness.clamp_min(torch.finfo(curve.dtype).tiny)
    stored = storable_scale(best.abs()).float().copysign(best)
    new = torch.where((steepness > 0) & torch.isfinite(best), stored, scale)
    codes.scale[:, index] = new
    pull.sub_(curve.mul_((new - scale).unsqueeze(1)))
