"""Values that lie on a coded grid, found again: the compiled loop on the CPU, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import grids as plain
from v4quant_kernels.ref.grids import find_fp8_tiles
from v4quant_kernels.ref.mx import GROUP
from v4quant_kernels.scheme import MXFP4

__all__ = ["find_fp8_tiles", "find_mxfp4"]


def find_mxfp4(values: Tensor) -> QTensor | None:
    """As `ref.grids.find_mxfp4`, byte for byte."""
    fits = values.ndim == 2 and values.numel() and values.shape[1] % GROUP == 0
    if not (fits and values.is_cpu and native.available()):
        return plain.find_mxfp4(values)
    from v4quant_kernels.native.grids import ODD, OFF, on_mxfp4_grid

    rows, columns = values.shape
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scale = torch.empty(rows, columns // GROUP, dtype=torch.uint8)
    bits = values.float().contiguous().view(torch.int32).numpy()
    found = on_mxfp4_grid(bits, codes.numpy(), scale.numpy())
    if found == ODD:
        return plain.find_mxfp4(values)
    if found == OFF:
        return None
    return QTensor(MXFP4, (rows, columns), codes, scale.view(torch.float8_e8m0fnu))
