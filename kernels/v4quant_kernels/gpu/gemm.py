"""The grouped GEMM: one template for every format, both projections and every operand.

A program multiplies BM slots of one expert with BN rows of that expert's words, 128 columns a step.
What differs between formats is constants of the compilation:

* CODE and SCALE name the word code (`words.py`) and the form of the scales (`scale_forms.py`).
* Words for bfloat16 are decoded in registers 32 columns at a time, each a short product of its own
  (`spread_sums`). Where the scale goes is decided by exactness: `field` and `ue5m3` scales are part
  of the decoded number; a bfloat16 scale multiplies the float32 sum of its group.
* FP8: activations are E4M3 bytes with an E8M0 scale per 128 columns (`fp8_sums`). The sum of a step
  is scaled once, which is also where Hopper's short FP8 accumulator is emptied. `relative` scales
  are part of the number, `e8m0` ones multiply the sum.
* SWAP puts the weights on the left of the product: the tensor cores of sm_90 work on 64 or more
  rows of the left operand, and take them from registers; those of older ones share out the rows
  among warps, so that none decodes what another has decoded.
* SPLIT programs share one tile along K; each writes its own part of the sums.

EPILOGUE "swiglu" turns the interleaved gate and up sums of a tile into h = bf16(routing *
silu(gate) * up); "sums" stores them as float32, `[SPLIT, slots, R]`. No atomics: every output
element has one writer.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.activation import swiglu
from v4quant_kernels.gpu.decode import cast_to_bf16, load_bf16
from v4quant_kernels.gpu.words import (
    fp8_numbers,
    plain_floats,
    spread_floats,
    spread_integers,
)


@triton.jit
def multiplier(piece, place, SCALE: tl.constexpr):
    """int32: the bfloat16 that patterns are multiplied by, in both halves; byte `place` of a piece.

    `scale_forms.py` says what the byte is.
    """
    byte = (piece >> 8 * place) & 255
    if SCALE == "field":
        twice = byte * 0x00800080
    else:
        tl.static_assert(SCALE == "ue5m3")
        twice = byte * 0x00100010 + 0x75807580
    return twice


@triton.jit
def sum_factor(piece, place):
    """float32 of the bfloat16 in half `place` of a piece."""
    return ((piece << 16 * (1 - place)) & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def group_factor(stored):
    """float32 multiplier of a group's sum from an E8M0 byte."""
    code = stored.to(tl.int32)
    return tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_weights(pointers, rows, columns, WHOLE: tl.constexpr):
    """A tile of words or scales, 0 outside the masks; WHOLE tiles need none."""
    if WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0)
    return tile


@triton.jit
def multiply(acc, x, w, SWAP: tl.constexpr):
    """acc + x @ w.T, or w @ x.T when swapped."""
    if SWAP:
        acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    else:
        acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def along_rows(values, SWAP: tl.constexpr):
    """Per-row (BN) values, to broadcast over the accumulator."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def along_slots(values, SWAP: tl.constexpr):
    """Per-slot (BM) values, to broadcast over the accumulator."""
    return values[None, :] if SWAP else values[:, None]


@triton.jit
def load_pieces(scale_line, index, NEXT: tl.constexpr, there, WHOLE: tl.constexpr):
    """int32 scales: `[rows]` if there is one piece to a part of 32 columns, or `[rows, NEXT]`."""
    pointers = scale_line + index * NEXT
    if NEXT > 1:
        pointers = pointers[:, None] + tl.arange(0, NEXT)[None, :]
        there = there[:, None]
    if WHOLE:
        pieces = tl.load(pointers)
    else:
        pieces = tl.load(pointers, mask=there, other=0)
    return pieces


@triton.jit
def spread_sums(
    acc,
    x_line,
    real,
    words_line,
    scale_line,
    row,
    first,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """acc plus the products of STEPS steps from column `first`, of words decoded to bfloat16.

    x_line `[slots, 1]`, words_line `[rows, 1]` and scale_line `[rows]` point at column 0. Scales
    are read in pieces of int32, NEXT of them for a part of 32 columns that holds so many groups.
    """
    PAIRS: tl.constexpr = COLUMNS // 2
    SUMS: tl.constexpr = SCALE == "bf16"
    NEXT: tl.constexpr = 32 // GROUP if GROUP < 32 else 1
    SPAN: tl.constexpr = GROUP * NEXT
    PIECE: tl.constexpr = (2 if SUMS else 4) * SPAN  # columns whose scales a piece holds
    column = tl.arange(0, 32)
    word = tl.arange(0, 16)
    x_tile = x_line + (first + column)[None, :]
    words_tile = words_line + first // COLUMNS + word[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES, loop_unroll_factor=UNROLL):
        start = first + step * STEP
        part = tl.zeros_like(acc)
        for i in tl.static_range(STEP // 32):
            there = row < tl.where(start + 32 * i < K, ROWS, 0)
            x_mask = real[:, None]
            if not WHOLE:
                x_mask = x_mask & (start + 32 * i + column < K)[None, :]
            x = load_bf16(x_tile + 32 * i, x_mask, COMPUTE)
            if i % PAIRS == 0:
                words = load_weights(words_tile + i // PAIRS * 16, there, word < 16, WHOLE)
            if SCALE != "none" and 32 * i % PIECE == 0:
                piece = load_pieces(scale_line, (start + 32 * i) // PIECE, NEXT, there, WHOLE)
            # Known when compiling, unless several steps share a piece.
            place = (32 * i if PIECE <= STEP else start) % PIECE // SPAN
            if SUMS:
                part = multiply(part, x, spread_integers(words, i % PAIRS, CODE, COMPUTE), SWAP)
                if 32 * (i + 1) % GROUP == 0:
                    acc += part * along_rows(sum_factor(piece, place), SWAP)
                    part = tl.zeros_like(acc)
            elif SCALE == "none":
                acc = multiply(acc, x, plain_floats(words, COMPUTE), SWAP)
            else:
                twice = multiplier(piece, place, SCALE)
                if NEXT == 1:
                    twice = twice[:, None]
                w = spread_floats(words, twice, i % PAIRS, CODE, COMPUTE)
                acc = multiply(acc, x, w, SWAP)
        x_tile += STEP
        words_tile += STEP // COLUMNS
    return acc


@triton.jit
def fp8_sums(
    acc,
    x_line,
    x_scale_line,
    real,
    words_line,
    scale_line,
    reference,
    row,
    first,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    STEPS: tl.constexpr,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    SWAP: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """As `spread_sums`, of E4M3 activations and words decoded to E4M3."""
    WORDS: tl.constexpr = (K + COLUMNS - 1) // COLUMNS
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    column = tl.arange(0, STEP)
    word = tl.arange(0, STEP // COLUMNS)
    group = tl.arange(0, STEP // GROUP)
    exists = row < ROWS
    x_tile = x_line + (first + column)[None, :]
    words_tile = words_line + first // COLUMNS + word[None, :]
    for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
        start = first + step * STEP
        x_mask = real[:, None]
        if not WHOLE:
            x_mask = x_mask & (start + column < K)[None, :]
        x = tl.load(x_tile, mask=x_mask, other=0).to(tl.float8e4nv, bitcast=True)
        words = load_weights(words_tile, exists, start // COLUMNS + word < WORDS, WHOLE)
        place = start // GROUP + group
        stored = load_weights(scale_line[:, None] + place[None, :], exists, place < GROUPS, WHOLE)
        exponent = stored.to(tl.int32) - reference[:, None]
        exponent = tl.minimum(tl.maximum(exponent, -5), 6)  # outside only for groups of zeros
        w = fp8_numbers(words, exponent, CODE, COMPUTE)
        part = multiply(tl.zeros_like(acc), x, w, SWAP)
        block = tl.minimum(start // STEP, (K - 1) // STEP)  # beyond K, x is 0
        x_scale = tl.load(x_scale_line + block, mask=real, other=127)
        part *= along_slots(group_factor(x_scale), SWAP)
        if SCALE == "e8m0":
            part *= along_rows(tl.reshape(group_factor(stored), (row.shape[0],)), SWAP)
        acc += part
        x_tile += STEP
        words_tile += STEP // COLUMNS
    return acc


@triton.jit
def store_sums(acc, out_ptr, slots, row, num_slots, ROWS: tl.constexpr, SWAP: tl.constexpr):
    """float32 out[split, slot, row] = acc."""
    line = out_ptr + (tl.program_id(2).to(tl.int64) * num_slots + slots.to(tl.int64)) * ROWS
    inside = along_slots(slots >= 0, SWAP) & along_rows(row < ROWS, SWAP)
    tl.store(along_slots(line, SWAP) + along_rows(row, SWAP), acc, mask=inside)


@triton.jit
def store_swiglu(
    acc, h_ptr, slots, routing, limit, N, SWAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr
):
    """bfloat16 h[slot, channel] from gate and up rows alternating in blocks of eight."""
    if SWAP:
        parts = tl.permute(tl.reshape(acc, (BN // 16, 2, 8, BM)), (0, 2, 3, 1))
        gate, up = tl.split(parts)
        gate, up = tl.reshape(gate, (BN // 2, BM)), tl.reshape(up, (BN // 2, BM))
    else:
        parts = tl.permute(tl.reshape(acc, (BM, BN // 16, 2, 8)), (0, 1, 3, 2))
        gate, up = tl.split(parts)
        gate, up = tl.reshape(gate, (BM, BN // 2)), tl.reshape(up, (BM, BN // 2))
    h = swiglu(gate, up, along_slots(routing, SWAP), limit)
    channel = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    line = h_ptr + slots.to(tl.int64) * N
    inside = along_slots(slots >= 0, SWAP) & along_rows(channel < N, SWAP)
    pointers = along_slots(line, SWAP) + along_rows(channel, SWAP)
    tl.store(pointers, cast_to_bf16(h), mask=inside)


@triton.jit
def gemm_kernel(
    x_ptr,
    x_scale_ptr,
    words_ptr,
    scale_ptr,
    row_scale_ptr,
    reference_ptr,
    sorted_slots_ptr,
    tile_expert_ptr,
    routing_ptr,
    out_ptr,
    num_slots,
    limit,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    N: tl.constexpr,
    SLOTS_PER_ROW: tl.constexpr,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    GROUP: tl.constexpr,
    FP8: tl.constexpr,
    SWAP: tl.constexpr,
    SPLIT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    STEP: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Sums or h of one tile. Grid: (row tiles, slot tiles, SPLIT).

    COLUMNS is how many columns a word holds, SLOTS_PER_ROW how many slots share a row of x.
    """
    expert = tl.load(tile_expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    STEPS: tl.constexpr = (K + STEP * SPLIT - 1) // (STEP * SPLIT)
    WHOLE: tl.constexpr = K % (STEP * SPLIT) == 0 and ROWS % BN == 0
    # How a row of the layout is filled up, in words and in scales (pieces of them).
    BLOCK: tl.constexpr = COLUMNS if FP8 else 16 * COLUMNS
    WORDS: tl.constexpr = (K + BLOCK - 1) // BLOCK * BLOCK // COLUMNS
    PIECE: tl.constexpr = GROUP if FP8 else (2 if SCALE == "bf16" else 4) * GROUP
    HELD: tl.constexpr = 8 * GROUP if GROUP == 16 else PIECE
    GROUPS: tl.constexpr = (K + HELD - 1) // HELD * (HELD // PIECE)

    slots = tl.load(sorted_slots_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * (STEPS * STEP)
    real = slots >= 0
    x_row = (tl.maximum(slots, 0) // SLOTS_PER_ROW).to(tl.int64)
    x_line = x_ptr + x_row[:, None] * K
    words_line = (words_ptr + expert * ROWS * WORDS + row * WORDS)[:, None]
    scale_line = scale_ptr + expert * ROWS * GROUPS + row * GROUPS
    exists = row < ROWS
    if SWAP:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    if FP8:
        reference = row * 0
        if SCALE == "relative":
            reference = tl.load(reference_ptr + expert * ROWS + row, mask=exists, other=0)
        acc = fp8_sums(
            acc, x_line, x_scale_ptr + x_row * ((K + 127) // 128), real, words_line, scale_line,
            reference, row, first, K, ROWS, STEP, STEPS, CODE, COLUMNS, SCALE, GROUP, SWAP, WHOLE,
            UNROLL, COMPUTE,
        )  # fmt: skip
    else:
        acc = spread_sums(
            acc, x_line, real, words_line, scale_line, row, first, K, ROWS, STEP, STEPS, CODE,
            COLUMNS, SCALE, GROUP, SWAP, WHOLE, UNROLL, STAGES, COMPUTE,
        )  # fmt: skip

    row_scale = tl.load(row_scale_ptr + expert * ROWS + row, mask=exists, other=0.0)
    acc *= along_rows(row_scale, SWAP)
    if EPILOGUE == "swiglu":
        routing = tl.load(routing_ptr + slots, mask=real, other=0.0)
        store_swiglu(acc, out_ptr, slots, routing, limit, N, SWAP, BM, BN)
    else:
        store_sums(acc, out_ptr, slots, row, num_slots, ROWS, SWAP)
