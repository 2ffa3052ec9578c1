"""The routed experts as grouped GEMMs over packed weights; the Triton twin of `ref.moe`.

    sort slots by expert -> gate and up GEMM -> SwiGLU -> down GEMM -> sum per token

Weights stay packed in memory (`runtime.py` says how) and are decoded on their way to the tensor
cores. Every product is exact and only the float32 accumulation rounds, whatever the format.

A batch of many slots applies SwiGLU at the end of the first GEMM. A small batch has too few tiles
to fill a GPU: its tiles are shared along K by SPLIT programs, whose float32 sums a second kernel
adds in order before SwiGLU (and before rounding to E4M3, which spares a launch). The experts'
outputs are float32 `[SPLIT, slots, rows]`, rows being `hidden` filled up to eights, and the last
kernel adds a token's parts and slots in a fixed order. No atomics: the same input gives the same
bits.

`activations="e4m3"` rounds x and h as the release does. With weights laid out for FP8 or
block-scaled tensor cores the E4M3 numbers are multiplied as they are; otherwise as bfloat16, which
holds the same values.

Under Triton's interpreter tiles are multiplied as float32, because it multiplies bfloat16 bit
patterns as integers; the values are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.experts import Activations, ExpertWeights, check_moe_inputs
from v4quant_kernels.gpu.activation import Fp8Rows, activate, fake_quant_e4m3, quantize_e4m3
from v4quant_kernels.gpu.decode import cast_to_bf16
from v4quant_kernels.gpu.gemm import gemm_kernel
from v4quant_kernels.gpu.interpreter import compute_type
from v4quant_kernels.gpu.routing import Routed, RoutingPlan, local_experts, sort_slots
from v4quant_kernels.gpu.scaled_gemm import native_gemm_kernel
from v4quant_kernels.gpu.tiles import SIZES, Tile, choose_split, choose_tile
from v4quant_kernels.runtime import RuntimeExperts, RuntimeMatrix, check_layout, prepare_experts
from v4quant_kernels.words import SPREAD, STEP, columns_per_word


@triton.jit
def combine_kernel(
    y_ptr,
    ids_ptr,
    map_ptr,
    out_ptr,
    num_slots,
    map_size,
    num_experts,
    rows,
    hidden,
    MAPPED: tl.constexpr,
    TOP_K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[t] = bf16(sum of y over t's slots that were computed). Grid: (T, column blocks).

    y is as wide as the rows of the weights' layout, which are filled up; out is `hidden` wide.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for choice in range(TOP_K):
        slot = token * TOP_K + choice
        expert = local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED)
        width = tl.where(expert >= 0, hidden, 0)  # 0: y was not written
        for part in tl.static_range(SPLIT):
            line = y_ptr + (part * num_slots + slot) * rows
            total += tl.load(line + column, mask=column < width, other=0.0)
    tl.store(out_ptr + token * hidden + column, cast_to_bf16(total), mask=column < hidden)


def moe(
    x: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    experts: ExpertWeights | RuntimeExperts,
    swiglu_limit: float,
    expert_map: Tensor | None = None,
    activations: Activations = "bf16",
    *,
    arch: int = 90,
    tile: Tile | None = None,
    split: int | None = None,
    compute: tl.dtype | None = None,
) -> Tensor:
    """`ref.moe.moe` on a GPU, or on CPU tensors under TRITON_INTERPRET=1.

    `experts` should be prepared once (`runtime.prepare_experts`); ExpertWeights are prepared anew
    in every call. Weights prepared for FP8 or block-scaled operands take activations="e4m3" only.
    `arch` (90 for sm_90) chooses tiles. `tile`, `split` and `compute` are for tests and tuning.
    Nothing is read on the host.
    """
    check_moe_inputs(x, expert_ids, expert_weights, experts, expert_map)
    if isinstance(experts, ExpertWeights):
        experts = prepare_experts(experts)
    for matrix in (experts.gate_up, experts.down):
        _check_matrix(matrix, activations)
    num_slots, top_k = expert_ids.numel(), expert_ids.shape[1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if num_slots == 0:
        return out.zero_()
    limit, compute = float(swiglu_limit), compute or compute_type()  # an integer is another type
    local = None if expert_map is None else expert_map.contiguous()
    who = Routed(expert_ids.contiguous().view(-1), local, experts.num_experts)
    routing = expert_weights.contiguous()
    per_expert = num_slots / experts.num_experts
    first = tile or choose_tile(arch, experts.gate_up, per_expert, fused=True)
    second = tile or choose_tile(arch, experts.down, per_expert)
    plan = sort_slots(who, first.rows)
    rows = _round(x.contiguous(), experts.gate_up, activations)
    h = _gate_up(rows, routing, who, experts, plan, limit, activations, first, split, compute)
    if second.rows != first.rows:
        plan = sort_slots(who, second.rows)
    tiles = plan.tile_expert.numel()
    parts = split or choose_split(tiles, experts.down, second)
    y = torch.empty(parts, num_slots, experts.down.rows, dtype=torch.float32, device=x.device)
    _gemm(h, y, routing, experts.down, plan, 0.0, 1, second, parts, "sums", compute)
    combine_kernel[(x.shape[0], triton.cdiv(out.shape[1], 512))](
        y, who.ids, who.expert_map, out, num_slots, who.map_size, who.num_experts,
        experts.down.rows, out.shape[1],
        MAPPED=who.mapped, TOP_K=top_k, SPLIT=parts, BLOCK=512,
    )  # fmt: skip
    return out


def _check_matrix(matrix: RuntimeMatrix, activations: Activations) -> None:
    check_layout(matrix)
    if matrix.operand != "bf16" and activations != "e4m3":
        raise V4QuantError(
            f"weights laid out as '{matrix.tag}' are multiplied by E4M3 activations only; "
            "prepare them for bfloat16, or pass activations='e4m3'"
        )


def _rounding(matrix: RuntimeMatrix, activations: Activations) -> str:
    """How the input of this matrix is rounded: "none", "fake" (kept bfloat16) or "fp8"."""
    if activations == "bf16":
        return "none"
    return "fake" if matrix.operand == "bf16" else "fp8"


def _round(x: Tensor, matrix: RuntimeMatrix, activations: Activations) -> Tensor | Fp8Rows:
    rounding = _rounding(matrix, activations)
    if rounding == "none":
        return x
    return quantize_e4m3(x) if rounding == "fp8" else fake_quant_e4m3(x)


def _gate_up(
    x: Tensor | Fp8Rows,
    routing: Tensor,
    who: Routed,
    experts: RuntimeExperts,
    plan: RoutingPlan,
    limit: float,
    activations: Activations,
    tile: Tile,
    split: int | None,
    compute: tl.dtype,
) -> Tensor | Fp8Rows:
    """h of every slot, rounded as the down projection wants it; skipped slots hold garbage."""
    matrix = experts.gate_up
    slots, channels, top_k = routing.numel(), matrix.shape[0], routing.shape[1]
    few = tile.rows <= SIZES[0]
    parts = split or (choose_split(plan.tile_expert.numel(), matrix, tile) if few else 1)
    if parts > 1 or few:
        sums = torch.empty(parts, slots, matrix.rows, dtype=torch.float32, device=routing.device)
        _gemm(x, sums, routing, matrix, plan, limit, top_k, tile, parts, "sums", compute)
        rounding = _rounding(experts.down, activations)
        return activate(sums, routing, who, channels, limit, rounding)
    h = torch.empty(slots, channels, dtype=torch.bfloat16, device=routing.device)
    _gemm(x, h, routing, matrix, plan, limit, top_k, tile, 1, "swiglu", compute)
    return _round(h, experts.down, activations)


def _gemm(
    x: Tensor | Fp8Rows,
    out: Tensor,
    routing: Tensor,
    matrix: RuntimeMatrix,
    plan: RoutingPlan,
    limit: float,
    slots_per_row: int,
    tile: Tile,
    split: int,
    epilogue: str,
    compute: tl.dtype,
) -> None:
    codes, x_scale = (x.codes, x.scale) if isinstance(x, Fp8Rows) else (x, matrix.row_scale)
    native = matrix.operand.startswith("native")
    words = matrix.words
    if native and matrix.code != "t8":
        words = words.view(torch.uint8)
    scale = matrix.scale
    if matrix.code in SPREAD and matrix.scale_code != "none":
        scale = scale.view(torch.int32)  # in pieces of four bytes
    grid = (triton.cdiv(matrix.rows, tile.columns), plan.tile_expert.numel(), split)
    kernel = native_gemm_kernel if native else gemm_kernel
    kernel[grid](
        codes, x_scale, words, scale, matrix.row_scale, matrix.reference,
        plan.sorted_slots, plan.tile_expert, routing, out, routing.numel(), limit,
        SLOTS_PER_ROW=slots_per_row, SPLIT=split, EPILOGUE=epilogue,
        **constants(matrix, tile, compute),
    )  # fmt: skip


def constants(matrix: RuntimeMatrix, tile: Tile, compute: tl.dtype) -> dict[str, object]:
    """The compile-time arguments both GEMM kernels take, and Triton's launch options.

    K is one of them (a model has two), because Triton 3.6's interpreter cannot loop to a number
    that is only known when the kernel runs.
    """
    native = matrix.operand.startswith("native")
    bytes_of = {"n4": 2, "b8": 1}
    columns = bytes_of[matrix.code] if native and matrix.code in bytes_of else None
    return {
        "K": matrix.shape[1],
        "ROWS": matrix.rows,
        "N": matrix.shape[0],
        "CODE": matrix.code,
        "COLUMNS": columns or columns_per_word(matrix.code),
        "SCALE": matrix.scale_code,
        "GROUP": matrix.scheme.group_size if matrix.scale_code != "none" else STEP,
        "FP8": matrix.operand == "fp8",
        "SWAP": tile.swap,
        "BM": tile.rows,
        "BN": tile.columns,
        "STEP": STEP,
        "UNROLL": tile.unroll,
        "STAGES": tile.stages,
        "COMPUTE": compute,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
