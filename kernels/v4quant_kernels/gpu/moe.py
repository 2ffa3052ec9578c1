"""The routed experts as grouped GEMMs over packed weights; the Triton twin of `ref.moe`.

    sort slots by expert -> gate and up GEMM with the SwiGLU epilogue -> down GEMM -> sum per token

Weights stay packed in memory and are decoded on their way to the tensor cores. One template serves
every scheme: which element, which scale and which block are constants of the compilation, and only
`decode` knows their bits.

Where the scale goes decides whether the result is exact. A power of two, or the E4M3 scale of a
four-bit float, times the element still fits bfloat16's eight significant bits, so it is folded into
the weight. A bfloat16 scale times an integer does not fit (37 % of the products would round), so
the elements are multiplied bare, as exact small integers, and the float32 partial sum of each group
is scaled instead; a step along K is then one group or a part of it. Either way every product is
exact and only the float32 accumulation rounds.

h is stored as bfloat16 `[slots, intermediate]` and the experts' outputs as float32 `[slots,
hidden]`, both in slot order, so the last kernel adds a token's `top_k` rows in a fixed order. No
atomics: the same input gives the same bits.

`compute` is the type the tensor cores multiply in. Under Triton's interpreter it must be float32,
because the interpreter multiplies bfloat16 bit patterns as integers; the values are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.experts import (
    Activations,
    ExpertWeights,
    StackedMatrix,
    check_moe_inputs,
    local_expert_ids,
)
from v4quant_kernels.gpu.activation import fake_quant_e4m3
from v4quant_kernels.gpu.decode import (
    cast_to_bf16,
    decode_element,
    decode_scale,
    load_bf16,
    load_codes,
)
from v4quant_kernels.gpu.interpreter import compute_type
from v4quant_kernels.gpu.routing import RoutingPlan, sort_slots


@triton.jit
def fold_scales(
    w, scale_ptr, scale_line, inside, first, K, SCALE: tl.constexpr, GROUP: tl.constexpr
):
    """`w` [BN, BK] times its scales; `first` is a multiple of BK, and BK of GROUP or inversely."""
    BN: tl.constexpr = w.shape[0]
    BK: tl.constexpr = w.shape[1]
    if BK <= GROUP:
        stored = tl.load(scale_ptr + scale_line + first // GROUP, mask=inside, other=0)
        scaled = w * decode_scale(stored, SCALE)[:, None]
    else:
        group = first // GROUP + tl.arange(0, BK // GROUP)[None, :]
        within = inside[:, None] & (group * GROUP < K)
        stored = tl.load(scale_ptr + scale_line[:, None] + group, mask=within, other=0)
        scales = decode_scale(stored, SCALE)[:, :, None]
        scaled = tl.reshape(tl.reshape(w, (BN, BK // GROUP, GROUP)) * scales, (BN, BK))
    return scaled


@triton.jit
def multiply_step(
    acc,
    x,
    codes_ptr,
    scale_ptr,
    rows,
    first,
    N,
    row_bytes,
    scale_row_length,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """acc [BM, BN] + x [BM, BK] @ W[rows, first:first+BK].T, decoding W on the way."""
    scale_line = (rows // GROUP_ROWS) * scale_row_length
    if ELEMENT == "bf16":
        column = first + tl.arange(0, BK)[None, :]
        within = (rows < N)[:, None] & (column < K)
        w = load_bf16(codes_ptr + rows[:, None] * K + column, within, COMPUTE)
    else:
        codes = load_codes(codes_ptr, rows, first, N, K, row_bytes, BITS, BK)
        w = decode_element(codes, ELEMENT, BITS)
        if FOLD:
            w = fold_scales(w, scale_ptr, scale_line, rows < N, first, K, SCALE, GROUP)
    w = tl.trans(w.to(COMPUTE))
    if FOLD:
        acc = tl.dot(x, w, acc, input_precision="ieee")
    else:
        stored = tl.load(scale_ptr + scale_line + first // GROUP, mask=rows < N, other=0.0)
        scale = decode_scale(stored, SCALE)[None, :]
        acc += tl.dot(x, w, input_precision="ieee") * scale
    return acc


@triton.jit
def gate_up_kernel(
    x_ptr,
    h_ptr,
    routing_ptr,
    sorted_slots_ptr,
    tile_expert_ptr,
    w1_ptr,
    w3_ptr,
    s1_ptr,
    s3_ptr,
    g1_ptr,
    g3_ptr,
    N,
    row_bytes,
    scale_rows,
    scale_row_length,
    swiglu_limit,
    K: tl.constexpr,
    TOP_K: tl.constexpr,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """h[slot] = bf16(routing * silu(min(w1 x, limit)) * clamp(w3 x, limit)). Grid: (M, N tiles)."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slots = tl.load(sorted_slots_ptr + tl.program_id(0) * BM + tl.arange(0, BM))
    real = slots >= 0
    x_line = x_ptr + (tl.maximum(slots, 0) // TOP_K).to(tl.int64)[:, None] * K
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    codes = expert * N * row_bytes
    scales = expert * scale_rows * scale_row_length

    gate = tl.zeros((BM, BN), dtype=tl.float32)
    up = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        column = first + tl.arange(0, BK)
        x = load_bf16(x_line + column[None, :], real[:, None] & (column < K)[None, :], COMPUTE)
        gate = multiply_step(
            gate, x, w1_ptr + codes, s1_ptr + scales, rows, first, N, row_bytes,
            scale_row_length, K, ELEMENT, BITS, SCALE, FOLD, GROUP_ROWS, GROUP, BK, COMPUTE,
        )  # fmt: skip
        up = multiply_step(
            up, x, w3_ptr + codes, s3_ptr + scales, rows, first, N, row_bytes,
            scale_row_length, K, ELEMENT, BITS, SCALE, FOLD, GROUP_ROWS, GROUP, BK, COMPUTE,
        )  # fmt: skip

    # Clamped by comparison: minimum and maximum would turn a NaN into a number.
    gate *= tl.load(g1_ptr + expert)
    gate = tl.where(gate > swiglu_limit, swiglu_limit, gate)
    up *= tl.load(g3_ptr + expert)
    up = tl.where(up > swiglu_limit, swiglu_limit, up)
    up = tl.where(up < -swiglu_limit, -swiglu_limit, up)
    routing = tl.load(routing_ptr + slots, mask=real, other=0.0)
    h = routing[:, None] * (gate / (1.0 + tl.exp(-gate))) * up
    h_line = h_ptr + slots.to(tl.int64)[:, None] * N
    inside = real[:, None] & (rows < N)[None, :]
    tl.store(h_line + rows[None, :], cast_to_bf16(h), mask=inside)


@triton.jit
def down_kernel(
    h_ptr,
    y_ptr,
    sorted_slots_ptr,
    tile_expert_ptr,
    w2_ptr,
    s2_ptr,
    g2_ptr,
    N,
    row_bytes,
    scale_rows,
    scale_row_length,
    K: tl.constexpr,
    ELEMENT: tl.constexpr,
    BITS: tl.constexpr,
    SCALE: tl.constexpr,
    FOLD: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """y[slot] = w2 h[slot], float32. Grid: (M tiles, N tiles)."""
    expert = tl.load(tile_expert_ptr + tl.program_id(0)).to(tl.int64)
    if expert < 0:
        return
    slots = tl.load(sorted_slots_ptr + tl.program_id(0) * BM + tl.arange(0, BM))
    real = slots >= 0
    h_line = h_ptr + slots.to(tl.int64)[:, None] * K
    rows = tl.program_id(1) * BN + tl.arange(0, BN)
    codes = expert * N * row_bytes
    scales = expert * scale_rows * scale_row_length

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for first in range(0, K, BK):
        column = first + tl.arange(0, BK)
        h = load_bf16(h_line + column[None, :], real[:, None] & (column < K)[None, :], COMPUTE)
        acc = multiply_step(
            acc, h, w2_ptr + codes, s2_ptr + scales, rows, first, N, row_bytes,
            scale_row_length, K, ELEMENT, BITS, SCALE, FOLD, GROUP_ROWS, GROUP, BK, COMPUTE,
        )  # fmt: skip
    y_line = y_ptr + slots.to(tl.int64)[:, None] * N
    inside = real[:, None] & (rows < N)[None, :]
    tl.store(y_line + rows[None, :], acc * tl.load(g2_ptr + expert), mask=inside)


@triton.jit
def combine_kernel(
    y_ptr, expert_ids_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr
):
    """out[t] = bf16(sum of y over t's slots that were computed). Grid: (T, column blocks)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        width = tl.where(tl.load(expert_ids_ptr + slot) >= 0, hidden, 0)  # 0: y was not written
        total += tl.load(y_ptr + slot * hidden + column, mask=column < width, other=0.0)
    tl.store(out_ptr + token * hidden + column, cast_to_bf16(total), mask=column < hidden)


@dataclass(frozen=True)
class Tile:
    """Slots (`rows`), output channels (`columns`) and inner steps (`depth`) of one program."""

    rows: int
    columns: int
    depth: int
    warps: int = 4
    stages: int = 3


def folds_scale(matrix: StackedMatrix) -> bool:
    """Whether element times scale is exact in bfloat16, so that weights are scaled and not sums."""
    return matrix.scale_format in {"e8m0", "e4m3", "none"}


def choose_tile(slots_per_expert: float, matrix: StackedMatrix) -> Tile:
    """Starting point by how many slots an expert gets on average; to be tuned on a device.

    Scaled sums need a third accumulator, hence narrower tiles: wider ones spill on sm_100 and 120.
    """
    fold = folds_scale(matrix)
    depth = 64 if fold else min(64, matrix.scheme.group_size)
    columns = 64 if fold else 32
    if slots_per_expert <= 16:
        return Tile(16, 64, depth)
    if slots_per_expert <= 64:
        return Tile(64, columns, depth)
    return Tile(128, columns, depth, warps=8)


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: ExpertWeights,
    swiglu_limit: float,
    expert_map: Tensor | None = None,
    activations: Activations = "bf16",
    *,
    tile: Tile | None = None,
    compute: tl.dtype | None = None,
) -> Tensor:
    """`ref.moe.moe` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    `tile` and `compute` are for tests and tuning; a tile's depth must divide, or be a multiple of,
    the scheme's group, and with bfloat16 or float32 scales must divide it. Nothing is read on the
    host.
    """
    check_moe_inputs(x, expert_ids, expert_weights, experts)
    ids = local_expert_ids(expert_ids, experts.num_experts, expert_map).contiguous()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if ids.numel() == 0:
        return out.zero_()
    compute = compute or compute_type()
    per_expert = ids.numel() / experts.num_experts
    first = tile or choose_tile(per_expert, experts.w1)
    second = tile or choose_tile(per_expert, experts.w2)
    assert first.rows == second.rows, "both GEMMs walk over one plan"
    plan = sort_slots(ids.view(-1), experts.num_experts, first.rows)
    x = x.contiguous()
    if activations == "e4m3":
        x = fake_quant_e4m3(x)
    h = _gate_up(x, expert_weights.contiguous(), experts, plan, swiglu_limit, first, compute)
    if activations == "e4m3":
        h = fake_quant_e4m3(h)
    y = _down(h, experts.w2, plan, second, compute)
    grid = (x.shape[0], triton.cdiv(experts.hidden_size, 512))
    combine_kernel[grid](y, ids, out, experts.hidden_size, ids.shape[1], BLOCK=512)
    return out


def _gate_up(
    x: Tensor,
    routing: Tensor,
    experts: ExpertWeights,
    plan: RoutingPlan,
    swiglu_limit: float,
    tile: Tile,
    compute: tl.dtype,
) -> Tensor:
    """h, bfloat16 `[slots, intermediate]`; rows of skipped slots stay unwritten."""
    w1, w3 = experts.w1, experts.w3
    h = torch.empty(routing.numel(), w1.shape[0], dtype=torch.bfloat16, device=x.device)
    gate_up_kernel[_grid(plan, w1, tile)](
        x, h, routing, plan.sorted_slots, plan.tile_expert,
        w1.codes, w3.codes, w1.scale, w3.scale, w1.global_scale, w3.global_scale,
        *_layout(w1), swiglu_limit, TOP_K=routing.shape[1], **_constants(w1, tile, compute),
    )  # fmt: skip
    return h


def _down(h: Tensor, w2: StackedMatrix, plan: RoutingPlan, tile: Tile, compute: tl.dtype) -> Tensor:
    """y, float32 `[slots, hidden]`; rows of skipped slots stay unwritten."""
    y = torch.empty(h.shape[0], w2.shape[0], dtype=torch.float32, device=h.device)
    down_kernel[_grid(plan, w2, tile)](
        h, y, plan.sorted_slots, plan.tile_expert, w2.codes, w2.scale, w2.global_scale,
        *_layout(w2), **_constants(w2, tile, compute),
    )  # fmt: skip
    return y


def _grid(plan: RoutingPlan, matrix: StackedMatrix, tile: Tile) -> tuple[int, int]:
    return plan.tile_expert.numel(), triton.cdiv(matrix.shape[0], tile.columns)


def _layout(matrix: StackedMatrix) -> tuple[int, int, int, int]:
    """N, bytes of a row of codes, rows and columns of the scales."""
    return matrix.shape[0], matrix.codes.shape[-1], *matrix.scale.shape[1:]


def _constants(matrix: StackedMatrix, tile: Tile, compute: tl.dtype) -> dict[str, object]:
    """The compile-time arguments both GEMM kernels take, and Triton's launch options.

    K is one of them (a model has two), because Triton 3.6's interpreter cannot loop to a number
    that is only known when the kernel runs.
    """
    rows, columns = matrix.scheme.block
    return {
        "K": matrix.shape[1],
        "ELEMENT": matrix.scheme.element,
        "BITS": matrix.scheme.bits,
        "SCALE": matrix.scale_format,
        "FOLD": folds_scale(matrix),
        "GROUP_ROWS": rows,
        "GROUP": columns,
        "BM": tile.rows,
        "BN": tile.columns,
        "BK": tile.depth,
        "COMPUTE": compute,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
