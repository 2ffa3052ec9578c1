"""MXFP4 found again in float32 values, as one compiled loop; `ref/grids.py` says what it means.

A normal float32 on the grid has no mantissa bit but the first, so its upper nine bits less those of
the group's scale number the E2M1 codes: with h = exponent * 2 + first mantissa bit and the scale's
own h subtracted, the magnitudes 1/2, 1, 3/2, 2, 3, 4, 6 are -2, 0, 1, 2, 3, 4, 5. The largest of a
group is 4 or 6; where it is 6 and no other is 1/2 or 3/2, everything fits the next coarser scale,
which is then the one chosen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled
from v4quant_kernels.ref.mx import GROUP

ON, OFF, ODD = 0, 1, 2
"""On the grid; not; with a group so near the ends of float32 that torch must look at it."""
_LOWEST, _HIGHEST = 8, 246  # exponent fields of a group's largest value that the loop takes


def on_mxfp4_grid(
    bits: NDArray[np.int32], codes: NDArray[np.uint8], scale: NDArray[np.uint8]
) -> int:
    """Write codes `[N, K/2]` and scale bytes `[N, K/32]` of float32 bits `[N, K]`.

    What is written is whole only when ON is returned.
    """
    return int(_on_grid(bits, codes, scale, GROUP, _LOWEST, _HIGHEST))


@compiled
def _on_grid(bits, codes, scale, size, lowest, highest):  # type: ignore[no-untyped-def]
    nibbles = np.empty(size, np.uint8)
    for r in range(bits.shape[0]):
        for g in range(scale.shape[1]):
            group = bits[r, g * size : (g + 1) * size]
            top, low = np.int32(0), np.int32(0)
            for i in range(size):
                magnitude = group[i] & np.int32(0x7FFFFFFF)
                top = max(top, magnitude)
                low |= magnitude
            if top == 0:
                scale[r, g] = 127
                for i in range(size // 2):
                    first, second = group[2 * i], group[2 * i + 1]
                    sign = ((first >> 28) & 8) | ((second >> 24) & 128)
                    codes[r, g * size // 2 + i] = np.uint8(sign)
                continue
            field = top >> 23
            if field < lowest or field > highest:
                return 2
            if low & np.int32(0x3FFFFF):
                return 1
            # 4 or 6 at the top: the scale's exponent lies two below the largest value's.
            base = np.int32((field - 2) << 1)
            fine, off = np.int32(0), np.int32(0)
            for i in range(size):
                magnitude = group[i] & np.int32(0x7FFFFFFF)
                step = (magnitude >> 22) - base
                held = np.int32(magnitude != 0)
                off |= held & (np.int32(step < -2) | np.int32(step == -1))
                fine |= held & (np.int32(step == -2) | np.int32(step == 1))
                code = held * max(step + np.int32(2), np.int32(1))
                nibbles[i] = np.uint8(code | ((group[i] >> 28) & 8))
            if off:
                return 1
            if (top >> 22) - base == 5 and fine == 0:
                base += np.int32(2)
                for i in range(size):  # 1, 2, 3, 4, 6 become 1/2, 1, 3/2, 2, 3
                    code = np.int32(nibbles[i] & 7)
                    halved = np.int32(code != 0) * max(code - np.int32(2), np.int32(1))
                    nibbles[i] = np.uint8(halved | (nibbles[i] & 8))
            for i in range(size // 2):
                pair = nibbles[2 * i] | (nibbles[2 * i + 1] << 4)
                codes[r, g * size // 2 + i] = np.uint8(pair)
            scale[r, g] = np.uint8(base >> 1)
    return 0
