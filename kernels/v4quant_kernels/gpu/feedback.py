"""Error feedback inside a group of channels on a GPU: one launch where torch needs a thousand.

A program has all channels of a group for a tile of rows in registers and takes the channels in
turn. A channel is brought out of the tile by a masked sum, and a rank-one update with a masked row
of the factor moves those to come: more arithmetic than a triangle has, but none of it leaves the
registers. Rounding is left to the float32 adder: beside 1.5 * 2^23 there is no room for a fraction,
ties go to even. What the functions mean is told in `ref.feedback`. Groups must be powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 32
WARPS = 4


@triton.jit
def nearest(x, low, high):
    """float32 `x` to the nearest integer between low and high (small integers)."""
    bounded = tl.minimum(tl.maximum(x, low), high)
    return (bounded + 12582912.0) - 12582912.0


@triton.jit
def load_tile(start, rows, row, GROUP: tl.constexpr):
    """float32 `[GROUP, TILE]`: all channels of these rows of a member that begins at `start`."""
    channel = tl.arange(0, GROUP).to(tl.int64)
    place = start + channel[:, None] * rows + row[None, :]
    return tl.load(place, mask=(row < rows)[None, :], other=0.0)


@triton.jit
def channel_of(tile, i):
    """Channel i of a tile `[GROUP, TILE]`, `[TILE]`."""
    channel = tl.arange(0, tile.shape[0])
    return tl.sum(tl.where((channel == i)[:, None], tile, 0.0), axis=0)


@triton.jit
def best_scale_kernel(
    values_ptr, cost_ptr, size_ptr, scale_ptr, rows, values_batch, cost_batch, low, high,
    CANDIDATES: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, B)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, GROUP)
    inside = row < rows
    values = load_tile(values_ptr + batch * values_batch, rows, row, GROUP)
    cost = tl.load(cost_ptr + batch * cost_batch + channel)
    least = tl.full([TILE], float("inf"), tl.float32)
    found = tl.full([TILE], 1.0, tl.float32)
    for k in range(2 * CANDIDATES):
        at = (batch * CANDIDATES + k // 2) * rows + row
        size = tl.load(size_ptr + at, mask=inside, other=1.0)
        size = tl.where(k % 2 == 1, -size, size)
        integers = nearest(values * (1.0 / size)[None, :], low, high)
        missed = integers * size[None, :] - values
        error = tl.sum(missed * missed * cost[:, None], axis=0)
        better = error < least
        least, found = tl.where(better, error, least), tl.where(better, size, found)
    tl.store(scale_ptr + batch * rows + row, found, mask=inside)


@triton.jit
def round_group_kernel(
    work_ptr, scale_ptr, factor_ptr, integers_ptr, errors_ptr, rows,
    work_batch, scale_batch, factor_batch, factor_row, integers_batch, low, high,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, B)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, GROUP)
    inside = row < rows
    work = load_tile(work_ptr + batch * work_batch, rows, row, GROUP)
    scale = tl.load(scale_ptr + batch * scale_batch + row, mask=inside, other=1.0)
    factor_ptr += batch * factor_batch
    integers_ptr += batch * integers_batch
    errors_ptr += batch * GROUP * rows
    for i in range(GROUP):
        value = channel_of(work, i)
        integers = nearest(tl.div_rn(value, scale), low, high)
        error = tl.div_rn(value - integers * scale, tl.load(factor_ptr + i * factor_row + i))
        here = i * rows + row
        tl.store(integers_ptr + here, integers, mask=inside)
        tl.store(errors_ptr + here, error, mask=inside)
        later = tl.load(factor_ptr + i * factor_row + channel, mask=channel > i, other=0.0)
        work -= later[:, None] * error[None, :]


@triton.jit
def code_steps_kernel(
    pull_ptr, scale_ptr, gram_ptr, integers_ptr, rows,
    pull_batch, scale_batch, gram_batch, gram_row, integers_batch, low, high,
    GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid: (row tiles, B)."""
    batch = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, GROUP)
    inside = row < rows
    pull = load_tile(pull_ptr + batch * pull_batch, rows, row, GROUP)
    scale = tl.load(scale_ptr + batch * scale_batch + row, mask=inside, other=1.0)
    gram_ptr += batch * gram_batch
    integers_ptr += batch * integers_batch
    for i in range(GROUP):
        own = scale * tl.load(gram_ptr + i * gram_row + i)
        here = i * rows + row
        old = tl.load(integers_ptr + here, mask=inside, other=0.0)
        present = channel_of(pull, i)
        new = nearest(old + tl.div_rn(present, own), low, high)
        tl.store(integers_ptr + here, new, mask=inside)
        later = tl.load(gram_ptr + i * gram_row + channel, mask=channel > i, other=0.0)
        pull -= later[:, None] * ((new - old) * scale)[None, :]


def takes(values: Tensor) -> bool:
    """Whether the kernels handle groups of this size, `[B, group, N]`."""
    return values.shape[1] & (values.shape[1] - 1) == 0


def best_scale(values: Tensor, cost: Tensor, magnitudes: Tensor, low: int, high: int) -> Tensor:
    """As `ref.feedback.best_scale`."""
    _check(values, cost)
    sizes = magnitudes.contiguous()
    scale = torch.empty(sizes.shape[::2], dtype=values.dtype, device=values.device)
    best_scale_kernel[_grid(values)](
        values, cost, sizes, scale, values.shape[2], values.stride(0), cost.stride(0),
        float(low), float(high), CANDIDATES=sizes.shape[1], GROUP=values.shape[1], TILE=TILE,
        num_warps=WARPS,
    )  # fmt: skip
    return scale


def round_group(
    work: Tensor, scale: Tensor, factor: Tensor, low: int, high: int, integers: Tensor
) -> Tensor:
    """As `ref.feedback.round_group`; leaves `work` as it was."""
    _check(work, scale, factor, integers)
    errors = torch.empty(work.shape, dtype=work.dtype, device=work.device)
    round_group_kernel[_grid(work)](
        work, scale, factor, integers, errors, work.shape[2], work.stride(0), scale.stride(0),
        factor.stride(0), factor.stride(1), integers.stride(0), float(low), float(high),
        GROUP=work.shape[1], TILE=TILE, num_warps=WARPS,
    )  # fmt: skip
    return errors


def code_steps(
    pull: Tensor, scale: Tensor, gram: Tensor, low: int, high: int, integers: Tensor
) -> None:
    """As `ref.feedback.code_steps`; leaves `pull` as it was."""
    _check(pull, scale, gram, integers)
    code_steps_kernel[_grid(pull)](
        pull, scale, gram, integers, pull.shape[2], pull.stride(0), scale.stride(0),
        gram.stride(0), gram.stride(1), integers.stride(0), float(low), float(high),
        GROUP=pull.shape[1], TILE=TILE, num_warps=WARPS,
    )  # fmt: skip


def _grid(values: Tensor) -> tuple[int, int]:
    return triton.cdiv(values.shape[2], TILE), values.shape[0]


def _check(*tensors: Tensor) -> None:
    """float32, rows side by side; channels `[B, group, N]` one row length apart."""
    for tensor in tensors:
        assert tensor.dtype == torch.float32 and tensor.stride(-1) == 1, tensor.stride()
    channels = tensors[0]
    assert channels.shape[1] == 1 or channels.stride(1) == channels.shape[2], channels.stride()
