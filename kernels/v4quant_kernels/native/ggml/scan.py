"""Trying many scales at once: the inner loops of the GGML searches.

Candidates are the lanes: the loop over the elements of a sub-block is outside, the loop over the
candidates inside, so the compiler fills vector registers without reordering a single sum, and every
sum has the same order on every processor.

A `scratch` array, float32 `[7 * LANES]`, holds the candidates and the sums side by side; which part
is what, each function says. One array with constant offsets, because the compiler cannot know that
several arrays do not overlap. Rounding is to nearest, ties to even, by adding and subtracting
1.5 * 2^23 after clamping.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled

F32 = NDArray[np.float32]
I8 = NDArray[np.int8]
I64 = NDArray[np.int64]

LANES = 32
"""Candidates tried side by side in a full scan."""

ROUND = np.float32(12582912.0)
SMALLEST_HALF = np.float32(2.0**-24)
ZERO = np.float32(0.0)
ONE = np.float32(1.0)


@compiled
def scan_affine(
    x: F32, w: F32, start: int, size: int, low: np.float32, high: np.float32, s: F32
) -> None:
    """Error of each candidate grid `step * q + lowest`, low <= q <= high, on x[start:start+size].

    scratch: 0 step, 1 its reciprocal (0 where the step is 0), 2 lowest, 3 out: sum w (x - value)^2.
    `w` is indexed as `x`.
    """
    for c in range(LANES):
        s[3 * LANES + c] = ZERO
    for i in range(start, start + size):
        xi = x[i]
        wi = w[i]
        for c in range(LANES):
            shifted = xi - s[2 * LANES + c]
            q = min(max(shifted * s[LANES + c], low), high)
            q = (q + ROUND) - ROUND
            e = shifted - s[c] * q
            s[3 * LANES + c] += wi * (e * e)


@compiled
def scan_sums(
    x: F32, w: F32, start: int, size: int, low: np.float32, high: np.float32, s: F32
) -> None:
    """Sums of the integers low <= q <= high that each candidate assigns to x[start:start+size].

    scratch: 0 reciprocal step, 1 lowest, 2 out: sum w q, 3 out: sum w q q, 4 out: sum w x q.
    """
    for c in range(3 * LANES):
        s[2 * LANES + c] = ZERO
    for i in range(start, start + size):
        xi = x[i]
        wi = w[i]
        for c in range(LANES):
            q = min(max((xi - s[LANES + c]) * s[c], low), high)
            q = (q + ROUND) - ROUND
            t = wi * q
            s[2 * LANES + c] += t
            s[3 * LANES + c] += t * q
            s[4 * LANES + c] += t * xi


@compiled
def sums_for(
    x: F32,
    w: F32,
    start: int,
    size: int,
    low: np.float32,
    high: np.float32,
    step: np.float32,
    minimum: np.float32,
) -> tuple[np.float32, np.float32, np.float32]:
    """sum w q, sum w q q, sum w x q of the nearest integers under one grid."""
    inverse = ONE / step if step != ZERO else ZERO
    sq = ZERO
    sqq = ZERO
    sxq = ZERO
    for i in range(start, start + size):
        q = min(max((x[i] + minimum) * inverse, low), high)
        q = (q + ROUND) - ROUND
        t = w[i] * q
        sq += t
        sqq += t * q
        sxq += t * x[i]
    return sq, sqq, sxq


@compiled
def store_codes(
    x: F32,
    start: int,
    size: int,
    low: np.float32,
    high: np.float32,
    step: np.float32,
    minimum: np.float32,
    q: I8,
) -> None:
    """The nearest integers under one grid into q[start:start+size]; 0 (or low) for a step of 0."""
    inverse = ONE / step if step != ZERO else ZERO
    for i in range(start, start + size):
        v = min(max((x[i] + minimum) * inverse, low), high)
        q[i] = np.int8((v + ROUND) - ROUND)


@compiled
def round_half(x: np.float32) -> np.float32:
    """The nearest number of half precision, by float32 additions (infinity above 65504)."""
    if abs(x) > np.float32(65504.0):
        return x * np.float32(np.inf)
    if abs(x) < np.float32(6.103515625e-05):  # subnormal: multiples of 2^-24
        return (x + np.float32(0.75)) - np.float32(0.75)
    t = x * np.float32(8193.0)  # 2^13 + 1: keep 11 significant bits
    return t - (t - x)


@compiled
def smallest(s: F32, part: int) -> int:
    """The first lane with the smallest number in a part of scratch; part 6 is overwritten."""
    for c in range(LANES // 2):
        s[6 * LANES + c] = min(s[part * LANES + c], s[part * LANES + LANES // 2 + c])
    for c in range(LANES // 4):
        s[6 * LANES + c] = min(s[6 * LANES + c], s[6 * LANES + LANES // 4 + c])
    least = s[6 * LANES]
    for c in range(1, LANES // 4):
        least = min(least, s[6 * LANES + c])
    for c in range(LANES):
        if s[part * LANES + c] == least:
            return c
    return 0


@compiled
def unit_for(values: F32, curve: F32, limit: np.float32, s: F32) -> np.float32:
    """The half-precision unit u for which integers round(|v| / u) <= limit serve `values` best.

    Candidates put the largest value on limit and below; the cost is sum curve (v - u round)^2.
    scratch: 0 unit, 1 its reciprocal, 2 cost.
    """
    top = ZERO
    for j in range(values.size):
        top = max(top, abs(values[j]))
    if not top > ZERO:
        return ZERO
    for c in range(LANES):
        unit = top / (limit * (np.float32(1.02) - np.float32(0.01) * np.float32(c)))
        s[c] = unit
        s[LANES + c] = ONE / unit
        s[2 * LANES + c] = ZERO
    for j in range(values.size):
        v = abs(values[j])
        a = curve[j]
        for c in range(LANES):
            r = min(v * s[LANES + c], limit)
            r = (r + ROUND) - ROUND
            e = v - s[c] * r
            s[2 * LANES + c] += a * (e * e)
    return max(round_half(s[smallest(s, 2)]), SMALLEST_HALF)
