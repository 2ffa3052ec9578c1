"""Weight defects: what a wrong matrix looks like, asked of the few that are wrong.

Converters fail in a handful of ways, and each leaves a signature that one comparison confirms: the
matrix is another one of the file (w1 for w3, a neighbouring expert), the two codes of every byte
are exchanged, everything carries a constant factor (a scale that is off by a power of two), or only
some rows are bad. A hypothesis is accepted when it takes away at least three quarters of the error.
Two unrelated matrices of equal norm have a relative error of sqrt(2), so an error near 1.4 that no
hypothesis explains means "something else altogether".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS, TensorName
from v4quant_formats.weight_reading import read_dense

_ROWS = 512
# A hypothesis must leave at most this share of the error.
_EXPLAINED = 0.25
# How many other wrong matrices of the same layer a matrix is tried on.
_MOST_OTHERS = 8


def relative_error(a: Tensor, b: Tensor) -> float:
    """Frobenius norm of a - b over that of b, in float64; 0 for two zeros, inf against a zero.

    a, b: `[N, K]` float32. Temporaries are some rows at a time.
    """
    return ratio(*squares(a, b))


def squares(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Sums of the squares of a - b and of b, in float64; arguments as of `relative_error`."""
    error = norm = 0.0
    for first in range(0, a.shape[0], _ROWS):
        x, y = (m[first : first + _ROWS].double() for m in (a, b))
        error += float((x - y).square().sum())
        norm += float(y.square().sum())
    return error, norm


def ratio(error: float, norm: float) -> float:
    """The relative error that two sums of squares give."""
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return math.sqrt(error / norm)


def explain(
    reference: Checkpoint,
    candidate: Checkpoint,
    name: TensorName,
    error: float,
    others: Sequence[str],
) -> str:
    """What the candidate's matrix `name` looks like, in words; empty when nothing known fits.

    error: its relative error. others: further wrong matrices of the layer, as suspects for an
    exchange.
    """
    mine = read_dense(candidate, name.module)
    right = read_dense(reference, name.module)
    limit = _EXPLAINED * error
    if not bool(mine.any()):
        return "its values are all zero"
    for test in (_other_matrix(reference, name, others), _nibbles, _factor):
        told = test(mine, right, limit)
        if told:
            return told
    return _rows(mine, right)


def explain_values(mine: Tensor, right: Tensor, error: float) -> str:
    """As `explain`, for values at hand: zeros, one factor, or few rows. `[N, K]` float32."""
    if not bool(mine.any()):
        return "its values are all zero"
    told = _factor(mine, right, _EXPLAINED * error)
    return told or (_rows(mine, right) if mine.shape[0] > 1 else "")


def _other_matrix(
    reference: Checkpoint, name: TensorName, others: Sequence[str]
) -> Callable[[Tensor, Tensor, float], str]:
    """Whether the values are those of w1 / w3 beside it, or of another wrong matrix."""
    partner = {"w1": "w3", "w3": "w1"}.get(name.module.rpartition(".")[2])
    beside = f"{name.module[:-2]}{partner}"
    there = any(f"{beside}.{part}" in reference for part in PARTS)
    tried = [beside] if partner is not None and there else []
    tried += [module for module in others[:_MOST_OTHERS] if module != beside]

    def test(mine: Tensor, right: Tensor, limit: float) -> str:
        for module in tried:
            other = read_dense(reference, module)
            if other.shape == right.shape and relative_error(mine, other) <= limit:
                return f"looks swapped with {partner if module == beside else module}"
        return ""

    return test


def _nibbles(mine: Tensor, right: Tensor, limit: float) -> str:
    """Even and odd columns exchanged: the high nibble was read as the low one."""
    if mine.shape[1] % 2:
        return ""
    exchanged = mine.view(mine.shape[0], -1, 2).flip(-1).view(mine.shape)
    fits = relative_error(exchanged, right) <= limit
    return "its nibbles look swapped (even and odd columns are exchanged)" if fits else ""


def _factor(mine: Tensor, right: Tensor, limit: float) -> str:
    """One factor on everything: the gain <mine, mine> / <mine, right>.

    Rounding to the best scale leaves an error orthogonal to its result, so that <m, m> = <m, r>
    for healthy m and the gain of a multiple of m is the multiple.
    """
    inner = norm = 0.0
    for x, y in zip(mine.split(_ROWS), right.split(_ROWS), strict=True):
        inner += float((x.double() * y.double()).sum())
        norm += float(x.double().square().sum())
    gain = norm / inner if inner else 0.0
    if not gain or relative_error(mine / gain, right) > limit:
        return ""
    return f"its values look multiplied by {gain:.3g}; check its scales"


def _rows(mine: Tensor, right: Tensor) -> str:
    """Whether few rows, three times as wrong as the median row, hold most of the error."""
    squared = torch.cat(
        [
            (x.double() - y.double()).square().sum(1)
            for x, y in zip(mine.split(_ROWS), right.split(_ROWS), strict=True)
        ]
    )
    bad = (squared > 9 * squared.median()).nonzero().flatten()
    if 4 * len(bad) > len(squared) or 2 * float(squared[bad].sum()) < float(squared.sum()):
        return ""
    return f"most of it in {len(bad)} of {len(squared)} rows, the first is row {int(bad[0])}"
