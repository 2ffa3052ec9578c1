"""The indexer's score kernels: a small GEMM, a relu and a weighted sum over heads, in registers.

A program multiplies a tile of BS keys with the heads of STEP tokens at a time: keys are on the left
of the product, so that a key's scores with all heads lie in few lanes and their sum stays there.
relu(x) is taken as (x + |x|) / 2 with the half applied to the finished score: one instruction at
full rate, where a maximum runs at half, and a NaN stays visible.

* `shared_kernel` keeps its tile of keys and walks over BQ tokens, whose heads arrive in a pipeline.
* `own_kernel` keeps its STEP tokens and walks over TILES tiles of keys, decoding them on the way:
  68 bytes a key are read and nothing else. In a ragged batch a token has keys of its own.

What is multiplied, OPERAND, is explained in `index_vectors.py`. Where a factor of FP8 is NaN,
or a scale lies outside the window, the program takes `exact_scores` instead: every group of 32
channels is multiplied by itself, unscaled, and the float32 sum is scaled, whatever the exponents.

A tile that no token of the program sees is not multiplied, only filled with -inf, so that results
are defined everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.decode import is_nan, round_to_bf16
from v4quant_kernels.gpu.index_vectors import (
    LEAST_R,
    MOST_R,
    REACH,
    power_of_two,
    scale_bytes,
)
from v4quant_kernels.gpu.words import as_fp8, byte_of, fp8_fours, index_vectors

NEEDS_ZERO = tl.constexpr(tuple(int(n) for n in triton.__version__.split(".")[:2]) < (3, 9))
"""Triton 3.6 cannot compile block-scaled products for sm_100 that start from a constant, 3.9 can;
what is between was not tried."""


@triton.jit
def load_rows(pointers, inside, MASKED: tl.constexpr):
    """A tile, 0 in rows that are not inside."""
    if MASKED:
        tile = tl.load(pointers, mask=inside[:, None], other=0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def as_operands(tile, OPERAND: tl.constexpr, COMPUTE: tl.constexpr):
    """What `expand_kernel` wrote, as numbers; COMPUTE holds bfloat16 exactly."""
    if OPERAND == "fp8":
        tile = tile.to(tl.float8e4nv, bitcast=True)
    if OPERAND == "bf16" and tl.float32 == COMPUTE:
        tile = (tile.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return tile


@triton.jit
def load_packed_bytes(packed_ptr, row, inside):
    """(code bytes `[rows, 64]`, scale bytes `[rows, 4]`) of packed keys."""
    line = packed_ptr + row[:, None] * 68
    codes = tl.load(line + tl.arange(0, 64)[None, :], mask=inside[:, None], other=0)
    scales = tl.load(line + 64 + tl.arange(0, 4)[None, :], mask=inside[:, None], other=127)
    return codes, scales


@triton.jit
def multiply(keys, key_scales, queries, query_scales, zero, OPERAND: tl.constexpr):
    """float32 `[keys, heads]`; `zero` is a float32 0 that the compiler does not see through."""
    if OPERAND == "native":
        turned = tl.trans(queries)
        if NEEDS_ZERO:
            empty = tl.full((keys.shape[0], queries.shape[0]), 0.0, dtype=tl.float32) + zero
            out = tl.dot_scaled(keys, key_scales, "e2m1", turned, query_scales, "e2m1", empty)
        else:
            out = tl.dot_scaled(keys, key_scales, "e2m1", turned, query_scales, "e2m1")
    else:
        out = tl.dot(keys, tl.trans(queries), input_precision="ieee")
    return out


@triton.jit
def weighted_sums(product, weights, STEP: tl.constexpr, ROUND_PRODUCTS: tl.constexpr):
    """float32 `[keys, STEP]`: twice the scores of products `[keys, STEP * heads]`."""
    if ROUND_PRODUCTS:
        product = round_to_bf16(product)
    twice = product + tl.abs(product)
    KEYS: tl.constexpr = product.shape[0]
    HEADS: tl.constexpr = product.shape[1] // STEP
    twice = tl.reshape(twice, (KEYS, STEP, HEADS))
    return tl.sum(twice * tl.reshape(weights, (STEP, HEADS))[None, :, :], axis=2)


@triton.jit
def store_scores(out, scores, key, ends, exists, seen):
    """Store `[keys, STEP]` scores at `out`, -inf for keys at or beyond a token's end."""
    scores = tl.where(key[:, None] < ends[None, :], scores, float("-inf"))
    tl.store(out, scores, mask=exists[:, None] & seen[None, :])


@triton.jit
def hide(line, first, tokens, columns, exists, TOKENS: tl.constexpr):
    """Store -inf at `line` `[keys, 1]` for TOKENS tokens from `first`."""
    for i in range(TOKENS):
        token = first + i + tl.arange(0, 1)
        out = line + token.to(tl.int64)[None, :] * columns
        mask = exists[:, None] & (token < tokens)[None, :]
        tl.store(out, tl.full(mask.shape, float("-inf"), dtype=tl.float32), mask=mask)


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


@triton.jit
def shared_kernel(
    q_ptr,
    q_words_ptr,
    q_scale_ptr,
    factor_ptr,
    weight_ptr,
    k_ptr,
    k_words_ptr,
    k_factor_ptr,
    end_ptr,
    logits_ptr,
    tokens,
    total_keys,
    columns,
    skipped,
    REAL: tl.constexpr,
    HEADS: tl.constexpr,
    BS: tl.constexpr,
    BQ: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """logits[t, c] of key skipped + c, for BQ tokens and BS keys. Grid: key tiles x token tiles.

    REAL of the HEADS are there. q and k are operands; the words, packed, are read where FP8 fails.
    """
    key_tiles = (columns + BS - 1) // BS
    start = tl.program_id(0) % key_tiles * BS
    first = tl.program_id(0) // key_tiles * BQ
    column = start + tl.arange(0, BS)
    key = skipped + column
    exists = column < columns
    inside = exists & (key < total_keys)
    ends = tl.load(end_ptr + first + tl.arange(0, BQ))
    line = logits_ptr + column[:, None]
    if tl.max(ends, axis=0) <= skipped + start:
        hide(line, first, tokens, columns, exists, BQ)
        return
    key_factor = tl.full((BS,), 1.0, dtype=tl.float32)
    if OPERAND == "fp8":
        key_factor = tl.load(k_factor_ptr + key, mask=inside, other=1.0)
        factors = tl.load(factor_ptr + first.to(tl.int64) * HEADS + tl.arange(0, BQ * HEADS))
        wrong = tl.max(is_nan(key_factor).to(tl.int32), axis=0)
        if wrong + tl.max(is_nan(factors).to(tl.int32), axis=0) > 0:
            exact_tile(
                q_words_ptr, q_scale_ptr, weight_ptr, k_words_ptr, end_ptr, logits_ptr, first,
                tokens, start, columns, skipped, skipped, total_keys,
                REAL, HEADS, BQ, BS, ROUND_PRODUCTS, COMPUTE,
            )  # fmt: skip
            return
    if OPERAND == "native":
        keys, key_scales = load_packed_bytes(k_ptr, key.to(tl.int64), inside)
    else:
        keys = k_ptr + key.to(tl.int64)[:, None] * 128 + tl.arange(0, 128)[None, :]
        keys = as_operands(load_rows(keys, inside, True), OPERAND, COMPUTE)
        key_scales = key
    WIDTH: tl.constexpr = 64 if OPERAND == "native" else 128
    lane = tl.arange(0, STEP * HEADS)
    begin = first.to(tl.int64) * HEADS
    q_tile = q_ptr + begin * WIDTH + lane[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    scale_tile = q_scale_ptr + begin * 4 + lane[:, None] * 4 + tl.arange(0, 4)[None, :]
    weight_line = factor_ptr + begin + lane
    token = first + tl.arange(0, STEP)
    out = line + token.to(tl.int64)[None, :] * columns
    zero = (tokens < 0).to(tl.float32)
    for _ in tl.range(0, BQ, STEP, num_stages=STAGES):
        queries = as_operands(tl.load(q_tile), OPERAND, COMPUTE)
        query_scales = lane
        if OPERAND == "native":
            query_scales = tl.load(scale_tile)
        weights = tl.load(weight_line)
        end = tl.load(end_ptr + token)
        product = multiply(keys, key_scales, queries, query_scales, zero, OPERAND)
        scores = weighted_sums(product, weights, STEP, ROUND_PRODUCTS)
        scores *= (key_factor * 0.5)[:, None]
        store_scores(out, scores, key, end, exists, token < tokens)
        q_tile += STEP * HEADS * WIDTH
        scale_tile += STEP * HEADS * 4
        weight_line += STEP * HEADS
        token += STEP
        out += STEP * columns.to(tl.int64)


@triton.jit
def run_reference(k_words_ptr, run, last, shift, KEYS: tl.constexpr):
    """(reference exponent, whether it serves them all) of KEYS packed keys before column `last`."""
    column = run + tl.arange(0, KEYS)
    scale_words = k_words_ptr + (shift + column).to(tl.int64) * 17 + 16
    bytes_ = scale_bytes(tl.load(scale_words, mask=column < last, other=0))
    there = (column < last)[:, None]
    most = tl.max(tl.max(bytes_, axis=1), axis=0)
    least = tl.min(tl.min(tl.where(there, bytes_, 255), axis=1), axis=0)
    reference = most - 127 - MOST_R
    fits = (most - least <= MOST_R - LEAST_R) & (most < 255) & (tl.abs(reference) <= REACH)
    return reference, fits


@triton.jit
def score_run(
    queries,
    query_scales,
    weights,
    end,
    seen,
    k_words_ptr,
    k_bytes_ptr,
    line,
    base,
    run,
    columns,
    skipped,
    shift,
    total_keys,
    BS: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Scores of TILES tiles of packed keys from column `run`; `base` is their FP8 reference.

    Not MASKED, keys beyond a token's end are read and multiplied too, only not shown.
    """
    slot = tl.arange(0, BS)
    column = run + slot
    row = (shift + column).to(tl.int64)
    words_tile = k_words_ptr + row[:, None] * 17 + tl.arange(0, 16)[None, :]
    scales_tile = k_words_ptr + row * 17 + 16
    codes_tile = k_bytes_ptr + row[:, None] * 68 + tl.arange(0, 64)[None, :]
    bytes_tile = k_bytes_ptr + row[:, None] * 68 + 64 + tl.arange(0, 4)[None, :]
    out = line + column[:, None]
    left = total_keys - shift - run
    factor = power_of_two(base - 1)
    zero = (total_keys < 0).to(tl.float32)
    for _ in tl.range(0, TILES, num_stages=STAGES):
        if OPERAND == "native":
            key_scales = load_rows(bytes_tile, slot < left, MASKED)
            keys = load_rows(codes_tile, slot < left, MASKED)
        else:
            key_scales = slot
            words = load_rows(words_tile, slot < left, MASKED)
            if MASKED:
                scales = tl.load(scales_tile, mask=slot < left, other=0)
            else:
                scales = tl.load(scales_tile)
            if OPERAND == "fp8":
                bytes_ = byte_of(scales[:, None], tl.arange(0, 4)[None, :], COMPUTE)
                keys = as_fp8(fp8_fours(words, bytes_, base + 127, COMPUTE))
            else:
                keys = index_vectors(words, scales, COMPUTE)
        product = multiply(keys, key_scales, queries, query_scales, zero, OPERAND)
        scores = weighted_sums(product, weights, STEP, ROUND_PRODUCTS) * factor
        store_scores(out, scores, skipped + column, end, column < columns, seen)
        left -= BS
        column += BS
        words_tile += BS * 17
        scales_tile += BS * 17
        codes_tile += BS * 68
        bytes_tile += BS * 68
        out += BS


@triton.jit
def own_kernel(
    q_ptr,
    q_words_ptr,
    q_scale_ptr,
    factor_ptr,
    weight_ptr,
    k_words_ptr,
    k_bytes_ptr,
    end_ptr,
    first_key_ptr,
    logits_ptr,
    tokens,
    total_keys,
    columns,
    skipped,
    REAL: tl.constexpr,
    HEADS: tl.constexpr,
    BS: tl.constexpr,
    TILES: tl.constexpr,
    STEP: tl.constexpr,
    STAGES: tl.constexpr,
    RAGGED: tl.constexpr,
    OPERAND: tl.constexpr,
    ROUND_PRODUCTS: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """logits[t, c] of packed key skipped + c, STEP tokens. Grid: runs of TILES tiles x tokens."""
    runs = (columns + BS * TILES - 1) // (BS * TILES)
    run = tl.program_id(0) % runs * (BS * TILES)
    first = tl.program_id(0) // runs * STEP
    token = first + tl.arange(0, STEP)
    end = tl.load(end_ptr + token)
    head = (first * HEADS).to(tl.int64) + tl.arange(0, STEP * HEADS)
    shift = skipped
    if RAGGED:
        shift += tl.load(first_key_ptr + first)
    line = logits_ptr + token.to(tl.int64)[None, :] * columns
    last = tl.minimum(tl.max(end, axis=0) - skipped, columns)
    if run >= last:
        column = run + tl.arange(0, BS * TILES)
        hide(logits_ptr + column[:, None], first, tokens, columns, column < columns, STEP)
        return
    weights = tl.load(factor_ptr + head)
    base = 0
    if OPERAND == "fp8":
        base, fits = run_reference(
            k_words_ptr, run, tl.minimum(last, total_keys - shift), shift, BS * TILES
        )
        if (not fits) | (tl.max(is_nan(weights).to(tl.int32), axis=0) > 0):
            exact_tile(
                q_words_ptr, q_scale_ptr, weight_ptr, k_words_ptr, end_ptr, logits_ptr, first,
                tokens, run, columns, skipped, shift, total_keys,
                REAL, HEADS, STEP, BS * TILES, ROUND_PRODUCTS, COMPUTE,
            )  # fmt: skip
            return
    WIDTH: tl.constexpr = 64 if OPERAND == "native" else 128
    queries = tl.load(q_ptr + head[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])
    queries = as_operands(queries, OPERAND, COMPUTE)
    query_scales = head
    if OPERAND == "native":
        query_scales = tl.load(q_scale_ptr + head[:, None] * 4 + tl.arange(0, 4)[None, :])
    seen = token < tokens
    if shift + run + BS * TILES <= total_keys:
        score_run(
            queries, query_scales, weights, end, seen, k_words_ptr, k_bytes_ptr, line, base,
            run, columns, skipped, shift, total_keys, BS, TILES, STEP, STAGES, False, OPERAND,
            ROUND_PRODUCTS, COMPUTE,
        )  # fmt: skip
    else:
        score_run(
            queries, query_scales, weights, end, seen, k_words_ptr, k_bytes_ptr, line, base,
            run, columns, skipped, shift, total_keys, BS, TILES, STEP, STAGES, True, OPERAND,
            ROUND_PRODUCTS, COMPUTE,
        )  # fmt: skip
