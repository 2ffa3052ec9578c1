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

from v4quant_calibration.gptq import compiled_for


class Fit(NamedTuple):
    """The grid chosen of each row, int64 `[B, N]`; integers and errors over pivots, float32
    `[B, size, N]`; what it costs, `[B, N]` (infinite where no grid is finite)."""

    choice: Tensor
    integers: Tensor
    errors: Tensor
    cost: Tensor


def fit(
    values: Tensor, factor: Tensor, step: Tensor, lowest: Tensor, limits: tuple[int, int]
) -> Fit:
    """Round values `[B, size, N]` to the best of grids step * q + lowest, low <= q <= high.

    factor: `[B, size, size]`, upper; step, lowest: `[B, grids, N]`. Values are left unchanged.
    """
    integers, errors = torch.zeros_like(values), torch.zeros_like(values)
    cost = values.new_full((values.shape[0], values.shape[2]), torch.inf)
    choice = torch.zeros_like(cost, dtype=torch.int64)
    if compiled_for(values):
        from v4quant_kernels.native import block_fit

        for b in range(len(values)):
            block_fit.fit(
                values[b].numpy(), factor[b].contiguous().numpy(), step[b].numpy(),
                lowest[b].numpy(), *limits, choice[b].numpy(), integers[b].numpy(),
                errors[b].numpy(), cost[b].numpy(),
            )  # fmt: skip
        return Fit(choice, integers, errors, cost)
    for k in range(step.shape[1]):
        tried, missed = _round(values, factor, step[:, k], lowest[:, k], limits)
        total = missed.square().sum(1)
        better = total < cost
        where = better.unsqueeze(1)
        cost = torch.where(better, total, cost)
        choice = choice.masked_fill(better, k)
        integers = torch.where(where, tried, integers)
        errors = torch.where(where, missed, errors)
    return Fit(choice, integers, errors, cost)


def _round(
    values: Tensor, factor: Tensor, step: Tensor, lowest: Tensor, limits: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Integers and errors over pivots under one grid a row, step and lowest `[B, N]`."""
    work, integers = values.clone(), torch.empty_like(values)
    errors = torch.empty_like(values)
    inverse = torch.where(step != 0, 1 / step, 0.0)
    for i in range(values.shape[1]):
        rounded = torch.round((work[:, i] - lowest) * inverse).clamp_(*limits)
        integers[:, i] = rounded
        error = (work[:, i] - (rounded * step + lowest)) / factor[:, i, i].unsqueeze(1)
        errors[:, i] = error
        rest = factor[:, i, i + 1 :].unsqueeze(2)
        work[:, i + 1 :].baddbmm_(rest, error.unsqueeze(1), alpha=-1)
    return integers, errors
