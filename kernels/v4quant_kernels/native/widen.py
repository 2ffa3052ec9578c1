"""FP8 tiles in bfloat16 as one compiled loop; `ref/fp8_block.py` says when that is exact."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled


def widen(
    codes: NDArray[np.uint8],
    exponent: NDArray[np.int32],
    block: tuple[int, int],
    table: NDArray[np.int16],
    out: NDArray[np.int16],
) -> None:
    """Write the bfloat16 bits of every code times its tile's power of two.

    codes: [N, K]; exponent: [ceil(N/rows), ceil(K/columns)]; table: [256], the codes' own bfloat16
    bits; out: [N, K].
    """
    _widen(codes, exponent, block[0], block[1], table, out)


@compiled
def _widen(codes, exponent, height, width, table, out):  # type: ignore[no-untyped-def]
    rows, tiles = codes.shape[0], exponent.shape[1]
    scaled = np.empty((tiles, 256), np.int16)
    for band in range(exponent.shape[0]):
        for t in range(tiles):
            # A power of two adds to the exponent field; zeros have none.
            for code in range(256):
                bits = table[code]
                scaled[t, code] = bits + (exponent[band, t] << 7) if bits & 0x7FFF else bits
        for r in range(band * height, min((band + 1) * height, rows)):
            for t in range(tiles):
                mine = scaled[t]
                source, made = codes[r, t * width : (t + 1) * width], out[r, t * width :]
                for c in range(source.size):
                    made[c] = mine[source[c]]
