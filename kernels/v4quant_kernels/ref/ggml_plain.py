"""Plain rounding into GGML blocks: scales from the extreme values, no search.

The step of a sub-block is its range over the range of the integers; the largest step and the
largest minimum of a block get the top integers, and everything is rounded once, each stage against
the stored (rounded) scale of the stage before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import Blocks


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
    d, sc = _two_level(step, shape.sc)
    dmin = m = None
    if bottom is not None and shape.sc is None:
        dmin = bottom[:, 0].half()
    elif bottom is not None:
        dmin, m = _two_level(-bottom, shape.sc)
    return round_onto(x, Blocks(torch.empty(0), d, sc, dmin, m), shape.q)


def round_onto(x: Tensor, grid: Blocks, q: tuple[int, int]) -> Blocks:
    """The nearest integers `q` for float32 `[B, block]` under the scales of `grid`."""
    step, offset = grid.step()[..., None], grid.offset()
    subs = x.view(*step.shape[:2], -1)
    if offset is not None:
        subs = subs - offset[..., None]
    codes = (subs / step).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*q)
    return Blocks(codes.to(torch.int8).view(x.shape), grid.d, grid.sc, grid.dmin, grid.m)


def _two_level(step: Tensor, limits: tuple[int, int] | None) -> tuple[Tensor, Tensor | None]:
    """float16 `[B]` and int8 `[B, subs]` with step ~ d * sc, from steps `[B, subs]` >= 0."""
    if limits is None:
        return step[:, 0].half(), None
    d = (step.amax(-1) / limits[1]).half()
    sc = (step / d.float()[:, None]).nan_to_num_(0.0, 0.0, 0.0).round_().clamp_(*limits)
    return d, sc.to(torch.int8)
