"""The indexer's score kernels: a small GEMM, a relu and a weighted sum over heads, in registers.

A program multiplies a tile of BS keys with the heads of STEP tokens at a time (`index_parts.py`).

* `shared_kernel` keeps its tile of keys and walks over BQ tokens, whose heads arrive in a pipeline.
* `own_kernel` keeps its STEP tokens and walks over TILES tiles of keys, decoding them on the way:
  68 bytes a key are read and nothing else. In a ragged batch a token has keys of its own.

Triton makes an integer of 1 a constant, and what a kernel needs as a number of its own then has no
type: such arguments are not specialised.

What is multiplied, OPERAND, is explained in `index_vectors.py`. Where a factor of FP8 is NaN, or a
scale lies outside the window, the program takes `exact_tile` instead (`index_exact.py`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.decode import is_nan
from v4quant_kernels.gpu.index_exact import exact_tile
from v4quant_kernels.gpu.index_parts import (
    as_operands,
    hide,
    load_packed_bytes,
    load_rows,
    multiply,
    store_scores,
    weighted_sums,
)
from v4quant_kernels.gpu.index_vectors import (
    LEAST_R,
    MOST_R,
    REACH,
    power_of_two,
    scale_bytes,
)
from v4quant_kernels.gpu.words import as_fp8, byte_of, fp8_fours, index_vectors


@triton.jit(do_not_specialize=["tokens"])
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
        out += STEP * tl.cast(columns, tl.int64)


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


@triton.jit(do_not_specialize=["total_keys"])
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
