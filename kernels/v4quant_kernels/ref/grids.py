"""Values that already lie on a coded grid, found again from the values alone.

A checkpoint "dequantized to BF16" still holds nothing but MXFP4 or block-FP8 numbers wherever
nobody trained. Such a matrix is recoded without loss, however the file stores it.

MXFP4: a group of 32 is `element * 2^k` with elements 0, 1/2, 1, 3/2, 2, 3, 4, 6. Block FP8: a tile
is `e4m3 * 2^k`. Encoders choose the smallest k under which nothing saturates, so the largest
element lies in the upper half of the format's range; that leaves one k, or two when the largest
value is 3/4 (FP8: half) of the next power the format could hold. Of two that both hold every value
the larger is taken: had the smaller one been the encoder's, some of the group's elements would
almost surely need its finer steps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block, mx
from v4quant_kernels.ref.blocks import absmax, power_of_two_exponent
from v4quant_kernels.scheme import MXFP4, SCHEMES, Scheme

_FIRST_ROWS = 8  # looked at before a whole matrix is


def find_mxfp4(values: Tensor) -> QTensor | None:
    """The MXFP4 matrix that is exactly `values`, float [N, K]; None where there is none.

    -0 is kept. A group of zeros gets the scale that the quantizer gives it (1).
    """
    if values.ndim != 2 or not values.numel() or values.shape[1] % mx.GROUP:
        return None
    if len(values) > _FIRST_ROWS and _on_mxfp4_grid(values[:_FIRST_ROWS].float()) is None:
        return None
    return _on_mxfp4_grid(values.float())


def _on_mxfp4_grid(values: Tensor) -> QTensor | None:
    scheme = MXFP4
    exponent = _exponents(values.view(len(values), -1, mx.GROUP), -1, 6.0)
    fine = mx.quantize(values, scheme, scale=e8m0.encode_exponent(exponent))
    held = _held(fine, values, mx.dequantize(fine)).view(*exponent.shape, mx.GROUP)
    if not bool(held.all()):
        return None
    # The largest element is 6 under `fine`, and 3 under the next coarser scale, if that holds all.
    coarser = (exponent + 1).clamp_max(e8m0.MAX_EXPONENT - 2)
    coarse = mx.quantize(values, scheme, scale=e8m0.encode_exponent(coarser))
    also = _held(coarse, values, mx.dequantize(coarse)).view(held.shape).all(-1)
    top = absmax(values.view(len(values), -1, mx.GROUP))
    also &= top == 3 * e8m0.power_of_two(coarser)
    if not bool(also.any()):
        return fine
    return mx.quantize(
        values, scheme, scale=e8m0.encode_exponent(torch.where(also, coarser, exponent))
    )


def find_fp8_tiles(values: Tensor, scheme: Scheme = SCHEMES["fp8"]) -> QTensor | None:
    """The FP8 matrix (E8M0 scales) that is exactly `values`, float [N, K]; or None.

    scheme: fp8 under some release's tiles.
    """
    values = values.float()
    fine = fp8_block.quantize(values, scheme)
    if not bool(_held(fine, values, fp8_block.dequantize(fine)).all()):
        return None
    assert fine.scale is not None
    exponent = e8m0.exponents(fine.scale)
    coarser = (exponent + 1).clamp_max(e8m0.MAX_EXPONENT - 8)
    coarse = fp8_block.quantize(values, scheme, scale=e8m0.encode_exponent(coarser))
    rows, columns = values.shape
    height, width = scheme.block
    missing = (0, -columns % width, 0, -rows % height)
    tiles = torch.nn.functional.pad(values, missing).view(
        -(-rows // height), height, -(-columns // width), width
    )
    again = torch.nn.functional.pad(fp8_block.dequantize(coarse), missing).view(tiles.shape)
    also = (again == tiles).all(3).all(1)
    also &= absmax(tiles, (1, 3)) == 224 * e8m0.power_of_two(coarser)
    if not bool(also.any()):
        return fine
    chosen = torch.where(also, coarser, exponent)
    return fp8_block.quantize(values, scheme, scale=e8m0.encode_exponent(chosen))


def _exponents(groups: Tensor, dim: int, maximum: float) -> Tensor:
    return power_of_two_exponent(absmax(groups, dim), maximum)


def _held(q: QTensor, wanted: Tensor, got: Tensor) -> Tensor:
    return (got == wanted) & (torch.signbit(got) == torch.signbit(wanted))
