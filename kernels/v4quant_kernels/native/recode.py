"""Byte lookups by block: the loop behind `v4quant_kernels.ref.cast`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled


def recode(
    codes: NDArray[np.uint8],
    row: NDArray[np.int32],
    table: NDArray[Any],
    changed: NDArray[np.uint8],
    out: NDArray[Any],
) -> int:
    """Write `table[row of the block, byte]` for every byte; returns the sum of `changed` there.

    codes: [N, K/2]; row: [N, K/32], which table row a block of 16 bytes uses; table: [rows * 256],
    uint8 or int16; changed: [rows * 256]; out: [N, K/2] of the table's dtype. All contiguous.
    """
    lossy = changed.reshape(-1, 256).any(1)
    return int(_recode(codes.reshape(-1), row.reshape(-1), table, changed, lossy, out.reshape(-1)))


@compiled
def _recode(codes, row, table, changed, lossy, out):  # type: ignore[no-untyped-def]
    altered = np.int64(0)
    width = codes.size // row.size
    for block in range(row.size):
        base, first = row[block] * 256, block * width
        for i in range(first, first + width):
            out[i] = table[base + codes[i]]
        if lossy[row[block]]:
            for i in range(first, first + width):
                altered += changed[base + codes[i]]
    return altered
