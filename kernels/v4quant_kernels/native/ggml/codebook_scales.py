"""The step that serves a sub-block best, alone and with diagonal weights, over a codebook.

A family of steps codes the sub-block; for every code the best step follows in closed form,
sum w x q / sum w q q, and what it gains is (sum w x q)^2 / sum w q q. The best is solved once more
for the code that it assigns itself.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.codebook_vectors import (
    EITHER_SHIFT,
    FLIPS,
    NO_SHIFT,
    ROWS,
    Q,
    V,
    code_group,
)
from v4quant_kernels.native.ggml.scan import F32, ZERO
from v4quant_kernels.native.threads import over_rows
from v4quant_kernels.ref.codebook_fit import Weighing


def ideal_steps(values: F32, weights: F32, weighing: Weighing, family: F32, found: F32) -> None:
    """Steps and their curvature sum w q q into found `[2, N]`; 0 and 0 for rows of zeros.

    values: `[size, N]`; weights: `[size]`, the diagonal that `weighing` was made of. family: steps
    tried, over the largest magnitude.
    """
    book = weighing.codebook
    parts = (weighing.table, weighing.s, weighing.carry)
    table, s, carry = (part[0].contiguous().numpy() for part in parts)
    rows = np.ascontiguousarray(values.T)  # as in `codebook_fit.fit`
    loop = partial(
        _ideal_steps, rows, weights, weighing.grid.numpy(), table, s, carry, family, book.vector,
        book.signs == "even", EITHER_SHIFT if book.shift else NO_SHIFT, found,
    )  # fmt: skip
    over_rows(len(rows), loop)


@compiled
def _ideal_steps(  # type: ignore[no-untyped-def]
    values, weights, grid, table, s, carry, family, vector, even, shift, found, start, stop
):
    size = values.shape[1]
    w = np.empty((ROWS, 8), np.float32)
    order, first = np.empty(FLIPS, np.int64), np.empty(FLIPS, np.int64)
    for n in range(start, stop):
        top = ZERO
        for i in range(size):
            top = max(top, abs(values[n, i]))
        best, found[0, n], found[1, n] = ZERO, ZERO, ZERO
        if not top > ZERO:
            continue
        for k in range(len(family) + 1):
            step = top * family[k] if k < len(family) else found[0, n]
            if not step > ZERO:
                continue
            xq, qq = ZERO, ZERO
            for g in range(size // 8):
                for i in range(8):
                    w[V, i] = values[n, 8 * g + i]
                code_group(
                    grid, table, s, carry, g, step, vector, even, shift, w, order, first
                )  # fmt: skip
                for i in range(8):
                    t = weights[8 * g + i] * w[Q, i]
                    xq += t * w[V, i]
                    qq += t * w[Q, i]
            if xq > ZERO and xq * (xq / qq) > best:
                best = xq * (xq / qq)
                found[0, n], found[1, n] = xq / qq, qq
