"""Sub-blocks onto a codebook with error feedback: the loop of `ref.codebook_fit` over rows.

Rows are independent. A row's groups of eight are coded in turn under every candidate of its step;
a candidate is given up as soon as it costs more than the best so far, or than a bound.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled, inlined
from v4quant_kernels.native.ggml.codebook_scan import fused
from v4quant_kernels.native.ggml.codebook_vectors import (
    EITHER_SHIFT,
    FLIPS,
    NO_SHIFT,
    OVER,
    ROWS,
    E,
    Q,
    V,
    code_group,
    inner,
)
from v4quant_kernels.native.ggml.scan import F32, ZERO
from v4quant_kernels.native.threads import over_rows
from v4quant_kernels.ref.codebook_fit import Weighing


def fit(
    values: F32, weighing: Weighing, member: int, step: F32, choice: NDArray[np.int64], q: F32,
    errors: F32, cost: F32,
) -> None:  # fmt: skip
    """For every row the best of its steps, into the last four arguments.

    values: `[size, N]`; step: `[steps, N]`; choice, cost: `[N]`; q, errors (over the pivots):
    `[size, N]`. The first of equals wins. member: of the batch that `weighing` is of. cost holds
    bounds before: it becomes infinite where no step costs less, and the rest of the row is 0.
    """
    book = weighing.codebook
    shifts: tuple[int, ...] = (NO_SHIFT,)
    if book.shift:
        shifts = (0, 1) if book.shift > 8 else (EITHER_SHIFT,)
    parts = (weighing.table, weighing.s, weighing.carry, weighing.inverse, weighing.factor)
    table, s, carry, inverse, factor = (part[member].contiguous().numpy() for part in parts)
    # Row by row in memory: channels of many rows lie a power of two apart, in one set of the cache.
    rows = np.ascontiguousarray(values.T)
    codes, missed = np.zeros_like(rows), np.zeros_like(rows)
    loop = partial(
        _fit, rows, weighing.grid.numpy(), table, s, carry, inverse, factor, step, book.vector,
        book.signs == "even", np.array(shifts), choice, codes, missed, cost,
    )  # fmt: skip
    over_rows(len(rows), loop)
    q[:], errors[:] = codes.T, missed.T


@compiled
def _fit(  # type: ignore[no-untyped-def]
    values, grid, table, s, carry, inverse, factor, step, vector, even, shifts, choice, q, errors,
    cost, start, stop,
):  # fmt: skip
    size = values.shape[1]
    w = np.empty((ROWS, 8), np.float32)
    order, first = np.empty(FLIPS, np.int64), np.empty(FLIPS, np.int64)
    work, codes, missed = (
        np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32),
    )  # fmt: skip
    for n in range(start, stop):
        least, served = cost[n], False
        choice[n] = 0
        for k in range(step.shape[0] * shifts.size):
            unit, shift = step[k // shifts.size, n], shifts[k % shifts.size]
            for i in range(size):
                work[i] = values[n, i]
            total = ZERO
            for g in range(size // 8):
                for i in range(8):
                    w[V, i] = work[8 * g + i]
                code_group(
                    grid, table, s, carry, g, unit, vector, even, shift, w, order, first
                )  # fmt: skip
                total += spread(inverse, factor, g, w, codes, missed, work)
                if not total < least:
                    break
            if total < least:
                least, served = total, True
                choice[n] = k // shifts.size
                for i in range(size):
                    q[n, i] = codes[i]
                    errors[n, i] = missed[i]
        cost[n] = least if served else np.float32(np.inf)


@inlined
def spread(  # type: ignore[no-untyped-def]
    inverse, factor, g, w, codes, missed, work
):
    """Keep a group's codes (row Q) and errors, move the weights behind it; returns its cost."""
    start = 8 * g
    for j in range(8):
        codes[start + j] = w[Q, j]
        w[OVER, j] = ZERO
    for i in range(8):  # the inverse is upper: half of these are zeros, and whole rows are faster
        error = w[E, i]
        for j in range(8):
            w[OVER, j] = fused(error, inverse[g, i, j], w[OVER, j])
    a, b, c, d = w[OVER, 0], w[OVER, 1], w[OVER, 2], w[OVER, 3]
    e, f, h, k = w[OVER, 4], w[OVER, 5], w[OVER, 6], w[OVER, 7]
    for j in range(8):
        missed[start + j] = w[OVER, j]
    for n in range(start + 8, len(work)):
        t = fused(-a, factor[start, n], fused(-b, factor[start + 1, n], work[n]))
        t = fused(-c, factor[start + 2, n], fused(-d, factor[start + 3, n], t))
        t = fused(-e, factor[start + 4, n], fused(-f, factor[start + 5, n], t))
        work[n] = fused(-h, factor[start + 6, n], fused(-k, factor[start + 7, n], t))
    return inner(8, w, OVER, OVER)
