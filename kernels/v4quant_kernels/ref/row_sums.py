"""Weighted sums over the rows of two matrices, exact, so that no order of additions can matter.

The products of a row are rounded to multiples of one power of two, 2^-36 of the row's largest.
Multiples of one unit add without rounding as long as their sum stays below 2^53 units: every
processor finds the same bits, however wide its vectors are.
"""

from __future__ import annotations

import torch
from torch import Tensor

DIGITS = 36
"""Bits of a row's largest product that count: sums of 2^16 columns still fit float64."""


def row_sums(values: Tensor, coded: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """sum_j h_j v_j^2 and sum_j h_j v_j q_j of every row, float64 `[N]`, in units of the row.

    values, coded: float32 `[N, K]`, K at most 2^16. weights h: float64 `[K]`, None for ones.
    """
    weighted = values.double()
    if weights is not None:
        weighted = weighted * weights
    own, crossed = weighted * values.double(), weighted * coded.double()
    largest = torch.maximum(own.abs().amax(1), crossed.abs().amax(1))
    _, exponent = torch.frexp(largest)
    unit = torch.ldexp(torch.ones_like(largest), DIGITS - exponent).unsqueeze(1)
    return (own * unit).round_().sum(1), (crossed * unit).round_().sum(1)
