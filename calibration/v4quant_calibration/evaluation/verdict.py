"""The verdict: figures of all tokens and of each part, beside the noise floor.

The floor is another legitimate computation of the same weights (`noise_floor.py`); of several that
ran the one with the larger mean KL counts. A difference that is not above it by more than the error
of both is no damage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from v4quant_calibration.corpus.corpus import CorpusPart
from v4quant_calibration.evaluation.divergence import TokenRecords, kl_histogram, summarise

# A mean KL within this many standard errors above the floor's mean is not above the floor.
_ERRORS_ABOVE = 2.0


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
    return {
        **result,
        "noise_floor": floor.metrics,
        "verdict": _verdict(result, floor.metrics),
        "kl_histogram": kl_histogram(records.kl, floor.kl),
        "corpora": by_part(records, parts),
    }


def _verdict(result: dict[str, Any], noise: dict[str, Any]) -> dict[str, Any]:
    kl, floor = result["kl_mean"], noise["kl_mean"]
    error = (result["kl_mean_stderr"] ** 2 + noise["kl_mean_stderr"] ** 2) ** 0.5
    above = kl > floor + _ERRORS_ABOVE * error
    ratio = f"{kl / floor:.1f} times" if floor > 0 else "above"
    text = (
        f"Mean KL {kl:.2e} nats is {ratio} the noise floor of {floor:.2e}: the conversion is "
        f"measurable. Perplexity changes by {100 * (result['perplexity_ratio'] - 1):+.2f} % "
        f"(standard error {100 * result['perplexity_ratio_stderr']:.2f} %)."
        if above
        else f"Mean KL {kl:.2e} nats is not above the noise floor of {floor:.2e}: no cost found."
    )
    return {"above_floor": above, "text": text}


def by_part(records: TokenRecords, parts: Sequence[CorpusPart]) -> list[dict[str, Any]]:
    """Metrics of each corpus file that has enough windows for an error bar."""
    rows = []
    for index, part in enumerate(parts):
        chosen = records.select(records.part == index)
        if chosen.block.unique().numel() >= 2:
            rows.append({"name": part.name, **summarise(chosen)})
    return rows
