"""The grid search for integer scales of arbitrary values as one compiled loop.

Groups lie side by side, as in `lattice.py`, so that the sum over a group's elements is taken in
their order for many groups at once. Every group tries the same ratios of its own largest magnitude,
each rounded to bfloat16 and with either sign (the grid reaches one step further below zero).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled

_TILE = 64  # groups side by side


def best_scales(
    values: NDArray[np.float32],
    weights: NDArray[np.float32],
    ratios: NDArray[np.float32],
    bits: int,
) -> NDArray[np.float32]:
    """The scale of least weighted squared error of every group, float32 [groups].

    values: [groups, G]; weights: [groups of a row, G], repeating down the rows; ratios: candidate
    scales as fractions of the group's largest magnitude.
    """
    scale = np.empty(values.shape[0], np.float32)
    _best_scales(values, weights, ratios, float(-(2 ** (bits - 1))), 2.0 ** (bits - 1) - 1, scale)
    return scale


@compiled
def _best_scales(values, weights, ratios, low, high, scale):  # type: ignore[no-untyped-def]
    size = values.shape[1]
    x, w = np.zeros((size, _TILE), np.float32), np.zeros((size, _TILE), np.float32)
    amax, best = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    step = np.empty(_TILE, np.float32)
    error, found = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    low, high = np.float32(low), np.float32(high)
    for first in range(0, values.shape[0], _TILE):
        groups = min(_TILE, values.shape[0] - first)
        amax[:] = 2.0**-100
        for g in range(groups):
            for i in range(size):
                x[i, g] = values[first + g, i]
                w[i, g] = weights[(first + g) % weights.shape[0], i]
                amax[g] = max(amax[g], abs(x[i, g]))
        best[:] = np.inf
        for k in range(2 * ratios.size):
            sign = np.float32(1 if k < ratios.size else -1)
            _candidates(amax, ratios[k % ratios.size], sign, step)
            error[:] = 0
            for i in range(size):
                for g in range(_TILE):
                    q = min(max(np.rint(x[i, g] / step[g]), low), high)
                    off = q * step[g] - x[i, g]
                    error[g] += off * off * w[i, g]
            for g in range(_TILE):
                better = error[g] < best[g]
                best[g] = error[g] if better else best[g]
                found[g] = step[g] if better else found[g]
        scale[first : first + groups] = found[:groups]


@compiled
def _candidates(amax, ratio, sign, step):  # type: ignore[no-untyped-def]
    for g in range(_TILE):
        step[g] = amax[g] * ratio
    bits = step.view(np.int32)
    for g in range(_TILE):
        bits[g] = (bits[g] + 0x7FFF + ((bits[g] >> 16) & 1)) & -0x10000
    for g in range(_TILE):
        step[g] *= sign
