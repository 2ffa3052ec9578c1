"""Activations between the two GEMMs: SwiGLU of summed parts, and rounding to E4M3.

The release rounds the input of every quantized linear layer to E4M3 per 128 columns with a
power-of-two scale (`ref.activation.fake_quant_e4m3`). One kernel does that in two forms: as E4M3
bytes and E8M0 scales for FP8 tensor cores, or back as bfloat16 of the same values, which holds them
exactly, for everything else.

The scale comes from exponent bits (`ceil(log2(amax * f32(1/448)))`), and rounding to E4M3 is left
to the float32 adder: adding 1.5 * 2^23 times the spacing of E4M3 numbers around v leaves no room
for anything finer, so the sum is rounded, ties to even, and subtracting it back gives the result.
Times 2^-120 its float32 pattern then holds the E4M3 code in bits 26..20.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from v4quant_kernels.gpu.decode import cast_to_bf16, is_nan, load_bf16, round_to_bf16
from v4quant_kernels.gpu.routing import Routed, local_experts

BLOCK = 128


@dataclass(frozen=True)
class Fp8Rows:
    """E4M3 bytes uint8 `[rows, K]` and E8M0 scales uint8 `[rows, ceil(K/128)]`."""

    codes: Tensor
    scale: Tensor


@triton.jit
def round_to_e4m3(v):
    """float32 `v`, |v| <= 448, rounded to the nearest E4M3 number, ties to even."""
    exponent = ((v.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
    exponent = tl.maximum(exponent, -6)  # below 2^-6 the spacing stays 2^-9
    # spacing = 2^(exponent - 3); the addend 1.5 * 2^23 * spacing has exponent (exponent + 20).
    addend = (((exponent + 20 + 127) << 23) | 0x400000).to(tl.float32, bitcast=True)
    return (v + addend) - addend


@triton.jit
def e4m3_exponent(x):
    """int32 `[rows, 1]`: exponent of the scale of each row of float32 `x` `[rows, BLOCK]`."""
    amax = tl.maximum(tl.max(tl.abs(x), axis=1, keep_dims=True), 1e-4)
    bits = (amax * 0.002232142857142857).to(tl.int32, bitcast=True)  # times f32(1/448)
    return tl.minimum(((bits + 0x7FFFFF) >> 23) - 127, 126)


@triton.jit
def store_rounded(x, codes_ptr, scale_ptr, row, block, inside, columns, AS_BYTES: tl.constexpr):
    """Round one block of each row of float32 `x` `[rows, BLOCK]` and store it in either form."""
    BLOCK: tl.constexpr = x.shape[1]
    exponent = e4m3_exponent(x)
    inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    value = round_to_e4m3(tl.minimum(tl.maximum(x * inverse, -448.0), 448.0))
    column = block * BLOCK + tl.arange(0, BLOCK)
    place = row.to(tl.int64)[:, None] * columns + column[None, :]
    within = inside[:, None] & (column < columns)[None, :]
    if AS_BYTES:
        bits = (value * 7.52316384526264e-37).to(tl.int32, bitcast=True)  # 2^-120
        code = ((bits >> 20) & 0x7F) | ((bits >> 24) & 0x80)
        code = tl.where(is_nan(x), 0x7F, code)
        tl.store(codes_ptr + place, code.to(tl.uint8), mask=within)
        blocks = (columns + BLOCK - 1) // BLOCK
        scale_place = scale_ptr + row.to(tl.int64)[:, None] * blocks + block
        tl.store(scale_place, (exponent + 127).to(tl.uint8), mask=inside[:, None])
    else:
        scale = ((exponent + 127) << 23).to(tl.float32, bitcast=True)
        rounded = tl.where(is_nan(x), x, value * scale)
        tl.store(codes_ptr + place, cast_to_bf16(rounded), mask=within)


@triton.jit
def quantize_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    columns,
    AS_BYTES: tl.constexpr,
    BR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program rounds one block of BR rows. Grid: (row tiles, blocks)."""
    row = tl.program_id(0) * BR + tl.arange(0, BR)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = load_bf16(x_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], inside, tl.float32)
    store_rounded(x, codes_ptr, scale_ptr, row, tl.program_id(1), row < rows, columns, AS_BYTES)


@triton.jit
def swiglu(gate, up, routing, limit):
    """routing * silu(min(gate, limit)) * clamp(up, -limit, limit), all float32."""
    # By comparison: minimum and maximum would turn a NaN into a number.
    gate = tl.where(gate > limit, limit, gate)
    up = tl.where(up > limit, limit, up)
    up = tl.where(up < -limit, -limit, up)
    return routing * (gate / (1.0 + tl.exp(-gate))) * up


@triton.jit
def activate_kernel(
    sums_ptr,
    routing_ptr,
    ids_ptr,
    map_ptr,
    h_ptr,
    scale_ptr,
    num_slots,
    map_size,
    num_experts,
    rows,
    N,
    limit,
    MAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUND: tl.constexpr,
    AS_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """h of one slot's block of channels from SPLIT float32 sums. Grid: (slots, blocks).

    Slots of no expert here have no sums and get no h.
    """
    slot = tl.program_id(0).to(tl.int64)
    if local_experts(ids_ptr, map_ptr, slot, num_slots, map_size, num_experts, MAPPED) < 0:
        return
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = channel // 8 * 16 + channel % 8
    gate = tl.zeros((BLOCK,), dtype=tl.float32)
    up = tl.zeros((BLOCK,), dtype=tl.float32)
    for part in tl.static_range(SPLIT):
        line = sums_ptr + (part * num_slots + slot) * rows
        gate += tl.load(line + row, mask=channel < N, other=0.0)
        up += tl.load(line + row + 8, mask=channel < N, other=0.0)
    h = round_to_bf16(swiglu(gate, up, tl.load(routing_ptr + slot), limit))
    if ROUND:
        one = tl.zeros((1,), dtype=tl.int64) + slot
        block = tl.program_id(1)
        store_rounded(h[None, :], h_ptr, scale_ptr, one, block, one >= 0, N, AS_BYTES)
    else:
        tl.store(h_ptr + slot * N + channel, cast_to_bf16(h), mask=channel < N)


def _empty_fp8(rows: int, columns: int, device: torch.device) -> Fp8Rows:
    def bytes_(width: int) -> Tensor:
        return torch.empty(rows, width, dtype=torch.uint8, device=device)

    return Fp8Rows(bytes_(columns), bytes_(triton.cdiv(columns, BLOCK)))


def _quantize(x: Tensor, out: Tensor, scale: Tensor, as_bytes: bool) -> None:
    assert x.dtype == torch.bfloat16 and x.ndim == 2 and x.is_contiguous()
    rows, columns = x.shape
    if rows == 0:
        return
    tile = 16 if rows >= 1024 else 1
    quantize_kernel[(triton.cdiv(rows, tile), triton.cdiv(columns, BLOCK))](
        x, out, scale, rows, columns, AS_BYTES=as_bytes, BR=tile, BLOCK=BLOCK
    )


def quantize_e4m3(x: Tensor) -> Fp8Rows:
    """bfloat16 `[rows, columns]` as E4M3 with an E8M0 scale per 128 columns."""
    out = _empty_fp8(x.shape[0], x.shape[1], x.device)
    _quantize(x, out.codes, out.scale, True)
    return out


def fake_quant_e4m3(x: Tensor) -> Tensor:
    """bfloat16 `[rows, columns]` rounded to E4M3 per 128 columns, same shape and dtype."""
    out = torch.empty_like(x)
    _quantize(x, out, out, False)
    return out


def activate(
    sums: Tensor, routing: Tensor, who: Routed, channels: int, limit: float, rounding: str
) -> Tensor | Fp8Rows:
    """h of `[SPLIT, slots, R]` float32 sums with interleaved gate and up rows.

    rounding: "none" or "fake" give bfloat16 `[slots, channels]`, "fp8" gives Fp8Rows.
    """
    split, slots, rows = sums.shape
    fp8 = _empty_fp8(slots, channels, sums.device) if rounding == "fp8" else None
    out = fp8.codes if fp8 else sums.new_empty(0)
    if fp8 is None:
        out = torch.empty(slots, channels, dtype=torch.bfloat16, device=sums.device)
    activate_kernel[(slots, triton.cdiv(channels, BLOCK))](
        sums,
        routing,
        who.ids,
        who.expert_map,
        out,
        fp8.scale if fp8 else out,
        slots,
        who.map_size,
        who.num_experts,
        rows,
        channels,
        limit,
        MAPPED=who.mapped,
        SPLIT=split,
        ROUND=rounding != "none",
        AS_BYTES=fp8 is not None,
        BLOCK=BLOCK,
    )
    return fp8 or out
