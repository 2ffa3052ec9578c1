"""Decoding inside a kernel: codes to float32 by moving bits.

Every small float here is a float32 with some bits missing, so decoding is one shift into place and
one multiplication by a power of two that repairs the exponent bias; the multiplication also turns
the small format's subnormals into float32 normals, because their shifted pattern is a float32
subnormal of the same meaning. Nothing rounds. (Triton emits plain `mul.f32`, which keeps subnormal
operands; the compile test asserts that no flushing variant appears.)

* E2M1 `seem`: sign to bit 31, `eem` to bits 24..22, times 2^126 (biases 1 and 127).
* E4M3 `seeeemmm`: sign to bit 31, the rest to bits 26..20, times 2^120; 0x7F and 0xFF are NaN.
* E8M0 `b`: bits 30..23, except b = 0 (2^-127, a subnormal) and b = 255 (NaN).
* integers are stored with an offset of 2^(bits-1).

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
def decode_e4m3(code):
    """float32 values of int32 codes 0..255."""
    bits = ((code & 0x80) << 24) | ((code & 0x7F) << 20)
    value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def decode_e8m0(code):
    """float32 values of int32 codes 0..255."""
    bits = tl.where(code == 0, 0x00400000, code << 23)
    bits = tl.where(code == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def decode_element(code, ELEMENT: tl.constexpr, BITS: tl.constexpr):
    """float32 values of int32 codes of any element format."""
    if ELEMENT == "e2m1":
        value = decode_e2m1(code)
    elif ELEMENT == "e4m3":
        value = decode_e4m3(code)
    else:
        value = (code - (1 << (BITS - 1))).to(tl.float32)
    return value


@triton.jit
def decode_scale(stored, SCALE: tl.constexpr):
    """float32 values of stored scales (bytes for e8m0 and e4m3)."""
    if SCALE == "e8m0":
        scale = decode_e8m0(stored.to(tl.int32))
    elif SCALE == "e4m3":
        scale = decode_e4m3(stored.to(tl.int32))
    else:
        scale = stored.to(tl.float32)
    return scale


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


@triton.jit
def load_codes(ptr, rows, first, N, K, row_bytes, BITS: tl.constexpr, BK: tl.constexpr):
    """int32 codes `[rows, BK]` of columns first..first+BK of a packed matrix, 0 outside it."""
    BN: tl.constexpr = rows.shape[0]
    line = ptr + rows[:, None] * row_bytes
    inside = (rows < N)[:, None]
    column = first + tl.arange(0, BK)[None, :]
    if BITS == 8:
        codes = tl.load(line + column, mask=inside & (column < K), other=0).to(tl.int32)
    elif BITS == 4:
        # K is even: both nibbles of a byte are inside or neither.
        byte = first // 2 + tl.arange(0, BK // 2)[None, :]
        pair = tl.load(line + byte, mask=inside & (byte * 2 < K), other=0).to(tl.int32)
        codes = tl.reshape(tl.join(pair & 15, pair >> 4), (BN, BK))
    else:
        # Two- and three-bit codes: a code may straddle two bytes of the stream.
        bit = column * BITS
        inside = inside & (column < K)
        low = tl.load(line + (bit >> 3), mask=inside, other=0).to(tl.int32)
        straddles = inside & ((bit & 7) + BITS > 8)
        high = tl.load(line + (bit >> 3) + 1, mask=straddles, other=0).to(tl.int32)
        codes = ((low | (high << 8)) >> (bit & 7)) & ((1 << BITS) - 1)
    return codes
