"""block_codes: coded matrices of GGUF's block types as a solver handles them.

A value is step * q + lowest with step = d * sc and lowest = -(dmin * m): `q` a small integer, `d`
and `dmin` half-precision numbers of a block, `sc` and `m` small integers of a sub-block (types of
one scale per block: both 1). What may change together lies together: `grids` lists the neighbours
of a sub-block's pair (sc, m), or of its d where there is no sc.

Matrices lie transposed as in `gptq`, `[B, K, N]`; a block's numbers are `[B, blocks, N]`, a
sub-block's `[B, sub-blocks, N]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from v4quant_calibration.rounding.fieldwise import choose
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.ggml_blocks import SHAPES, put_together, take_apart
from v4quant_kernels.ref.ggml_fields import Blocks, BlockShape
from v4quant_kernels.scheme import Scheme


@dataclass(frozen=True)
class BlockCodes:
    """Integers and scales, all float32: q `[B, K, N]`; d, dmin by block; sc, m by sub-block.

    sc is in units of one: it includes the type's `unit`.
    """

    q: Tensor
    d: Tensor
    sc: Tensor
    dmin: Tensor
    m: Tensor

    def step(self) -> Tensor:
        """Distance of neighbouring values, `[B, sub-blocks, N]`."""
        return self._spread(self.d) * self.sc

    def lowest(self) -> Tensor:
        """The value of q = 0, `[B, sub-blocks, N]`."""
        return -(self._spread(self.dmin) * self.m)

    def values(self) -> Tensor:
        """What the codes stand for, `[B, K, N]`, rounded as the format's decoders round."""
        size = self.q.shape[1] // self.sc.shape[1]
        step = self.step().repeat_interleave(size, 1)
        return self.q * step + self.lowest().repeat_interleave(size, 1)

    def sub_values(self, sub: int) -> Tensor:
        """`values` of one sub-block of a single block, `[B, size, N]`."""
        size = self.q.shape[1] // self.sc.shape[1]
        step = self.d * self.sc[:, sub : sub + 1]
        lowest = -(self.dmin * self.m[:, sub : sub + 1])
        return self.q[:, sub * size : (sub + 1) * size] * step + lowest

    def scaled(self, factor: Tensor) -> BlockCodes:
        """The same integers with every row's d and dmin times a factor `[B, N]`, as stored.

        Rows where that leaves half precision's range stay.
        """
        d, dmin = ((t * factor.unsqueeze(1)).half().float() for t in (self.d, self.dmin))
        fits = (d.isfinite() & dmin.isfinite()).all(1)
        return choose(fits, replace(self, d=d, dmin=dmin), self)

    def _spread(self, by_block: Tensor) -> Tensor:
        return by_block.repeat_interleave(self.sc.shape[1] // by_block.shape[1], 1)

    def part(self, columns: slice) -> BlockCodes:
        """The codes of whole sub-blocks of whole blocks, as views."""
        total = self.q.shape[1]
        cut = []
        for field in fields(self):
            values: Tensor = getattr(self, field.name)
            share = total // values.shape[1]
            cut.append(values[:, columns.start // share : columns.stop // share])
        return BlockCodes(*cut)


def join(batch: Sequence[BlockCodes], dim: int = 0) -> BlockCodes:
    """Codes one after the other: members of a batch (dim 0), or blocks of the same rows (1)."""
    names = [field.name for field in fields(BlockCodes)]
    return BlockCodes(
        *(torch.cat([getattr(codes, name) for codes in batch], dim) for name in names)
    )


@dataclass(frozen=True)
class Grids:
    """Grids to try for a sub-block, each `[B, grids, N]`; sc, m, d, dmin as in BlockCodes."""

    sc: Tensor
    m: Tensor
    d: Tensor
    dmin: Tensor

    @property
    def step(self) -> Tensor:
        """As `BlockCodes.step`."""
        return (self.d * self.sc).contiguous()

    @property
    def lowest(self) -> Tensor:
        """As `BlockCodes.lowest`."""
        return (-(self.dmin * self.m)).contiguous()

    def take(self, choice: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """sc, m, d, dmin `[B, N]` of the grids chosen, int64 `[B, N]`."""
        index = choice.unsqueeze(1)
        sc, m, d, dmin = (t.gather(1, index)[:, 0] for t in (self.sc, self.m, self.d, self.dmin))
        return sc, m, d, dmin


def grids(codes: BlockCodes, shape: BlockShape, sub: int, reach: int) -> Grids:
    """Neighbours of the grid a sub-block has (which comes first), up to `reach` steps away.

    codes: of one block, `sub` the sub-block's number in it.
    """
    sc, m = codes.sc[:, sub : sub + 1], codes.m[:, sub : sub + 1]
    d, dmin = codes.d[:, :1], codes.dmin[:, :1]
    offsets = torch.arange(-reach, reach + 1, device=d.device)
    offsets = offsets[offsets.abs().argsort(stable=True)].float().view(1, -1, 1)
    if shape.odd_scales:
        offsets = 2 * offsets
    if shape.sc is None:
        return _single_grids(d, dmin, offsets, shape)
    low, high = (limit * shape.unit for limit in shape.sc)
    offsets = offsets * shape.unit
    near = (sc + offsets).clamp_(low, high)
    if not shape.has_minimum:
        shared = torch.ones_like(near)
        return Grids(near, m * shared, d * shared, dmin * shared)
    # The best minimum moves with the step by about the mean integer: the mean of the values stays.
    size = codes.q.shape[1] // codes.sc.shape[1]
    mean = codes.q[:, sub * size : (sub + 1) * size].mean(1, keepdim=True)
    slope = torch.where(dmin > 0, mean * d / dmin, 0.0).nan_to_num_(0.0, 0.0, 0.0)
    middle = torch.round(m + (near - sc) * slope)
    found = [(middle + shift).clamp_(low, high) for shift in (0.0, 1.0, -1.0)]
    steps, minima = torch.cat([near] * 3, 1), torch.cat(found, 1)
    shared = torch.ones_like(steps)
    return Grids(steps, minima, d * shared, dmin * shared)


_STRIDE = 0.03
"""Step of the scales tried for types of one scale per block, as a share of the scale."""


def _single_grids(d: Tensor, dmin: Tensor, offsets: Tensor, shape: BlockShape) -> Grids:
    near = (d * (1 + _STRIDE * offsets)).half().float()
    if not shape.has_minimum:
        shared = torch.ones_like(near)
        return Grids(shared, shared, near, dmin * shared)
    middle = shape.q[1] / 2
    lowest = -dmin - (near - d) * middle
    minima = [(-lowest + shift * d).half().float() for shift in (0.0, 0.5, -0.5)]
    minima[0][:, :1] = dmin
    steps = torch.cat([near] * 3, 1)
    shared = torch.ones_like(steps)
    return Grids(shared, shared, steps, torch.cat(minima, 1))


def read_codes(matrices: Sequence[QTensor], device: torch.device) -> BlockCodes:
    """Codes of stacked matrices of one type, for a batch of one."""
    name = matrices[0].scheme.name
    shape = SHAPES[name]
    data = torch.cat([q.codes for q in matrices])
    rows, columns = data.shape[0], matrices[0].shape[1]
    blocks = take_apart(data.reshape(-1, matrices[0].scheme.block_bytes), name)
    return from_blocks(blocks, rows, columns, shape, device)


def from_blocks(
    blocks: Blocks, rows: int, columns: int, shape: BlockShape, device: torch.device
) -> BlockCodes:
    """Codes `[1, K, N]` of blocks row by row."""
    count = columns // shape.block

    def arranged(t: Tensor | None, each: int, absent: float, unit: float = 1.0) -> Tensor:
        if t is None:
            return torch.full((1, count * each, rows), absent, device=device)
        return (
            (t.float() * unit).reshape(rows, count * each).mT.contiguous().unsqueeze(0).to(device)
        )

    scaled = shape.sc is not None
    dmin = blocks.dmin
    if dmin is not None and not scaled:
        dmin = -dmin  # q5_1 stores the lowest value itself
    return BlockCodes(
        arranged(blocks.q, shape.block, 0.0),
        arranged(blocks.d, 1, 0.0),
        arranged(blocks.sc, shape.subs, 1.0, shape.unit),
        arranged(dmin, 1, 0.0),
        arranged(blocks.m, shape.subs, 1.0),
    )


def write_codes(
    codes: BlockCodes, index: int, heights: Sequence[int], scheme: Scheme
) -> list[QTensor]:
    """Coded matrices, cut at their heights, of one of the batch."""
    shape = SHAPES[scheme.name]
    columns = codes.q.shape[1]

    def rows_of(t: Tensor, each: int) -> Tensor:
        return t[index].mT.contiguous().view(-1, each)

    scaled = shape.sc is not None
    dmin = None
    if shape.has_minimum:
        dmin = rows_of(codes.dmin, 1)[:, 0]
        dmin = (dmin if scaled else -dmin).half()
    blocks = Blocks(
        rows_of(codes.q, shape.block).to(torch.int8),
        rows_of(codes.d, 1)[:, 0].half(),
        (rows_of(codes.sc, shape.subs) / shape.unit).to(torch.int8) if scaled else None,
        dmin,
        rows_of(codes.m, shape.subs).to(torch.int8) if scaled and shape.has_minimum else None,
        shape.unit,
    )
    data = put_together(blocks, scheme.name).view(sum(heights), -1)
    parts = data.split(list(heights))
    return [QTensor(scheme, (len(part), columns), part.contiguous()) for part in parts]
