"""The integer scale search over E2M1 points as one compiled loop; `ref/lattice.py` has the idea.

Groups are taken in tiles of `_TILE` and laid out with the group as the fastest index, so that every
step of the search is a short loop over contiguous numbers, which the compiler turns into vector
instructions. From one assignment of codes to integers to the next only a few codes change theirs,
so the sums A and B of all groups are carried along and changed by those few.

A and B are exact: products of small integers, powers of two and (with statistics) channel weights
that are multiples of 2^-14. So they do not depend on the order of additions, and the torch search
in `v4quant_kernels.ref.lattice_search` finds the same bits.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled
from v4quant_kernels.ref.lattice import DEPTHS, DOUBLED, NEVER_ZERO, integer_lattice

_TILE = 64  # groups side by side: a tile's sums fit the first-level cache
_BLOCK = 32  # elements of an MXFP4 block
_CODES = 16
_MIN_EXPONENT = -127
_ZERO = 512
_POWER = np.ldexp(1.0, np.arange(-_ZERO, _ZERO))  # _POWER[_ZERO + e] = 2^e
_TWICE_MAGNITUDE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int16)
_NEGATED = np.arange(_CODES) ^ 8
_TWICE_VALUE = np.concatenate([_TWICE_MAGNITUDE, -_TWICE_MAGNITUDE])
_SQUARE = _TWICE_VALUE * _TWICE_VALUE


class Tables(NamedTuple):
    """What the loop needs to know of one integer width, as plain arrays.

    first_a, first_b: [DEPTHS*16], v*q and q*q under the first assignment.
    start: the changes from assignment i-1 to i are numbers start[i-1] to start[i].
    feature, change_a, change_b: which depth*16 + code changes, and by how much.
    asymmetric: assignments before this one treat v and -v differently, later ones alike.
    v_q, q_q: [2, DEPTHS, n, 16], 2*value*q and q*q at depth 0 for scales above and below zero.
    quantized: [DEPTHS, n, 16], q plus offset.
    assignment: by bfloat16 bits of t minus first_bits.
    counters: [2, 256], for every byte eight one-byte counters of codes 0-7, and of codes 8-15.
    doubled: [256], both codes of a byte doubled; byte_codes: `IntegerLattice.byte_table`.
    """

    bits: int
    lowest: float
    highest: float
    first_a: NDArray[np.float64]
    first_b: NDArray[np.float64]
    start: NDArray[np.int64]
    feature: NDArray[np.int64]
    change_a: NDArray[np.float64]
    change_b: NDArray[np.float64]
    asymmetric: int
    v_q: NDArray[np.int16]
    q_q: NDArray[np.int16]
    quantized: NDArray[np.uint8]
    assignment: NDArray[np.int32]
    first_bits: int
    counters: NDArray[np.uint64]
    doubled: NDArray[np.uint8]
    byte_codes: NDArray[np.uint8]


class Loss(NamedTuple):
    """Unweighted sums over a matrix: squared error, squared value; largest absolute error."""

    squared_error: float
    squared_norm: float
    max_error: float


def quantize_mxfp4(
    codes: NDArray[np.uint8],
    exponents: NDArray[np.int32],
    blocks: int,
    bits: int,
    weights: NDArray[np.float64] | None,
    out_codes: NDArray[np.uint8],
    out_scale: NDArray[np.uint16],
) -> Loss:
    """Give every group of an MXFP4 matrix its optimal bfloat16 scale and nearest integers.

    codes: [N, K/2], exponents: [N, K/32]; blocks: MXFP4 blocks a group; weights: [K] multiples of
    2^-14 or None. out_codes: [N, packed row] as `ref/pack.py` lays them out, out_scale: bfloat16
    bits [N, K/(32*blocks)], both contiguous, both written.
    """
    number = np.float32 if weights is None else np.float64
    columns = np.zeros(0) if weights is None else weights
    scratch = _scratch(blocks, 1 if blocks == 1 else DEPTHS, number)
    table = tables(bits, blocks)
    return Loss(
        *_quantize(
            codes.reshape(-1),
            exponents.reshape(-1),
            columns,
            blocks,
            table,
            scratch,
            out_codes.reshape(-1),
            out_scale.reshape(-1),
        )
    )


@cache
def tables(bits: int, blocks: int) -> Tables:
    """The tables of `integer_lattice(bits, blocks)` in the loop's form."""
    lattice = integer_lattice(bits, blocks)
    va, qq = lattice.va.double().numpy(), lattice.qq.double().numpy()
    start, feature, change_a, change_b = [0], [], [], []
    for i in range(1, va.shape[1]):
        a, b = va[:, i] - va[:, i - 1], qq[:, i] - qq[:, i - 1]
        changed = np.nonzero((a != 0) | (b != 0))[0].tolist()
        feature += changed
        change_a += a[changed].tolist()
        change_b += b[changed].tolist()
        start.append(len(feature))
    assignment, first_bits = lattice.assignment_table()
    q = lattice.quantized.numpy().astype(np.int16)
    both = np.stack([q, q[:, :, _NEGATED]])
    asymmetric = np.nonzero((both[0] != -both[1]).any((0, 2)))[0]
    return Tables(
        bits,
        lattice.lowest_scale,
        lattice.highest_scale,
        va[:, 0].copy(),
        qq[:, 0].copy(),
        np.array(start),
        np.array(feature),
        np.array(change_a),
        np.array(change_b),
        int(asymmetric[-1]) + 1,
        both * np.stack([_TWICE_VALUE, -_TWICE_VALUE])[:, None, None],
        both * both,
        (q + (1 << (bits - 1))).astype(np.uint8),
        assignment.numpy(),
        first_bits,
        _make_counters(),
        DOUBLED.numpy(),
        lattice.byte_table().numpy() if bits == 4 else np.zeros(0, np.uint8),
    )


def _make_counters() -> NDArray[np.uint64]:
    byte = np.arange(256)
    counts = np.zeros((256, _CODES), np.uint8)
    np.add.at(counts, (byte, byte & 15), 1)
    np.add.at(counts, (byte, byte >> 4), 1)
    return np.ascontiguousarray(counts.view("<u8").T)


class _Scratch(NamedTuple):
    """One tile's arrays. Group g's blocks are rows g*blocks and following."""

    codes: NDArray[np.uint8]  # [blocks of the tile, 16 bytes], small blocks doubled
    counts: NDArray[np.uint8]  # [blocks, 16]
    packed_counts: NDArray[np.uint64]  # the same memory, [blocks, 2]
    exponent: NDArray[np.int64]  # [blocks]
    top: NDArray[np.int64]  # [groups]
    features: NDArray[np.float64]  # [depths*16, groups], float32 when unweighted
    sums: NDArray[np.float64]  # [2, groups]: A, B; likewise
    gain: NDArray[np.float64]  # [2, groups]: the best so far, for scales above and below zero
    t: NDArray[np.float32]  # [3, groups]: the best of either sign; the one looked at
    chosen: NDArray[np.int64]  # [2, groups]: sign and assignment of the best scale
    step: NDArray[np.float32]  # [groups]: its t, as stored


def _scratch(blocks: int, depths: int, number: type) -> _Scratch:
    packed_counts = np.empty((_TILE * blocks, _CODES // 8), np.uint64)
    return _Scratch(
        np.empty((_TILE * blocks, _BLOCK // 2), np.uint8),
        packed_counts.view(np.uint8),
        packed_counts,
        np.empty(_TILE * blocks, np.int64),
        np.empty(_TILE, np.int64),
        np.zeros((depths * _CODES, _TILE), number),
        np.empty((2, _TILE), number),
        np.empty((2, _TILE), number),
        np.empty((3, _TILE), np.float32),
        np.empty((2, _TILE), np.int64),
        np.empty(_TILE, np.float32),
    )


@compiled
def _quantize(codes, exponents, weights, blocks, table, s, out_codes, out_scale):  # type: ignore[no-untyped-def]
    # A call costs the copying of two tuples of arrays: one call a tile and step, none a group.
    error = norm = largest = 0.0
    for first in range(0, out_scale.size, _TILE):
        groups = min(_TILE, out_scale.size - first)
        start = first * blocks
        _load(codes, exponents, start, groups * blocks, table, s)
        _make_features(weights, start * _BLOCK, groups, blocks, s)
        _search(table, s, 0)
        _search(table, s, 1)
        _choose(table, s, groups, out_scale, first)
        part = _loss(table, s, groups, blocks, largest)
        error, norm, largest = error + part[0], norm + part[1], part[2]
        _encode(table, s, groups, blocks, out_codes, start * (_BLOCK // 8) * table.bits)
    return error, norm, largest


@compiled
def _round_to_bfloat16(bits):  # type: ignore[no-untyped-def]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000


@compiled
def _load(codes, exponents, start, count, table, s):  # type: ignore[no-untyped-def]
    """Fetch the tile's blocks, count their codes, and double those that use only small ones."""
    blocks, counts, doubled = s.codes, s.packed_counts, table.doubled
    small, large = table.counters[0], table.counters[1]
    byte_mask, half, width = np.uint64(0xFF), np.uint64(32), _BLOCK // 2
    for i in range(count):
        for j in range(width):
            blocks[i, j] = codes[(start + i) * width + j]
        exponent = exponents[start + i]
        for _ in range(3):
            low = high = np.uint64(0)
            for j in range(width):
                low += small[blocks[i, j]]
                high += large[blocks[i, j]]
            if (low >> half) | (high >> half):
                break  # a code of 2 or more
            if (low & byte_mask) + (high & byte_mask) == _BLOCK:
                exponent = _MIN_EXPONENT  # zeros are exact under any scale
                break
            exponent -= 1
            for j in range(width):
                blocks[i, j] = doubled[blocks[i, j]]
        s.exponent[i] = exponent
        counts[i, 0], counts[i, 1] = low, high


@compiled
def _make_features(weights, column, groups, blocks, s):  # type: ignore[no-untyped-def]
    """Sum counts, or channel weights, over a group's blocks, by depth and code."""
    features, counts, codes, exponent = s.features, s.counts, s.codes, s.exponent
    features[:] = 0
    for g in range(groups):
        top = exponent[g * blocks]
        for i in range(g * blocks + 1, (g + 1) * blocks):
            top = max(top, exponent[i])
        s.top[g] = top
        for i in range(g * blocks, (g + 1) * blocks):
            depth = min(top - exponent[i], DEPTHS - 1) * _CODES
            if weights.size == 0:
                for c in range(_CODES):
                    features[depth + c, g] += counts[i, c]
                continue
            place = (column + i * _BLOCK) % weights.size
            for j in range(_BLOCK // 2):
                byte = codes[i, j]
                features[depth + (byte & 15), g] += weights[place + 2 * j]
                features[depth + (byte >> 4), g] += weights[place + 2 * j + 1]


@compiled
def _search(table, s, sign):  # type: ignore[no-untyped-def]
    """The best t of every group of the tile for one sign of the scale, with its gain.

    A scale below zero is one above zero for the negated codes, which differ in the sign bit.
    """
    features, a, b, gain, t = s.features, s.sums[0], s.sums[1], s.gain[sign], s.t[2]
    start, changes, best_t, flip = table.start, table.feature, s.t[sign], sign * (_CODES // 2)
    low, high = np.float32(table.lowest), np.float32(table.highest)
    a[:] = 0
    b[:] = 0
    gain[:] = np.inf
    for f in range(features.shape[0]):
        _add(features, f ^ flip, table.first_a[f], table.first_b[f], a, b)
    _look(a, b, t, gain, best_t, low, high)
    # Beyond, both signs give the same, and the positive one is preferred.
    for i in range(1, table.asymmetric if sign else start.size):
        for e in range(start[i - 1], start[i]):
            if changes[e] < features.shape[0]:
                _add(features, changes[e] ^ flip, table.change_a[e], table.change_b[e], a, b)
        _look(a, b, t, gain, best_t, low, high)


@compiled
def _add(features, f, change_a, change_b, a, b):  # type: ignore[no-untyped-def]
    number = features.dtype.type
    x, y = number(change_a), number(change_b)
    for g in range(_TILE):
        a[g] += features[f, g] * x
        b[g] += features[f, g] * y


@compiled
def _look(a, b, t, best, best_t, low, high):  # type: ignore[no-untyped-def]
    """Try every group's own best t under the present assignment."""
    number = a.dtype.type
    tiny, two = number(NEVER_ZERO), number(2)
    for g in range(_TILE):
        t[g] = min(max(np.float32(a[g] / (b[g] + tiny)), low), high)
    bits = t.view(np.int32)
    for g in range(_TILE):
        bits[g] = _round_to_bfloat16(bits[g])
    for g in range(_TILE):
        gain = (t[g] * (b[g] + tiny) - two * a[g]) * t[g]
        better = (gain < best[g]) | ((gain == best[g]) & (t[g] > best_t[g]))
        best[g] = gain if better else best[g]
        best_t[g] = t[g] if better else best_t[g]


@compiled
def _choose(table, s, groups, out_scale, first):  # type: ignore[no-untyped-def]
    """The better sign of every group; its scale as bfloat16, and what then holds."""
    scale, assignment = np.empty(1, np.float32), table.assignment
    bits = scale.view(np.int32)
    for g in range(groups):
        sign = 1 if s.gain[1, g] < s.gain[0, g] else 0
        # Exact in float32; bfloat16 rounds it only among its subnormals, below 2^-126.
        scale[0] = s.t[sign, g] * _POWER[_ZERO + s.top[g]]
        bits[0] = _round_to_bfloat16(bits[0])
        out_scale[first + g] = (bits[0] >> 16) | (sign << 15)
        scale[0] = scale[0] * _POWER[_ZERO - s.top[g]]
        place = (bits[0] >> 16) - table.first_bits
        s.chosen[0, g] = sign
        s.chosen[1, g] = assignment[min(max(place, 0), assignment.size - 1)]
        s.step[g] = scale[0]


@compiled
def _loss(table, s, groups, blocks, largest):  # type: ignore[no-untyped-def]
    """(squared error, squared value, the larger of `largest` and the largest error) of a tile."""
    top_integer = 2 ** (table.bits - 1) - 1
    v_q, q_q, counts = table.v_q, table.q_q, s.counts
    error = norm = 0.0
    for g in range(groups):
        sign, assignment = s.chosen[0, g], s.chosen[1, g]
        a = b = energy = 0.0
        t, unit = np.float64(s.step[g]), _POWER[_ZERO + s.top[g]]
        for i in range(g * blocks, (g + 1) * blocks):
            below = s.top[g] - s.exponent[i]
            depth = min(below, DEPTHS - 1)
            # 16 bits hold these sums over 32 elements. A length known only when running keeps the
            # compiler from unrolling the loop instead of using vectors.
            v_v = sum_a = sum_b = np.int16(0)
            for c in range(counts.shape[1]):
                count = np.int16(counts[i, c])
                sum_a = np.int16(sum_a + np.int16(count * v_q[sign, depth, assignment, c]))
                sum_b = np.int16(sum_b + np.int16(count * q_q[sign, depth, assignment, c]))
                v_v = np.int16(v_v + np.int16(count * _SQUARE[c]))
            shrink = _POWER[_ZERO - below]
            a += sum_a * (0.5 * shrink)
            b += sum_b
            energy += v_v * (0.25 * shrink * shrink)
            # An error is at most t/2, or what is left of a magnitude beyond the grid.
            magnitude = (6.0 if counts[i, 7] | counts[i, 15] else 4.0) * shrink
            if max(t / 2, magnitude - top_integer * t) * unit <= largest:
                continue
            for c in range(_CODES):
                if counts[i, c ^ (8 * sign)]:
                    q = np.float64(table.quantized[depth, assignment, c]) - (top_integer + 1)
                    off = abs(_TWICE_VALUE[c] * (0.5 * shrink) - q * t) * unit
                    largest = max(largest, off)
        error += max(energy + t * (t * b - 2 * a), 0.0) * unit * unit
        norm += energy * unit * unit
    return error, norm, largest


@compiled
def _encode(table, s, groups, blocks, out, place):  # type: ignore[no-untyped-def]
    """The tile's integers as a little-endian bit stream, from byte `place` of `out`."""
    count, codes, byte_codes, quantized = (
        table.start.size,
        s.codes,
        table.byte_codes,
        table.quantized,
    )
    width = _BLOCK // 2
    for i in range(groups * blocks):
        g = i // blocks
        flip, assignment = s.chosen[0, g] * 0x88, s.chosen[1, g]
        depth = min(s.top[g] - s.exponent[i], DEPTHS - 1)
        if table.bits == 4:
            base = (depth * count + assignment) * 256
            wanted, source = byte_codes[base : base + 256], codes[i]
            made = out[place + i * width : place + (i + 1) * width]
            for j in range(width):
                made[j] = wanted[source[j] ^ flip]
            continue
        stream, filled = 0, 0
        for j in range(width):
            byte = codes[i, j] ^ flip
            low, high = (
                quantized[depth, assignment, byte & 15],
                quantized[depth, assignment, byte >> 4],
            )
            stream |= (low | (np.int64(high) << table.bits)) << filled
            filled += 2 * table.bits
            while filled >= 8:
                out[place] = stream & 0xFF
                stream, filled, place = stream >> 8, filled - 8, place + 1
