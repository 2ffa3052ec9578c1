"""Weighted sums over rows as one compiled loop; `ref/row_sums.py` says what they mean."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled
from v4quant_kernels.ref.row_sums import DIGITS


def row_sums(
    values: NDArray[np.float32],
    coded: NDArray[np.float32],
    weights: NDArray[np.float64],
    own: NDArray[np.float64],
    crossed: NDArray[np.float64],
) -> None:
    """Write both sums of every row. weights: `[K]`, or empty for ones."""
    _row_sums(values, coded, weights, DIGITS, own, crossed)


@compiled
def _row_sums(values, coded, weights, digits, own, crossed):  # type: ignore[no-untyped-def]
    columns = values.shape[1]
    first, second = np.empty(columns), np.empty(columns)
    for r in range(values.shape[0]):
        largest = 0.0
        for c in range(columns):
            value = np.float64(values[r, c])
            weighted = value * weights[c] if weights.size else value
            first[c] = weighted * value
            second[c] = weighted * np.float64(coded[r, c])
        for c in range(columns):
            largest = max(largest, abs(first[c]), abs(second[c]))
        _, exponent = math.frexp(largest)
        unit = math.ldexp(1.0, digits - exponent)
        a = b = 0.0
        for c in range(columns):
            a += np.rint(first[c] * unit)
            b += np.rint(second[c] * unit)
        own[r], crossed[r] = a, b


def losses(values: NDArray[np.float32], coded: NDArray[np.float32]) -> tuple[float, float, float]:
    """Sum of squared differences, of squared values; the largest difference."""
    squared, norm, largest = _losses(values.reshape(-1), coded.reshape(-1))
    return float(squared), float(norm), float(largest)


@compiled
def _losses(values, coded):  # type: ignore[no-untyped-def]
    # Four sums side by side: an addition waits for the one before it.
    squares, norms = np.zeros(4), np.zeros(4)
    largest = np.float32(0.0)
    for c in range(values.size):
        difference = coded[c] - values[c]
        wide, value = np.float64(difference), np.float64(values[c])
        squares[c & 3] += wide * wide
        norms[c & 3] += value * value
        largest = max(largest, abs(difference))
    return squares.sum(), norms.sum(), largest
