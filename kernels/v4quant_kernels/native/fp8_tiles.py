"""Block FP8 found again in float32 values, as one compiled loop; `ref/grids.py` says what it means.

Under the scale 2^k an E4M3 number has an exponent of k - 6 to k + 8 and three mantissa bits, or is
1 to 7 times 2^(k - 9). So no value on the grid has a bit below the third of its mantissa, which
most matrices that are on no grid show in their first tile. The largest value of a tile, at most
448 = 1.75 * 2^8 times the scale, gives k. Where it is exactly 448 times, and k + 1 holds all values
too, k + 1 is chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled

ON, OFF, ODD = 0, 1, 2
"""On the grid; not; with a tile so near the ends of float32 that torch must look at it."""
_LOWEST, _HIGHEST = 20, 240  # exponent fields of a tile's largest value that the loop takes


def on_fp8_grid(
    bits: NDArray[np.int32],
    codes: NDArray[np.uint8],
    scale: NDArray[np.uint8],
    tile: tuple[int, int],
) -> int:
    """Write codes `[N, K]` and scale bytes, one a tile, of float32 bits `[N, K]`.

    What is written is whole only when ON is returned.
    """
    return int(_on_fp8_grid(bits, codes, scale, tile[0], tile[1], _LOWEST, _HIGHEST))


@compiled
def _on_fp8_grid(bits, codes, scale, height, width, lowest, highest):  # type: ignore[no-untyped-def]
    rows, columns = bits.shape
    for r in range(scale.shape[0]):
        first, last = r * height, min((r + 1) * height, rows)
        for c in range(scale.shape[1]):
            left, right = c * width, min((c + 1) * width, columns)
            top, low = np.int32(0), np.int32(0)
            for i in range(first, last):
                row = bits[i, left:right]
                for j in range(row.shape[0]):
                    magnitude = row[j] & np.int32(0x7FFFFFFF)
                    top = max(top, magnitude)
                    low |= magnitude
            field = top >> 23
            if top != 0 and (field < lowest or field > highest):
                return 2
            if low & np.int32(0xFFFFF):
                return 1
            exponent = np.int32(127)
            if top != 0:
                # Above 1.75 * 2^8 times the scale nothing is held.
                exponent = field - np.int32(8) + np.int32((top & np.int32(0x7FFFFF)) > 0x600000)
            if not _write(bits, codes, first, last, left, right, exponent):
                return 1
            if top & np.int32(0x7FFFFF) == 0x600000 and _write(
                bits, codes, first, last, left, right, exponent + np.int32(1)
            ):
                exponent += np.int32(1)
            elif top & np.int32(0x7FFFFF) == 0x600000:
                _write(bits, codes, first, last, left, right, exponent)
            scale[r, c] = np.uint8(exponent)
    return 0


@compiled
def _write(bits, codes, first, last, left, right, exponent):  # type: ignore[no-untyped-def]
    """Write a tile's codes under a scale's exponent field; whether all values are held."""
    off = np.int32(0)
    for i in range(first, last):
        row, out = bits[i, left:right], codes[i, left:right]
        for j in range(row.shape[0]):
            magnitude = row[j] & np.int32(0x7FFFFFFF)
            step = (magnitude >> 23) - exponent + np.int32(7)  # E4M3's own exponent field
            mantissa = (magnitude >> 20) & np.int32(7)
            shift = min(max(np.int32(1) - step, np.int32(0)), np.int32(4))
            small = np.int32(8) | mantissa
            lost = small & ((np.int32(1) << shift) - np.int32(1))
            normal = np.int32(step > 0)
            code = normal * ((step << 3) | mantissa) + (np.int32(1) - normal) * (small >> shift)
            held = np.int32(magnitude != 0)
            off |= held * (lost | np.int32(step < -2))
            out[j] = np.uint8((held * code) | ((row[j] >> 24) & np.int32(128)))
    return off == 0
