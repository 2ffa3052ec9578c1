"""Blocks of a matrix: the one place that cuts `[N, K]` into groups sharing a scale."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.ref import e8m0
from v4quant_kernels.scheme import Scheme


def grouped(x: Tensor, scheme: Scheme) -> Tensor:
    """float32 `[N, K/g, g]` of a matrix `[N, K]` (a view where `x` allows).

    Raises UnsupportedScheme when `x` is not a matrix or K is not a multiple of the group size.
    """
    if x.ndim != 2 or x.shape[1] % scheme.group_size:
        raise UnsupportedScheme(
            f"scheme '{scheme.name}' shares a scale among {scheme.group_size} columns and cannot "
            f"hold the shape {list(x.shape)}; choose a scheme whose group divides the columns"
        )
    rows, columns = x.shape
    return x.float().reshape(rows, columns // scheme.group_size, scheme.group_size)


def absmax(x: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Largest magnitude along `dim`.

    Two reductions, because on CPUs they are several times faster than one of `abs(x)` (which also
    needs a copy) or than aminmax along a dimension.
    """
    return torch.maximum(x.amax(dim), x.amin(dim).neg_())


def power_of_two_exponent(amax: Tensor, maximum: float) -> Tensor:
    """int32 exponents of the scales `2^ceil(log2(amax / maximum))`, exact.

    `maximum` is the element format's largest value. The smallest power of two is chosen under which
    nothing saturates. Two ends need a rule:

    * a block of zeros gets the scale 1 (exponent 0). Any scale would do; 1 lies near those of real
      weights, so that an engine which folds scales relative to the largest or smallest of a tile
      is not pushed out of its range by a block that holds nothing;
    * exponents are kept where the scale is an E8M0 number and `maximum * scale` is a finite
      float32 (and bfloat16): below 2^-127 the elements become subnormal or zero, and values within
      a factor 4/3 of the float32 limit saturate.
    """
    largest = 128 - math.frexp(maximum)[1]  # 127 - floor(log2(maximum))
    exponent = e8m0.ceil_exponent(amax, maximum).clamp_(e8m0.MIN_EXPONENT, largest)
    return exponent.masked_fill_(amax == 0, 0)


def require_positive(scale: Tensor, what: str) -> None:
    """Raise NonFiniteWeight unless all of `scale` is finite and above zero."""
    if not bool(((scale > 0) & (scale < torch.inf)).all()):
        raise NonFiniteWeight(f"{what} must be finite and positive everywhere")
