"""The verdict: planted damage of several shapes is seen, another rounding is not called damage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from v4quant_calibration.evaluation.verdict import Verdict, beyond_worst, judge, signed_rank

TOKENS = 256


def rounding(generator: torch.Generator, windows: int) -> tuple[Tensor, Tensor]:
    """KL `[windows, TOKENS]` of two roundings of one model, shaped like the tiny model's floors.

    Tokens of one text are hard for both; in some windows an expert is exchanged and what follows is
    off; a few tokens are off by thousands, none by more than half a nat.
    """
    shared = torch.randn(windows, TOKENS, generator=generator).mul(1.5)
    shared += torch.randn(windows, 1, generator=generator).mul(0.5)

    def one() -> Tensor:
        own = shared + torch.randn(windows, TOKENS, generator=generator)
        hit = torch.rand(windows, 1, generator=generator) < 0.1
        start = TOKENS * (0.6 + 0.4 * torch.rand(windows, 1, generator=generator))
        late = (torch.arange(TOKENS) >= start) & hit
        own = own + late * torch.randn(windows, 1, generator=generator).abs().mul(2)
        rare = torch.rand(windows, TOKENS, generator=generator) < 0.002
        own = own + rare * torch.rand(windows, TOKENS, generator=generator).mul(7)
        return (1e-5 * own.exp()).double().clamp_max(0.5)

    return one(), one()


def verdict_of(kl: Tensor, floor: Tensor) -> Verdict:
    blocks = torch.arange(len(kl)).repeat_interleave(kl.shape[1])
    return judge(kl.flatten(), floor.flatten(), blocks)


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda kl: kl * factor


def last_part(share: float, value: float) -> Callable[[Tensor], Tensor]:
    def plant(kl: Tensor) -> Tensor:
        kl = kl.clone()
        kl[:, int((1 - share) * TOKENS) :] = value
        return kl

    return plant


def one_token(value: float) -> Callable[[Tensor], Tensor]:
    def plant(kl: Tensor) -> Tensor:
        kl = kl.clone()
        kl[:, TOKENS // 3] = value
        return kl

    return plant


def test_another_rounding_is_rarely_called_damage(generator: torch.Generator) -> None:
    """At most 1 in 100 is promised; of 60, five or more have a chance below 1 in 1,000."""
    found = [verdict_of(*rounding(generator, windows)) for windows in (10, 30, 100) * 20]
    assert sum(v.above_floor is True for v in found) < 5


@pytest.mark.parametrize(
    ("windows", "plant"),
    [
        (3, times(1000)),
        (3, times(30)),
        (3, times(8)),
        (1, times(1000)),
        (3, last_part(0.5, 0.05)),
        (3, last_part(0.3, 0.5)),
        (12, one_token(3.0)),
        (100, times(1.7)),
        (100, times(3)),
    ],
)
def test_damage_in_some_of_100_windows_is_seen(
    generator: torch.Generator, windows: int, plant: Callable[[Tensor], Tensor]
) -> None:
    kl, floor = rounding(generator, 100)
    chosen = torch.randperm(100, generator=generator)[:windows]
    kl[chosen] = plant(kl[chosen])
    found = verdict_of(kl, floor)
    assert found.above_floor is True
    assert found.grade not in ("identical", "indistinguishable", "undecided")


def test_large_damage_in_few_windows_is_called_by_its_name(generator: torch.Generator) -> None:
    kl, floor = rounding(generator, 100)
    kl[40:43] = 0.8
    found = verdict_of(kl, floor)
    assert found.grade == "damaged in places" and found.places == 3
    assert {s.block for s in found.worst[:3]} == {40, 41, 42}
    assert "3 of 100 stretches" in found.text
    kl[:] = 0.8
    assert verdict_of(kl, floor).grade == "damaged"


def test_75000_times_the_floor_is_seen_in_the_shortest_text(generator: torch.Generator) -> None:
    kl, floor = rounding(generator, 4)
    kl[1] *= 75_000 * 4
    assert verdict_of(kl, floor).above_floor is True


def test_few_windows_cannot_tell(generator: torch.Generator) -> None:
    kl, floor = rounding(generator, 5)
    found = verdict_of(kl, floor)
    assert found.above_floor is None and found.grade == "undecided"
    assert "too few" in found.text


def test_a_mean_above_the_floor_is_never_called_below(generator: torch.Generator) -> None:
    for _ in range(20):
        kl, floor = rounding(generator, 20)
        found = verdict_of(kl, floor)
        if kl.mean() > floor.mean():
            assert found.grade != "indistinguishable" and "not above" not in found.text


def test_equal_predictions_are_identical() -> None:
    zero = torch.zeros(4, TOKENS, dtype=torch.float64)
    assert verdict_of(zero, zero + 1e-5).grade == "identical"
    assert verdict_of(zero, zero).above_floor is False


def test_signed_ranks_are_counted_exactly(generator: torch.Generator) -> None:
    """Against all sign patterns of a few differences, ties among them."""
    for n in (3, 6, 9):
        size = torch.randint(1, 6, (n,), generator=generator).numpy().astype(float)
        sign = np.where(torch.rand(n, generator=generator).numpy() < 0.5, -1.0, 1.0)
        order = np.array([np.mean([np.sum(size < x) + 1, np.sum(size <= x)]) for x in size])
        observed = order[sign > 0].sum()
        patterns = itertools.product((0, 1), repeat=n)
        sums = [float(np.dot(p, order)) for p in patterns]
        share = sum(s >= observed - 1e-9 for s in sums) / len(sums)
        assert signed_rank(size * sign) == pytest.approx(share)
    assert signed_rank(np.zeros(5)) == 1.0


def test_many_signed_ranks_are_nearly_normal(generator: torch.Generator) -> None:
    """On both sides of the switch from counting to the normal law."""
    d = torch.randn(25, generator=generator).add(0.3).numpy()
    exact = signed_rank(d)
    ranks = np.argsort(np.argsort(np.abs(d))) + 1.0
    z = (ranks[d > 0].sum() - ranks.sum() / 2 - 0.5) / math.sqrt(np.square(ranks).sum() / 4)
    assert exact == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), abs=0.02)


def test_the_tail_counts_how_far_and_how_many() -> None:
    floors = np.array([1.0, 0.5, 0.2])
    assert beyond_worst(np.array([0.9, 0.3, 0.1]), floors, 1.0) == (1.0, 0)
    assert beyond_worst(np.array([10.0, 0.3, 0.1]), floors, 1.0) == (pytest.approx(1 / 20), 1)
    chance, places = beyond_worst(np.array([10.0, 8.0, 0.1]), floors, 1.0)
    assert places == 2 and chance == pytest.approx((1 / 16) ** 2)
