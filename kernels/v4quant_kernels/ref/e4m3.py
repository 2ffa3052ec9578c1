"""E4M3: the eight-bit float of FP8 weights and activations (torch's `float8_e4m3fn`).

One sign bit, four exponent bits (bias 7), three mantissa bits. "fn" means finite: there is no
infinity, and only the codes 0x7F and 0xFF are NaN, which buys one more binade. Normal numbers run
from 2^-6 to 448 = 1.75 * 2^8; subnormals are the multiples of 2^-9.

Rounding is to nearest, ties to the even mantissa. Everything above 448 saturates, which torch does
not promise on its own (older versions return NaN from 480 up), so we clamp first; the clamp cannot
change the rounding of anything smaller. NaN stays NaN.

Four significant bits make every value exact in bfloat16, float16 and float32. A product with a
power of two is exact too, until the exponent leaves the wider format. E2M1 is exact in E4M3.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

MAX = 448.0
"""The largest magnitude."""

SMALLEST = 2.0**-9
"""The smallest positive value, a subnormal."""


def encode(x: Tensor) -> Tensor:
    """Nearest float8_e4m3fn (same shape), ties to even, saturating at +-448."""
    return x.float().clamp(-MAX, MAX).to(torch.float8_e4m3fn)


@cache
def _table(device: torch.device) -> Tensor:
    """float32 `[256]`: the value of each code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().to(device)


def decode(codes: Tensor) -> Tensor:
    """float32 values of float8_e4m3fn codes (any shape), exact.

    A gather from a table of 256: on CPUs torch's own conversion is several times slower.
    """
    assert codes.dtype == torch.float8_e4m3fn, codes.dtype
    indices = codes.view(torch.uint8).reshape(-1).int()
    return _table(codes.device).index_select(0, indices).view(codes.shape)
