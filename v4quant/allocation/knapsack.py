"""allocate: one choice for every place, least total loss within a number of bytes.

This is the multiple-choice knapsack problem. Bytes of tensors are multiples of something large (a
row's blocks times all rows of all experts), so after division by the greatest common divisor even
a model of a hundred gigabytes is a knapsack of some ten thousand units, which dynamic programming
over units solves exactly (Kellerer, Pferschy and Pisinger, Knapsack Problems, 2004, section 11.5).
`best[u]` is the least loss of the places so far with at most u units; one numpy line a choice.

Should units be so small that the table would not fit, costs are rounded up to larger ones: the
result still never exceeds the budget, and misses the best by less than a unit a place. The unit
does not depend on the budget, so a larger budget never loses more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from v4quant_kernels.errors import V4QuantError

MOST_CELLS = 50_000_000


class BudgetError(V4QuantError):
    """A budget nothing fits into, or one that cannot be read."""


@dataclass(frozen=True)
class Choice:
    """What a place may become: its bytes, and the loss (>= 0, any unit) it would cost."""

    nbytes: int
    loss: float


def allocate(places: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of each place's choice: least summed loss with at most `budget` bytes in all.

    Of equal losses the smaller is taken. Raises BudgetError naming the smallest possible size.
    """
    extra, unit, units = _in_units(places, budget)
    best, taken = np.zeros(units + 1), []
    for place, own in zip(places, extra, strict=True):
        new = np.full(units + 1, np.inf)
        chosen = np.zeros(units + 1, dtype=np.int8)
        for index, (choice, more) in enumerate(zip(place, own, strict=True)):
            cost = -(-more // unit)
            if cost > units:
                continue
            loss = best[: units + 1 - cost] + choice.loss
            better = loss < new[cost:]
            new[cost:][better] = loss[better]
            chosen[cost:][better] = index
        best = new
        taken.append(chosen)
    return _follow(taken, extra, unit, int(best.argmin()))


def fullest(places: Sequence[Sequence[Choice]], budget: int) -> int:
    """The most bytes, up to the budget, that any choices take together, whatever they lose."""
    extra, unit, units = _in_units(places, budget)
    reached = np.zeros(units + 1, dtype=bool)
    reached[0] = True
    for own in extra:
        new = np.zeros_like(reached)
        for cost in {-(-more // unit) for more in own}:
            if cost <= units:
                new[cost:] |= reached[: units + 1 - cost]
        reached = new
    most = int(np.flatnonzero(reached)[-1]) * unit
    return min(sum(min(c.nbytes for c in place) for place in places) + most, budget)


def _in_units(places: Sequence[Sequence[Choice]], budget: int) -> tuple[list[list[int]], int, int]:
    """Bytes of each choice above its place's smallest; the unit; units there is room for."""
    least = [min(c.nbytes for c in place) for place in places]
    room = budget - sum(least)
    if room < 0:
        raise BudgetError(
            f"a budget of {budget:,} bytes is below the smallest possible, {sum(least):,}"
        )
    extra = [[c.nbytes - low for c in place] for place, low in zip(places, least, strict=True)]
    most = sum(max(e) for e in extra)
    unit = math.gcd(*(e for place in extra for e in place)) or 1
    # The same unit for every budget: were it finer for some, more bytes might lose more.
    unit = max(unit, -(-most * len(places) // MOST_CELLS))
    if room >= most:  # rounded up, all may take a little more than there is room for
        return extra, unit, sum(-(-max(e) // unit) for e in extra)
    return extra, unit, room // unit


def _follow(
    taken: Sequence[np.ndarray], extra: Sequence[Sequence[int]], unit: int, left: int
) -> list[int]:
    """Choices from the last place back to the first."""
    picked = []
    for chosen, own in zip(reversed(taken), reversed(extra), strict=True):
        index = int(chosen[left])
        picked.append(index)
        left -= -(-own[index] // unit)
    return picked[::-1]
