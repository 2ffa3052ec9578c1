"""The grouped GEMM for machines that multiply block-scaled numbers themselves (sm_100, sm_120).

There the tensor core takes E4M3 activations, MXFP4 or MXFP8 weights and the scales of both, so
nothing is decoded: n4 words are the bytes of the checkpoint. sm_120 has no instruction for E4M3
times E2M1; there t8 words are widened to E4M3 by the byte table and the scales stay scales. The
release's activation scale, one per 128 columns, is passed four times, once for each group of 32.

Tiles, epilogues and everything around are those of `gemm.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from v4quant_kernels.gpu.gemm import along_rows, store_sums, store_swiglu
from v4quant_kernels.gpu.words import fp8_numbers


@triton.jit
def native_gemm_kernel(
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
    """As `gemm_kernel`, with the same arguments; `words_ptr` points to bytes unless CODE is t8."""
    expert = tl.load(tile_expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    tl.static_assert(SCALE == "e8m0")
    tl.static_assert(GROUP == 32)
    STEPS: tl.constexpr = (K + STEP * SPLIT - 1) // (STEP * SPLIT)
    # Units of weight storage: words of 8 for t8, otherwise bytes of 2 (n4) or 1 (b8).
    STEP_UNITS: tl.constexpr = STEP // COLUMNS
    UNITS: tl.constexpr = K // COLUMNS
    GROUPS: tl.constexpr = K // 32

    slots = tl.load(sorted_slots_ptr + tl.program_id(1) * BM + tl.arange(0, BM))
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    first = tl.program_id(2) * (STEPS * STEP)
    column = tl.arange(0, STEP)
    unit = tl.arange(0, STEP_UNITS)
    group = tl.arange(0, STEP // 32)
    real = slots >= 0
    x_row = (tl.maximum(slots, 0) // SLOTS_PER_ROW).to(tl.int64)
    x_line = x_ptr + x_row[:, None] * K
    x_scale_line = x_scale_ptr + (x_row * ((K + 127) // 128))[:, None]
    w_line = words_ptr + expert * ROWS * UNITS + row[:, None] * UNITS
    scale_line = scale_ptr + expert * ROWS * GROUPS + row[:, None] * GROUPS
    exists = (row < ROWS)[:, None]

    if SWAP:
        acc = tl.zeros((BN, BM), dtype=tl.float32)
    else:
        acc = tl.zeros((BM, BN), dtype=tl.float32)
    W_FORMAT: tl.constexpr = "e2m1" if CODE == "n4" else "e4m3"
    for step in range(STEPS):
        start = first + step * STEP
        x_mask = real[:, None] & (start + column < K)[None, :]
        x = tl.load(x_line + (start + column)[None, :], mask=x_mask, other=0)
        places = start // 32 + group
        has_scale = (places < GROUPS)[None, :]
        x_scale = tl.load(
            x_scale_line + (places // 4)[None, :], mask=real[:, None] & has_scale, other=127
        )
        units = start // COLUMNS + unit
        stored = tl.load(w_line + units[None, :], mask=exists & (units < UNITS)[None, :], other=0)
        w_scale = tl.load(scale_line + places[None, :], mask=exists & has_scale, other=127)
        if CODE == "t8":
            w = fp8_numbers(stored, w_scale.to(tl.int32) * 0, CODE, COMPUTE)
            stored = w.to(tl.uint8, bitcast=True)
        if SWAP:
            acc = tl.dot_scaled(stored, w_scale, W_FORMAT, tl.trans(x), x_scale, "e4m3", acc)
        else:
            acc = tl.dot_scaled(x, x_scale, "e4m3", tl.trans(stored), w_scale, W_FORMAT, acc)

    row_scale = tl.load(row_scale_ptr + expert * ROWS + row, mask=row < ROWS, other=0.0)
    acc *= along_rows(row_scale, SWAP)
    if EPILOGUE == "swiglu":
        routing = tl.load(routing_ptr + slots, mask=real, other=0.0)
        store_swiglu(acc, out_ptr, slots, routing, limit, N, SWAP, BM, BN)
    else:
        store_sums(acc, out_ptr, slots, row, num_slots, ROWS, SWAP)
