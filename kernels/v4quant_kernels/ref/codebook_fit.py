"""Rounding a sub-block onto a codebook with error feedback, as torch does it.

With U the upper factor of the inverse moments (`v4quant_calibration.rounding.gptq`), errors e of a
group of eight channels cost e S e^T with S = (U_gg^T U_gg)^-1, once everything behind has made up
for them, and move what is behind by -e U_gg^-1 U_g,rest. The cost is joint: a diagonal one gives
up a quarter to a third of what feedback gains. q S q^T depends on a row through its signs alone,
so it is read from a table [group][signs][point]; signs and their opposites share a row.

Signs start as those of the weights. Where an even number of them must be negative and an odd one
is, each of the `FLIPS` cheapest to turn is tried with a search of its own. Where any may be, one or
two are turned as long as the joint cost falls, with a new search after each turn. Grids of four
take two vectors a group: the first one's error moves the second's weights, and signs are counted
over both.

`native.ggml.codebook_fit` does the same a row at a time. It sums in other orders and takes costs
that differ by less than 2^-11 for equal, so the choice may differ where two cost the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from v4quant_kernels.ref.ggml_codebooks import points
from v4quant_kernels.ref.ggml_fields import Codebook

FLIPS = 3
TURNS = 2


@dataclass(frozen=True)
class Weighing:
    """What the errors of sub-blocks cost, for a batch of B and V = `codebook.vector`.

    grid: float32 `[V, points]`, what `q` may be but for signs and shift. factor: `[B, size, size]`,
    upper. inverse: U_gg^-1 `[B, size / 8, 8, 8]`. s: `[B, size / V, V, V]`. carry:
    `[B, size / 8, 4, 4]`, U_aa^-1 U_ab of halves of a group. table: `[B, size / V, rows, points]`,
    a row for each pattern of signs or shift; one row where it makes no difference.
    """

    codebook: Codebook
    grid: Tensor
    factor: Tensor
    inverse: Tensor
    s: Tensor
    carry: Tensor
    table: Tensor


def grid_of(codebook: Codebook, device: torch.device) -> Tensor:
    """float32 `[V, points]`: the numbers `q` of `ggml_codebooks` without signs and shift."""
    scale = 8.0 if codebook.shift else 1.0
    return (points(codebook.grid).float() * scale).mT.contiguous().to(device)


def weigh(factor: Tensor, codebook: Codebook, diagonal: bool = False) -> Weighing:
    """The weighing of sub-blocks under upper factors `[B, size, size]`.

    diagonal: the factors are, so that a point's cost does not depend on its signs.
    """
    vector = codebook.vector
    grid = grid_of(codebook, factor.device)
    inverse = _inverse(_own(factor, 8))
    half = inverse if vector == 8 else _inverse(_own(factor, vector))
    s = half @ half.mT
    eights = _own(factor, 8)
    carry = inverse[..., :4, :4] @ eights[..., :4, 4:]
    return Weighing(codebook, grid, factor, inverse, s, carry, _table(s, grid, codebook, diagonal))


def _own(factor: Tensor, size: int) -> Tensor:
    """Blocks along the diagonal, `[B, n, size, size]`."""
    batch, columns = factor.shape[:2]
    tiled = factor.reshape(batch, columns // size, size, columns // size, size)
    return tiled.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def _inverse(upper: Tensor) -> Tensor:
    eye = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, eye.expand_as(upper), upper=True)
    return inverse


def patterns(codebook: Codebook, diagonal: bool, device: torch.device) -> Tensor:
    """Signs `[rows, V]` whose costs a table has apart: row r turns the signs of its bits."""
    rows = 1 if diagonal else 1 << (codebook.vector - 1)
    bits = torch.arange(rows, device=device).unsqueeze(1) >> torch.arange(
        codebook.vector, device=device
    )
    return 1.0 - 2.0 * (bits & 1).float()


def _table(s: Tensor, grid: Tensor, codebook: Codebook, diagonal: bool) -> Tensor:
    if codebook.shift:
        shifted = torch.stack([grid + 1, grid - 1])  # [2, V, points]
        return torch.einsum("bgij,pic,pjc->bgpc", s, shifted, shifted)
    first, second = torch.triu_indices(*s.shape[-2:], device=s.device)
    signs = patterns(codebook, diagonal, s.device)
    twice = torch.where(first == second, 1.0, 2.0)
    weights = s[..., first, second].unsqueeze(-2) * (signs[:, first] * signs[:, second] * twice)
    return weights @ (grid[first] * grid[second])


@dataclass(frozen=True)
class _Point:
    """Vectors chosen for rows: cost `[B, N]`, q and errors `[B, N, n]`."""

    cost: Tensor
    q: Tensor
    error: Tensor

    def or_better(self, other: _Point) -> _Point:
        """The one of less cost, this one of equals."""
        better = other.cost < self.cost
        wide = better.unsqueeze(2)
        return _Point(
            torch.where(better, other.cost, self.cost),
            torch.where(wide, other.q, self.q),
            torch.where(wide, other.error, self.error),
        )


@dataclass(frozen=True)
class _Search:
    """Searches for one vector of every row: v, S v `[B, N, n]`, v S v and the step `[B, N]`."""

    grid: Tensor
    table: Tensor
    s: Tensor
    v: Tensor
    sv: Tensor
    base: Tensor
    step: Tensor

    def natural(self) -> Tensor:
        """bool `[B, N, n]`: weights that are negative in units of the step."""
        return self.v * self.step.unsqueeze(2) < 0

    def cheapest(self, count: int) -> Tensor:
        """int64 `[B, N, count]`: the weights whose signs cost least to turn."""
        cost = self.s.diagonal(dim1=1, dim2=2).unsqueeze(1) * self.v.square()
        return cost.argsort(dim=2, stable=True)[..., :count]

    def under(self, negative: Tensor) -> _Point:
        """The best point under signs `[B, N, n]`."""
        sign = 1.0 - 2.0 * negative.float()
        n = negative.shape[2]
        row = torch.zeros_like(self.base, dtype=torch.int64)
        if self.table.shape[1] > 1:
            digits = torch.arange(n, device=row.device)
            mask = (negative.long() << digits).sum(2)
            top = 1 << (n - 1)
            row = torch.where(mask >= top, 2 * top - 1 - mask, mask)
        u = 2 * self.step.unsqueeze(2) * sign * self.sv
        known = self.table[torch.arange(len(row), device=row.device).unsqueeze(1), row]
        costs = known * self.step.square().unsqueeze(2) - u @ self.grid
        least, index = costs.min(2)
        q = sign * self.grid.mT[index]
        return _Point(self.base + least, q, self.v - self.step.unsqueeze(2) * q)

    def turned(self, point: _Point) -> _Point:
        """Signs turned, one or two at a time, while that lowers the cost."""
        for _ in range(TURNS):
            turn = self._best_turn(point)
            tried = self.under((point.q < 0) ^ turn)
            tried = _Point(tried.cost.masked_fill(~turn.any(2), torch.inf), tried.q, tried.error)
            point = point.or_better(tried)
        return point

    def _best_turn(self, point: _Point) -> Tensor:
        """bool `[B, N, n]`: the signs whose turning gains most, none where none does."""
        gradient = point.error @ self.s
        move = 2 * self.step.unsqueeze(2) * point.q
        own = self.s.diagonal(dim1=1, dim2=2).unsqueeze(1)
        gain = move * (2 * gradient + move * own)
        both = gain.unsqueeze(3) + gain.unsqueeze(2)
        both = both + 2 * move.unsqueeze(3) * move.unsqueeze(2) * self.s.unsqueeze(1)
        n = gain.shape[2]
        eye = torch.eye(n, dtype=torch.bool, device=gain.device)
        both = torch.where(eye, gain.unsqueeze(3).expand_as(both), both)
        least, index = both.flatten(2).min(2)
        worth = least < -1e-5 * (gradient * point.error).sum(2)
        first, second = index.div(n, rounding_mode="floor"), index % n
        chosen = torch.arange(n, device=index.device)
        turn = (chosen == first.unsqueeze(2)) | (chosen == second.unsqueeze(2))
        return turn & worth.unsqueeze(2)


def _search(weighing: Weighing, place: int, v: Tensor, step: Tensor) -> _Search:
    s = weighing.s[:, place]
    sv = v @ s
    return _Search(weighing.grid, weighing.table[:, place], s, v, sv, (sv * v).sum(2), step)


def _flipped(search: _Search, negative: Tensor, count: int) -> _Point:
    """The best point with one of the signs turned."""
    order = search.cheapest(count)
    chosen = torch.arange(negative.shape[2], device=order.device)
    best = search.under(negative ^ (chosen == order[..., :1]))
    for k in range(1, count):
        best = best.or_better(search.under(negative ^ (chosen == order[..., k : k + 1])))
    return best


def _where(mask: Tensor, one: _Point, other: _Point) -> _Point:
    wide = mask.unsqueeze(2)
    return _Point(
        torch.where(mask, one.cost, other.cost),
        torch.where(wide, one.q, other.q),
        torch.where(wide, one.error, other.error),
    )


def _eight(weighing: Weighing, group: int, v: Tensor, step: Tensor) -> _Point:
    search = _search(weighing, group, v, step)
    negative = search.natural()
    point = search.under(negative)
    if weighing.codebook.signs == "free":
        return search.turned(point)
    odd = negative.sum(2) % 2 == 1
    return _where(odd, _flipped(search, negative, FLIPS), point)


def _fours(weighing: Weighing, group: int, v: Tensor, step: Tensor) -> _Point:
    first = _search(weighing, 2 * group, v[..., :4], step)
    negative = first.natural()
    natural = first.under(negative)
    if weighing.codebook.signs == "free":
        return _second(weighing, group, v, step, first.turned(natural), FLIPS)[0]
    best, odd = _second(weighing, group, v, step, natural, FLIPS)
    chosen = torch.arange(4, device=v.device)
    for index in first.cheapest(FLIPS).unbind(2):
        start = first.under(negative ^ (chosen == index.unsqueeze(2)))
        tried, _ = _second(weighing, group, v, step, start, 1)
        best = _where(odd, best.or_better(tried), best)
    return best


def _second(
    weighing: Weighing, group: int, v: Tensor, step: Tensor, first: _Point, flips: int
) -> tuple[_Point, Tensor]:
    """The group with this first half, and whether its signs were odd before a turn."""
    moved = v[..., 4:] - first.error @ weighing.carry[:, group]
    search = _search(weighing, 2 * group + 1, moved, step)
    negative = search.natural()
    point = search.under(negative)
    odd = ((first.q < 0).sum(2) + negative.sum(2)) % 2 == 1
    if weighing.codebook.signs == "free":
        point = search.turned(point)
    else:
        point = _where(odd, _flipped(search, negative, flips), point)
    error = v[..., 4:] - step.unsqueeze(2) * point.q
    q = torch.cat([first.q, point.q], 2)
    return _Point(first.cost + point.cost, q, torch.cat([first.error, error], 2)), odd


def _shifted(weighing: Weighing, group: int, v: Tensor, step: Tensor, shift: int | None) -> _Point:
    """A grid of its own signs, plus one (shift 0), minus one (1) or the better of both (None)."""
    if shift is None:
        up, down = (_shifted(weighing, group, v, step, s) for s in (0, 1))
        return up.or_better(down)
    search = _search(weighing, group, v, step)
    grid = weighing.grid + (1 - 2 * shift)
    u = 2 * step.unsqueeze(2) * search.sv
    costs = search.table[:, shift].unsqueeze(1) * step.square().unsqueeze(2) - u @ grid
    least, index = costs.min(2)
    q = grid.mT[index]
    return _Point(search.base + least, q, v - step.unsqueeze(2) * q)


def bounds(values: Tensor, bound: Tensor | None) -> Tensor:
    """`[B, N]` of one's own: the costs below which a fit of values `[B, size, N]` is wanted."""
    if bound is not None:
        return bound.clone()
    return values.new_full((values.shape[0], values.shape[2]), torch.inf)


def fit(
    values: Tensor, weighing: Weighing, step: Tensor, bound: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round values `[B, size, N]` to the best of steps `[B, steps, N]`.

    Returns the step chosen, int64 `[B, N]`; q and the errors over the pivots, `[B, size, N]`; what
    it costs, `[B, N]`. The first of equals wins. Rows that no step serves for less than `bound`
    have infinite cost, and 0 for the rest.
    """
    cost = bounds(values, bound)
    served = torch.zeros_like(cost, dtype=torch.bool)
    choice = torch.zeros_like(cost, dtype=torch.int64)
    q, errors = torch.zeros_like(values), torch.zeros_like(values)
    shared = weighing.codebook.shift > 8
    for k, shift in product(range(step.shape[1]), (0, 1) if shared else (None,)):
        codes, missed = _coded(values, weighing, step[:, k], shift)
        total = missed.square().sum(1)
        better = total < cost
        served |= better
        cost = torch.where(better, total, cost)
        choice = choice.masked_fill(better, k)
        wide = better.unsqueeze(1)
        q, errors = torch.where(wide, codes, q), torch.where(wide, missed, errors)
    return choice, q, errors, cost.masked_fill(~served, torch.inf)


def _coded(
    values: Tensor, weighing: Weighing, step: Tensor, shift: int | None
) -> tuple[Tensor, Tensor]:
    """q and errors over the pivots of all groups in turn under one step `[B, N]`."""
    work = values.mT.clone()
    codes, missed = torch.empty_like(work), torch.empty_like(work)
    for group in range(values.shape[1] // 8):
        place = slice(8 * group, 8 * group + 8)
        v = work[..., place]
        if weighing.codebook.shift:
            point = _shifted(weighing, group, v, step, shift)
        elif weighing.codebook.vector == 8:
            point = _eight(weighing, group, v, step)
        else:
            point = _fours(weighing, group, v, step)
        codes[..., place] = point.q
        missed[..., place] = point.error @ weighing.inverse[:, group]
        rest = weighing.factor[:, place, place.stop :]
        work[..., place.stop :] -= missed[..., place] @ rest
    return codes.mT, missed.mT
