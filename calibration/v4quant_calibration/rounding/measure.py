"""measure: what coding a matrix cost."""

from __future__ import annotations

from torch import Tensor

from v4quant_kernels import codec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scale_search import QuantizedMatrix


def measured(values: Tensor, q: QTensor) -> QuantizedMatrix:
    """A coded matrix with its unweighted error against float32 `values` [N, K]."""
    difference = (codec.dequantize(q) - values).double()
    squared = float(difference.square().sum())
    norm = float(values.double().square().sum())
    return QuantizedMatrix(q, squared, norm, float(difference.abs().max()))
