"""The search for GGML types without minima: q3_k, q6_k, and with one scale q8_0, q5_0, q4_0.

A value is `d sc q` with integers -n <= q < n, one more on the negative side, so the sign of the
step matters. The weighted squared error is made small in three steps:

1. Each sub-block alone, with a real step: a family of steps of both signs assigns integers, and
   for every assignment the best step follows in closed form.
2. `d` is chosen so that the rounded `d sc` lie near those optima, each deviation counted with the
   curvature of its sub-block's error. With one scale, `d` is that optimum, solved once more for the
   integers it assigns itself.
3. Every sub-block tries the integers `sc` about its optimum, with exact errors.

Thirty-two sub-blocks are searched side by side (`ggml_lanes.py`). Blocks of lattice points need no
search: they are stored as they are, and only the others wait for a place in a tile.

All sums run in the order of elements, in float32.
"""

from __future__ import annotations

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.exact import all_multiples, binade_unit, largest, lattice_units
from v4quant_kernels.native.ggml.lanes import load, store, tile_errors, tile_sums
from v4quant_kernels.native.ggml.scan import (
    F32,
    I8,
    I64,
    LANES,
    ONE,
    ROUND,
    ZERO,
    round_half,
    store_codes,
    unit_for,
)

SPREAD = np.float32(64.0)
"""The largest power of two among the scales of q6_k."""

TINY = np.float32(1e-30)


@compiled
def reciprocals(step: F32, inverse: F32) -> None:
    """1 / step of every lane, 0 for a step of 0."""
    for c in range(LANES):
        inverse[c] = ONE / step[c] if step[c] != ZERO else ZERO


@compiled
def real_steps(
    x: F32, w: F32, size: int, low: np.float32, high: np.float32, family: F32, s: F32
) -> None:
    """The best real step of each lane, of either sign, into s[0], its curvature w q q into s[1].

    s: float32 [7, LANES]; the rest is overwritten. Lanes of zeros get 0.
    """
    step, curve, inverse, qq, xq, unit, best = s[0], s[1], s[2], s[3], s[4], s[5], s[6]
    for c in range(LANES):
        unit[c] = ZERO
        step[c] = ZERO
        curve[c] = ZERO
        best[c] = ZERO
    for i in range(size):
        for c in range(LANES):
            unit[c] = max(unit[c], abs(x[i * LANES + c]))
    reciprocals(unit, unit)
    for k in range(family.size):
        for c in range(LANES):
            inverse[c] = family[k] * unit[c]
        tile_sums(x, w, size, low, high, inverse, qq, xq)
        for c in range(LANES):
            here = xq[c] / (qq[c] + TINY)
            gain = here * xq[c]
            better = gain > best[c]
            best[c] = gain if better else best[c]
            step[c] = here if better else step[c]
            curve[c] = qq[c] if better else curve[c]


@compiled
def nearest_scales(
    x: F32,
    w: F32,
    size: int,
    low: np.float32,
    high: np.float32,
    bottom: np.float32,
    limit: np.float32,
    reach: int,
    s: F32,
) -> None:
    """The best integer scale of each lane into s[1], at most `reach` from the real one.

    s: float32 [7, LANES]; 0 d, 1 real scale in units of d; the rest is overwritten.
    """
    d, near, step, inverse, error, least, best = s[0], s[1], s[2], s[3], s[4], s[5], s[6]
    for c in range(LANES):
        near[c] = (near[c] + ROUND) - ROUND
        least[c] = np.float32(np.inf)
        best[c] = ZERO
    for k in range(-reach, reach + 1):
        for c in range(LANES):
            step[c] = d[c] * min(max(near[c] + np.float32(k), bottom), limit)
        reciprocals(step, inverse)
        tile_errors(x, w, size, low, high, step, inverse, error)
        for c in range(LANES):
            better = error[c] < least[c]
            least[c] = error[c] if better else least[c]
            best[c] = min(max(near[c] + np.float32(k), bottom), limit) if better else best[c]
    for c in range(LANES):
        near[c] = best[c]


@compiled
def search_waiting(
    x: F32,
    w: F32,
    waiting: I64,
    low: np.float32,
    high: np.float32,
    bottom: np.float32,
    limit: np.float32,
    family: F32,
    reach: int,
    again: bool,
    tile: F32,
    s: F32,
    q: I8,
    sc: I8,
    d: F32,
) -> None:
    """q, sc and d of the blocks whose numbers are in `waiting`, at most a tile of them."""
    subs = sc.shape[1]
    size = x.shape[1] // subs
    load(x, w, waiting, subs, again, tile)
    real_steps(tile[0], tile[1], size, low, high, family, s)
    for k in range(waiting.size):
        lanes = slice(k * subs, (k + 1) * subs)
        unit = unit_for(s[0, lanes], s[1, lanes], limit, tile[2])
        d[waiting[k]] = unit
        for c in range(k * subs, (k + 1) * subs):
            s[1, c] = s[0, c] / unit if unit > ZERO else ZERO
            s[0, c] = unit
    nearest_scales(tile[0], tile[1], size, low, high, bottom, limit, reach, s)
    for k in range(waiting.size):
        for j in range(subs):
            sc[waiting[k], j] = np.int8(s[1, k * subs + j])
    for c in range(LANES):
        s[2, c] = s[0, c] * s[1, c]
    reciprocals(s[2], s[3])
    store(tile, low, high, s[3], waiting, q)


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
    reach: int,
    q: I8,
    sc: I8,
    d: F32,
) -> None:
    """Blocks of float32 `x` [B, block] into q, sc (int8) and d (float32, exact halves).

    w: float32 [blocks a row, block]. `bits`: lattice points below 2^(bits+1) units are kept
    exactly; 0: not tried. `family`, `reach`: how many steps and scales are tried.
    """
    count, block = x.shape
    subs = sc.shape[1]
    size = block // subs
    tile = np.zeros((3, size * LANES), np.float32)
    s = np.zeros((7, LANES), np.float32)
    near = np.empty(subs, np.float32)
    waiting = np.empty(LANES // subs, np.int64)
    held = 0
    again = False
    for b in range(count):
        finest = lattice_units(x[b], size, bits, SPREAD, near) if bits > 0 else ZERO
        if finest > ZERO:
            d[b] = finest
            for j in range(subs):
                sc[b, j] = np.int8(near[j] / finest)
                store_codes(x[b], j * size, size, low, high, near[j], ZERO, q[b])
        else:
            waiting[held] = b
            held += 1
        if held == waiting.size or b == count - 1:
            search_waiting(
                x, w, waiting[:held], low, high, bottom, limit, family, reach, again, tile, s,
                q, sc, d,
            )  # fmt: skip
            again = True
            held = 0


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
    tile = np.zeros((2, block * LANES), np.float32)
    s = np.zeros((7, LANES), np.float32)
    waiting = np.empty(LANES, np.int64)
    held = 0
    again = False
    for b in range(count):
        top = largest(x[b], 0, block) if bits > 0 else ZERO
        unit = binade_unit(top, bits) if top > ZERO else ZERO
        if unit > ZERO and round_half(unit) == unit and all_multiples(x[b], 0, block, unit):
            d[b] = unit
            store_codes(x[b], 0, block, low, high, unit, ZERO, q[b])
        else:
            waiting[held] = b
            held += 1
        if held == LANES or b == count - 1:
            load(x, w, waiting[:held], 1, again, tile)
            again = True
            real_steps(tile[0], tile[1], block, low, high, family, s)
            reciprocals(s[0], s[2])
            tile_sums(tile[0], tile[1], block, low, high, s[2], s[3], s[4])
            for c in range(held):
                step = s[4, c] / s[3, c] if s[3, c] > TINY else s[0, c]
                s[0, c] = round_half(step)
                d[waiting[c]] = s[0, c]
            reciprocals(s[0], s[2])
            store(tile, low, high, s[2], waiting[:held], q)
            held = 0


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
