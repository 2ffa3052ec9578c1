"""block_fit: the best of several grids for a sub-block, each tried by rounding with error feedback.

With U the upper Cholesky factor of the inverse moments (see `gptq`), rounding the channels in turn
and moving the later ones costs sum (e_i / U_ii)^2, which is what the errors will cost the output
once everything still free has made up for them. So candidates for a sub-block's step and minimum
are compared by that sum, after really rounding to them: codes, step and minimum are chosen
together. GPTQ's pass takes U of all channels still free; refinement takes U of the sub-block's own
moments, for which the sum is exactly the error the sub-block adds with everything else fixed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from v4quant_kernels import codebook_fit, dispatch
from v4quant_kernels.ref.ggml_fields import BlockShape


class Fit(NamedTuple):
    """The grid chosen of each row, int64 `[B, N]`; integers and errors over pivots, float32
    `[B, size, N]`; what it costs, `[B, N]` (infinite where no grid is finite)."""

    choice: Tensor
    integers: Tensor
    errors: Tensor
    cost: Tensor


def fit(
    values: Tensor,
    factor: Tensor,
    step: Tensor,
    lowest: Tensor,
    shape: BlockShape,
    bound: Tensor | None = None,
) -> Fit:
    """Round values `[B, size, N]` to the best of grids step * q + lowest with the type's q.

    factor: `[B, size, size]`, upper; step, lowest: `[B, grids, N]`, lowest of a type with a
    codebook is 0. Values are left unchanged. Where no grid costs less than `bound`, `[B, N]`, the
    cost is infinite or what it is: a search over a codebook, which is dear, ends early there.
    """
    if shape.codebook is not None:
        return Fit(*codebook_fit.fit(values, factor, step, shape.codebook, bound))
    cost = values.new_full((values.shape[0], values.shape[2]), torch.inf)
    choice = torch.zeros_like(cost, dtype=torch.int64)
    if dispatch.uses_loops(values):
        from v4quant_kernels.native import block_fit

        integers, errors = torch.zeros_like(values), torch.zeros_like(values)
        for b in range(len(values)):
            block_fit.fit(
                values[b].numpy(), factor[b].contiguous().numpy(), step[b].numpy(),
                lowest[b].numpy(), shape.q, shape.levels, choice[b].numpy(), integers[b].numpy(),
                errors[b].numpy(), cost[b].numpy(),
            )  # fmt: skip
        return Fit(choice, integers, errors, cost)
    tried, missed = _round(values, factor, step, lowest, shape)
    for k, total in enumerate(missed.square().sum(1).unbind(1)):
        better = total < cost
        cost = torch.where(better, total, cost)
        choice = choice.masked_fill(better, k)
    index = choice.view(len(values), 1, 1, -1).expand(-1, values.shape[1], 1, -1)
    integers, errors = (
        t.gather(2, index).squeeze(2).masked_fill_(cost.isinf().unsqueeze(1), 0.0)
        for t in (tried, missed)
    )
    return Fit(choice, integers, errors, cost)


def _round(
    values: Tensor, factor: Tensor, step: Tensor, lowest: Tensor, shape: BlockShape
) -> tuple[Tensor, Tensor]:
    """Integers and errors over pivots under all grids, `[B, size, grids, N]` both."""
    work = values.unsqueeze(2).repeat(1, 1, step.shape[1], 1)
    integers, errors = torch.empty_like(work), torch.empty_like(work)
    inverse = torch.where(step != 0, 1 / step, 0.0)
    rows = factor.view(*factor.shape, 1, 1)
    for i in range(values.shape[1]):
        rounded = _nearest((work[:, i] - lowest) * inverse, shape)
        integers[:, i] = rounded
        errors[:, i] = (work[:, i] - (rounded * step + lowest)) / rows[:, i, i]
        work[:, i + 1 :].addcmul_(rows[:, i, i + 1 :], errors[:, i].unsqueeze(1), value=-1)
    return integers, errors


def _nearest(values: Tensor, shape: BlockShape) -> Tensor:
    """The type's integers nearest to values."""
    if not shape.levels:
        return torch.round(values).clamp_(*shape.q)
    levels = torch.tensor(shape.levels, dtype=values.dtype, device=values.device)
    return levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]
