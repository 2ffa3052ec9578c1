"""allocate: the least loss within a budget, against trying everything."""

from __future__ import annotations

import itertools
import random
import secrets

import pytest

from v4quant.allocation import knapsack as module
from v4quant.allocation.knapsack import BudgetError, Choice, allocate, fullest


def _totals(places: list[list[Choice]], picked: tuple[int, ...] | list[int]) -> tuple[float, int]:
    chosen = [place[i] for place, i in zip(places, picked, strict=True)]
    return sum(c.loss for c in chosen), sum(c.nbytes for c in chosen)


def _problem(rng: random.Random, unit: int) -> tuple[list[list[Choice]], int]:
    places = [
        [Choice(rng.randint(0, 30) * unit, rng.random()) for _ in range(rng.randint(1, 4))]
        for _ in range(rng.randint(1, 6))
    ]
    least = sum(min(c.nbytes for c in place) for place in places)
    most = sum(max(c.nbytes for c in place) for place in places)
    return places, rng.randint(least, most + unit)


@pytest.mark.parametrize("unit", [1, 344_064])
def test_as_good_as_every_combination(unit: int) -> None:
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    for _ in range(60):
        places, budget = _problem(rng, unit)
        loss, nbytes = _totals(places, allocate(places, budget))
        tried = [
            _totals(places, picked)
            for picked in itertools.product(*(range(len(p)) for p in places))
        ]
        best = min(found for found in tried if found[1] <= budget)
        assert nbytes <= budget, seed
        assert loss == pytest.approx(best[0], rel=1e-12), seed
        assert fullest(places, budget) == max(n for _, n in tried if n <= budget), seed


def test_coarse_units_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that would be too large: costs are rounded up, never down."""
    monkeypatch.setattr(module, "MOST_CELLS", 100)
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    for _ in range(60):
        places, budget = _problem(rng, 997)
        assert _totals(places, allocate(places, budget))[1] <= budget, seed


@pytest.mark.parametrize("cells", [module.MOST_CELLS, 100])
def test_a_larger_budget_never_loses_more(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the unit: were it finer for smaller budgets, more bytes might lose more."""
    monkeypatch.setattr(module, "MOST_CELLS", cells)
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    for _ in range(20):
        places, _ = _problem(rng, 997)
        least = sum(min(c.nbytes for c in place) for place in places)
        most = sum(max(c.nbytes for c in place) for place in places)
        budgets = sorted(rng.randint(least, most) for _ in range(20))
        lost = [
            _totals(places, allocate(places, b))[0] for b in (least, *budgets, most, most + 500)
        ]
        assert lost == sorted(lost, reverse=True), seed
        assert lost[-1] == pytest.approx(sum(min(c.loss for c in place) for place in places)), seed


def test_needless_bytes_are_not_spent() -> None:
    assert allocate([[Choice(1, 0.5), Choice(2, 0.0), Choice(3, 0.0)]], 10) == [1]
    assert allocate([[Choice(5, 0.0)]], 5) == [0]


def test_a_budget_below_all_names_the_smallest() -> None:
    with pytest.raises(BudgetError, match=r"9 bytes is below the smallest possible, 1,010"):
        allocate([[Choice(10, 0.0), Choice(20, 0.0)], [Choice(1000, 0.0)]], 9)


def test_at_the_size_of_a_release() -> None:
    """43 layers of Flash's experts in three schemes: within half a percent of the budget."""
    seed = secrets.randbits(32)
    rng = random.Random(seed)
    weights = 256 * 4096 * 2048
    schemes = [(4.25, 0.0), (3.4375, 0.03), (2.625, 0.1)]
    places = []
    for matrices in [2, 1] * 43:
        effect = rng.lognormvariate(0, 1) * matrices
        places.append(
            [Choice(int(weights * matrices * bits / 8), effect * e) for bits, e in schemes]
        )
    for bits in (2.7, 3.2, 4.0):
        budget = int(weights * 3 * 43 * bits / 8)
        nbytes = _totals(places, allocate(places, budget))[1]
        assert 0.995 * budget < nbytes <= budget, (seed, bits)
