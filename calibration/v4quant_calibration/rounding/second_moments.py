"""gram: second moments of an expert's inputs, made fit for a solver.

The expected squared output error of a weight error e is e H e^T with H = E[x x^T], the Gram matrix
of the expert's own input rows. Three things are done to it before a solver may trust it.

*Weight.* An expert's output reaches the layer's times its routing weight r, so a row counts r^2
for w1 and w3. (The input of w2 includes r already.)

*Shrinkage.* n rows leave a matrix of K channels with at most n directions; with n < K the others
look free, and a solver dumps its errors there. So the expert's own moments H are mixed with the
layer's pooled moments P by count, (n H + m P) / (n + m) with m = K / 2 rows' worth of pool: an
expert with thousands of tokens is hardly touched, one with none gets the pool. P of w1 and w3 is
taken over all tokens of the layer; hidden channels of different experts have nothing in common, so
P of w2 comes from a sample of the layer's tokens sent through this expert. A pool may be of few
rows itself (a short text, a sample smaller than w2 has channels), and directions it does not show
are no more free than before. So P is mixed in the same way, with K / 2 rows that are alike in all
channels and directions. Without that, K / 2 tokens gave codes with twice the error of uncalibrated
ones on other text (built-in model, 3 and 2 bits); with it the error is 7 % below theirs, and with
4 K tokens still a tenth lower than without.

*Damping.* One percent of the mean second moment is added to the diagonal (as GPTQ does), so that
the matrix is positive definite whatever the rows were.

Products of float32 rows are taken in blocks and the blocks summed in float64, so that a million
rows lose no more than a thousand do, whatever their split over calls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from v4quant_kernels import dispatch

DAMPING = 0.01
# Rows of the pool an expert's own rows are weighed against, and the pool's rows against rows of no
# direction, per input channel.
POOL_ROWS_PER_CHANNEL = 0.5
_BLOCK = 1024
_BAND = 512  # channels of a product that is computed from its diagonal on


def gram_sum(left: Tensor, right: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sum over rows of w l^T r: float64 `[K, K]` from float32 `[n, K]` rows, weights `[n]`.

    Where left and right are one tensor the result is symmetric, and only its upper half computed.
    """
    total = left.new_zeros((left.shape[1], right.shape[1]), dtype=torch.float64)
    bands = [slice(i, i + _BAND) for i in range(0, left.shape[1], _BAND)]
    if left is not right:
        bands = [slice(0, left.shape[1])]
    for start in range(0, left.shape[0], _BLOCK):
        part = slice(start, start + _BLOCK)
        rows = left[part] if weights is None else left[part] * weights[part].unsqueeze(1)
        for band in bands:
            total[band, band.start :] += dispatch.float32_product(
                rows[:, band].mT, right[part, band.start :]
            )
    for band in bands[1:]:
        total[band, : band.start] = total[: band.start, band].mT
    return total


def borrowed_rows(moments: Tensor) -> float:
    """How many rows' worth moments `[..., K, K]` are mixed with."""
    return POOL_ROWS_PER_CHANNEL * moments.shape[-1]


def shrunk(total: Tensor, count: float, pool: Tensor) -> Tensor:
    """(n H + m P) / (n + m): total = n H `[K, K]`, count = n, pool = P `[K, K]`."""
    borrowed = borrowed_rows(pool)
    return (total + borrowed * pool) / (count + borrowed)


def rows_of_no_direction(columns: int, count: float) -> float:
    """How many of them count rows of a matrix that all tokens visit are mixed with: K / 2, and
    fewer where there are more rows than channels. Its moments are its own, not a pool that stands
    for others, and inputs of attention and head have directions of very little energy, which a
    few percent of the mean would hide (seen: a tenth more KL at 12 K rows)."""
    return POOL_ROWS_PER_CHANNEL * columns * min(1.0, columns / max(count, 1))


def pooled(total: Tensor, count: float, borrowed: float) -> Tensor:
    """(n P + m p I) / (n + m): total = n P `[..., K, K]`, count = n, borrowed = m, p the mean of
    P's diagonal."""
    level = total.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) / max(count, 1)
    result = total / (count + borrowed)
    result.diagonal(dim1=-2, dim2=-1).add_(level * (borrowed / (count + borrowed)))
    return result


def damped(gram: Tensor) -> Tensor:
    """Positive definite: a share of the mean diagonal added to it. Zeros become the identity."""
    mean = gram.diagonal().mean()
    if not float(mean) > 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    result = gram.clone()
    result.diagonal().add_(DAMPING * mean)
    return result


def correction(lost: Tensor, rows: Tensor, gram: Tensor, weights: Tensor | None = None) -> Tensor:
    """M `[K, K]` float32 such that W + W M undoes what it can of the inputs' error.

    lost: rows x - x', rows: x', both float32 `[n, K]`, of weights `[n]`; gram: shrunk and damped
    moments of x'.
    """
    sums = CrossSums(rows.shape[1], rows.device)
    sums.add(lost, rows, weights)
    return sums.correction(gram, borrowed_rows(gram))


class CrossSums:
    """What the correction of a target needs of rows x - x' and x', summed as they come.

    A converted model feeds a matrix with rows x' where the original had x. The matrix W' that
    brings W' x' closest to W x, over the damped moments H of x', is W + W M with
    M = E[(x - x') x'^T] H^-1: the asymmetric calibration of GPTAQ (Li et al., arXiv 2504.02692) in
    closed form.

    M is a regression with K^2 coefficients, and any regression explains K / n of pure noise. Where
    x' differs from x by little more than noise (4 bits and finer), using all of M would add that
    noise to the weights. So M is scaled by the share of what it explains that is not expected by
    chance, 1 - (1 - R^2) / R^2 * K / n, down to nothing.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        """Nothing yet."""
        self._cross = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._energy = self._weight = self._squares = 0.0
        self._count = 0

    def add(self, lost: Tensor, rows: Tensor, weights: Tensor | None = None) -> None:
        """Rows x - x' and x', float32 `[n, K]`, of weights `[n]` (None: 1)."""
        self._cross += gram_sum(lost, rows, weights)
        energies = lost.double().square().sum(1)
        wide = torch.ones_like(energies) if weights is None else weights.double()
        self._energy += float((energies * wide).sum())
        self._weight += float(wide.sum())
        self._squares += float(wide.square().sum())
        self._count += len(rows)

    def join(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add what other processes have summed; total(t) is the sum of all processes' t."""
        self._cross = total(self._cross)
        sums = [self._energy, self._weight, self._squares, float(self._count)]
        told = total(torch.tensor(sums, dtype=torch.float64, device=self._cross.device)).tolist()
        self._energy, self._weight, self._squares = told[:3]
        self._count = int(told[3])

    def correction(self, gram: Tensor, borrowed: float = 0.0) -> Tensor:
        """M over the damped moments `gram`, which were mixed with so many rows of a pool."""
        total = self._count + borrowed
        cross = self._cross / max(total, 1.0)
        # Factorised in float64 (the moments may be nearly singular), solved in float32: an
        # estimate from so many rows is not worth more digits.
        factor = torch.linalg.cholesky(gram.double()).float()
        solved = torch.cholesky_solve(cross.mT.float(), factor).mT
        explained = float((solved * cross).sum()) * total
        if explained <= 0 or self._energy <= 0:
            return torch.zeros_like(gram, dtype=torch.float32)
        share = min(explained / self._energy, 1.0)
        # Rows of unequal weights tell as much as (sum w)^2 / sum w^2 equal ones.
        effective = self._weight**2 / self._squares
        chance = (1 - share) / share * len(gram) / effective
        return solved * max(0.0, 1 - chance)
