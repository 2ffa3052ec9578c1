"""measure: what coding a matrix cost."""

from __future__ import annotations

from torch import Tensor

from v4quant_kernels import codec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.row_sums import losses
from v4quant_kernels.scale_search import QuantizedMatrix


def measured(values: Tensor, q: QTensor) -> QuantizedMatrix:
    """A coded matrix with its unweighted error against float32 `values` [N, K]."""
    return QuantizedMatrix(q, *losses(values, codec.dequantize(q)))
