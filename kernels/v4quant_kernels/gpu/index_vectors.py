"""Packed FP4 vectors of the indexer as operands of tensor cores.

A vector is 16 words of eight E2M1 numbers in natural order and one word of four E8M0 scales, one
per 32 channels. What becomes of it depends on the OPERAND that the machine multiplies:

* **bf16**: every E2M1 number times its scale is a bfloat16 number (`words.index_vectors`).
* **fp8**: E4M3 holds E2M1 times 2^r without subnormals for -5 <= r <= 6. So each vector gets a
  *reference* exponent, r is a group's exponent above it, and 2^reference, common to the vector,
  leaves the product: a query's goes into its head weight, a key's multiplies the finished score,
  because a positive factor passes through relu. A word of eight becomes two of four E4M3 numbers by
  a table of bytes (`words.py`), signs by the same instruction.
* **native**: block-scaled tensor cores take codes and scales as they are.

A vector *fits* FP8 when the scales of its groups lie within the window, groups of zeros apart, and
neither its reference nor its head weight is so far from 1 that a finite score could leave float32's
range on the way (REACH). Rotated vectors do, having all channels of about one size. Of one that
does not, the factor is NaN: the mark by which the kernels of `index_scores.py` know that a tile
needs the slow exact way. Nothing is decided on the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.gpu.decode import cast_to_bf16
from v4quant_kernels.gpu.words import fp8_fours, index_vectors

LEAST_R = tl.constexpr(-5)
MOST_R = tl.constexpr(6)
REACH = tl.constexpr(40)
LEAST_SIZE = tl.constexpr(2.0**-40)
MOST_SIZE = tl.constexpr(2.0**40)


@triton.jit
def scale_bytes(scales):
    """int32 `[R, 4]` E8M0 bytes of scale words `[R]`."""
    return (scales[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255


@triton.jit
def power_of_two(exponent):
    """float32 2^exponent for -126..127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp8_reference(bytes_):
    """int32 `[R]`: the exponent that leaves a vector with these scale bytes `[R, 4]`."""
    largest = tl.max(bytes_, axis=1) - 127 - MOST_R
    return tl.minimum(tl.maximum(largest, -REACH), REACH)


@triton.jit
def fp8_exponents(bytes_, reference):
    """int32 `[R, 4]` exponents of the groups above the vectors' references, unbounded."""
    return bytes_ - 127 - reference[:, None]


@triton.jit
def clamp_exponents(exponent):
    """Within the window: changes groups of zeros, and vectors that do not fit."""
    return tl.minimum(tl.maximum(exponent, LEAST_R), MOST_R)


@triton.jit
def outside_window(bytes_, exponent):
    """bool `[R, 4]`: scales that E4M3 cannot absorb, or NaN."""
    return (exponent < LEAST_R) | (exponent > MOST_R) | (bytes_ == 255)


@triton.jit
def load_words(words_ptr, vector, inside, WORDS: tl.constexpr):
    """int32 `[R, 16]` code words of vectors WORDS words apart; 0 where not inside."""
    pointers = words_ptr + vector.to(tl.int64)[:, None] * WORDS + tl.arange(0, 16)[None, :]
    return tl.load(pointers, mask=inside[:, None], other=0)


@triton.jit
def expand_kernel(
    words_ptr,
    scale_ptr,
    weight_ptr,
    out_ptr,
    factor_ptr,
    vectors,
    results,
    REAL: tl.constexpr,
    HEADS: tl.constexpr,
    WORDS: tl.constexpr,
    SCALES: tl.constexpr,
    WEIGHTED: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Operands out[p, 128] and float32 factor[p] of vectors. Grid: tiles of BLOCK results.

    Results come in runs of HEADS, of which the first REAL are vectors; all others are zeros. The
    factor is what leaves the vector, times its head weight if WEIGHTED; NaN where it does not fit.
    """
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    vector = place // HEADS * REAL + place % HEADS
    real = (vector < vectors) & (place % HEADS < REAL)
    words = load_words(words_ptr, vector, real, WORDS)
    scales = tl.load(scale_ptr + vector.to(tl.int64) * SCALES, mask=real, other=0x7F7F7F7F)
    factor = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if WEIGHTED:
        factor = tl.load(weight_ptr + vector, mask=real, other=0.0)
    if FP8:
        bytes_ = scale_bytes(scales)
        reference = fp8_reference(bytes_)
        exponent = fp8_exponents(bytes_, reference)
        magnitudes = tl.reshape(words & 0x77777777, (BLOCK, 4, 4))
        wrong = outside_window(bytes_, exponent) & (tl.max(magnitudes, axis=2) > 0)
        wrong |= bytes_ == 255
        size = tl.abs(factor)
        near = (size == 0.0) | ((size > LEAST_SIZE) & (size < MOST_SIZE))
        fits = near & (tl.max(wrong.to(tl.int32), axis=1) == 0)
        factor = tl.where(fits, factor * power_of_two(reference), float("nan"))
        values = fp8_fours(words, clamp_exponents(exponent), 0, COMPUTE)
        pointers = out_ptr + place.to(tl.int64)[:, None] * 32 + tl.arange(0, 32)[None, :]
    else:
        values = cast_to_bf16(index_vectors(words, scales, tl.float32))
        pointers = out_ptr + place.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
    tl.store(pointers, values, mask=(place < results)[:, None])
    tl.store(factor_ptr + place, factor, mask=place < results)


def _expand(
    words: Tensor,
    scales: Tensor,
    weights: Tensor | None,
    runs: tuple[int, int],
    results: int,
    apart: tuple[int, int],
    fp8: bool,
    compute: tl.dtype,
) -> tuple[Tensor, Tensor]:
    width, dtype = (32, torch.int32) if fp8 else (128, torch.bfloat16)
    out = torch.empty(results, width, dtype=dtype, device=words.device)
    factor = torch.empty(results, dtype=torch.float32, device=words.device)
    expand_kernel[(triton.cdiv(results, 32),)](
        words, scales, factor if weights is None else weights, out, factor,
        words.numel() // apart[0], results,
        REAL=runs[0], HEADS=runs[1], WORDS=apart[0], SCALES=apart[1],
        WEIGHTED=weights is not None, FP8=fp8, BLOCK=32, COMPUTE=compute,
    )  # fmt: skip
    return (out.view(torch.uint8) if fp8 else out), factor


def expand_queries(
    words: Tensor,
    scales: Tensor,
    weights: Tensor,
    padded: tuple[int, int],
    fp8: bool,
    compute: tl.dtype,
) -> tuple[Tensor, Tensor]:
    """(operands `[P, 128]`, float32 `[P]` weights), P being the product of `padded`.

    words: int32 `[T, heads, 16]`. scales: int32, one a vector. weights: float32 `[T, heads]`.
    Operands are E4M3 bytes or bfloat16. `padded` is how many tokens and heads there shall be.
    """
    runs, results = (weights.shape[1], padded[1]), padded[0] * padded[1]
    return _expand(words, scales, weights, runs, results, (16, 1), fp8, compute)


def expand_keys(packed: Tensor, fp8: bool, compute: tl.dtype) -> tuple[Tensor, Tensor]:
    """(operands `[keys, 128]`, float32 `[keys]` factors) of int32 `[keys, 17]` packed keys."""
    count = packed.shape[0]
    return _expand(packed, packed[:, 16:], None, (1, 1), count, (17, 17), fp8, compute)
