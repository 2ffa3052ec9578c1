"""refine: coordinate descent on codes and scales, after GPTQ, until nothing gets better.

GPTQ never comes back to a channel. Refinement does: with all other codes fixed, the error
(t - s q) H (t - s q)^T of a row is a parabola in any one code and in any one scale, so each has a
best value in closed form: the nearest integer to q_i + (r H)_i / (s H_ii), and the nearest
bfloat16 to s + (q . r H) / (q H q) over the group, where r is the row's remaining error. No step
can raise the error, and sweeps over all channels and groups stop when a sweep gains next to
nothing. (The code step is that of QuantEase, arXiv 2309.01885; scale steps between code steps are
the usual alternating least squares.)

The product r H is carried along with every change. Float32 sums drift, so it is computed afresh
every few sweeps, and at the end a row whose error in float64 came out higher than it began keeps
its first codes: the error never rises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_calibration.gptq import Codes, Grid, compiled_for
from v4quant_kernels.ref.intq import storable_scale

DEFAULT_SWEEPS = 12
# A sweep that lowers an expert's error by less than this share of it is its last.
ENOUGH = 2e-3
FRESH = 4
"""Sweeps between two fresh computations of the pull."""


def refine(
    target: Tensor, gram: Tensor, start: Codes, grid: Grid, sweeps: int = DEFAULT_SWEEPS
) -> Codes:
    """Better codes for target `[B, K, N]` under moments `gram` (`[B, K, K]`), from `start`.

    The Gram-weighted error of no row rises. Arguments are left unchanged.
    """
    codes = Codes(start.integers.clone(), start.scale.clone())
    # Every expert stops for itself, so its codes do not depend on who shares its batch.
    active = torch.arange(len(target), device=target.device)
    goal, moments = target, gram
    part = Codes(start.integers.clone(), start.scale.clone())
    pull = torch.empty(0)
    for sweep in range(sweeps):
        left = goal - part.values(grid.group)
        if sweep % FRESH == 0:
            pull = moments @ left
        before = (left * pull).sum((1, 2))
        _sweep(pull, moments, part, grid)
        left = goal - part.values(grid.group)
        gained = before - (left * pull).sum((1, 2)) > ENOUGH * before
        codes.integers[active], codes.scale[active] = part.integers, part.scale
        active = active[gained]
        if not len(active):
            break
        goal, moments, pull = goal[gained], moments[gained], pull[gained]
        part = Codes(part.integers[gained], part.scale[gained])
    better = gram_error(target, gram, codes, grid) <= gram_error(target, gram, start, grid)
    return choose(better, codes, start)


def choose(mask: Tensor, codes: Codes, others: Codes) -> Codes:
    """`codes` in the rows where mask (`[B, N]`) holds, `others` elsewhere."""
    where = mask.unsqueeze(1)
    return Codes(
        torch.where(where, codes.integers, others.integers),
        torch.where(where, codes.scale, others.scale),
    )


def gram_error(target: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> Tensor:
    """As `row_errors`, of codes."""
    return row_errors(target - codes.values(grid.group), gram)


def row_errors(errors: Tensor, gram: Tensor) -> Tensor:
    """e H e^T of every row e of float32 `[B, K, N]`, float64 `[B, N]`, one matrix at a time."""
    found = []
    for error, moments in zip(errors, gram, strict=True):
        wide = error.double()
        found.append((moments.double() @ wide).mul_(wide).sum(0))
    return torch.stack(found)


def _sweep(pull: Tensor, gram: Tensor, codes: Codes, grid: Grid) -> None:
    """One pass over all groups: the codes of a group in turn, then its scale. In place.

    pull: r H of the remaining errors r, transposed `[B, K, N]`, kept right throughout.
    """
    for index, start in enumerate(range(0, pull.shape[1], grid.group)):
        part = slice(start, start + grid.group)
        before = codes.integers[:, part] * codes.scale[:, index].unsqueeze(1)
        own = pull[:, part].clone()
        _code_steps(own, gram[:, part, part], codes, part, index, grid)
        _scale_step(own, gram[:, part, part], codes, part, index)
        change = codes.integers[:, part] * codes.scale[:, index].unsqueeze(1) - before
        pull.baddbmm_(gram[:, :, part], change, alpha=-1)


def _code_steps(
    pull: Tensor, gram: Tensor, codes: Codes, part: slice, index: int, grid: Grid
) -> None:
    """Every code of a group to its best value; keeps the group's `pull` `[B, group, N]` right."""
    scale = codes.scale[:, index]
    if compiled_for(pull):
        from v4quant_kernels.native import feedback

        for b in range(len(pull)):
            feedback.code_steps(
                pull[b].numpy(), scale[b].contiguous().numpy(), gram[b].contiguous().numpy(),
                grid.low, grid.high, codes.integers[b, part].numpy(),
            )  # fmt: skip
        return
    for offset, channel in enumerate(range(part.start, part.stop)):
        old = codes.integers[:, channel]
        own = gram[:, offset, offset].unsqueeze(1)
        new = torch.round(old + pull[:, offset] / (scale * own)).clamp_(grid.low, grid.high)
        step = (new - old).mul_(scale).unsqueeze(1)
        codes.integers[:, channel] = new
        pull.baddbmm_(gram[:, :, offset].unsqueeze(2), step, alpha=-1)


def _scale_step(pull: Tensor, gram: Tensor, codes: Codes, part: slice, index: int) -> None:
    """A group's scale to its best bfloat16 value; a group of zero codes keeps its scale."""
    integers, scale = codes.integers[:, part], codes.scale[:, index]
    curve = (gram @ integers).mul_(integers).sum(1)
    best = scale + (integers * pull).sum(1) / curve.clamp_min(torch.finfo(curve.dtype).tiny)
    stored = storable_scale(best.abs()).float().copysign(best)
    codes.scale[:, index] = torch.where((curve > 0) & torch.isfinite(best), stored, scale)
