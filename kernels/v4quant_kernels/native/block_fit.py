"""Choosing among grids by rounding with error feedback, a tile of rows at a time.

`v4quant_calibration.rounding.block_fit` has the arithmetic and the torch twin. A sub-block has 16
or 32 channels and some twenty grids to try, and each try rounds all channels in turn: triangular
work that torch would do in thousands of calls. The row is the fastest index, so inner loops become
vector instructions. Sums are taken in another order than torch's, so the choice may differ where
two grids cost the same.
"""

from __future__ import annotations

from functools import partial

import numpy as np
from numpy.typing import NDArray

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.levels import nearest_level
from v4quant_kernels.native.threads import over_rows

Floats = NDArray[np.float32]
_TILE = 64  # rows side by side: values, codes and errors of 32 channels take 24 KB


def fit(
    values: Floats,
    factor: Floats,
    step: Floats,
    lowest: Floats,
    limits: tuple[int, int],
    levels: tuple[int, ...],
    choice: NDArray[np.int64],
    integers: Floats,
    errors: Floats,
    cost: Floats,
) -> None:
    """For every row the best of its grids, into the last four arguments.

    values: `[channels, N]`; factor: `[channels, channels]`, upper; step, lowest: `[grids, N]`;
    choice, cost: `[N]`; integers, errors (over the pivots): `[channels, N]`. The first of equals
    wins. levels: the integers there are, ascending, where not all within the limits are.
    """
    low, high = (np.float32(v) for v in limits)
    known = np.array(levels, np.float32)
    middles = (known[1:] + known[:-1]) / 2
    found = choice, integers, errors, cost
    over_rows(
        values.shape[1],
        partial(_fit, values, factor, step, lowest, low, high, known, middles, *found),
    )


@compiled
def nearest(  # type: ignore[no-untyped-def]
    work, i, width, base, inverse, low, high, levels, middles, codes
):
    """The integers nearest to channel i of a tile, into its codes."""
    if levels.size:
        for t in range(width):
            found = nearest_level(middles, (work[i, t] - base[t]) * inverse[t])
            codes[i, t] = levels[found]
    else:
        for t in range(width):
            codes[i, t] = min(max(np.rint((work[i, t] - base[t]) * inverse[t]), low), high)


@compiled
def _fit(  # type: ignore[no-untyped-def]
    values, factor, step, lowest, low, high, levels, middles, choice, integers, errors, cost,
    start, stop,
):  # fmt: skip
    channels = len(values)
    work = np.empty((channels, _TILE), np.float32)
    codes = np.empty((channels, _TILE), np.float32)
    missed = np.empty((channels, _TILE), np.float32)
    size, inverse = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    base, total = np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    least = np.empty(_TILE, np.float32)
    zero, one = np.float32(0), np.float32(1)
    for first in range(start, stop, _TILE):
        width = min(_TILE, stop - first)
        least[:] = np.inf
        for k in range(step.shape[0]):
            for t in range(width):
                size[t] = step[k, first + t]
                inverse[t] = one / size[t] if size[t] != zero else zero
                base[t] = lowest[k, first + t]
                total[t] = zero
            work[:, :width] = values[:, first : first + width]
            for i in range(channels):
                pivot = one / factor[i, i]
                nearest(work, i, width, base, inverse, low, high, levels, middles, codes)
                for t in range(width):
                    e = (work[i, t] - (codes[i, t] * size[t] + base[t])) * pivot
                    missed[i, t] = e
                    total[t] += e * e
                for j in range(i + 1, channels):
                    u = factor[i, j]
                    for t in range(width):
                        work[j, t] -= u * missed[i, t]
            for t in range(width):
                if total[t] < least[t]:
                    least[t] = total[t]
                    choice[first + t] = k
                    for i in range(channels):
                        integers[i, first + t] = codes[i, t]
                        errors[i, first + t] = missed[i, t]
        for t in range(width):
            cost[first + t] = least[t]
