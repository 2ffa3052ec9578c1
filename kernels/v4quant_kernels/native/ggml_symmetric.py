"""The search for GGML types without minima: q3_k, q6_k, and with one scale q8_0, q5_0, q4_0.

A value is `d sc q` with integers -n <= q < n, one more on the negative side, so the sign of the
step matters. The weighted squared error of a block is made small in three steps:

1. Each sub-block alone, with a real step: a fixed family of steps of both signs assigns integers,
   and for every assignment the best step follows in closed form.
2. `d` is chosen so that the rounded `d sc` lie near those optima, each deviation counted with the
   curvature of its sub-block's error.
3. In turns: every sub-block tries neighbouring integers sc with exact errors; then, for the
   assignment found, `d` is solved again over the whole block and rounded to half precision. A turn
   that does not lower the block's error ends the search, so it never rises.

All sums run in the order of elements, in float32; the last quotient is taken in float64.
"""

from __future__ import annotations

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml_exact import all_multiples, binade_unit, largest, lattice_units
from v4quant_kernels.native.ggml_scan import (
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

SPREAD = np.float32(64.0)
"""The largest power of two among the scales of q6_k."""

TINY = np.float32(1e-30)


@compiled
def real_step(
    x: F32,
    w: F32,
    start: int,
    size: int,
    low: np.float32,
    high: np.float32,
    family: F32,
    s: F32,
) -> tuple[np.float32, np.float32]:
    """The best real step of a sub-block (of either sign) and the curvature sum w q q there."""
    top = largest(x, start, size)
    if not top > ZERO:
        return ZERO, ZERO
    inverse = ONE / top
    for c in range(LANES):
        s[c] = family[c] * inverse
        s[LANES + c] = ZERO
    scan_sums(x, w, start, size, low, high, s)
    for c in range(LANES):
        sxq = s[4 * LANES + c]
        s[c] = -(sxq * sxq) / (s[3 * LANES + c] + TINY)
    best = smallest(s, 0)
    sqq = s[3 * LANES + best]
    return s[4 * LANES + best] / (sqq + TINY), sqq


@compiled
def window(
    x: F32,
    w: F32,
    start: int,
    size: int,
    low: np.float32,
    high: np.float32,
    d: np.float32,
    sc0: np.float32,
    bottom: np.float32,
    limit: np.float32,
    s: F32,
) -> tuple[np.float32, np.float32]:
    """The best (error, sc) among the LANES neighbours of the integer sc0."""
    first = sc0 - np.float32(LANES // 2)
    for c in range(LANES):
        sc = min(max(first + np.float32(c), bottom), limit)
        step = d * sc
        s[c] = step
        s[LANES + c] = ONE / step if step != ZERO else ZERO
        s[2 * LANES + c] = ZERO
        s[4 * LANES + c] = sc
    scan_affine(x, w, start, size, low, high, s)
    best = smallest(s, 3)
    return s[3 * LANES + best], s[4 * LANES + best]


@compiled
def search_block(
    x: F32,
    w: F32,
    low: np.float32,
    high: np.float32,
    bottom: np.float32,
    limit: np.float32,
    family: F32,
    turns: int,
    near: F32,
    new: F32,
    s: F32,
    sc: I8,
) -> np.float32:
    """The integers sc of one block; returns d, an exact half."""
    subs = sc.size
    size = x.size // subs
    for j in range(subs):
        near[j], new[j] = real_step(x, w, j * size, size, low, high, family, s)
    d = unit_for(near, new, limit, s)
    for j in range(subs):
        near[j] = near[j] / d if d > ZERO else ZERO
    kept = d
    best = np.inf
    for turn in range(turns):
        total = 0.0
        above = 0.0
        below = 0.0
        for j in range(subs):
            sc0 = (near[j] + ROUND) - ROUND
            error, u = window(x, w, j * size, size, low, high, d, sc0, bottom, limit, s)
            total += float(error)
            new[j] = u
            if turn + 1 < turns:
                _, sqq, sxq = sums_for(x, w, j * size, size, low, high, d * u, ZERO)
                above += float(u * sxq)
                below += float(u * u * sqq)
        if not total < best:
            break
        best = total
        kept = d
        for j in range(subs):
            near[j] = new[j]
        if not above > 0.0:
            break
        d = round_half(np.float32(above / below))
    for j in range(subs):
        sc[j] = np.int8(near[j])
    return kept


@compiled
def search_symmetric(
    x: F32,
    w: F32,
    low: np.float32,
    high: np.float32,
    bottom: np.float32,
    limit: np.float32,
    bits: int,
    family: F32,
    turns: int,
    q: I8,
    sc: I8,
    d: F32,
) -> None:
    """Blocks of float32 `x` [B, block] into q, sc (int8) and d (float32, exact halves).

    w: float32 [blocks a row, block]. `bits`: lattice points below 2^(bits+1) units are kept
    exactly; 0: not tried.
    """
    count, block = x.shape
    subs = sc.shape[1]
    size = block // subs
    s = np.empty(7 * LANES, np.float32)
    near = np.empty(subs, np.float32)
    new = np.empty(subs, np.float32)
    for b in range(count):
        finest = lattice_units(x[b], size, bits, SPREAD, near) if bits > 0 else ZERO
        if finest > ZERO:
            d[b] = finest
            for j in range(subs):
                sc[b, j] = np.int8(near[j] / finest)
        else:
            wb = w[b % w.shape[0]]
            d[b] = search_block(
                x[b], wb, low, high, bottom, limit, family, turns, near, new, s, sc[b]
            )
        for j in range(subs):
            step = d[b] * np.float32(sc[b, j])
            store_codes(x[b], j * size, size, low, high, step, ZERO, q[b])


@compiled
def search_single(
    x: F32,
    w: F32,
    low: np.float32,
    high: np.float32,
    bits: int,
    family: F32,
    q: I8,
    d: F32,
) -> None:
    """Blocks with one scale: float32 `x` [B, block] into q (int8) and d (float32, exact halves)."""
    count, block = x.shape
    s = np.empty(7 * LANES, np.float32)
    for b in range(count):
        xb = x[b]
        wb = w[b % w.shape[0]]
        top = largest(xb, 0, block)
        unit = binade_unit(top, bits) if top > ZERO and bits > 0 else ZERO
        if not (unit > ZERO and round_half(unit) == unit and all_multiples(xb, 0, block, unit)):
            unit, _ = real_step(xb, wb, 0, block, low, high, family, s)
            _, sqq, sxq = sums_for(xb, wb, 0, block, low, high, unit, ZERO)
            unit = round_half(sxq / sqq if sqq > TINY else unit)
        d[b] = unit
        store_codes(xb, 0, block, low, high, unit, ZERO, q[b])


@compiled
def round_bytes(x: F32, bits: int, q: I8, d: F32) -> None:
    """q8_0, whose step is the largest magnitude over 127: at eight bits no search pays its time."""
    count, block = x.shape
    limit = np.float32(127.0)
    for b in range(count):
        top = largest(x[b], 0, block)
        unit = binade_unit(top, bits) if top > ZERO else ZERO
        if not (unit > ZERO and round_half(unit) == unit and all_multiples(x[b], 0, block, unit)):
            unit = round_half(top / limit)
        d[b] = unit
        store_codes(x[b], 0, block, -limit, limit, unit, ZERO, q[b])
