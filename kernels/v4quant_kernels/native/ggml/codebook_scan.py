"""The point of a codebook nearest to a vector: the innermost loops of IQ searches.

With S the matrix that weighs errors, sigma the signs and s the step, the cost of point g is

    (v - s sigma g) S (v - s sigma g)^T = v S v^T - 2 s (g . sigma S v^T) + s^2 g sigma S sigma g^T

and the last product depends on no row: it is read from a table (`tables`). What is left is a dot
product a point. The least is found over 32-bit integers, the cost's bits (which order as positive
floats do) with the last ones replaced by the index, so that the compiler can keep sixteen
minima side by side; costs that differ by less than 2^-12 of their size count as equal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from v4quant_kernels.native import inlined
from v4quant_kernels.native.ggml.scan import F32, ZERO


@intrinsic  # type: ignore[untyped-decorator]
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c rounded once, on every processor."""
    del typing_context, a, b, c
    signature = types.float32(types.float32, types.float32, types.float32)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        number = ir.FloatType()
        kind = ir.FunctionType(number, [number] * 3)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32")
        return builder.call(function, arguments)

    return signature, code


@intrinsic  # type: ignore[untyped-decorator]
def lower(typing_context: Any, best: Any, cost: Any, keep: Any, index: Any) -> Any:
    """The lesser of the int32 `best` and (bits of the float32 `cost` & `keep`) | `index`.

    Written in LLVM's terms because Numba widens every operation on int32 to 64 bits: half as many
    lanes a vector.
    """
    del typing_context, best, cost, keep, index
    word = types.int32
    signature = word(word, types.float32, word, types.int64)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        best, cost, keep, index = arguments
        kind = ir.IntType(32)
        kept = builder.and_(builder.bitcast(cost, kind), keep)
        key = builder.or_(kept, builder.trunc(index, kind))
        return builder.select(builder.icmp_signed("<", key, best), key, best)

    return signature, code


@inlined
def nearest_8(
    grid: F32, table: F32, group: int, row: int, w: F32, u: int, square: np.float32,
    base: np.float32,
) -> int:  # fmt: skip
    """Index of the point c of least `base + square table[group, row, c] - w[u] . grid[:, c]`.

    grid: `[8, E]`, E a power of two; w: `[rows, 8]`.
    """
    u0, u1, u2, u3 = -w[u, 0], -w[u, 1], -w[u, 2], -w[u, 3]
    u4, u5, u6, u7 = -w[u, 4], -w[u, 5], -w[u, 6], -w[u, 7]
    entries = grid.shape[1]
    keep = np.int32(~(entries - 1))
    best = np.int32(0x7FFFFFFF)
    for c in range(entries):
        a = fused(grid[3, c], u3, fused(square, table[group, row, c], base))
        a = fused(grid[0, c], u0, fused(grid[1, c], u1, fused(grid[2, c], u2, a)))
        b = fused(grid[5, c], u5, fused(grid[6, c], u6, grid[7, c] * u7))
        cost = a + fused(grid[4, c], u4, b)
        best = lower(best, max(cost, ZERO), keep, c)
    return int(best & np.int32(entries - 1))


@inlined
def nearest_4(
    grid: F32, table: F32, group: int, row: int, w: F32, u: int, square: np.float32,
    base: np.float32,
) -> int:  # fmt: skip
    """As `nearest_8` for a grid `[4, E]`."""
    u0, u1, u2, u3 = -w[u, 0], -w[u, 1], -w[u, 2], -w[u, 3]
    entries = grid.shape[1]
    keep = np.int32(~(entries - 1))
    best = np.int32(0x7FFFFFFF)
    for c in range(entries):
        a = fused(grid[3, c], u3, fused(square, table[group, row, c], base))
        cost = fused(grid[0, c], u0, fused(grid[1, c], u1, fused(grid[2, c], u2, a)))
        best = lower(best, max(cost, ZERO), keep, c)
    return int(best & np.int32(entries - 1))


@inlined
def nearest_shifted(
    grid: F32, table: F32, group: int, w: F32, u: int, square: np.float32, up: np.float32,
    down: np.float32,
) -> int:  # fmt: skip
    """As `nearest_8` over two shifts of every point: twice the index, plus 1 for the second.

    up, down: `base` of either; rows 0 and 1 of the table are theirs.
    """
    u0, u1, u2, u3 = -w[u, 0], -w[u, 1], -w[u, 2], -w[u, 3]
    u4, u5, u6, u7 = -w[u, 4], -w[u, 5], -w[u, 6], -w[u, 7]
    entries = grid.shape[1]
    keep = np.int32(~(2 * entries - 1))
    best = np.int32(0x7FFFFFFF)
    for c in range(entries):
        a = fused(grid[0, c], u0, fused(grid[1, c], u1, fused(grid[2, c], u2, grid[3, c] * u3)))
        b = fused(grid[5, c], u5, fused(grid[6, c], u6, grid[7, c] * u7))
        dot = a + fused(grid[4, c], u4, b)
        first = max(fused(square, table[group, 0, c], up) + dot, ZERO)
        second = max(fused(square, table[group, 1, c], down) + dot, ZERO)
        best = lower(lower(best, first, keep, 2 * c), second, keep, 2 * c + 1)
    return int(best & np.int32(2 * entries - 1))
