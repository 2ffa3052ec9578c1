"""Plain rounding into GGML blocks: scales from the extreme values, no search.

The step of a sub-block is its range over the range of the integers; the largest step and the
largest minimum of a block get the top integers, and everything is rounded once, each stage against
the stored (rounded) scale of the stage before.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4quant_kernels.ref import codebook_fit
from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import Blocks, BlockShape


def round_blocks(x: Tensor, name: str) -> Blocks:
    """Blocks from finite float32 `[B, block]`; half-precision scales saturate at infinity."""
    shape = SHAPES[name]
    subs = x.view(-1, shape.subs, shape.sub)
    low, high = shape.q
    if shape.has_minimum:
        bottom = subs.amin(-1)
        bottom = bottom if shape.sc is None else bottom.clamp_(max=0)
        step = (subs.amax(-1) - bottom) / (high - low)
    else:
        bottom = None
        step = subs.abs().amax(-1) / high
    if shape.codebook is not None:
        return _round_vectors(subs, step, shape)
    d, sc = _two_level(step, shape.sc)
    dmin = m = None
    if bottom is not None and shape.sc is None:
        dmin = bottom[:, 0].half()
    elif bottom is not None:
        dmin, m = _two_level(-bottom, shape.sc)
    return round_onto(x, Blocks(torch.empty(0), d, sc, dmin, m), shape)


def round_onto(x: Tensor, grid: Blocks, shape: BlockShape) -> Blocks:
    """The nearest integers of the type for float32 `[B, block]` under the scales of `grid`."""
    step, offset = grid.step()[..., None], grid.offset()
    subs = x.view(*step.shape[:2], -1)
    if offset is not None:
        subs = subs - offset[..., None]
    codes = (subs / step).nan_to_num_(0.0, 0.0, 0.0)
    if shape.levels:
        levels = torch.tensor(shape.levels, dtype=codes.dtype, device=codes.device)
        codes = levels[torch.bucketize(codes, (levels[1:] + levels[:-1]) / 2)]
    else:
        codes = codes.round_().clamp_(*shape.q)
    return Blocks(codes.to(torch.int8).view(x.shape), grid.d, grid.sc, grid.dmin, grid.m)


def _round_vectors(subs: Tensor, step: Tensor, shape: BlockShape) -> Blocks:
    """Sub-blocks `[B, subs, sub]` under odd multiples of d, each vector for itself."""
    assert shape.codebook is not None and shape.sc is not None
    d = (step.amax(-1) / (shape.sc[1] * shape.unit)).half()
    ratio = step / (d.float()[:, None] * shape.unit)
    sc = ratio.nan_to_num_(1.0, 1.0, 1.0).sub_(1).mul_(0.5).round_().mul_(2).add_(1)
    sc = sc.clamp_(*shape.sc).to(torch.int8)
    blocks = Blocks(torch.empty(0), d, sc, unit=shape.unit)
    weighing = codebook_fit.weigh(torch.eye(shape.sub)[None], shape.codebook, diagonal=True)
    columns = subs.reshape(-1, shape.sub).mT.unsqueeze(0)
    _, q, _, _ = codebook_fit.fit(columns, weighing, blocks.step().view(1, 1, -1))
    return replace(blocks, q=q[0].mT.to(torch.int8).reshape(len(subs), shape.block))


def _two_level(step: Tensor, limits: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """float16 `[B]` and int8 `[B, subs]` with step ~ d * sc, from steps `[B, subs]` >= 0."""
    if limits is None:
        return step[:, 0].half(), None
    d = (step.amax(-1) / limits[1]).half()
    sc = (step / d.float()[:, None]).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*limits)
    return d, sc.to(torch.int8)
