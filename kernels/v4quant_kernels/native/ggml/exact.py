"""Blocks of lattice points into GGML integers without any loss, where they fit.

MXFP4 weights are small integers (up to 12 in units of half the scale) times a power of two that
changes every 32 columns, and so are many others by accident. The types of five bits and more hold
such numbers exactly: give every sub-block the unit 2^k that puts its largest magnitude on the top
binade of the integers, or a coarser one when the units of a block lie too far apart for `sc`, and
look whether everything is a multiple. The check stops at the first weight that is not, so other
data pays next to nothing for it.
"""

from __future__ import annotations

import math

import numpy as np

from v4quant_kernels.native import compiled
from v4quant_kernels.native.ggml.scan import F32, ONE, ROUND, ZERO, round_half


@compiled
def largest(x: F32, start: int, size: int) -> np.float32:
    """The largest magnitude in x[start:start+size]."""
    top = ZERO
    for i in range(start, start + size):
        top = max(top, abs(x[i]))
    return top


@compiled
def binade_unit(top: np.float32, bits: int) -> np.float32:
    """The power of two 2^k with 2^bits <= top / 2^k < 2^(bits+1), for top > 0."""
    _, exponent = math.frexp(top)
    return np.float32(math.ldexp(1.0, exponent - 1 - bits))


@compiled
def all_multiples(x: F32, start: int, size: int, unit: np.float32) -> bool:
    """Whether x[start:start+size] are integer multiples (below 2^22) of a power of two."""
    inverse = ONE / unit
    for i in range(start, start + size):
        v = x[i] * inverse
        if (v + ROUND) - ROUND != v:
            return False
    return True


@compiled
def lattice_units(x: F32, size: int, bits: int, spread: np.float32, units: F32) -> np.float32:
    """Units of the sub-blocks (0 for zeros) under which all of `x` is exact, and the smallest.

    `spread`: how far the largest and smallest unit may lie apart. Returns 0 if there are none, or
    if the smallest is not a number of half precision.
    """
    coarsest = ZERO
    for j in range(units.size):
        top = largest(x, j * size, size)
        units[j] = binade_unit(top, bits) if top > ZERO else ZERO
        coarsest = max(coarsest, units[j])
    if not coarsest > ZERO:
        return ZERO
    finest = coarsest
    for j in range(units.size):
        if units[j] > ZERO:
            units[j] = max(units[j], coarsest / spread)
            finest = min(finest, units[j])
            if not all_multiples(x, j * size, size, units[j]):
                return ZERO
    return finest if round_half(finest) == finest else ZERO
