"""Exact weighted sums over rows: the compiled loop on the CPU, torch elsewhere, the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.ref import row_sums as plain


def row_sums(values: Tensor, coded: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `ref.row_sums.row_sums`; weights of any floating dtype, wherever they are."""
    rows, columns = values.shape
    assert columns <= 1 << 16, columns
    if weights is not None:
        weights = weights.to(values.device).double()
    if not (values.is_cpu and native.available()):
        return plain.row_sums(values, coded, weights)
    from v4quant_kernels.native.row_sums import row_sums as loop

    own, crossed = torch.empty(2, rows, dtype=torch.float64)
    factors = torch.empty(0, dtype=torch.float64) if weights is None else weights.contiguous()
    pair = (values.contiguous().numpy(), coded.contiguous().numpy())
    loop(*pair, factors.numpy(), own.numpy(), crossed.numpy())
    return own, crossed


def losses(values: Tensor, coded: Tensor) -> tuple[float, float, float]:
    """Sum of squared differences of float32 `[N, K]`, of squared values; the largest difference."""
    if values.is_cpu and native.available():
        from v4quant_kernels.native.row_sums import losses as loop

        return loop(values.contiguous().numpy(), coded.contiguous().numpy())
    difference = (coded - values).double()
    squared, norm = float(difference.square().sum()), float(values.double().square().sum())
    return squared, norm, float(difference.abs().max())
