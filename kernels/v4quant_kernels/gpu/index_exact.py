"""Scores of vectors that do not fit the window of FP8 operands (`index_vectors.py`): slow, exact.

Every group of 32 channels is multiplied by itself, unscaled, and the float32 sum is scaled,
whatever the exponents.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.index_parts import store_scores, weighted_sums
from v4quant_kernels.gpu.index_vectors import power_of_two
from v4quant_kernels.gpu.words import as_fp8, fp8_fours


@triton.jit
def two_factors(byte):
    """Two float32 numbers whose product is the E8M0 number `byte`, NaN for 255."""
    half = (byte - 127) >> 1
    rest = power_of_two(byte - 127 - half)
    return power_of_two(half), tl.where(byte == 255, float("nan"), rest)


@triton.jit
def exact_tile(
    q_words_ptr,
    q_scale_ptr,
    weight_ptr,
    k_words_ptr,
    end_ptr,
    logits_ptr,
    first,
    tokens,
    start,
    columns,
    skipped,
    shift,
    total_keys,
    REAL: tl.constexpr,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    KEYS: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """logits of TOKENS tokens from `first` and KEYS columns from `start` by FP8, any exponents.

    Every group of 32 channels is multiplied unscaled and its float32 sum is scaled.
    """
    PART: tl.constexpr = 64 if KEYS > 64 else KEYS
    head = tl.arange(0, HEADS)
    for i in range(TOKENS * (KEYS // PART)):
        number = first + i // (KEYS // PART)
        token = number + tl.arange(0, 1)
        vector = number * REAL + head
        real = head < tl.where(number < tokens, REAL, 0)
        column = start + i % (KEYS // PART) * PART + tl.arange(0, PART)
        row = shift + column
        inside = (column < columns) & (row < total_keys)
        k_word = k_words_ptr + row.to(tl.int64)[:, None] * 17
        q_word = q_words_ptr + vector.to(tl.int64)[:, None] * 16
        k_scales = tl.load(k_words_ptr + row.to(tl.int64) * 17 + 16, mask=inside, other=0x7F7F7F7F)
        q_scales = tl.load(q_scale_ptr + vector, mask=real, other=0x7F7F7F7F)
        product = tl.zeros((PART, HEADS), dtype=tl.float32)
        for group in range(4):
            word = 4 * group + tl.arange(0, 4)[None, :]
            k = tl.load(k_word + word, mask=inside[:, None], other=0)
            q = tl.load(q_word + word, mask=real[:, None], other=0)
            k_numbers = as_fp8(fp8_fours(k, tl.zeros_like(row)[:, None], 0, COMPUTE))
            q_numbers = as_fp8(fp8_fours(q, tl.zeros_like(vector)[:, None], 0, COMPUTE))
            part = tl.dot(k_numbers, tl.trans(q_numbers))
            # Half of each exponent at a time: no step leaves float32's range before the result.
            k_half, k_rest = two_factors((k_scales >> (8 * group)) & 255)
            q_half, q_rest = two_factors((q_scales >> (8 * group)) & 255)
            part = part * k_half[:, None] * q_half[None, :]
            product += part * k_rest[:, None] * q_rest[None, :]
        weights = tl.load(weight_ptr + vector, mask=real, other=0.0)
        scores = weighted_sums(product, weights, 1, ROUND_PRODUCTS) * 0.5
        end = tl.load(end_ptr + token, mask=token < tokens, other=0)
        out = logits_ptr + token.to(tl.int64)[None, :] * columns + column[:, None]
        store_scores(out, scores, skipped + column, end, column < columns, token < tokens)
