"""One group of eight weights onto a codebook: points and signs that cost least together.

The cost of errors e of a group is e S e^T (`codebook_scan`). Signs start as those of the weights.
Where an even number must be negative and an odd one is, each of the `FLIPS` cheapest to turn is
tried with a search of its own. Where any may be, one or two are turned as long as the joint cost
falls, with a new search after each turn; where their number must stay even that gains a third of a
percent and costs a fifth more time.

Grids of four take two points a group: the error of the first moves the second's weights, and the
group's signs are counted over both.

`w` is float32 scratch `[ROWS, 8]`, one vector a row; the constants below say which.
"""

from __future__ import annotations

import numpy as np

from v4quant_kernels.native import inlined
from v4quant_kernels.native.ggml.codebook_scan import nearest_4, nearest_8, nearest_shifted
from v4quant_kernels.native.ggml.scan import F32, I64, ONE, ZERO

FLIPS = 3
NO_SHIFT, EITHER_SHIFT = -2, -1
TURNS = 2
"""Times signs are turned and the grid is searched anew."""

V, SV, U, Q, E = 0, 1, 2, 3, 4
"""Weights; S v; what a search multiplies the grid with; the points chosen; v - step q."""
TRIED_Q, TRIED_E, GRADIENT, MOVE, GAIN = 5, 6, 7, 8, 9
HALF_V, HALF_Q, HALF_E, FIRST_Q, FIRST_E = 10, 11, 12, 13, 14
POINT, OVER = 15, 16
"""The point found, before its signs; errors over the pivots."""
ROWS = 17

SIGNS = np.where(np.arange(256)[:, None] >> np.arange(8) & 1, -1, 1).astype(np.float32)
"""A row of signs for each mask of eight bits."""

TWO = np.float32(2.0)
HUGE = np.float32(3e38)
LEAST_GAIN = np.float32(1e-5)


# Rows are read as wholes before they are written, in constant lengths: one vector instruction each,
# and no branch that depends on a sign.
@inlined
def turn_row(n: int, factor: np.float32, mask: int, w: F32, source: int, result: int) -> None:
    """factor times a row under the signs of `mask`."""
    a, b, c, d = w[source, 0], w[source, 1], w[source, 2], w[source, 3]
    if n == 8:
        e, f, g, h = w[source, 4], w[source, 5], w[source, 6], w[source, 7]
        w[result, 4], w[result, 5] = factor * e * SIGNS[mask, 4], factor * f * SIGNS[mask, 5]
        w[result, 6], w[result, 7] = factor * g * SIGNS[mask, 6], factor * h * SIGNS[mask, 7]
    w[result, 0], w[result, 1] = factor * a * SIGNS[mask, 0], factor * b * SIGNS[mask, 1]
    w[result, 2], w[result, 3] = factor * c * SIGNS[mask, 2], factor * d * SIGNS[mask, 3]


@inlined
def leave(n: int, step: np.float32, w: F32, v: int, q: int, e: int) -> None:
    """What a point leaves of a row: v - step q into row e."""
    for i in range(n):
        w[e, i] = w[v, i] - step * w[q, i]


@inlined
def inner(n: int, w: F32, one: int, other: int) -> np.float32:
    """The inner product of two rows, in pairs: a chain of eight sums would take as long as a search
    of fifty points."""
    a = w[one, 0] * w[other, 0] + w[one, 1] * w[other, 1]
    b = w[one, 2] * w[other, 2] + w[one, 3] * w[other, 3]
    if n == 8:
        a += w[one, 4] * w[other, 4] + w[one, 5] * w[other, 5]
        b += w[one, 6] * w[other, 6] + w[one, 7] * w[other, 7]
    result: np.float32 = a + b
    return result


@inlined
def weigh(s: F32, group: int, n: int, w: F32, source: int, result: int) -> np.float32:
    """S v of row `source` into row `result`; returns v S v."""
    if n == 8:  # constant lengths: whole rows are one vector instruction
        for i in range(8):
            w[result, i] = ZERO
        for j in range(8):
            v = w[source, j]
            for i in range(8):
                w[result, i] += s[group, j, i] * v
    else:
        for i in range(4):
            w[result, i] = ZERO
        for j in range(4):
            v = w[source, j]
            for i in range(4):
                w[result, i] += s[group, j, i] * v
    return inner(n, w, result, source)


@inlined
def negative(n: int, step: np.float32, w: F32, row: int) -> int:
    """A bit for each number of a row that is negative in units of the step."""
    mask = 0
    for i in range(n):
        if w[row, i] * step < ZERO:
            mask |= 1 << i
    return mask


@inlined
def odd(mask: int) -> bool:
    """Whether an odd number of eight bits is set."""
    mask ^= mask >> 4
    mask ^= mask >> 2
    mask ^= mask >> 1
    return (mask & 1) == 1


@inlined
def cheapest(s: F32, group: int, n: int, w: F32, row: int, order: I64) -> None:
    """The `FLIPS` weights whose sign costs least to turn, by S_ii v_i^2, into order."""
    taken = 0
    for k in range(FLIPS):
        least = HUGE
        order[k] = 0
        for i in range(n):
            cost = s[group, i, i] * w[row, i] * w[row, i]
            if cost < least and not (taken >> i) & 1:
                least = cost
                order[k] = i
        taken |= 1 << order[k]


@inlined
def copy_row(n: int, w: F32, source: int, result: int) -> None:
    """One row of the scratch into another."""
    for i in range(n):
        w[result, i] = w[source, i]


@inlined
def search_point(
    grid: F32, table: F32, group: int, n: int, step: np.float32, mask: int, base: np.float32,
    w: F32, v: int, q: int, e: int,
) -> np.float32:  # fmt: skip
    """The best point under the signs of `mask` for row v, into row q, its error into e; its cost.

    Row SV has S v, and base = v S v.
    """
    turn_row(n, TWO * step, mask, w, SV, U)
    row = 0
    if table.shape[1] > 1:  # q S q is the same for opposite signs
        top = 1 << (n - 1)
        row = mask ^ (2 * top - 1) if mask & top else mask
    square = step * step
    if n == 8:
        index = nearest_8(grid, table, group, row, w, U, square, base)
        for i in range(8):
            w[POINT, i] = grid[i, index]
    else:
        index = nearest_4(grid, table, group, row, w, U, square, base)
        for i in range(4):
            w[POINT, i] = grid[i, index]
    turn_row(n, ONE, mask, w, POINT, q)
    leave(n, step, w, v, q, e)
    cost: np.float32 = base + square * table[group, row, index] - inner(n, w, U, POINT)
    return cost


@inlined
def best_turn(s: F32, group: int, n: int, step: np.float32, w: F32, q: int, e: int) -> int:
    """The one or two signs of row q whose turning lowers the cost most, as a mask; or 0."""
    present = weigh(s, group, n, w, e, GRADIENT)
    for i in range(n):
        move = TWO * step * w[q, i]
        w[MOVE, i] = move
        w[GAIN, i] = move * (TWO * w[GRADIENT, i] + move * s[group, i, i])
    least = -LEAST_GAIN * present
    found = 0
    for i in range(n):
        if w[GAIN, i] < least:
            least = w[GAIN, i]
            found = 1 << i
        twice = TWO * w[MOVE, i]
        for j in range(i):
            both = w[GAIN, i] + w[GAIN, j] + twice * w[MOVE, j] * s[group, i, j]
            if both < least:
                least = both
                found = (1 << i) | (1 << j)
    return found


@inlined
def turn_signs(
    grid: F32, table: F32, s: F32, group: int, n: int, step: np.float32, mask: int,
    base: np.float32, cost: np.float32, w: F32, v: int, q: int, e: int,
) -> np.float32:  # fmt: skip
    """Turn signs of row q (of `mask`) while its cost falls; returns the cost."""
    for _ in range(TURNS):
        turn = best_turn(s, group, n, step, w, q, e)
        if turn == 0:
            break
        mask ^= turn
        new = search_point(grid, table, group, n, step, mask, base, w, v, TRIED_Q, TRIED_E)
        if not new < cost:
            break
        cost = new
        copy_row(n, w, TRIED_Q, q)
        copy_row(n, w, TRIED_E, e)
    return cost


@inlined
def search_signs(
    grid: F32, table: F32, s: F32, group: int, n: int, step: np.float32, mask: int, flips: int,
    base: np.float32, w: F32, v: int, q: int, e: int, order: I64,
) -> tuple[np.float32, int]:  # fmt: skip
    """The best point of row v under the signs of `mask`, or with one of so many turned (0: none).

    Returns its cost and signs.
    """
    if flips == 0:
        return search_point(grid, table, group, n, step, mask, base, w, v, q, e), mask
    cheapest(s, group, n, w, v, order)
    cost, best = HUGE, mask
    for k in range(flips):
        tried = mask ^ (1 << order[k])
        new = search_point(grid, table, group, n, step, tried, base, w, v, TRIED_Q, TRIED_E)
        if new < cost:
            cost, best = new, tried
            copy_row(n, w, TRIED_Q, q)
            copy_row(n, w, TRIED_E, e)
    return cost, best


@inlined
def code_eight(
    grid: F32, table: F32, s: F32, group: int, step: np.float32, even: bool, w: F32, order: I64
) -> np.float32:
    """The best signed point for row V into row Q, its error into E; returns its cost."""
    base = weigh(s, group, 8, w, V, SV)
    mask = negative(8, step, w, V)
    flips = FLIPS if even and odd(mask) else 0
    cost, mask = search_signs(
        grid, table, s, group, 8, step, mask, flips, base, w, V, Q, E, order
    )  # fmt: skip
    if even:
        return cost
    return turn_signs(grid, table, s, group, 8, step, mask, base, cost, w, V, Q, E)


@inlined
def code_half(
    grid: F32, table: F32, s: F32, half: int, step: np.float32, mask: int, flips: int, even: bool,
    w: F32, order: I64,
) -> np.float32:  # fmt: skip
    """The best point of four for row HALF_V into HALF_Q, its error into HALF_E; its cost."""
    base = weigh(s, half, 4, w, HALF_V, SV)
    cost, mask = search_signs(
        grid, table, s, half, 4, step, mask, flips, base, w, HALF_V, HALF_Q, HALF_E, order
    )  # fmt: skip
    if even:
        return cost
    return turn_signs(
        grid, table, s, half, 4, step, mask, base, cost, w, HALF_V, HALF_Q, HALF_E
    )  # fmt: skip


@inlined
def code_fours(
    grid: F32, table: F32, s: F32, carry: F32, group: int, step: np.float32, even: bool, w: F32,
    order: I64, first: I64,
) -> np.float32:  # fmt: skip
    """As `code_eight` with two points of four; carry `[groups, 4, 4]`: how the first one's error
    moves the second's weights. first: int64 `[FLIPS]`, overwritten."""
    copy_row(4, w, V, HALF_V)
    natural = negative(4, step, w, HALF_V)
    cheapest(s, 2 * group, 4, w, HALF_V, first)
    least = HUGE
    for k in range(-1, FLIPS):
        copy_row(4, w, V, HALF_V)
        mask = natural if k < 0 else natural ^ (1 << first[k])
        cost = code_half(grid, table, s, 2 * group, step, mask, 0, even, w, order)
        if not cost < least:
            continue
        copy_row(4, w, HALF_Q, FIRST_Q)
        copy_row(4, w, HALF_E, FIRST_E)
        for j in range(4):
            moved = w[V, 4 + j]
            for i in range(4):
                moved -= w[HALF_E, i] * carry[group, i, j]
            w[HALF_V, j] = moved
        signs = negative(4, ONE, w, FIRST_Q) | (negative(4, step, w, HALF_V) << 4)
        tangled = even and odd(signs)
        flips = 0 if not tangled else (FLIPS if k < 0 else 1)
        cost += code_half(grid, table, s, 2 * group + 1, step, signs >> 4, flips, even, w, order)
        if cost < least:
            least = cost
            for i in range(4):
                w[Q, i], w[Q, 4 + i] = w[FIRST_Q, i], w[HALF_Q, i]
                w[E, i], w[E, 4 + i] = w[FIRST_E, i], w[V, 4 + i] - step * w[HALF_Q, i]
        if not tangled and k < 0:
            break
    return least


@inlined
def code_shifted(
    grid: F32, table: F32, s: F32, group: int, step: np.float32, shift: int, w: F32
) -> np.float32:
    """The best point of a grid without signs, plus or minus one, for row V, as `code_eight`.

    shift: 0 adds one to every number of a point, 1 takes it away, -1 tries both.
    """
    base = weigh(s, group, 8, w, V, SV)
    factor, total = TWO * step, ZERO
    for i in range(8):
        w[U, i] = factor * w[SV, i]
        total += w[U, i]
    square = step * step
    if shift < 0:
        found = nearest_shifted(grid, table, group, w, U, square, base - total, base + total)
        index, shift = found >> 1, found & 1
    else:
        moved = base - total if shift == 0 else base + total
        index = nearest_8(grid, table, group, shift, w, U, square, moved)
    added = -ONE if shift else ONE
    cost: np.float32 = base - added * total + square * table[group, shift, index]
    for i in range(8):
        p = grid[i, index]
        cost -= w[U, i] * p
        w[Q, i] = p + added
        w[E, i] = w[V, i] - step * w[Q, i]
    return cost


@inlined
def code_group(
    grid: F32, table: F32, s: F32, carry: F32, group: int, step: np.float32, vector: int,
    even: bool, shift: int, w: F32, order: I64, first: I64,
) -> np.float32:  # fmt: skip
    """`code_shifted` where shift is not `NO_SHIFT`, else `code_eight` or `code_fours`."""
    if shift != NO_SHIFT:
        return code_shifted(grid, table, s, group, step, shift, w)
    if vector == 8:
        return code_eight(grid, table, s, group, step, even, w, order)
    return code_fours(grid, table, s, carry, group, step, even, w, order, first)
