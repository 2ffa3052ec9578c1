"""The loops behind `v4quant_kernels.cast`: depths of blocks from scales, and recoded bytes.

Four bytes (eight E2M1 codes) are taken as one word, spread so that every code has its own byte, and
turned into the target's bytes by shifts and masks on all eight at once; the compiler does the same
for several words side by side. That holds as long as a block is near enough to its scale for every
magnitude to be a normal E4M3 number, or a multiple of the integer step; deeper blocks, where values
may change, are looked up in the tables of `ref.cast` and counted.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled

_BLOCK = 16  # bytes of a block's codes
_WORDS = 4  # the same in words of four
_CHUNK = 128  # blocks side by side
_ONES = np.uint64(0x0101010101010101)
_SIGNS = np.uint64(0x0808080808080808)
_HIGH = np.uint64(0x8080808080808080)
_MAGNITUDES = np.uint64(0x7777777777777777)
_FIRST, _SECOND, _THIRD, _FOURTH = np.uint64(1), np.uint64(2), np.uint64(3), np.uint64(4)
_PAIRS, _BYTES = np.uint64(0x0000FFFF0000FFFF), np.uint64(0x00FF00FF00FF00FF)
_NIBBLES = np.uint64(0x0F0F0F0F0F0F0F0F)
_LOW_TWO = np.uint64(0x0303030303030303)
_LOW_BITS = np.uint64(63)
_DEEPEST = 24  # the tables' last row
# Rows of the tables that the arithmetic replaces: 0.5 * 2^(6-11) is the smallest normal E4M3, and
# half a step of INT8 would come next.
_LAST_ROW = {"e4m3": 11, "int8": 3, "e2m1": -1}


def recode(
    codes: NDArray[np.uint8],
    row: NDArray[np.uint8],
    target: str,
    table: NDArray[Any],
    changed: NDArray[np.uint8],
    out: NDArray[Any],
) -> int:
    """Write `table[row of the block, byte]` for every byte; returns the sum of `changed` there.

    codes: [N, K/2]; row: [N, K/32], which table row a block of 16 bytes uses; table: [rows * 256],
    uint8 for the target e2m1, int16 for e4m3 and int8; changed: [rows * 256]; out: [N, K/2] of the
    table's dtype. All contiguous.
    """
    last, source, rows = _LAST_ROW[target], codes.reshape(-1), row.reshape(-1)
    assert not changed[: (last + 1) * 256].any()
    if last < 0:
        return int(_look_up_all(source, rows, table, changed, out.reshape(-1)))
    words, made = source.view(np.uint32), out.reshape(-1).view(np.uint64)
    return int(_recode(target == "int8", words, rows, last, source, table, changed, made))


def block_depths(
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    tile: tuple[int, int],
    top_shift: int,
    lowest: int,
    base: NDArray[np.int32],
    row: NDArray[np.uint8],
) -> None:
    """Each tile's scale exponent into `base`, and each block's table row into `row`.

    codes: [N, K/2]; scale: E8M0 bytes [N, G]; tile: (height, width) in rows and blocks;
    base: [ceil(N/height), ceil(G/width)], the largest exponent of a block that holds a nonzero code
    (-127 if none) less `top_shift`, at least `lowest`; row: [N, G], `base + top_shift - exponent`
    within 0 to the tables' deepest.
    """
    words = codes.view(np.uint64).reshape(*scale.shape, 2)
    if tile == (1, 1):
        ends = (words.reshape(-1), scale.reshape(-1), base.reshape(-1), row.reshape(-1))
        _single_depths(top_shift, lowest, *ends)
        return
    _block_depths(words, scale, tile[0], tile[1], top_shift, lowest, base, row)


@compiled
def _block_depths(words, scale, height, width, top_shift, lowest, base, row):  # type: ignore[no-untyped-def]
    rows, groups = scale.shape
    # In bytes, not exponents: a tile of zeros is left with byte 0.
    tops = np.empty(base.shape[1], np.int32)
    for band in range(base.shape[0]):
        first, last = band * height, min((band + 1) * height, rows)
        tops[:] = 0
        for r in range(first, last):
            for t in range(tops.size):
                top = tops[t]
                for g in range(t * width, min((t + 1) * width, groups)):
                    # Few are higher, so the codes are seldom looked at.
                    if scale[r, g] > top and ((words[r, g, 0] | words[r, g, 1]) & _MAGNITUDES):
                        top = np.int32(scale[r, g])
                tops[t] = top
        for t in range(tops.size):
            base[band, t] = max(tops[t] - 127 - top_shift, lowest)
            tops[t] = base[band, t] + top_shift + 127
        for r in range(first, last):
            for t in range(tops.size):
                for g in range(t * width, min((t + 1) * width, groups)):
                    row[r, g] = min(max(tops[t] - np.int32(scale[r, g]), 0), _DEEPEST)


@compiled
def _single_depths(top_shift, lowest, words, scale, base, row):  # type: ignore[no-untyped-def]
    for i in range(scale.size):
        nonzero = ((words[2 * i] | words[2 * i + 1]) & _MAGNITUDES) != 0
        top = np.int32(scale[i]) if nonzero else np.int32(0)
        found = max(top - np.int32(127 + top_shift), np.int32(lowest))
        base[i] = found
        depth = found + np.int32(top_shift + 127) - np.int32(scale[i])
        row[i] = min(max(depth, 0), _DEEPEST)


@compiled
def _spread(word):  # type: ignore[no-untyped-def]
    """Eight codes of four bytes, each in a byte of its own, the low nibble first."""
    x = np.uint64(word)
    x = (x | (x << np.uint64(16))) & _PAIRS
    x = (x | (x << np.uint64(8))) & _BYTES
    return (x | (x << _FOURTH)) & _NIBBLES


@compiled
def _mask(bits):  # type: ignore[no-untyped-def]
    """0xFF where a byte is 1, 0 where it is 0."""
    return (bits << np.uint64(8)) - bits


@compiled
def _recode(integers, words, row, last, codes, table, changed, out):  # type: ignore[no-untyped-def]
    pairs = out.view(np.int16)
    aid = np.empty(_CHUNK * _WORDS, np.uint64)
    altered = np.int64(0)
    for first in range(0, row.size, _CHUNK):
        count = min(_CHUNK, row.size - first)
        deepest = 0
        for b in range(count):
            depth = row[first + b]
            deepest = max(deepest, depth)
            word = np.uint64(depth) if integers else (np.uint64(12 - depth) << _THIRD) * _ONES
            for i in range(b * _WORDS, (b + 1) * _WORDS):
                aid[i] = word
        part = slice(first * _WORDS, (first + count) * _WORDS)
        if integers:
            _to_int8(words[part], aid[: count * _WORDS], out[part])
        else:
            _to_e4m3(words[part], aid[: count * _WORDS], out[part])
        if deepest > last:
            for b in range(first, first + count):
                if row[b] > last:
                    altered += _look_up(codes, b, row[b], table, changed, pairs)
    return altered


@compiled
def _to_e4m3(words, lift, out):  # type: ignore[no-untyped-def]
    # Code 2 is 1.0, which E4M3 writes as 7 << 3; from there on the codes' own exponent and
    # mantissa bits are E4M3's. Code 1 is one binade below 2, not half of one; 0 stays 0.
    for i in range(words.size):
        x = _spread(words[i])
        middle, top = x >> _FIRST, x >> _SECOND
        nonzero = (x | middle | top) & _ONES
        one = x & ~(middle | top) & _ONES
        magnitude = ((x & ~_SIGNS) << _SECOND) - (one << _SECOND) + (_mask(nonzero) & lift[i])
        out[i] = magnitude | ((x & _SIGNS) << _FOURTH)


@compiled
def _to_int8(words, depth, out):  # type: ignore[no-untyped-def]
    for i in range(words.size):
        x = _spread(words[i])
        # Twice the magnitude: 0, 1, 2, 3, then (2 + low bit) << (1 + middle bit).
        large = ((x & _ONES) | (_ONES << _FIRST)) << _FIRST
        large += large & _mask((x >> _FIRST) & _ONES)
        is_large = _mask((x >> _SECOND) & _ONES)
        twice = (large & is_large) | (x & _LOW_TWO & ~is_large)
        steps = twice << ((_THIRD - depth[i]) & _LOW_BITS)
        negative = steps & _mask((x >> _THIRD) & _ONES)
        out[i] = (_HIGH + steps) - (negative << _FIRST)


@compiled
def _look_up(codes, block, row, table, changed, out):  # type: ignore[no-untyped-def]
    base, altered = np.int64(row) * 256, np.int64(0)
    for i in range(block * _BLOCK, (block + 1) * _BLOCK):
        place = base + codes[i]
        out[i] = table[place]
        altered += changed[place]
    return altered


@compiled
def _look_up_all(codes, row, table, changed, out):  # type: ignore[no-untyped-def]
    altered = np.int64(0)
    for block in range(row.size):
        altered += _look_up(codes, block, row[block], table, changed, out)
    return altered
