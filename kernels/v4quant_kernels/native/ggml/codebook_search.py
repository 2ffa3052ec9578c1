"""The search for GGML types with a codebook: IQ1, IQ2 and IQ3.

Points, signs, scales and d together make the weighted squared error small, in three steps:

1. Each sub-block's best real step, alone (`codebook_scales`).
2. d, a number of half precision, such that the odd multiples of it that are steps lie near those
   optima, each deviation counted with the curvature of its sub-block's error.
3. Every sub-block under the multiples around its optimum, with exact errors (`codebook_fit`, whose
   costs are here those of a diagonal). Then d in closed form and the sub-blocks again, kept where
   that is better.

The columns of one block are searched for all rows together: importance is by column, and so are
the tables of costs.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from v4quant_kernels.native.ggml import codebook_fit
from v4quant_kernels.native.ggml.codebook_scales import ideal_steps
from v4quant_kernels.native.ggml.scan import F32
from v4quant_kernels.ref.codebook_fit import Weighing, weigh
from v4quant_kernels.ref.ggml_codebooks import SHAPES
from v4quant_kernels.ref.ggml_fields import Blocks, BlockShape

_FAMILY = {
    "iq1_s": (8.0, 22.0, 6),
    "iq1_m": (8.0, 22.0, 6),
    "iq2_xxs": (26.0, 58.0, 6),
    "iq2_xs": (26.0, 58.0, 6),
    "iq2_s": (26.0, 58.0, 6),
    "iq3_xxs": (40.0, 76.0, 6),
    "iq3_s": (9.0, 18.0, 6),
}
"""The largest magnitude over the step: first, last, how many."""
_TOPS = 40
"""Values of d tried: the largest step is from 1.02 to 0.4 of the largest multiple of it."""
_SMALLEST_HALF = 2.0**-24
REACH = 2
LEAST_MOVE = 3e-3
"""Change of d below which a block isn't coded again: such blocks have a tenth of what it gains."""


@cache
def _family(name: str) -> F32:
    first, last, count = _FAMILY[name]
    return (1 / np.linspace(first, last, count)).astype(np.float32)


def search(x: Tensor, name: str, weights: Tensor) -> Blocks:
    """Blocks from finite float32 `[rows, K]`; weights: positive float32 `[blocks a row, 256]`."""
    shape = SHAPES[name]
    found = []
    for index, start in enumerate(range(0, x.shape[1], shape.block)):
        part = x[:, start : start + shape.block].mT.contiguous()
        found.append(search_block(part, weights[index % len(weights)], name))
    q, d, sc = (torch.stack(parts, 1) for parts in zip(*found, strict=True))
    return Blocks(
        q.reshape(-1, shape.block), d.reshape(-1), sc.reshape(-1, shape.subs), unit=shape.unit
    )


def _search_scales(
    x: Tensor, weights: Tensor, weighings: list[Weighing], name: str
) -> tuple[Tensor, Tensor]:
    """d, float32 `[N]` of half precision, and sc, float32 `[subs, N]`, for one block of all rows.

    x: `[256, N]`; weights: `[256]`, of which `weighings` were made.
    """
    shape = SHAPES[name]
    steps = torch.empty(shape.subs, 2, x.shape[1])
    for sub, weighing in enumerate(weighings):
        own = slice(sub * shape.sub, (sub + 1) * shape.sub)
        ideal_steps(
            x[own].numpy(), weights[own].numpy(), weighing, _family(name), steps[sub].numpy()
        )
    return _choose_d(steps[:, 0], steps[:, 1], shape)


def _weighings(weights: Tensor, shape: BlockShape) -> list[Weighing]:
    assert shape.codebook is not None
    roots = weights.rsqrt().view(shape.subs, shape.sub)
    if bool((roots == roots[0]).all()):  # as without importance: one table for all
        return [weigh(torch.diag(roots[0])[None], shape.codebook, diagonal=True)] * shape.subs
    return [weigh(torch.diag(root)[None], shape.codebook, diagonal=True) for root in roots]


def _choose_d(steps: Tensor, curve: Tensor, shape: BlockShape) -> tuple[Tensor, Tensor]:
    """d and sc whose products lie best near the steps `[subs, N]`."""
    assert shape.sc is not None
    limit = shape.sc[1]
    best = torch.full_like(steps[0], torch.inf)
    d = torch.zeros_like(best)
    largest = steps.amax(0) / shape.unit
    for top in torch.linspace(1.02 * limit, 0.4 * limit, _TOPS).tolist():
        tried = (largest / top).half().float()
        miss = (steps - tried * shape.unit * nearest_scale(steps, tried, shape)).square_()
        cost = miss.mul_(curve).sum(0)
        better = cost < best
        best = torch.where(better, cost, best)
        d = torch.where(better, tried, d)
    # A block of tiny weights still has the smallest number there is.
    d = torch.where(largest > 0, d.clamp_min(_SMALLEST_HALF), 0.0)
    return d, nearest_scale(steps, d, shape)


def nearest_scale(steps: Tensor, d: Tensor, shape: BlockShape) -> Tensor:
    """The odd multiple of d and unit nearest to each step, in the range of `sc`."""
    assert shape.sc is not None
    ratio = (steps / (d * shape.unit)).nan_to_num_(1.0, 1.0, 1.0)
    return ratio.sub_(1).mul_(0.5).round_().mul_(2).add_(1).clamp_(*shape.sc)


def search_block(x: Tensor, weights: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """q int8 `[N, 256]`, d float16 `[N]`, sc int8 `[N, subs]` for one block of all rows.

    x: `[256, N]`; weights: `[256]`.
    """
    shape = SHAPES[name]
    weighings = _weighings(weights, shape)
    d, sc = _search_scales(x, weights, weighings, name)
    q, sc, cost = _fit_block(x, weighings, d, sc, REACH, shape)
    rows = torch.arange(len(d))
    for _ in range(2):
        part = x[:, rows]
        other = _best_d(part, weights, q[:, rows], sc[:, rows], d[rows], shape)
        moved = (other - d[rows]).abs() > LEAST_MOVE * d[rows]
        rows, other = rows[moved], other[moved]
        again = _fit_block(part[:, moved], weighings, other, sc[:, rows], 1, shape)
        better = again[2] < cost[rows]
        rows = rows[better]
        for old, new in zip((q, sc, cost, d), (*again, other), strict=True):
            old[..., rows] = new[..., better]
    # No code is zero: weights below the smallest step there is are nearer to a block of zeros.
    d = torch.where(cost > (x.square() * weights[:, None]).sum(0), 0.0, d)
    return q.to(torch.int8).mT, d.half(), sc.to(torch.int8).mT


def _best_d(
    x: Tensor, weights: Tensor, q: Tensor, sc: Tensor, d: Tensor, shape: BlockShape
) -> Tensor:
    """d `[N]` of half precision that serves codes best; as it is where that is no positive one."""
    wide = q * sc.repeat_interleave(shape.sub, 0) * shape.unit
    heavy = wide * weights[:, None]
    ideal = (heavy * x).sum(0) / (heavy * wide).sum(0).clamp_min(1e-30)
    found = torch.where(d > 0, ideal, d).half().float()
    return torch.where((found > 0) & found.isfinite(), found, d)


def _fit_block(
    x: Tensor, weighings: list[Weighing], d: Tensor, sc: Tensor, reach: int, shape: BlockShape
) -> tuple[Tensor, Tensor, Tensor]:
    """q `[256, N]`, sc `[subs, N]` and the cost `[N]` under d; sc is at most `reach` steps off."""
    assert shape.sc is not None
    q, errors = torch.zeros_like(x), torch.empty(shape.sub, x.shape[1])
    chosen, total = torch.empty_like(sc), torch.zeros_like(d)
    cost, choice = torch.empty_like(d), torch.zeros(len(d), dtype=torch.int64)
    offsets = torch.tensor(sorted(range(-reach, reach + 1), key=abs)).unsqueeze(1)
    for sub, weighing in enumerate(weighings):
        own = slice(sub * shape.sub, (sub + 1) * shape.sub)
        tried = (sc[sub] + 2 * offsets).clamp_(*shape.sc)
        steps = tried * shape.unit * d
        cost.fill_(torch.inf)
        codebook_fit.fit(
            x[own].numpy(), weighing, 0, steps.numpy(), choice.numpy(), q[own].numpy(),
            errors.numpy(), cost.numpy(),
        )  # fmt: skip
        chosen[sub] = tried.gather(0, choice[None])[0]
        total += cost
    return q, chosen, total
