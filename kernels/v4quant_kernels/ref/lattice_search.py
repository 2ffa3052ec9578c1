"""The integer scale search over E2M1 points in torch: the meaning, and the way on CUDA.

Two small matrix products give the sums A and B (see v4quant_kernels.ref.lattice) of every group
under every assignment of codes to integers; the best of the assignments' own scales wins. All sums
are exact, so the compiled loop of `v4quant_kernels.native.lattice` finds the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_kernels.ref import e2m1, e8m0
from v4quant_kernels.ref.lattice import (
    DEPTHS,
    DOUBLED,
    NEVER_ZERO,
    IntegerLattice,
    integer_lattice,
)
from v4quant_kernels.ref.mx import GROUP
from v4quant_kernels.scheme import Scheme

_CODES = 16
_SIGN = 8  # the sign bit of a code


@dataclass(frozen=True)
class FoundPart:
    """Rows quantized. integers: int8 [n, K]; scale: bfloat16 [n, K/G]; unweighted errors."""

    integers: Tensor
    scale: Tensor
    squared_error: float
    squared_norm: float
    max_error: float


def search_part(
    packed: Tensor, exponents: Tensor, scheme: Scheme, weights: Tensor | None
) -> FoundPart:
    """Search the scales of a few rows.

    packed: uint8 [n, K/2] E2M1 codes, even column in the low nibble; exponents: int32 [n, K/32];
    weights: float64 [K], multiples of 2^-14, or None.
    """
    rows, blocks = packed.shape[0], scheme.group_size // GROUP
    lattice = integer_lattice(scheme.bits, blocks)
    codes, exponents = _doubled(packed, exponents.reshape(-1))
    top = exponents.view(-1, blocks).amax(1)
    below = (top.unsqueeze(1) - exponents.view(-1, blocks)).view(-1)
    depth = below.clamp(max=DEPTHS - 1)
    features = _features(codes, depth, blocks, weights)
    # A scale below zero is one above zero for the negated codes: both histograms, side by side.
    negated = features.view(-1, _CODES // _SIGN, _SIGN).flip(1).reshape(features.shape)
    gain, t = _best_scale(lattice, features, blocks)
    gain_negative, t_negative = _best_scale(lattice, negated, blocks)
    negative = gain_negative < gain
    t = torch.where(negative, t_negative, t)

    unit = e8m0.power_of_two_f64(top)
    stored = (t.double() * unit).bfloat16()  # exact but for bfloat16 subnormals, below 2^-126
    t = (stored.double() / unit).float()
    codes = codes ^ (negative.int() * _SIGN).repeat_interleave(blocks).unsqueeze(1)
    row = depth * lattice.quantized.shape[1] + _assignment(lattice, t).repeat_interleave(blocks)
    table = lattice.quantized.to(codes.device).view(-1)
    integers = table[row.unsqueeze(1) * _CODES + codes]
    value = _on(e2m1.VALUES, codes).double()[codes] * e8m0.power_of_two_f64(-below).unsqueeze(1)
    step = t.double().repeat_interleave(blocks).unsqueeze(1)
    scale_up = unit.repeat_interleave(blocks).unsqueeze(1)
    error = (value - integers * step).mul_(scale_up)
    return FoundPart(
        integers.view(rows, -1),
        torch.where(negative, -stored, stored).view(rows, -1),
        float(error.square().sum()),
        float((value * scale_up).square().sum()),
        float(error.abs().max()),
    )


def _on(table: Tensor, other: Tensor) -> Tensor:
    return table.to(other.device)


def _doubled(packed: Tensor, exponents: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int32 [blocks, 32] and exponents [blocks], with a code of 2 or more in every block.

    The window counts from the largest block scale, so a block that uses only codes up to 1.5 would
    put it too high. Quantizers leave no such block, but a file may: its codes are doubled and its
    exponent lowered, at most twice. Blocks of zeros, exact under any scale, go to the bottom.
    """
    data = packed.reshape(-1, GROUP // 2)
    for _ in range(2):
        small = ~((data & 0x44) != 0).any(1) & ((data & 0x77) != 0).any(1)
        data = torch.where(small.unsqueeze(1), _on(DOUBLED, data)[data.int()], data)
        exponents = exponents - small.int()
    empty = ~((data & 0x77) != 0).any(1)
    codes = torch.stack((data & 15, data >> 4), 2).view(-1, GROUP).int()
    return codes, exponents.masked_fill(empty, e8m0.MIN_EXPONENT)


def _features(codes: Tensor, depth: Tensor, blocks: int, weights: Tensor | None) -> Tensor:
    """Counts, or sums of weights, over a group's codes by depth: [groups, depths*16]."""
    depths = 1 if blocks == 1 else DEPTHS
    groups = codes.shape[0] // blocks
    if weights is None:
        each = torch.ones((), dtype=torch.float32, device=codes.device).expand(codes.numel())
    else:
        each = _on(weights, codes).repeat(codes.numel() // weights.numel())
    group = torch.arange(groups, device=codes.device).repeat_interleave(blocks)
    index = (group * depths + depth).unsqueeze(1) * _CODES + codes
    total = torch.zeros(groups * depths * _CODES, dtype=each.dtype, device=codes.device)
    return total.index_add_(0, index.view(-1), each).view(groups, -1)


def _best_scale(lattice: IntegerLattice, features: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """(gain, t) of every group; t float32, exactly representable in bfloat16."""
    used = features.shape[1]
    va, qq = (_on(x[:used], features).to(features.dtype) for x in (lattice.va, lattice.qq))
    a, b = va.T @ features.T, (qq.T @ features.T).add_(NEVER_ZERO)
    low, high = lattice.lowest_scale, lattice.highest_scale
    t = torch.div(a, b).float().clamp_(low, high).bfloat16().float()
    gain = (t * b).sub_(a, alpha=2).mul_(t)  # error - E, <= 0 at any optimum
    # A minimum with index is slow across rows; comparing with the minimum finds t as well.
    best = gain.amin(0)
    return best, t.mul_(gain == best).amax(0)


def _assignment(lattice: IntegerLattice, t: Tensor) -> Tensor:
    """Index of the assignment that holds at each t, int32: a lookup by t's bfloat16 bits."""
    table, first = lattice.assignment_table()
    bits = t.view(torch.int32).bitwise_right_shift(16).sub_(first)
    return _on(table, t)[bits.clamp_(0, len(table) - 1)]
