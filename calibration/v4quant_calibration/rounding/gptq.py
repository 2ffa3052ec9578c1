"""gptq: codes one input channel at a time, each rounding error passed on to the channels to come.

Rounding a row w of a matrix to w + e costs e H e^T in expected squared output, with H the second
moments of the inputs. Given the errors made so far, the best real values for the channels not yet
rounded are known in closed form: with U the upper Cholesky factor of H^-1 (U^T U = H^-1), rounding
channel i with error e_i moves each later channel j by -e_i U_ij / U_ii. That is GPTQ (Frantar et
al., arXiv 2210.17323), which is the same procedure as LDLQ (Chee et al., arXiv 2307.13304). Errors
are applied to the rest of a group at once and to later groups in one matrix product.

Three choices are ours. Channels are taken group by group, groups and channels inside a group by
falling second moment, so heavy channels meet free ones ("activation order") while every group stays
where it is in the file and no engine needs an index. A group's scale is chosen when its turn comes,
from the weights as the errors so far have moved them, by a search over magnitudes and both signs: a
two's complement grid has one point more below zero than above, which matters the more the fewer
bits there are. And the search weighs channel i by 1 / U_ii^2, what its error costs when all later
channels have done their best to make up for it.

All arithmetic is batched over experts and written in torch: the same function runs on CPU and GPU.
The steps inside a group are loops and kernels of their own (`v4quant_kernels.twins.feedback`).
Matrices lie transposed, `[B, K, N]`, so that a channel of all rows is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_kernels import dispatch
from v4quant_kernels.ref.intq import storable_scale

# Scales tried, as multiples of amax / 2^(bits - 1): from clipping two thirds to clipping nothing.
_LOWEST, _HIGHEST, _STEPS = 0.3, 1.3, 41


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits in groups of `group` input channels."""

    bits: int
    group: int

    @property
    def low(self) -> int:
        """The most negative integer."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The most positive integer."""
        return (1 << (self.bits - 1)) - 1


@dataclass(frozen=True)
class Codes:
    """Integers (float32 `[B, K, N]`) and scales (float32 holding bfloat16, `[B, K/group, N]`)."""

    integers: Tensor
    scale: Tensor

    def values(self, group: int) -> Tensor:
        """What the codes stand for, float32 `[B, K, N]`."""
        return self.integers * self.scale.repeat_interleave(group, 1)

    def scaled(self, factor: Tensor) -> Codes:
        """The same integers with every row's scales times a factor `[B, N]`, as stored."""
        wanted = self.scale * factor.unsqueeze(1)
        return Codes(self.integers, storable_scale(wanted.abs()).float().copysign(wanted))


def gptq(weights: Tensor, gram: Tensor, grid: Grid) -> Codes:
    """Codes of weights `[B, K, N]` (float32) under input moments `gram` (`[B, K, K]`).

    The moments must be positive definite (`moments.damped`); K a multiple of the group.
    """
    batch, columns, rows = weights.shape
    order = activation_order(gram.diagonal(dim1=1, dim2=2), grid.group)
    factor = feedback_factor(permuted(gram, order))
    work = weights.gather(1, order.unsqueeze(2).expand_as(weights))
    integers = torch.empty_like(work)
    scale = work.new_empty(batch, columns // grid.group, rows)
    cost = factor.diagonal(dim1=1, dim2=2).square().reciprocal()
    for index, start in enumerate(range(0, columns, grid.group)):
        part = slice(start, start + grid.group)
        scale[:, index] = best_scale(work[:, part], cost[:, part], grid)
        errors = dispatch.round_group(
            work[:, part], scale[:, index], factor[:, part, part], grid.low, grid.high,
            integers[:, part],
        )  # fmt: skip
        if part.stop < columns:
            work[:, part.stop :].baddbmm_(factor[:, part, part.stop :].mT, errors, alpha=-1)
    inverse = order.argsort(1)
    # Groups were taken as wholes: the place of a group's first channel is the place of the group.
    groups = inverse[:, :: grid.group].div(grid.group, rounding_mode="floor")
    return Codes(
        integers.gather(1, inverse.unsqueeze(2).expand_as(integers)),
        scale.gather(1, groups.unsqueeze(2).expand_as(scale)),
    )


def activation_order(diagonal: Tensor, group: int) -> Tensor:
    """int64 `[B, K]`: channels group by group, both by falling second moment (`[B, K]`)."""
    batch, columns = diagonal.shape
    grouped = diagonal.view(batch, -1, group)
    groups = grouped.sum(2).argsort(dim=1, descending=True, stable=True)
    inside = grouped.argsort(dim=2, descending=True, stable=True)
    chosen = inside.gather(1, groups.unsqueeze(2).expand_as(inside))
    return (chosen + groups.unsqueeze(2) * group).view(batch, columns)


def feedback_factor(gram: Tensor) -> Tensor:
    """Upper U with U^T U = gram^-1, float32 `[B, K, K]`.

    With J the reversal of channels and J H J = L L^T, U = J L^-1 J. The factorisation is done in
    float64, one matrix at a time, because H may be nearly singular; L is much less so (its
    condition is the root of H's, some hundreds where moments are damped), and float32 inverts it.
    """
    lower = torch.stack(
        [torch.linalg.cholesky(one.double().flip((0, 1))).to(gram.dtype) for one in gram]
    )
    return inverse_lower(lower).flip((1, 2)).contiguous()


_SOLVED_AT_ONCE = 256


def inverse_lower(lower: Tensor) -> Tensor:
    """L^-1 of lower triangular L `[B, K, K]`, by halves, so that nearly all is matrix products."""
    size = lower.shape[-1]
    if size <= _SOLVED_AT_ONCE:
        eye = torch.eye(size, dtype=lower.dtype, device=lower.device)
        solved: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
        return solved
    half = size // 2
    inverse = torch.zeros_like(lower)
    first, last = slice(0, half), slice(half, size)
    inverse[:, first, first] = inverse_lower(lower[:, first, first])
    inverse[:, last, last] = inverse_lower(lower[:, last, last])
    between = lower[:, last, first] @ inverse[:, first, first]
    inverse[:, last, first] = -(inverse[:, last, last] @ between)
    return inverse


def best_scale(values: Tensor, cost: Tensor, grid: Grid) -> Tensor:
    """The scale of each group and row with the least weighted squared error, `[B, N]`.

    values: `[B, group, N]`; cost: `[B, group]`. Scales are bfloat16 numbers of either sign, never
    zero; a group of zeros gets 1.
    """
    largest = torch.maximum(values.amax(1), values.amin(1).neg_())
    unit = (largest / (1 << (grid.bits - 1))).unsqueeze(1)
    ratios = torch.linspace(_LOWEST, _HIGHEST, _STEPS, device=unit.device).unsqueeze(1)
    magnitudes = storable_scale(unit * ratios).float()
    scale = dispatch.best_scale(values, cost, magnitudes, grid.low, grid.high)
    return scale.masked_fill_(largest == 0, 1.0)


def permuted(gram: Tensor, order: Tensor) -> Tensor:
    """Moments `[B, K, K]` with channels in `order`, int64 `[B, K]`."""
    rows = gram.gather(1, order.unsqueeze(2).expand_as(gram))
    return rows.gather(2, order.unsqueeze(1).expand_as(gram))
