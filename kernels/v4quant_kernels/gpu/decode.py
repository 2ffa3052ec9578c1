"""Single numbers inside a kernel: E2M1 and E8M0 codes to float32, and casts on bits.

A small float is a float32 with some bits missing, so decoding is one shift into place and one
multiplication by a power of two that repairs the exponent bias; the multiplication also turns the
small format's subnormals into float32 normals, because their shifted pattern is a float32 subnormal
of the same meaning. Nothing rounds. (Triton emits plain `mul.f32`, which keeps subnormal operands;
the compile test asserts that no flushing variant appears.) Weights are decoded several at a time,
see `words.py`.

* E2M1 `seem`: sign to bit 31, `eem` to bits 24..22, times 2^126 (biases 1 and 127).
* E8M0 `b`: bits 30..23, except b = 0 (2^-127, a subnormal) and b = 255 (NaN).

Casts between bfloat16 and float32 are done on bits as well. On a GPU the plain casts would do;
Triton's interpreter truncates instead of rounding and mistakes bfloat16's subnormals.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e2m1(code):
    """float32 values of int32 codes 0..15."""
    bits = ((code & 8) << 28) | ((code & 7) << 22)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126


@triton.jit
def decode_e8m0(code):
    """float32 values of int32 codes 0..255."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


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
