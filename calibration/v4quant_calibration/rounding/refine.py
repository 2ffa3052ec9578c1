"""refine: coordinate descent on codes and scales, after GPTQ, until nothing gets better.

GPTQ never comes back to a channel. Refinement does: with all other codes fixed, the error
(t - s q) H (t - s q)^T of a row is a parabola in any one code and in any one scale, so each has a
best value in closed form: the nearest integer to q_i + (r H)_i / (s H_ii), and the nearest
bfloat16 to s + (q . r H) / (q H q) over the group, where r is the row's remaining error. No step
can raise the error. (The code step is that of QuantEase, arXiv 2309.01885; scale steps between
code steps are the usual alternating least squares.)

Nearly all the work is the pull r H, K^2 multiplications a row and sweep. It is formed for a few
groups when their turn comes, so nothing is carried along that could drift, and what a group's
change c gains is known exactly: c . (pull before + pull after). `descent` has the sweeps.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from v4quant_calibration.rounding.descent import DEFAULT_SWEEPS, Some, descend, spans
from v4quant_calibration.rounding.gptq import Codes, Grid
from v4quant_kernels import dispatch
from v4quant_kernels.ref.intq import storable_scale


def refine(
    target: Tensor, gram: Tensor, start: Codes, grid: Grid, sweeps: int = DEFAULT_SWEEPS
) -> Codes:
    """Better codes for target `[B, K, N]` under moments `gram` (`[B, K, K]`), from `start`.

    The Gram-weighted error of no row rises. Arguments are left unchanged.
    """

    def step(some: Some, goal: Tensor, codes: Codes) -> tuple[Tensor, Tensor]:
        return _sweep(goal, some.of(gram), codes, grid)

    return descend(target, gram, start, step, partial(Codes.values, group=grid.group), sweeps)


def _sweep(goal: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> tuple[Tensor, Tensor]:
    """One pass over all groups: the codes of a group in turn, then its scale. In place.

    Returns what every row gained, and its error as the groups found it, `[B, N]` both.
    """
    left = goal - codes.values(grid.group)
    gained, error = torch.zeros_like(goal[:, 0]), torch.zeros_like(goal[:, 0])
    for span, groups in spans(goal.shape[1], grid.group):
        pulls = dispatch.float32_product(gram[:, span], left)
        for part in groups:
            before = left[:, part].clone()
            own, rest = pulls[:, : grid.group], pulls[:, grid.group :]
            error += (before * own).sum(1)
            first = own.clone()
            _group_steps(goal[:, part], before, own, gram[:, part, part], codes, part, grid)
            left[:, part] = goal[:, part] - _values(codes, part, grid)
            change = before.sub_(left[:, part])
            gained += first.add_(own).mul_(change).sum(1)
            if part.stop < span.stop:
                rest.baddbmm_(gram[:, part.stop : span.stop, part], change, alpha=-1)
            pulls = rest
    return gained, error


def _group_steps(
    goal: Tensor, left: Tensor, pull: Tensor, gram: Tensor, codes: Codes, part: slice, grid: Grid
) -> None:
    """The codes and the scale of one group to their best values; keeps its `pull` right.

    goal, left, pull: `[B, group, N]`, left the errors that the pull belongs to.
    """
    scale = codes.scale[:, part.start // grid.group]
    integers = codes.integers[:, part]
    dispatch.code_steps(pull.clone(), scale, gram, grid.low, grid.high, integers)
    moved = left - goal + _values(codes, part, grid)
    pull.baddbmm_(gram, moved, alpha=-1)
    _scale_step(pull, gram, codes, part, grid)


def _values(codes: Codes, part: slice, grid: Grid) -> Tensor:
    return codes.integers[:, part] * codes.scale[:, part.start // grid.group].unsqueeze(1)


def _scale_step(pull: Tensor, gram: Tensor, codes: Codes, part: slice, grid: Grid) -> None:
    """A group's scale to its best bfloat16 value; a group of zero codes keeps its scale.

    Keeps the group's pull right.
    """
    index = part.start // grid.group
    integers, scale = codes.integers[:, part], codes.scale[:, index]
    curve = gram @ integers
    steepness = (curve * integers).sum(1)
    best = scale + (integers * pull).sum(1) / steepness.clamp_min(torch.finfo(curve.dtype).tiny)
    stored = storable_scale(best.abs()).float().copysign(best)
    new = torch.where((steepness > 0) & torch.isfinite(best), stored, scale)
    codes.scale[:, index] = new
    pull.sub_(curve.mul_((new - scale).unsqueeze(1)))
