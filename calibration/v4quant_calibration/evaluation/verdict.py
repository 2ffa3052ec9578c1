"""The verdict: is there damage beyond the arithmetic's own, everywhere or in places, and how much.

The floor is another legitimate computation of the same weights (`noise_floor.py`); of several that
ran the one with the larger mean KL counts. Candidate and floor saw the same tokens, so they are
compared pair by pair, in stretches of consecutive tokens (blocks), because neighbours are no
independent draws. Rounding's own KL has a heavy tail: a last bit chooses another expert, and the
tokens behind it are off by a thousand times the median. Of the tiny model two floors differ by up
to a factor of 500 in the mean of a stretch and of 2.5 in its median. So several figures of each
stretch are looked at (mean, median, upper quartile, largest), and none by its own standard error,
which damage makes as large as the mean.

**Everywhere?** Wilcoxon's signed ranks of d = log(candidate / floor) over all stretches (Wilcoxon
1945; exact for few, else normal with ties counted), for mean, median and largest token. If the
candidate were only another rounding, d would be symmetric around zero.

**In places?** By the middle of a stretch: d of median and upper quartile, less its middle over all
stretches. All but the tenth with the largest |d| are the bulk and tell the scale b of a Laplace
distribution (by its median, and by its largest, with a third added, for the quartile, which fewer
tokens move, five thirds); the chance that k of B
stretches lie above t is at most (B/2 exp(-t/b))^k / k!. By the tail: k stretches above x times the
worst of the floor have the chance (x^-a / 2)^k, since under exchange each of the k largest of both
is the candidate's with 1/2, and the tail is a power law; a = 1 for means, 0.6 for tokens (Hill's
estimates on the tiny model are 1.2 to 1.8, and 0.5 to 0.9).

The seven chances are each multiplied by seven. Below 1 in 100 the candidate is above the floor.
Otherwise a mean that is above the floor's, or fewer than ten stretches, with which no rank test
could have told, make the verdict "too little text to tell", never "not above".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from torch import Tensor

from v4quant_calibration.corpus.corpus import CorpusPart
from v4quant_calibration.evaluation.bootstrap import block_sums
from v4quant_calibration.evaluation.divergence import TokenRecords, kl_histogram, summarise

SIGNIFICANT = 0.01
FEWEST_BLOCKS = 10
# Stretches with the largest d are examined one by one up to this share, and the bulk is the rest.
_SUSPECT_SHARE = 0.1
_TESTS = 7
_MEDIAN_MARGIN, _QUARTILE_MARGIN = 4 / 3, 8 / 3
_LEAST_SCALE = 0.05
_LONG = 256
_MEAN_TAIL, _TOKEN_TAIL = 1.0, 0.6
_EXACT_RANKS = 25
_TINY = 1e-12
# KL in nats per token up to which a loss is small and up to which it is clear; see docs.
SMALL, CLEAR = 0.005, 0.05
_WORST_LISTED = 5

Grade = Literal[
    "identical", "indistinguishable", "undecided", "small", "clear", "damaged", "damaged in places"
]
GRADES: dict[Grade, str] = {
    "identical": "identical to the source",
    "indistinguishable": "indistinguishable from the source",
    "undecided": "too little text to tell",
    "small": "small loss, typical of a good 4-bit file",
    "clear": "clearly worse than the source",
    "damaged": "damaged",
    "damaged in places": "damaged in places",
}
"""Grades, best first, as people read them."""


@dataclass(frozen=True)
class Stretch:
    """A block of consecutive tokens: its number, mean KL of candidate and floor, largest KL."""

    block: int
    tokens: int
    kl_mean: float
    floor_kl_mean: float
    kl_max: float


@dataclass(frozen=True)
class Verdict:
    """What was found, and why.

    above_floor: the candidate differs from the source by more than rounding; None: cannot be told.
    everywhere, in_places: chances that rounding alone looks like this (smaller of mean and
    maximum, corrected). places: how many stretches stand out. text: sentences for people.
    """

    grade: Grade
    above_floor: bool | None
    everywhere: float
    in_places: float
    places: int
    blocks: int
    text: str
    worst: tuple[Stretch, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Floor:
    """`noise_floor` of the result, and the KL of every token."""

    metrics: dict[str, Any]
    kl: Tensor


def largest_floor(descriptions: list[str], records: list[TokenRecords]) -> Floor:
    """The run with the larger mean KL, with all runs listed."""
    runs = [{"description": d, **summarise(r)} for d, r in zip(descriptions, records, strict=True)]
    top = max(range(len(runs)), key=lambda i: runs[i]["kl_mean"])
    kl = records[top].kl
    assert kl is not None
    return Floor({**runs[top], "runs": runs}, kl)


def compared(records: TokenRecords, floor: Floor, parts: Sequence[CorpusPart]) -> dict[str, Any]:
    """Figures of one candidate with floor, verdict and histogram; `corpora` lists the parts'."""
    assert records.kl is not None
    result = summarise(records)
    verdict = judge(records.kl, floor.kl, records.block)
    return {
        **result,
        "noise_floor": floor.metrics,
        "verdict": verdict.as_dict(),
        "kl_histogram": kl_histogram(records.kl, floor.kl),
        "corpora": by_part(records, parts),
    }


def judge(kl: Tensor, floor: Tensor, block: Tensor) -> Verdict:
    """The verdict on KL `[n]` of a candidate and the floor, of one text, in stretches `block`."""
    stretches = _stretches(kl, floor, block)
    count = len(stretches)
    mean, base = float(kl.mean()), float(floor.mean())
    worst = tuple(sorted(stretches, key=lambda s: -s.kl_mean)[:_WORST_LISTED])
    if not bool((kl > 0).any()):
        text = "On this text every prediction is the source's, to the last bit."
        return Verdict("identical", False, 1.0, 1.0, 0, count, text, ())
    ours, floors = (_figures(values, block) for values in (kl, floor))
    d = {name: _log_ratio(ours[name], floors[name]) for name in ours}
    everywhere = _TESTS * min(signed_rank(d[name]) for name in ("mean", "median", "largest"))
    in_places, places = min(
        outliers(d["median"], kl.numel() / count, _MEDIAN_MARGIN),
        outliers(d["quartile"], kl.numel() / count, _QUARTILE_MARGIN),
        beyond_worst(ours["mean"], floors["mean"], _MEAN_TAIL),
        beyond_worst(ours["largest"], floors["largest"], _TOKEN_TAIL),
        key=lambda found: (found[0], -found[1]),
    )
    everywhere, in_places = min(1.0, everywhere), min(1.0, _TESTS * in_places)
    spread, local = everywhere < SIGNIFICANT, in_places < SIGNIFICANT
    if not spread and not local:
        grade: Grade = (
            "indistinguishable" if mean <= base and count >= FEWEST_BLOCKS else "undecided"
        )
        above = False if grade == "indistinguishable" else None
    else:
        above = True
        grade = _graded(mean, worst[0].kl_mean, local and not _explained(stretches, mean, places))
    text = _sentence(grade, mean, base, count, places, worst[0], spread)
    shown = places if local else 0
    return Verdict(grade, above, everywhere, in_places, shown, count, text, worst)


def _graded(mean: float, worst: float, local: bool) -> Grade:
    if mean > CLEAR:
        return "damaged"
    if local and worst > CLEAR:
        return "damaged in places"
    return "small" if mean <= SMALL else "clear"


def _explained(stretches: Sequence[Stretch], mean: float, places: int) -> bool:
    """Whether the stretches that stand out are what such a mean brings anyway: no more than a few
    times the mean each."""
    top = sorted((s.kl_mean for s in stretches), reverse=True)[: max(places, 1)]
    return min(top) < 8 * mean or len(stretches) < FEWEST_BLOCKS


def _sentence(
    grade: Grade, mean: float, base: float, count: int, places: int, worst: Stretch, spread: bool
) -> str:
    times = f"{_times(mean / base)} the noise floor" if base > 0 else "above a noise floor of zero"
    if grade == "indistinguishable":
        return (
            f"Indistinguishable from the source: a mean KL of {mean:.2e} nats per token is no more "
            f"than another rounding of the same weights does ({base:.2e})."
        )
    if grade == "undecided":
        few = f"{count} stretches of text are too few to tell" if count < FEWEST_BLOCKS else (
            f"over {count} stretches of text that may be chance"
        )  # fmt: skip
        where = f"{times} of {base:.2e}" if mean > base else f"not above the floor of {base:.2e}"
        return f"Mean KL {mean:.2e} nats per token is {where}; {few}. Evaluate more tokens."
    local = (
        f" {places} of {count} stretches of text stand out, the worst with a mean of "
        f"{worst.kl_mean:.2e} where the floor has {worst.floor_kl_mean:.2e}."
        if not spread and 0 < places <= count // 2
        else ""
    )
    reason = {
        "small": "what a good 4-bit conversion costs, or less",
        "clear": "more than a good 4-bit conversion costs",
        "damaged": "more than a good 2-bit conversion costs",
        "damaged in places": f"little in most of the text, but {places} of {count} stretches "
        f"are far off (the worst: {worst.kl_mean:.2e} nats per token, the floor there "
        f"{worst.floor_kl_mean:.2e})",
    }[grade]
    words = GRADES[grade]
    return (
        f"{words[0].upper()}{words[1:]}: mean KL {mean:.2e} nats per token, {times}, is {reason}."
        + ("" if grade == "damaged in places" else local)
    )


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{ratio:.1f} times"


def _stretches(kl: Tensor, floor: Tensor, block: Tensor) -> list[Stretch]:
    sums, sizes = block_sums(kl, block)
    floors, _ = block_sums(floor, block)
    numbers = block.unique()
    return [
        Stretch(int(b), int(n), float(s / n), float(f / n), float(kl[block == b].max()))
        for b, s, f, n in zip(numbers, sums, floors, sizes, strict=True)
    ]


def _figures(values: Tensor, block: Tensor) -> dict[str, np.ndarray]:
    """Mean, median, upper quartile and largest of every block, float64 `[blocks]` each."""
    pieces = [values[block == b].double().numpy() for b in block.unique()]
    return {
        "mean": np.array([p.mean() for p in pieces]),
        "median": np.array([np.median(p) for p in pieces]),
        "quartile": np.array([np.quantile(p, 0.75) for p in pieces]),
        "largest": np.array([p.max() for p in pieces]),
    }


def _log_ratio(ours: np.ndarray, floors: np.ndarray) -> np.ndarray:
    """log(candidate / floor) of every stretch; float64 dust below 1e-12 nats counts as that."""
    ratio: np.ndarray = np.log(np.maximum(ours, _TINY)) - np.log(np.maximum(floors, _TINY))
    return ratio


def signed_rank(d: np.ndarray) -> float:
    """One-sided chance of so large a sum of positive ranks of |d| if d is symmetric around 0.

    Exact (all 2^n signs, by convolution over doubled ranks) up to 25 differences, then normal with
    the tie correction. Zeros are left out, as Wilcoxon did.
    """
    d = d[d != 0]
    n = len(d)
    if n == 0:
        return 1.0
    ranks = _midranks(np.abs(d))
    observed = ranks[d > 0].sum()
    if n <= _EXACT_RANKS:
        doubled = np.rint(2 * ranks).astype(int)
        ways = np.zeros(int(doubled.sum()) + 1)
        ways[0] = 1.0
        for rank in doubled:
            shifted = np.zeros_like(ways)
            shifted[rank:] = ways[: len(ways) - rank]
            ways += shifted
        return float(ways[round(2 * observed) :].sum() / 2.0**n)
    spread = math.sqrt(float(np.square(ranks).sum()) / 4)
    z = (observed - ranks.sum() / 2 - 0.5) / spread
    return 0.5 * math.erfc(z / math.sqrt(2))


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, ties sharing the mean of theirs."""
    order = np.argsort(values, kind="stable")
    ranks = np.empty(len(values))
    start = 0
    for _, group in itertools.groupby(values[order]):
        size = len(list(group))
        ranks[order[start : start + size]] = start + (size + 1) / 2
        start += size
    return ranks


def outliers(d: np.ndarray, tokens: float, margin: float) -> tuple[float, int]:
    """(chance, number) of the stretches, of so many tokens, whose d stands out most from the bulk.

    The scale is widened by `margin`, and for short stretches, which one exchanged expert moves.
    """
    count = len(d)
    if count < FEWEST_BLOCKS:
        return 1.0, 0
    d = d - np.median(d)
    suspects = max(1, int(_SUSPECT_SHARE * count))
    bulk = np.sort(np.abs(d))[: count - suspects]
    scale = max(
        float(np.quantile(bulk, 0.5 * count / len(bulk))) / math.log(2),
        float(bulk[-1]) / math.log(count / suspects),
    )
    scale = max(margin * scale * max(1.0, math.sqrt(_LONG / tokens)), _LEAST_SCALE)
    best, places = 1.0, 0
    for k, value in enumerate(np.sort(d)[::-1][:suspects], 1):
        expected = count / 2 * math.exp(-float(value) / scale)
        chance = math.exp(min(0.0, k * math.log(expected) - math.lgamma(k + 1)))
        best, places = min((best, places), (chance, k), key=lambda found: (found[0], -found[1]))
    return best, places


def beyond_worst(ours: np.ndarray, floors: np.ndarray, tail: float) -> tuple[float, int]:
    """(chance, number) of the stretches that lie above the floor's worst, by how far they do."""
    worst = max(float(floors.max()), _TINY)
    ratios = np.sort(ours)[::-1] / worst
    best, places = 1.0, 0
    for k, ratio in enumerate(ratios[ratios > 1], 1):
        chance = math.exp(-k * (tail * math.log(ratio) + math.log(2)))
        best, places = min((best, places), (chance, k), key=lambda found: (found[0], -found[1]))
    return best, places


def by_part(records: TokenRecords, parts: Sequence[CorpusPart]) -> list[dict[str, Any]]:
    """Metrics of each corpus file that has enough windows for an error bar."""
    rows = []
    for index, part in enumerate(parts):
        chosen = records.select(records.part == index)
        if chosen.block.unique().numel() >= 2:
            rows.append({"name": part.name, **summarise(chosen)})
    return rows
