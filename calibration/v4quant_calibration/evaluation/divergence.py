"""Divergence: how far the candidate's next-token distribution is from the reference's.

Per scored token: both negative log-likelihoods, KL(reference || candidate) over the whole
vocabulary, agreement of the best and the five best tokens, how sure the reference was, and what
became of the probability of the token that follows (`token_scores.py` makes them of logits). Errors
of means are taken over blocks of consecutive tokens, because neighbouring
tokens are correlated and a per-token error would be too small by up to a factor of 3.

A *flip* is a token whose most probable successor is another one in the candidate. Most flips are
near-ties that rounding alone would turn; those the reference was sure of are the ones that change
an answer (arXiv 2407.09141 counts answers that changed). So flips are also weighted by the
reference's top probability, and counted among the tokens where it is above one half.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from v4quant_calibration.evaluation.bootstrap import block_sums, mean_interval
from v4quant_kernels.errors import V4QuantError

BLOCK_TOKENS = 512
QUANTILES = {"kl_median": 0.5, "kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
CONFIDENCE_EDGES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
CONFIDENT = 0.5


class DivergenceError(V4QuantError):
    """Logits that cannot be compared or summarised."""


@dataclass(frozen=True)
class TokenRecords:
    """One value per scored token, in order; `block` says which block of tokens it belongs to.

    nll: float64 of the scored model; nll_reference, kl: float64, top1: bool, top5: float64 share
    of the reference's five best tokens among the candidate's five best. top_p: float64 probability
    of the reference's best token; delta_p: float64, by how much the probability of the token that
    follows is higher in the candidate.
    """

    nll: Tensor
    block: Tensor
    part: Tensor
    nll_reference: Tensor | None = None
    kl: Tensor | None = None
    top1: Tensor | None = None
    top5: Tensor | None = None
    top_p: Tensor | None = None
    delta_p: Tensor | None = None

    def select(self, mask: Tensor) -> TokenRecords:
        """The records where `mask` (bool) holds."""
        columns: dict[str, Any] = {
            name: None if column is None else column[mask] for name, column in vars(self).items()
        }
        return TokenRecords(**columns)


def summarise(records: TokenRecords) -> dict[str, Any]:
    """Metrics by name, the keys of `evaluate --json`.

    Raises DivergenceError when there are fewer than two blocks, so that no error bar exists.
    """
    blocks = records.block.unique().numel()
    if blocks < 2:
        raise DivergenceError(
            f"{records.nll.numel()} scored tokens make {blocks} block; an error bar needs at least "
            "two windows: give more --tokens or a shorter --seq-len"
        )
    nll, error = block_mean(records.nll, records.block)
    metrics: dict[str, Any] = {
        "tokens": records.nll.numel(),
        "nll": nll,
        "perplexity": _exp(nll),
        "perplexity_stderr": _exp(nll) * error,
    }
    if records.kl is not None:
        metrics |= _compared(records)
    return metrics


def _compared(records: TokenRecords) -> dict[str, Any]:
    """Metrics of a model beside its reference."""
    assert records.nll_reference is not None and records.kl is not None
    assert records.top1 is not None and records.top5 is not None
    base, base_error = block_mean(records.nll_reference, records.block)
    difference = records.nll - records.nll_reference
    ratio, ratio_error = block_mean(difference, records.block)
    kl, kl_error = block_mean(records.kl, records.block)
    return {
        "reference_perplexity": _exp(base),
        "reference_perplexity_stderr": _exp(base) * base_error,
        "perplexity_ratio": _exp(ratio),
        "perplexity_ratio_stderr": _exp(ratio) * ratio_error,
        "perplexity_ratio_ci95": [_exp(x) for x in mean_interval(difference, records.block)],
        "kl_mean": kl,
        "kl_mean_stderr": kl_error,
        "kl_mean_ci95": list(mean_interval(records.kl, records.block)),
        **kl_quantiles(records.kl),
        "kl_max": float(records.kl.max()),
        "top1_agreement": float(records.top1.double().mean()),
        "top5_agreement": float(records.top5.mean()),
        "blocks": records.block.unique().numel(),
        **_flips(records),
        "kl_by_confidence": _by_confidence(records),
    }


def kl_quantiles(kl: Tensor) -> dict[str, float]:
    """The QUANTILES of `kl` `[n]` by name, interpolated linearly."""
    # Not torch.quantile, which refuses more than 2^24 values.
    found = np.quantile(kl.numpy(), list(QUANTILES.values()))
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _flips(records: TokenRecords) -> dict[str, Any]:
    """Flips by how much they matter, and what happened to the token that follows."""
    assert records.top1 is not None and records.top_p is not None and records.delta_p is not None
    flipped, sure = ~records.top1, records.top_p > CONFIDENT
    return {
        "flips_weighted": float(records.top_p[flipped].sum() / records.top_p.sum()),
        "flips_confident": float(flipped[sure].double().mean()) if bool(sure.any()) else None,
        "confident_tokens": int(sure.sum()),
        "delta_p_mean": float(records.delta_p.mean()),
        "delta_p_rms": float(records.delta_p.square().mean().sqrt()),
    }


def _by_confidence(records: TokenRecords) -> list[dict[str, Any]]:
    """KL and agreement of the tokens in each band (low, high] of the reference's probability."""
    assert records.kl is not None and records.top1 is not None and records.top_p is not None
    rows = []
    for low, high in pairwise(CONFIDENCE_EDGES):
        inside = (records.top_p > low) & (records.top_p <= high)
        if bool(inside.any()):
            rows.append(
                {
                    "low": low,
                    "high": high,
                    "tokens": int(inside.sum()),
                    "kl_mean": float(records.kl[inside].mean()),
                    "top1_agreement": float(records.top1[inside].double().mean()),
                }
            )
    return rows


def block_mean(values: Tensor, block: Tensor) -> tuple[float, float]:
    """Mean over all tokens and its standard error over blocks (ratio estimator).

    With B blocks of sizes n_b and sums s_b, the mean is m = sum s_b / sum n_b and its error
    sqrt(B / (B-1) * sum (s_b - m n_b)^2) / sum n_b.
    """
    sums, sizes = block_sums(values, block)
    count, total = len(sizes), sizes.sum()
    mean = sums.sum() / total
    residual = np.square(sums - mean * sizes).sum() * count / max(count - 1, 1)
    return float(mean), float(np.sqrt(residual) / total)


def kl_histogram(kl: Tensor, floor: Tensor | None) -> dict[str, Any]:
    """Counts of tokens in bins of log10 KL, the candidate's and the noise floor's."""
    low, high, bins = -9.0, 2.0, 44
    edges = torch.linspace(low, high, bins + 1, dtype=torch.float64)

    def counts(values: Tensor) -> list[int]:
        place = values.clamp_min(1e-300).log10().clamp(low, high - 1e-9)
        index = ((place - low) / (high - low) * bins).long()
        return torch.bincount(index, minlength=bins).tolist()

    return {
        "log10_edges": edges.tolist(),
        "counts": counts(kl),
        "floor_counts": None if floor is None else counts(floor),
    }


def _exp(nll: float) -> float:
    return float(torch.tensor(nll, dtype=torch.float64).exp())
