"""Thirty-two sub-blocks side by side: scans whose lanes are sub-blocks, not candidates.

A tile is float32 `[size * LANES]`: element i of lane c at i * LANES + c. Every lane tries a
candidate of its own, so how many there are is free, and no lane waits for the best of another. Sums
run in the order of elements, as everywhere here. They are kept in an array of the function's own
stack: only then does the compiler know that nothing else points there, and keeps them in registers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.scan import F32, I8, I64, LANES, ROUND, ZERO


@intrinsic  # type: ignore[untyped-decorator]
def _sums(typing_context: Any) -> Any:
    """A pointer to 2 * LANES float32 of the stack."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number = context.get_value_type(types.float32)
        return cgutils.alloca_once(builder, number, size=2 * LANES)

    return types.CPointer(types.float32)(), code


@compiled
def tile_sums(
    x: F32, w: F32, size: int, low: np.float32, high: np.float32, inverse: F32, qq: F32, xq: F32
) -> None:
    """Sums over each lane's nearest integers low <= q <= high: w q q and w x q.

    inverse: reciprocal steps [LANES], 0 for a step of 0.
    """
    sums = carray(_sums(), (2 * LANES,))
    for c in range(2 * LANES):
        sums[c] = ZERO
    for i in range(size):
        for c in range(LANES):
            v = x[i * LANES + c]
            q = min(max(v * inverse[c], low), high)
            q = (q + ROUND) - ROUND
            t = w[i * LANES + c] * q
            sums[c] += t * q
            sums[LANES + c] += t * v
    for c in range(LANES):
        qq[c] = sums[c]
        xq[c] = sums[LANES + c]


@compiled
def tile_errors(
    x: F32, w: F32, size: int, low: np.float32, high: np.float32, step: F32, inverse: F32, out: F32
) -> None:
    """sum w (x - step q)^2 of each lane for its nearest integers."""
    sums = carray(_sums(), (2 * LANES,))
    for c in range(LANES):
        sums[c] = ZERO
    for i in range(size):
        for c in range(LANES):
            v = x[i * LANES + c]
            q = min(max(v * inverse[c], low), high)
            q = (q + ROUND) - ROUND
            e = v - step[c] * q
            sums[c] += w[i * LANES + c] * (e * e)
    for c in range(LANES):
        out[c] = sums[c]


@compiled
def load(x: F32, w: F32, blocks: I64, subs: int, again: bool, tile: F32) -> None:
    """Sub-blocks of some blocks of `x` [B, block] and their weights into tile[0] and tile[1].

    `again`: the tile was loaded before, so weights that are the same for every block are there.
    Lanes that stay empty keep what they had: nobody reads their results.
    """
    size = x.shape[1] // subs
    for k in range(blocks.size):
        xb = x[blocks[k]]
        for j in range(subs):
            for i in range(size):
                tile[0, i * LANES + k * subs + j] = xb[j * size + i]
        if again and w.shape[0] == 1:
            continue
        wb = w[blocks[k] % w.shape[0]]
        for j in range(subs):
            for i in range(size):
                tile[1, i * LANES + k * subs + j] = wb[j * size + i]


@compiled
def store(tile: F32, low: np.float32, high: np.float32, inverse: F32, blocks: I64, q: I8) -> None:
    """The nearest integers of a loaded tile into rows `blocks` of `q` [B, block]; `tile` is spent.

    inverse: reciprocal steps [LANES], 0 for a step of 0.
    """
    x = tile[0]
    for i in range(x.size // LANES):
        for c in range(LANES):
            v = min(max(x[i * LANES + c] * inverse[c], low), high)
            x[i * LANES + c] = (v + ROUND) - ROUND
    size = x.size // LANES
    subs = q.shape[1] // size
    for k in range(blocks.size):
        qb = q[blocks[k]]
        for j in range(subs):
            for i in range(size):
                qb[j * size + i] = np.int8(x[i * LANES + k * subs + j])
