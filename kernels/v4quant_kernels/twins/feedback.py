"""Error feedback inside a group of channels: the meaning, in torch.

The three loops of GPTQ and its refinement (`v4quant_calibration.rounding.gptq` and `refine` have
formulas and papers). Matrices lie transposed and batched, `[B, group, N]`: channels, then rows of
the weight, all float32. The compiled loops of `native.feedback` and the kernels of `gpu.feedback`
do the same; they sum in other orders, so results may differ where a value lies on a tie.
"""

from __future__ import annotations

import torch
from torch import Tensor


def best_scale(values: Tensor, cost: Tensor, magnitudes: Tensor, low: int, high: int) -> Tensor:
    """The candidate of least weighted squared error of each row, `[B, N]`.

    values: `[B, group, N]`; cost: `[B, group]`; magnitudes: `[B, candidates, N]`, positive; each is
    tried with either sign, positive first, and the first of equals wins.
    """
    best = torch.full_like(values[:, 0], torch.inf)
    scale = torch.ones_like(best)
    weights = cost.unsqueeze(2)
    for magnitude in magnitudes.unbind(1):
        for candidate in (magnitude, -magnitude):
            step = candidate.unsqueeze(1)
            rounded = torch.round(values / step).clamp_(low, high)
            error = rounded.mul_(step).sub_(values).square_().mul_(weights).sum(1)
            better = error < best
            best = torch.where(better, error, best)
            scale = torch.where(better, candidate, scale)
    return scale


def round_group(
    work: Tensor, scale: Tensor, factor: Tensor, low: int, high: int, integers: Tensor
) -> Tensor:
    """Round a group's channels in turn, moving later ones; returns errors over the pivots.

    work: `[B, group, N]`, used up; scale: `[B, N]`; factor: `[B, group, group]`, upper; integers:
    `[B, group, N]`, filled.
    """
    errors = torch.empty_like(work)
    for i in range(work.shape[1]):
        rounded = torch.round(work[:, i] / scale).clamp_(low, high)
        integers[:, i] = rounded
        errors[:, i] = (work[:, i] - rounded * scale) / factor[:, i, i].unsqueeze(1)
        row, own = factor[:, i, i + 1 :].unsqueeze(2), errors[:, i].unsqueeze(1)
        work[:, i + 1 :].baddbmm_(row, own, alpha=-1)
    return errors


def code_steps(
    pull: Tensor, scale: Tensor, gram: Tensor, low: int, high: int, integers: Tensor
) -> None:
    """Every code of a group to its best value, in turn.

    pull: `[B, group, N]`, used up; scale: `[B, N]`; gram: `[B, group, group]`, symmetric; integers:
    `[B, group, N]`, changed.
    """
    for i in range(pull.shape[1]):
        old = integers[:, i]
        own = scale * gram[:, i, i].unsqueeze(1)
        new = torch.round(old + pull[:, i] / own).clamp_(low, high)
        step = (new - old).mul_(scale).unsqueeze(1)
        integers[:, i] = new
        pull[:, i + 1 :].baddbmm_(gram[:, i + 1 :, i].unsqueeze(2), step, alpha=-1)
