"""What every kernel of the indexer's scores does with a tile: load, multiply, sum, store.

Keys are on the left of the product, so that a key's scores with all heads lie in few lanes and
their sum stays there. relu(x) is taken as (x + |x|) / 2 with the half applied to the finished
score: one instruction at full rate, where a maximum runs at half, and a NaN stays visible.

A tile that no token of a program sees is not multiplied, only filled with -inf, so that results are
defined everywhere.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.decode import round_to_bf16

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
