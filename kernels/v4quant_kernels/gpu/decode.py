"""Casts between bfloat16 and float32 inside a kernel, on bits.

On a GPU the plain casts would do; Triton's interpreter truncates instead of rounding and mistakes
bfloat16's subnormals. Weights are decoded several at a time, see `words.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def is_nan(x):
    """Whether float32 `x` is NaN, from its bits."""
    return (x.to(tl.int32, bitcast=True) & 0x7FFFFFFF) > 0x7F800000


@triton.jit
def _bf16_bits(x):
    """int32 pattern of the bfloat16 nearest to float32 `x`, ties to even; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    odd = (bits >> 16) & 1
    rounded = (bits >> 16) + (((bits & 0xFFFF) + 0x7FFF + odd) >> 16)
    return tl.where(is_nan(x), (bits >> 16) | 0x40, rounded)


@triton.jit
def round_to_bf16(x):
    """float32 `x` rounded to bfloat16's grid, still float32."""
    return (_bf16_bits(x) << 16).to(tl.float32, bitcast=True)


@triton.jit
def cast_to_bf16(x):
    """float32 `x` as bfloat16, rounded to nearest, ties to even."""
    return _bf16_bits(x).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def load_bf16(ptr, mask, COMPUTE: tl.constexpr):
    """bfloat16 values at `ptr` (0 where masked) as COMPUTE, which holds them exactly."""
    x = tl.load(ptr, mask=mask, other=0.0)
    if tl.float32 == COMPUTE:
        x = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x
