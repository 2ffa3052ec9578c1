"""Error feedback on the CPU: the three loops of `ref.feedback`, a tile of rows at a time.

In torch each channel step passes over a whole group of all rows. Here a tile of rows stays in the
cache while all channels of the group go by, with the row as the fastest index, so that inner loops
become vector instructions. Sums are taken in another order than torch's, so codes may differ where
a value lies on a tie. The loops see one member of the batch at a time.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from v4quant_kernels.native import compiled
from v4quant_kernels.native.threads import over_rows

_TILE = 64  # rows side by side: a group of 128 channels takes 32 KB
_NARROW = 16  # where few codes move: often none of these does, and the channel is passed over


def round_group(
    work: Tensor, scale: Tensor, factor: Tensor, low: int, high: int, integers: Tensor
) -> Tensor:
    """As `ref.feedback.round_group`."""
    errors = torch.empty_like(work)
    bounds = np.float32(low), np.float32(high)
    for b in range(len(work)):
        loop = partial(
            _round_group, work[b].numpy(), scale[b].numpy(), factor[b].numpy(), *bounds,
            integers[b].numpy(), errors[b].numpy(),
        )  # fmt: skip
        over_rows(work.shape[2], loop)
    return errors


@compiled
def _round_group(  # type: ignore[no-untyped-def]
    work, scale, factor, low, high, integers, errors, start, stop
):
    channels = len(work)
    for first in range(start, stop, _TILE):
        last = min(first + _TILE, stop)
        for i in range(channels):
            pivot = factor[i, i]
            for n in range(first, last):
                value, s = work[i, n], scale[n]
                q = min(max(np.rint(value / s), low), high)
                integers[i, n] = q
                errors[i, n] = (value - q * s) / pivot
            for j in range(i + 1, channels):
                u = factor[i, j]
                for n in range(first, last):
                    work[j, n] -= u * errors[i, n]


def code_steps(
    pull: Tensor, scale: Tensor, gram: Tensor, low: int, high: int, integers: Tensor
) -> None:
    """As `ref.feedback.code_steps`."""
    bounds = np.float32(low), np.float32(high)
    for b in range(len(pull)):
        loop = partial(
            _code_steps, pull[b].numpy(), scale[b].numpy(), gram[b].numpy(), *bounds,
            integers[b].numpy(),
        )  # fmt: skip
        over_rows(pull.shape[2], loop)


@compiled
def _code_steps(  # type: ignore[no-untyped-def]
    pull, scale, gram, low, high, integers, start, stop
):
    channels = len(pull)
    step = np.empty(_NARROW, np.float32)
    for first in range(start, stop, _NARROW):
        width = min(_NARROW, stop - first)
        for i in range(channels):
            own = gram[i, i]
            moved = False
            for t in range(width):
                n = first + t
                s, old = scale[n], integers[i, n]
                q = min(max(np.rint(old + pull[i, n] / (s * own)), low), high)
                integers[i, n] = q
                step[t] = (q - old) * s
                moved |= q != old
            if not moved:
                continue
            for j in range(i + 1, channels):
                g = gram[j, i]
                for t in range(width):
                    pull[j, first + t] -= g * step[t]


def best_scale(values: Tensor, cost: Tensor, magnitudes: Tensor, low: int, high: int) -> Tensor:
    """As `ref.feedback.best_scale`."""
    best = torch.empty_like(values[:, 0])
    bounds = np.float32(low), np.float32(high)
    for b in range(len(values)):
        loop = partial(
            _best_scale, values[b].numpy(), cost[b].numpy(), magnitudes[b].numpy(), *bounds,
            best[b].numpy(),
        )  # fmt: skip
        over_rows(values.shape[2], loop)
    return best


@compiled
def _best_scale(  # type: ignore[no-untyped-def]
    values, cost, magnitudes, low, high, best, start, stop
):
    channels = len(values)
    least = np.empty(_TILE, np.float32)
    error = np.empty(_TILE, np.float32)
    candidate = np.empty(_TILE, np.float32)
    for first in range(start, stop, _TILE):
        width = min(_TILE, stop - first)
        least[:] = np.inf
        for k in range(2 * magnitudes.shape[0]):
            for t in range(width):
                size = magnitudes[k // 2, first + t]
                candidate[t] = -size if k % 2 else size
                error[t] = 0
            for i in range(channels):
                weight = cost[i]
                for t in range(width):
                    value, s = values[i, first + t], candidate[t]
                    q = min(max(np.rint(value / s), low), high)
                    missed = q * s - value
                    error[t] += missed * missed * weight
            for t in range(width):
                if error[t] < least[t]:
                    least[t] = error[t]
                    best[first + t] = candidate[t]
