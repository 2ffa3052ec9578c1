"""The grouped GEMM: one template for every format, both projections and every operand.

A program multiplies BM slots of one expert with BN rows of that expert's words. Per step along K it
loads a tile of activations and a tile of words, decodes the words in registers (`gpu/words.py`) and
feeds the tensor cores. What differs between formats is constants of the compilation:

* CODE and SCALE name the word code and the form of the scales (`runtime.py`).
* Where the scale goes is decided by exactness. `field`, `ue5m3` and `relative` scales are part of
  the decoded number, exactly. Others multiply the float32 sum of their group. A step of integers
  (`integer_sums`) is a block of 16 words, which holds parts of 32 columns, one or more a group.
* FP8: activations are E4M3 bytes with an E8M0 scale per 128 columns. A step is 128 columns whose
  sum is scaled once, which is also where Hopper's short FP8 accumulator is emptied.
* SWAP puts the weights on the left of the product. FP8 tensor cores of sm_90 work on 64 or more
  rows of the left operand: for few slots the weights must be there.
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
from v4quant_kernels.gpu.words import fp8_numbers, plain_floats, scaled_floats, spread_integers


@triton.jit
def multiplier_bits(stored, SCALE: tl.constexpr):
    """int32 bits of the bfloat16 that a pattern is multiplied by (`runtime.py` on scale forms)."""
    code = stored.to(tl.int32)
    if SCALE == "field":
        bits = code << 7
    else:
        tl.static_assert(SCALE == "ue5m3")
        bits = ((code << 4) + (235 << 7)) & ((0 - code) >> 31)  # 0 for code 0, without a predicate
    return bits


@triton.jit
def group_factor(stored):
    """float32 multiplier of a group's sum from an E8M0 byte."""
    code = stored.to(tl.int32)
    return tl.where(code == 0, 0x00400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def load_x(pointers, mask, FP8: tl.constexpr, COMPUTE: tl.constexpr):
    """A tile of activations: E4M3 from bytes, or bfloat16 as COMPUTE."""
    if FP8:
        x = tl.load(pointers, mask=mask, other=0).to(tl.float8e4nv, bitcast=True)
    else:
        x = load_bf16(pointers, mask, COMPUTE)
    return x


@triton.jit
def load_weights(pointers, rows, columns, WHOLE: tl.constexpr):
    """A tile of words or scales, 0 outside the masks; WHOLE tiles need no masks."""
    if WHOLE:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=rows[:, None] & columns[None, :], other=0)
    return tile


@triton.jit
def decode_tile(
    words,
    stored,
    reference,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    FP8: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """`[BN, BK]` weights, with their group scales where those can be part of them."""
    if FP8:
        exponent = stored.to(tl.int32) - reference[:, None]
        exponent = tl.minimum(tl.maximum(exponent, -5), 6)  # outside only for groups of zeros
        w = fp8_numbers(words, exponent, CODE, COMPUTE)
    elif SCALE == "field" or SCALE == "ue5m3":
        w = scaled_floats(words, multiplier_bits(stored, SCALE), CODE, COMPUTE)
    else:
        tl.static_assert(SCALE == "none")
        w = plain_floats(words, COMPUTE)
    return w


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
def integer_scale(
    scale_line, place, index: tl.constexpr, there, PAIRED: tl.constexpr, WHOLE: tl.constexpr
):
    """float32 `[rows]` scales of group `place`, the `index`-th of its block."""
    pointers = scale_line + (place // 2 if PAIRED else place)
    if WHOLE:
        stored = tl.load(pointers)
    else:
        stored = tl.load(pointers, mask=there, other=0)
    if not PAIRED:
        # Read as its bits: the interpreter's conversion errs for subnormals.
        bits = stored.to(tl.int16, bitcast=True).to(tl.int32) << 16
    elif index % 2 == 0:
        bits = stored << 16
    else:
        bits = stored & -0x10000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def integer_sums(
    acc,
    x_line,
    real,
    words_line,
    scale_line,
    row,
    first,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    GROUP: tl.constexpr,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SWAP: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
    STAGES: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """acc plus the sums of STEPS blocks of integer words from column `first`.

    x_line `[slots, 1]`, words_line and scale_line `[rows]` point at column 0. Scales are pairs of
    bfloat16 where a block has several groups.
    """
    BLOCK: tl.constexpr = 16 * COLUMNS
    PAIRED: tl.constexpr = GROUP < BLOCK
    column = tl.arange(0, 32)
    word = tl.arange(0, 16)
    x_tile = x_line + (first + column)[None, :]
    words_tile = words_line[:, None] + first // COLUMNS + word[None, :]
    for step in tl.range(0, STEPS, num_stages=STAGES, loop_unroll_factor=UNROLL):
        start = first + step * BLOCK
        there = row < tl.where(start < K, ROWS, 0)
        words = load_weights(words_tile, there, word < 16, WHOLE)
        part = tl.zeros_like(acc)
        for i in tl.static_range(COLUMNS // 2):
            x_mask = real[:, None]
            if not WHOLE:
                x_mask = x_mask & (start + 32 * i + column < K)[None, :]
            x = load_bf16(x_tile + 32 * i, x_mask, COMPUTE)
            part = multiply(part, x, spread_integers(words, i, CODE, COMPUTE), SWAP)
            if 32 * (i + 1) % GROUP == 0 or i == COLUMNS // 2 - 1:
                place = start // GROUP + 32 * i // GROUP
                factor = integer_scale(scale_line, place, 32 * i // GROUP, there, PAIRED, WHOLE)
                acc += part * along_rows(factor, SWAP)
                part = tl.zeros_like(acc)
        x_tile += BLOCK
        words_tile += 16
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
    BK: tl.constexpr,
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
    IN_WEIGHTS: tl.constexpr = SCALE == "field" or SCALE == "ue5m3" or SCALE == "relative"
    STEPS: tl.constexpr = (K + BK * SPLIT - 1) // (BK * SPLIT)
    WHOLE: tl.constexpr = K % (BK * SPLIT) == 0 and ROWS % BN == 0
    # Rows of integers are whole blocks of 16 words, and have two scales to an int32 if possible.
    BLOCK: tl.constexpr = 16 * COLUMNS if SCALE == "bf16" else COLUMNS
    WORDS: tl.constexpr = (K + BLOCK - 1) // BLOCK * BLOCK // COLUMNS
    GROUPS: tl.constexpr = (WORDS * COLUMNS + GROUP - 1) // GROUP
    STEP_GROUPS: tl.constexpr = BK // GROUP if BK > GROUP else 1

    slots = tl.load(sorted_slots_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * (STEPS * BK)
    column = tl.arange(0, BK)
    word = tl.arange(0, BK // COLUMNS)
    group = tl.arange(0, STEP_GROUPS)

    real = slots >= 0
    x_row = (tl.maximum(slots, 0) // SLOTS_PER_ROW).to(tl.int64)
    x_scale_line = x_scale_ptr + x_row * ((K + 127) // 128)
    x_tile = x_ptr + x_row[:, None] * K + (first + column)[None, :]
    words_line = words_ptr + expert * ROWS * WORDS + row * WORDS
    words_tile = words_line[:, None] + first // COLUMNS + word[None, :]
    scale_line = scale_ptr + expert * ROWS * GROUPS + row * GROUPS
    exists = row < ROWS
    reference = row * 0
    if SCALE == "relative":
        reference = tl.load(reference_ptr + expert * ROWS + row, mask=exists, other=0)

    if SWAP:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    if SCALE == "bf16":
        tl.static_assert(BK == BLOCK)
        PAIRED: tl.constexpr = GROUP < BLOCK
        scales = scale_ptr + expert * (ROWS * GROUPS // (2 if PAIRED else 1))
        acc = integer_sums(
            acc, x_ptr + x_row[:, None] * K, real, words_line,
            scales + row * (GROUPS // (2 if PAIRED else 1)), row, first, K, ROWS, STEPS, GROUP,
            CODE, COLUMNS, SWAP, WHOLE, UNROLL, STAGES, COMPUTE,
        )  # fmt: skip
    else:
        for step in tl.range(0, STEPS, loop_unroll_factor=UNROLL):
            start = first + step * BK
            x_mask = real[:, None]
            if not WHOLE:
                x_mask = x_mask & (start + column < K)[None, :]
            x = load_x(x_tile, x_mask, FP8, COMPUTE)
            words = load_weights(words_tile, exists, start // COLUMNS + word < WORDS, WHOLE)
            stored = words
            if SCALE != "none":
                place = start // GROUP + group
                pointers = scale_line[:, None] + place[None, :]
                stored = load_weights(pointers, exists, place < GROUPS, WHOLE)
            w = decode_tile(words, stored, reference, CODE, SCALE, FP8, COMPUTE)
            if SCALE == "none" or (IN_WEIGHTS and not FP8):
                acc = multiply(acc, x, w, SWAP)
            else:
                part = multiply(tl.zeros_like(acc), x, w, SWAP)
                if FP8:
                    block = tl.minimum(start // 128, (K - 1) // 128)  # beyond K, x is 0
                    x_scale = tl.load(x_scale_line + block, mask=real, other=127)
                    part *= along_slots(group_factor(x_scale), SWAP)
                if not IN_WEIGHTS:
                    part *= along_rows(tl.reshape(group_factor(stored), (BN,)), SWAP)
                acc += part
            x_tile += BK
            words_tile += BK // COLUMNS

    row_scale = tl.load(row_scale_ptr + expert * ROWS + row, mask=exists, other=0.0)
    acc *= along_rows(row_scale, SWAP)
    if EPILOGUE == "swiglu":
        routing = tl.load(routing_ptr + slots, mask=real, other=0.0)
        store_swiglu(acc, out_ptr, slots, routing, limit, N, SWAP, BM, BN)
    else:
        store_sums(acc, out_ptr, slots, row, num_slots, ROWS, SWAP)
