"""Rounding activations to E4M3 per block in Triton; the twin of `ref.activation.fake_quant_e4m3`.

Values stay bfloat16: an E4M3 number times a power of two is exact there, so the GEMM that follows
multiplies the very numbers an FP8 tensor core would.

The scale comes from exponent bits (`ceil(log2(amax * f32(1/448)))`), and rounding to E4M3 is left
to the float32 adder: adding 1.5 * 2^23 times the spacing of E4M3 numbers around v leaves no room
for anything finer, so the sum is rounded, ties to even, and subtracting it back gives the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.gpu.decode import cast_to_bf16, is_nan, load_bf16


@triton.jit
def round_to_e4m3(v):
    """float32 `v`, |v| <= 448, rounded to the nearest E4M3 number, ties to even."""
    exponent = ((v.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, -6)  # below 2^-6 the spacing stays 2^-9
    # spacing = 2^(exponent - 3); the addend 1.5 * 2^23 * spacing has exponent (exponent + 20).
    addend = (((exponent + 20 + 127) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (v + addend) - addend


@triton.jit
def fake_quant_e4m3_kernel(x_ptr, out_ptr, columns, BLOCK: tl.constexpr):
    """One program rounds one block of one row. Grid: (rows, blocks)."""
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offset = tl.program_id(0).to(tl.int64) * columns + column
    x = load_bf16(x_ptr + offset, column < columns, tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), 1e-4)
    bits = (amax * 0.002232142857142857).to(tl.int32, bitcast=True)  # times f32(1/448)
    exponent = tl.minimum(((bits + 0x7FFFFF) >> 23) - 127, 126)
    scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(x * inverse, -448.0), 448.0)
    rounded = tl.where(is_nan(x), x, round_to_e4m3(scaled) * scale)
    tl.store(out_ptr + offset, cast_to_bf16(rounded), mask=column < columns)


def fake_quant_e4m3(x: Tensor, block: int = 128) -> Tensor:
    """bfloat16 `[rows, columns]` rounded to E4M3 per `block` columns, same shape and dtype."""
    assert x.dtype == torch.bfloat16 and x.ndim == 2 and x.is_contiguous()
    out = torch.empty_like(x)
    rows, columns = x.shape
    if rows:
        fake_quant_e4m3_kernel[(rows, triton.cdiv(columns, block))](x, out, columns, BLOCK=block)
    return out
