"""Values that lie on a coded grid, found again: the compiled loop on the CPU, torch elsewhere."""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels import native
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import grids as plain
from v4quant_kernels.ref.mx import GROUP
from v4quant_kernels.scheme import MXFP4, SCHEMES, Scheme

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


def find_fp8_tiles(values: Tensor, scheme: Scheme = SCHEMES["fp8"]) -> QTensor | None:
    """As `ref.grids.find_fp8_tiles`, byte for byte."""
    if not (values.ndim == 2 and values.numel() and values.is_cpu and native.available()):
        return plain.find_fp8_tiles(values, scheme)
    from v4quant_kernels.native.fp8_tiles import ODD, OFF, on_fp8_grid

    (rows, columns), (height, width) = values.shape, scheme.block
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    scale = torch.empty(-(-rows // height), -(-columns // width), dtype=torch.uint8)
    bits = values.float().contiguous().view(torch.int32).numpy()
    found = on_fp8_grid(bits, codes.numpy(), scale.numpy(), (height, width))
    if found == ODD:
        return plain.find_fp8_tiles(values, scheme)
    if found == OFF:
        return None
    exponents = scale.view(torch.float8_e8m0fnu)
    return QTensor(scheme, (rows, columns), codes.view(torch.float8_e4m3fn), exponents)
