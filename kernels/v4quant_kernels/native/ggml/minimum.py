"""The search for GGML types with minima: q2_k, q4_k, q5_k (and q5_1, one sub-block a block).

A value is `d sc q - dmin m`. The weighted squared error of a block is made small in three steps:

1. Each sub-block alone, with real step and minimum: a fixed family of grids assigns integers, and
   for every assignment the best step and minimum follow in closed form (two normal equations). The
   best assignment is rounded and solved again.
2. `d` and `dmin` are chosen so that the rounded `d sc` and `dmin m` lie near those optima, each
   deviation counted with the curvature of its sub-block's error.
3. In turns: every sub-block tries a window of integers (sc, m) with exact errors; then, for the
   assignment found, `d` and `dmin` are solved again over the whole block and rounded to half
   precision. A turn that does not lower the block's error ends the search, so it never rises.

All sums run in the order of elements, in float32; the small systems are solved in float64.
"""

from __future__ import annotations

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.exact import all_multiples, binade_unit, largest, lattice_units
from v4quant_kernels.native.ggml.scan import (
    F32,
    I8,
    LANES,
    ONE,
    ROUND,
    ZERO,
    round_half,
    scan_affine,
    scan_sums,
    smallest,
    store_codes,
    sums_for,
    unit_for,
)

MIDDLE = np.float32(16.0)
SPREAD = np.float32(32.0)
"""Where zero lies among five bits, and the largest power of two among six-bit scales."""

TINY = np.float32(1e-30)
ROUNDING = np.float32(1e-6)


@compiled
def solve(
    sw: np.float32, sx: np.float32, sq: np.float32, sqq: np.float32, sxq: np.float32
) -> tuple[np.float32, np.float32, np.float32]:
    """Step and lowest value (<= 0) minimizing sum w (x - step q - lowest)^2, and the gain.

    The gain is how far the error lies below sum w x x. Without branches, so that a loop over
    candidates stays a loop over lanes.
    """
    det = sw * sqq - sq * sq
    singular = det <= TINY + ROUNDING * sw * sqq  # all integers alike, but for rounding
    det = ONE if singular else det
    alone = max(sxq / (sqq + TINY), ZERO)
    both = (sw * sxq - sx * sq) / det
    lowest = (sqq * sx - sq * sxq) / det
    positive = singular or lowest > ZERO
    step = alone if positive else both
    lowest = ZERO if positive else lowest
    return step, lowest, step * sxq + lowest * sx


@compiled
def real_grid(
    x: F32,
    w: F32,
    start: int,
    size: int,
    high: np.float32,
    family: F32,
    rounds: int,
    s: F32,
    out: F32,
) -> None:
    """The best real grid of a sub-block.

    out: 0 step, 1 minimum, 2 sum w, 3 sum w q, 4 sum w q q, 5 sum w x.
    """
    lowest = ZERO
    highest = x[start]
    sw = ZERO
    sx = ZERO
    for i in range(start, start + size):
        lowest = min(lowest, x[i])
        highest = max(highest, x[i])
        sw += w[i]
        sx += w[i] * x[i]
    out[0] = ZERO
    out[1] = -lowest
    out[2] = sw
    out[3] = ZERO
    out[4] = ZERO
    out[5] = sx
    extent = highest - lowest
    if not extent > ZERO:
        return
    for c in range(LANES):
        s[c] = family[0, c] * high / extent
        s[LANES + c] = lowest + family[1, c] * extent
    scan_sums(x, w, start, size, ZERO, high, s)
    for c in range(LANES):
        step, low, gain = solve(sw, sx, s[2 * LANES + c], s[3 * LANES + c], s[4 * LANES + c])
        s[c] = step
        s[LANES + c] = low
        s[5 * LANES + c] = -gain
    c = smallest(s, 5)
    best = -s[5 * LANES + c]
    step = s[c]
    low = s[LANES + c]
    sq = s[2 * LANES + c]
    sqq = s[3 * LANES + c]
    for _ in range(rounds):
        aq, aqq, axq = sums_for(x, w, start, size, ZERO, high, step, -low)
        a, b, gain = solve(sw, sx, aq, aqq, axq)
        if not gain > best:
            break
        best = gain
        step = a
        low = b
        sq = aq
        sqq = aqq
    out[0] = max(step, ZERO)
    out[1] = -low
    out[3] = sq
    out[4] = sqq


@compiled
def window(
    x: F32,
    w: F32,
    start: int,
    size: int,
    high: np.float32,
    d: np.float32,
    dmin: np.float32,
    sc0: np.float32,
    m0: np.float32,
    slope: np.float32,
    limit: np.float32,
    spread: F32,
    s: F32,
) -> tuple[np.float32, np.float32, np.float32]:
    """The best (error, sc, m) among LANES integer pairs around (sc0, m0).

    `slope`: how many units of m the best minimum moves when sc rises by one.
    """
    for c in range(LANES):
        a = spread[0, c]
        sc = min(max(sc0 + a, ZERO), limit)
        m = m0 + (sc - sc0) * slope
        m = min(max(((m + ROUND) - ROUND) + spread[1, c], ZERO), limit)
        step = d * sc
        s[c] = step
        s[LANES + c] = ONE / step if step > ZERO else ZERO
        s[2 * LANES + c] = -(dmin * m)
        s[4 * LANES + c] = sc
        s[5 * LANES + c] = m
    scan_affine(x, w, start, size, ZERO, high, s)
    best = smallest(s, 3)
    return s[3 * LANES + best], s[4 * LANES + best], s[5 * LANES + best]


@compiled
def keep_exact(
    x: F32, high: np.float32, units: F32, q: I8, sc: I8, m: I8
) -> tuple[np.float32, np.float32]:
    """A block of lattice points without loss: its d and dmin, or zeros where that is impossible."""
    size = x.size // sc.size
    finest = lattice_units(x, size, 3, SPREAD, units)
    if not finest > ZERO or round_half(MIDDLE * finest) != MIDDLE * finest:
        return ZERO, ZERO
    for j in range(sc.size):
        sc[j] = np.int8(units[j] / finest)
        m[j] = sc[j]
        store_codes(x, j * size, size, ZERO, high, units[j], MIDDLE * units[j], q)
    return finest, MIDDLE * finest


@compiled
def one_turn(
    x: F32,
    w: F32,
    high: np.float32,
    limit: np.float32,
    d: np.float32,
    dmin: np.float32,
    spread: F32,
    real: F32,
    near: F32,
    new: F32,
    s: F32,
) -> tuple[float, np.float32, np.float32]:
    """New integers [2, subs] around `near` for given d and dmin; their error, better d and dmin.

    real: what `real_grid` found, one row a sub-block; sum w q and sum w q q are brought up to date.
    """
    subs = near.shape[1]
    size = x.size // subs
    ratio = d / dmin if dmin > ZERO else ZERO
    total = 0.0
    a11 = 0.0
    a12 = 0.0
    a22 = 0.0
    b1 = 0.0
    b2 = 0.0
    for j in range(subs):
        start = j * size
        slope = real[j, 3] / real[j, 2] * ratio
        sc0 = min(max((near[0, j] + ROUND) - ROUND, ZERO), limit)
        m0 = near[1, j] + (sc0 - near[0, j]) * slope
        error, u, v = window(x, w, start, size, high, d, dmin, sc0, m0, slope, limit, spread, s)
        total += float(error)
        new[0, j] = u
        new[1, j] = v
        sq, sqq, sxq = sums_for(x, w, start, size, ZERO, high, d * u, dmin * v)
        real[j, 3] = sq
        a11 += float(u * u * sqq)
        a12 -= float(u * v * sq)
        a22 += float(v * v * real[j, 2])
        b1 += float(u * sxq)
        b2 -= float(v * real[j, 5])
    det = a11 * a22 - a12 * a12
    if det > 1e-12 * a11 * a22:
        d = round_half(np.float32((a22 * b1 - a12 * b2) / det))
        dmin = round_half(np.float32((a11 * b2 - a12 * b1) / det))
    elif a11 > 0.0:
        d = round_half(np.float32(b1 / a11))
    return total, d, dmin


@compiled
def search_block(
    x: F32,
    w: F32,
    high: np.float32,
    limit: np.float32,
    family: F32,
    spread: F32,
    rounds: int,
    turns: int,
    real: F32,
    near: F32,
    new: F32,
    s: F32,
    sc: I8,
    m: I8,
) -> tuple[np.float32, np.float32]:
    """The integers sc and m of one block; returns d and dmin, exact halves."""
    subs = sc.size
    size = x.size // subs
    for j in range(subs):
        real_grid(x, w, j * size, size, high, family, rounds, s, real[j])
        near[0, j] = real[j, 0]
        near[1, j] = real[j, 1]
        new[0, j] = max(real[j, 4] - real[j, 3] * (real[j, 3] / real[j, 2]), ZERO)
        new[1, j] = real[j, 2]
    d = unit_for(near[0], new[0], limit, s)
    dmin = unit_for(near[1], new[1], limit, s)
    for j in range(subs):
        near[0, j] = near[0, j] / d if d > ZERO else ZERO
        near[1, j] = near[1, j] / dmin if dmin > ZERO else ZERO
    kept_d = d
    kept_dmin = dmin
    best = np.inf
    for _ in range(turns):
        total, next_d, next_dmin = one_turn(x, w, high, limit, d, dmin, spread, real, near, new, s)
        if not total < best:
            break
        best = total
        kept_d = d
        kept_dmin = dmin
        for j in range(subs):
            near[0, j] = new[0, j]
            near[1, j] = new[1, j]
        if next_d < ZERO or next_dmin < ZERO:
            break
        d = next_d
        dmin = next_dmin
    for j in range(subs):
        sc[j] = np.int8(near[0, j])
        m[j] = np.int8(near[1, j])
    return kept_d, kept_dmin


@compiled
def search_minimum(
    x: F32,
    w: F32,
    high: np.float32,
    limit: np.float32,
    exact: bool,
    family: F32,
    spread: F32,
    rounds: int,
    turns: int,
    q: I8,
    sc: I8,
    m: I8,
    d: F32,
    dmin: F32,
) -> None:
    """Blocks of float32 `x` [B, block] into q, sc, m (int8) and d, dmin (float32, exact halves).

    w: float32 [blocks a row, block]. `exact`: keep lattice points as they are (five bits: -16..15
    units).
    """
    count, block = x.shape
    subs = sc.shape[1]
    size = block // subs
    s = np.empty(7 * LANES, np.float32)
    real = np.empty((subs, 6), np.float32)
    near = np.empty((2, subs), np.float32)
    new = np.empty((2, subs), np.float32)
    for b in range(count):
        if exact:
            d[b], dmin[b] = keep_exact(x[b], high, new[0], q[b], sc[b], m[b])
            if d[b] > ZERO:
                continue
        d[b], dmin[b] = search_block(
            x[b],
            w[b % w.shape[0]],
            high,
            limit,
            family,
            spread,
            rounds,
            turns,
            real,
            near,
            new,
            s,
            sc[b],
            m[b],
        )
        for j in range(subs):
            step = d[b] * np.float32(sc[b, j])
            minimum = dmin[b] * np.float32(m[b, j])
            store_codes(x[b], j * size, size, ZERO, high, step, minimum, q[b])


@compiled
def search_single_minimum(
    x: F32, w: F32, high: np.float32, family: F32, rounds: int, q: I8, d: F32, lowest: F32
) -> None:
    """q5_1: float32 `x` [B, 32] into q (int8), step and lowest value (float32, exact halves)."""
    count, block = x.shape
    s = np.empty(7 * LANES, np.float32)
    real = np.empty(6, np.float32)
    for b in range(count):
        xb = x[b]
        top = largest(xb, 0, block)
        unit = binade_unit(top, 3) if top > ZERO else ZERO
        if unit > ZERO and round_half(unit) == unit and all_multiples(xb, 0, block, unit):
            minimum = round_half(MIDDLE * unit)
        else:
            wb = w[b % w.shape[0]]
            real_grid(xb, wb, 0, block, high, family, rounds, s, real)
            unit = round_half(real[0])
            minimum = round_half(real[1])
        d[b] = unit
        lowest[b] = -minimum
        store_codes(xb, 0, block, ZERO, high, unit, minimum, q[b])
