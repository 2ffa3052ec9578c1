"""gain: rows of a coded matrix brought back to the size that least squares took from them.

The code of least error shrinks. With the best scale the error is orthogonal to the code, so that
<q, w> / <w, w> = 1 - (relative error): a row whose error energy is 12 % answers its inputs with
88 % of what it should. Rounding noise of many experts averages out over a model; a loss of gain has
one sign in every row of every layer and adds up. So least error is not least KL divergence. Each
row's scales are multiplied by

    g = <w, w>_H / <q, w>_H,

which makes the row's own part of its output right again (E[y y'] = E[y^2] for inputs of moments H)
at the price of a little more squared error. H is the full second moments where a solver has them,
else their diagonal, else ones; scales are rounded again as they are stored. On the built-in model
this halves the KL of searched 2-bit integers.

Without a solver the sums are exact (`row_sums`), so the same recipe gives the same bytes on every
processor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels import codec, dispatch
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.row_sums import losses, row_sums
from v4quant_kernels.scale_search import QuantizedMatrix

LARGEST = 2.0
"""A row that needs more has hardly any of its direction left, and is not made louder."""

NOT_WORTH_ROUNDING = 2.0**-8
"""Solved scales are each the best for their codes, and rounding all of a row's to BF16 again may
move one by so much. Below four bits every row gains more; at int4-g32 99 % of rows gain less, and
restoring all of them made no difference on held-out text (KL 0.00088 against 0.00087)."""

_AT_ONCE = 1 << 17  # elements taken at a time: what is made of them stays in the cache


def with_gain(
    source: QTensor | Tensor, found: QuantizedMatrix, importance: Tensor | None
) -> QuantizedMatrix:
    """A coded matrix with its rows' gain restored, and its errors against the source.

    source: what was coded, a coded matrix or float32 values `[N, K]`. importance: second moments
    of the inputs `[K]`, None for ones. A matrix without error comes back as it is.
    """
    if not found.squared_error:
        return found
    q, pieces = found.tensor, []
    squared = norm = largest = 0.0
    step = max(1, _AT_ONCE // q.shape[1])
    for start in range(0, q.shape[0], step):
        stop = min(start + step, q.shape[0])
        values = _values(source, start, stop)
        part = q.rows(start, stop)
        part = codec.rescale(part, row_gain(values, codec.dequantize(part), importance))
        pieces.append(part)
        lost, whole, worst = losses(values, codec.dequantize(part))
        squared, norm, largest = squared + lost, norm + whole, max(largest, worst)
    return QuantizedMatrix(QTensor.stacked(pieces), squared, norm, largest)


def _values(source: QTensor | Tensor, start: int, stop: int) -> Tensor:
    if isinstance(source, Tensor):
        return source[start:stop]
    height = source.scheme.block[0]
    first = start // height * height
    return codec.dequantize(source.rows(first, stop))[start - first :]


def row_gain(values: Tensor, coded: Tensor, importance: Tensor | None) -> Tensor:
    """g of every row: float64 `[N]` from float32 `[N, K]` both, moments `[K]` or None for ones.

    1 for rows of zeros and for rows whose code points away from them.
    """
    return bounded(*row_sums(values, coded, importance))


def bounded(energy: Tensor, kept: Tensor) -> Tensor:
    """<w, w> / <q, w>, from 1 / LARGEST to LARGEST; 1 where either is not positive."""
    usable = (energy > 0) & (kept > 0) & energy.isfinite() & kept.isfinite()
    gain = torch.where(usable, energy / torch.where(usable, kept, 1.0), 1.0)
    return gain.clamp_(1 / LARGEST, LARGEST)


def solved_gain(target: Tensor, values: Tensor, grams: Tensor) -> Tensor:
    """g of every row: float32 `[B, N]` from targets and codes' values `[B, K, N]`, moments
    `[B, K, K]`; 1 where it is within `NOT_WORTH_ROUNDING` of that.
    """
    pull = dispatch.float32_product(grams, target)
    gain = bounded((target * pull).sum(1), (values * pull).sum(1))
    return torch.where((gain - 1).abs() > NOT_WORTH_ROUNDING, gain, 1.0)
