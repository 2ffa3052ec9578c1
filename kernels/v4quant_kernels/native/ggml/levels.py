"""The search for GGML types whose integers are some uneven levels: IQ4_NL and IQ4_XS.

As `symmetric`: a family of steps of both signs (the levels reach further on one side) assigns
levels, the best step for each assignment follows in closed form; `d` is chosen so that its
multiples lie near those optima; then every sub-block tries the integers `sc` about its own.
"""

from __future__ import annotations

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.scan import (
    F32,
    I8,
    LANES,
    ONE,
    ZERO,
    round_half,
    unit_for,
)

REACH = 2
FAMILY = np.concatenate([s * np.linspace(85, 140, 14) for s in (1, -1)]).astype(np.float32)
"""The largest magnitude over the step."""


@compiled
def nearest_level(middles: F32, v: np.float32) -> int:
    """The index of the level nearest to v, the lower of two: sixteen levels, fifteen middles."""
    found = 8 if v > middles[7] else 0
    found += 4 if v > middles[found + 3] else 0
    found += 2 if v > middles[found + 1] else 0
    found += 1 if v > middles[found] else 0
    return found


@compiled
def level_sums(
    x: F32, w: F32, start: int, size: int, inverse: np.float32, levels: F32, middles: F32
) -> tuple[np.float32, np.float32, np.float32]:
    """Sums over the levels nearest to x * inverse: w q q, w x q and w x x."""
    qq, xq, xx = ZERO, ZERO, ZERO
    for i in range(start, start + size):
        q = levels[nearest_level(middles, x[i] * inverse)]
        qq += w[i] * q * q
        xq += w[i] * x[i] * q
        xx += w[i] * x[i] * x[i]
    return qq, xq, xx


@compiled
def level_step(
    x: F32, w: F32, start: int, size: int, family: F32, levels: F32, middles: F32
) -> tuple[np.float32, np.float32]:
    """The best real step of a sub-block and its curvature w q q; zeros for one of zeros."""
    top, best, step, curve = ZERO, ZERO, ZERO, ZERO
    for i in range(start, start + size):
        top = max(top, abs(x[i]))
    if not top > ZERO:
        return ZERO, ZERO
    for k in range(family.size + 1):
        inverse = family[k] / top if k < family.size else ONE / step
        qq, xq, _ = level_sums(x, w, start, size, inverse, levels, middles)
        if xq * (xq / qq) > best:
            best, step, curve = xq * (xq / qq), xq / qq, qq
    return step, curve


@compiled
def level_scale(
    x: F32, w: F32, start: int, size: int, d: np.float32, near: np.float32, limits: F32,
    levels: F32, middles: F32,
) -> np.float32:  # fmt: skip
    """The integer about `near` whose multiple of d has the least error."""
    least, best = np.float32(np.inf), ZERO
    middle = np.rint(near)
    for k in range(2 * REACH + 1):
        off = np.float32((k + 1) // 2 if k % 2 else -(k // 2))
        sc = min(max(middle + off, limits[0]), limits[1])
        step = d * sc
        inverse = ONE / step if step != ZERO else ZERO
        qq, xq, xx = level_sums(x, w, start, size, inverse, levels, middles)
        error = xx - step * (xq + xq - step * qq)
        if error < least:
            least, best = error, sc
    return best


@compiled
def search_levels(
    x: F32, w: F32, family: F32, limits: F32, levels: F32, middles: F32, q: I8, sc: I8, d: F32
) -> None:
    """Blocks of float32 `x` [B, block] into q, sc (int8) and d (float32, exact halves).

    w: float32 [blocks a row, block]; limits: of `sc`, none for types without (sc is then 1).
    """
    count, block = x.shape
    subs = sc.shape[1]
    size = block // subs
    steps, curves = np.empty(subs, np.float32), np.empty(subs, np.float32)
    scratch = np.empty(7 * LANES, np.float32)
    for b in range(count):
        wb = w[b % w.shape[0]]
        for j in range(subs):
            steps[j], curves[j] = level_step(
                x[b], wb, j * size, size, family, levels, middles
            )  # fmt: skip
        if limits.size:
            d[b] = unit_for(steps, curves, limits[1], scratch)
        else:
            d[b] = round_half(steps[0])
        for j in range(subs):
            near = steps[j] / d[b] if d[b] != ZERO else ZERO
            scale = ONE
            if limits.size:
                scale = level_scale(
                    x[b], wb, j * size, size, d[b], near, limits, levels, middles
                )  # fmt: skip
            sc[b, j] = np.int8(scale)
            step = d[b] * scale
            inverse = ONE / step if step != ZERO else ZERO
            for i in range(j * size, (j + 1) * size):
                q[b, i] = np.int8(levels[nearest_level(middles, x[b, i] * inverse)])
