"""block_gptq: GPTQ onto GGUF's block types, scales and minima chosen inside the loop.

The procedure is that of `gptq`; what differs is the grid. A K-type's block of 256 channels has one
or two half-precision numbers and its sub-blocks small integers on top of them. When a block's turn
comes, its numbers are searched on the weights as earlier errors have moved them, each channel
weighed by 1 / U_ii^2, what its error costs (the encoder's own search). Then its sub-blocks take
their turn: each tries grids around the one found, really rounding to them, on weights that the
sub-blocks before it have moved.

Blocks, sub-blocks inside them and channels inside these are taken by falling second moment; all of
them keep their places in the file. Types with a codebook round groups of eight channels at once
(`v4quant_kernels.codebook_fit`), which move as wholes; their scales are coarse, so a block is
coded from several values of d and each row keeps the best.
"""

from __future__ import annotations

from dataclasses import fields, replace

import torch
from torch import Tensor

from v4quant_calibration.rounding.block_codes import BlockCodes, from_blocks, grids, join
from v4quant_calibration.rounding.block_fit import fit
from v4quant_calibration.rounding.fieldwise import choose
from v4quant_calibration.rounding.gptq import feedback_factor, permuted
from v4quant_kernels import ggml
from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import BlockShape

_REACH = 4
_OTHER_STARTS = (0.92, 1.08)


def block_gptq(weights: Tensor, gram: Tensor, name: str) -> BlockCodes:
    """Codes in type `name` of weights `[B, K, N]` under input moments `gram` (`[B, K, K]`).

    The moments must be positive definite (`gram.damped`); K a multiple of the type's block.
    """
    shape = SHAPES[name]
    columns = weights.shape[1]
    order = nested_order(gram.diagonal(dim1=1, dim2=2), (shape.block, shape.sub, shape.group))
    factor = feedback_factor(permuted(gram, order))
    work = weights.gather(1, order.unsqueeze(2).expand_as(weights))
    cost = factor.diagonal(dim1=1, dim2=2).square().reciprocal()
    done = []
    for start in range(0, columns, shape.block):
        part = slice(start, start + shape.block)
        codes, errors = _round_block(work[:, part], cost[:, part], factor[:, part, part], name)
        done.append(codes)
        if part.stop < columns:
            work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].mT, errors, alpha=-1)
    return _back_in_place(join(done, 1), order)


def _round_block(
    work: Tensor, cost: Tensor, factor: Tensor, name: str
) -> tuple[BlockCodes, Tensor]:
    """Codes of one block `[B, block, N]` and errors over pivots."""
    shape = SHAPES[name]
    start = _searched(work, cost, name, shape)
    codes, errors = _round_subs(work.clone(), start, factor, shape)
    if shape.codebook is None:
        return codes, errors
    least = errors.square().sum(1)
    for multiple in _OTHER_STARTS:
        other, missed = _round_subs(work.clone(), _rescaled(start, multiple, shape), factor, shape)
        total = missed.square().sum(1)
        better = total < least
        codes = choose(better, other, codes)
        errors = torch.where(better.unsqueeze(1), missed, errors)
        least = torch.where(better, total, least)
    return codes, errors


def _rescaled(codes: BlockCodes, multiple: float, shape: BlockShape) -> BlockCodes:
    """Another d, with the multiples of it that lie nearest to the steps of sub-blocks."""
    assert shape.sc is not None
    d = (codes.d * multiple).half().float()
    ratio = (codes.step() / (d * shape.unit)).nan_to_num(1.0, 1.0, 1.0)
    sc = ((ratio - 1) / 2).round().mul_(2).add_(1).clamp_(*shape.sc) * shape.unit
    return replace(codes, q=codes.q.clone(), d=d, sc=sc)


def _round_subs(
    work: Tensor, codes: BlockCodes, factor: Tensor, shape: BlockShape
) -> tuple[BlockCodes, Tensor]:
    """A block's sub-blocks in turn, from the scales of `codes` on; changes `work` and `codes`."""
    errors = torch.empty_like(work)
    for sub in range(shape.subs):
        own = slice(sub * shape.sub, (sub + 1) * shape.sub)
        tried = grids(codes, shape, sub, _reach(shape))
        values = work[:, own].contiguous()
        found = fit(values, factor[:, own, own], tried.step, tried.lowest, shape)
        codes.q[:, own] = found.integers
        set_grid(codes, sub, tried.take(found.choice))
        errors[:, own] = found.errors
        rest = slice(own.stop, shape.block)
        if rest.start < rest.stop:
            work[:, rest].baddbmm_(factor[:, own, rest].mT, found.errors, alpha=-1)
    return codes, errors


def _reach(shape: BlockShape) -> int:
    """Steps of `sc` tried either side; a codebook's scales are coarse, and its tries are dear."""
    return _REACH if shape.codebook is None else 1


def set_grid(codes: BlockCodes, sub: int, chosen: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Give a sub-block of a block its sc, m, d and dmin, each `[B, N]`."""
    sc, m, d, dmin = chosen
    codes.sc[:, sub], codes.m[:, sub] = sc, m
    codes.d[:, 0], codes.dmin[:, 0] = d, dmin


def _searched(work: Tensor, cost: Tensor, name: str, shape: BlockShape) -> BlockCodes:
    """What the encoder's own search makes of one block `[B, block, N]`, weighed by cost."""
    found = []
    for values, weights in zip(work, cost, strict=True):
        rows = values.mT.cpu().contiguous()
        blocks = ggml.search_blocks(rows, name, weights.cpu())
        found.append(from_blocks(blocks, rows.shape[0], shape.block, shape, work.device))
    return join(found)


def nested_order(diagonal: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """int64 `[B, K]`: groups of sizes[0] channels by falling sum, inside them of sizes[1], ..."""
    batch, columns = diagonal.shape
    order = torch.arange(columns, device=diagonal.device).expand(batch, columns)
    for size in reversed(sizes):  # from the inside out: a group moves with its inner order
        outer = next((s for s in reversed(sizes) if s > size), columns)
        sums = diagonal.gather(1, order).view(batch, -1, outer // size, size).sum(3)
        ranked = sums.argsort(dim=2, descending=True, stable=True)
        view = order.reshape(batch, -1, outer // size, size)
        order = view.gather(2, ranked.unsqueeze(3).expand_as(view)).reshape(batch, columns)
    return order


def _back_in_place(codes: BlockCodes, order: Tensor) -> BlockCodes:
    """Codes whose channels lie in `order` in their own places again."""
    columns = order.shape[1]
    inverse = order.argsort(1)
    moved = []
    for field in fields(codes):
        values: Tensor = getattr(codes, field.name)
        size = columns // values.shape[1]
        # Groups moved as wholes: where a group's first channel lies, there the group lies.
        places = inverse[:, ::size].div(size, rounding_mode="floor")
        moved.append(values.gather(1, places.unsqueeze(2).expand_as(values)))
    return BlockCodes(*moved)
