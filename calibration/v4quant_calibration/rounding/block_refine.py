"""block_refine: after GPTQ onto block types, sub-blocks and scales in turn until nothing improves.

With everything else fixed, the error of a row as a function of one sub-block's values v is
(y - v) H_J (y - v)^T plus a constant, y = v + H_J^-1 p_J, where H_J are the sub-block's own moments
and p = r H the pull of the remaining errors r. So a sub-block is solved again as a small problem of
its own: grids around its present one are tried by rounding with feedback (`block_fit`), and the
best replaces what is there if it costs less. Then d and dmin of the block: with q, sc and m fixed
the error is a quadratic in the two, solved in closed form, rounded to half precision, and taken if
the rounded pair still lies lower. (Block coordinate descent as in QuantEase, arXiv 2309.01885,
with blocks instead of single codes.)

`descent` has the sweeps. As in `refine` the pull is formed for a few blocks when their turn comes,
and a row whose error in float64 came out higher keeps its first codes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_calibration.rounding.block_codes import BlockCodes, grids
from v4quant_calibration.rounding.block_fit import fit
from v4quant_calibration.rounding.block_gptq import set_grid
from v4quant_calibration.rounding.descent import DEFAULT_SWEEPS, Some, descend, spans
from v4quant_calibration.rounding.gptq import feedback_factor
from v4quant_kernels import dispatch
from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import BlockShape

_REACH = 2


def block_refine(
    target: Tensor, gram: Tensor, start: BlockCodes, name: str, sweeps: int = DEFAULT_SWEEPS
) -> BlockCodes:
    """Better codes for target `[B, K, N]` under moments `gram` (`[B, K, K]`), from `start`.

    The Gram-weighted error of no row rises. Arguments are left unchanged.
    """
    shape = SHAPES[name]
    factors = _own_factors(gram, shape.sub)

    def step(some: Some, goal: Tensor, codes: BlockCodes) -> tuple[Tensor, Tensor]:
        return _sweep(goal, some.of(gram), some.of(factors), codes, shape)

    return descend(target, gram, start, step, BlockCodes.values, sweeps)


def _own_factors(gram: Tensor, size: int) -> Tensor:
    """`feedback_factor` of every sub-block's own moments: `[B, K / size, size, size]`."""
    batch, columns = gram.shape[:2]
    tiled = gram.reshape(batch, columns // size, size, columns // size, size)
    own = tiled.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    return feedback_factor(own.reshape(-1, size, size)).view(batch, -1, size, size)


def _sweep(
    goal: Tensor, gram: Tensor, factors: Tensor, codes: BlockCodes, shape: BlockShape
) -> tuple[Tensor, Tensor]:
    """One pass over all blocks, in place.

    Returns what every row gained, and its error as the blocks found it, `[B, N]` both.
    """
    left = goal - codes.values()
    gained, error = torch.zeros_like(goal[:, 0]), torch.zeros_like(goal[:, 0])
    for span, blocks in spans(goal.shape[1], shape.block):
        pulls = dispatch.float32_product(gram[:, span], left)
        for columns in blocks:
            part, moments = codes.part(columns), gram[:, columns, columns]
            before, first = left[:, columns].clone(), pulls[:, : shape.block]
            error += (before * first).sum(1)
            subs = slice(columns.start // shape.sub, columns.stop // shape.sub)
            own = _sub_steps(first.clone(), moments, factors[:, subs], part, shape)
            _scale_step(own, moments, part, shape)
            left[:, columns] = goal[:, columns] - part.values()
            change = before.sub_(left[:, columns])
            moved = gram[:, columns.start : span.stop, columns] @ change
            after = first - moved[:, : shape.block]
            gained += after.add_(first).mul_(change).sum(1)
            pulls = pulls[:, shape.block :].sub_(moved[:, shape.block :])
    return gained, error


def _sub_steps(
    own: Tensor, gram: Tensor, factors: Tensor, codes: BlockCodes, shape: BlockShape
) -> Tensor:
    """Every sub-block of a block solved again, in turn; returns the block's pull, kept right."""
    for sub in range(shape.subs):
        place = slice(sub * shape.sub, (sub + 1) * shape.sub)
        old = codes.sub_values(sub)
        tried = grids(codes, shape, sub, _REACH if shape.codebook is None else 1)
        factor = factors[:, sub]
        wish = factor @ own[:, place]
        goal = (old + factor.mT @ wish).contiguous()
        present = wish.square().sum(1)
        found = fit(goal, factor, tried.step, tried.lowest, shape, present)
        better = found.cost < present
        sc, m, d, dmin = tried.take(found.choice)
        codes.q[:, place] = torch.where(better.unsqueeze(1), found.integers, codes.q[:, place])
        keep = (codes.sc[:, sub], codes.m[:, sub], codes.d[:, 0], codes.dmin[:, 0])
        pairs = zip((sc, m, d, dmin), keep, strict=True)
        sc, m, d, dmin = (torch.where(better, new, old) for new, old in pairs)
        set_grid(codes, sub, (sc, m, d, dmin))
        own.baddbmm_(gram[:, :, place], codes.sub_values(sub) - old, alpha=-1)
    return own


def _scale_step(pull: Tensor, gram: Tensor, codes: BlockCodes, shape: BlockShape) -> None:
    """d and dmin of a block to their best half-precision values, where that lowers the error."""
    one = codes.q * codes.sc.repeat_interleave(shape.sub, 1)
    a11, b1 = _curve(one, gram, one), (one * pull).sum(1)
    if shape.has_minimum:
        two = -codes.m.repeat_interleave(shape.sub, 1)
        a12, a22, b2 = _curve(one, gram, two), _curve(two, gram, two), (two * pull).sum(1)
    else:
        a12, a22, b2 = torch.zeros_like(a11), torch.zeros_like(a11), torch.zeros_like(b1)
    det = a11 * a22 - a12 * a12
    solvable = det > 1e-6 * a11 * a22
    both = torch.where(solvable, det, 1.0)
    alone = b1 / a11.clamp_min(torch.finfo(a11.dtype).tiny)
    move_d = torch.where(solvable, (a22 * b1 - a12 * b2) / both, alone)
    move_m = torch.where(solvable, (a11 * b2 - a12 * b1) / both, 0.0)
    d, dmin = codes.d[:, 0], codes.dmin[:, 0]
    new_d, new_m = (d + move_d).half().float(), (dmin + move_m).half().float()
    if shape.has_minimum and shape.sc is not None:
        new_m = new_m.clamp_min(0.0)  # as encoders write it; m alone has no sign
    p, r = new_d - d, new_m - dmin
    change = p * (p * a11 + 2 * r * a12 - 2 * b1) + r * (r * a22 - 2 * b2)
    better = (change < 0) & new_d.isfinite() & new_m.isfinite()
    codes.d[:, 0] = torch.where(better, new_d, d)
    codes.dmin[:, 0] = torch.where(better, new_m, dmin)


def _curve(left: Tensor, gram: Tensor, right: Tensor) -> Tensor:
    return (gram @ right).mul_(left).sum(1)
