"""Coded matrices to float32 in one pass: the loops behind `codec.dequantize`.

A format is a table here. A nibble, a byte or a few bits of a stream say which of at most 256 values
an element has, and its block's scale multiplies it; so three loops serve E2M1, E4M3 and integers
under every scale. Multiplying is done in the order and precision of the torch functions under
`ref/`, so the bits are the same. The result's memory comes from numpy, which asks the system for
large pages: with small ones, touching fresh memory for the first time costs several times what the
decoding does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v4quant_kernels.native import compiled
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3, fp8_block
from v4quant_kernels.scheme import Scheme


def decode(q: QTensor) -> Tensor:
    """float32 `[N, K]` of a matrix on the CPU that `decodes` its scheme."""
    assert q.scale is not None
    rows, columns = q.shape
    out = np.empty((rows, columns), np.float32)
    scale = _scales(q)
    codes = q.codes.view(torch.uint8).contiguous().numpy()
    factor = np.float32(1 if q.global_scale is None else float(q.global_scale))
    table = _table(q.scheme.element, q.scheme.bits)
    if q.scheme.bits == 8:
        _bytes(codes, scale, *q.scheme.block, table, out)
    elif q.scheme.bits == 4:
        even, odd = _pairs(q.scheme.element)
        _nibbles(codes, scale, q.scheme.group_size // 2, even, odd, factor, out)
    else:
        _stream(codes, scale, q.scheme.bits, q.scheme.group_size, table, out)
    return torch.from_numpy(out)


def decodes(scheme: Scheme) -> bool:
    """Whether `decode` knows a scheme: all but plain BF16 and GGUF's blocks."""
    return scheme.element in ("e2m1", "e4m3", "int")


def holds(codes: NDArray[np.uint8], magnitude: int) -> bool:
    """Whether the lower seven bits of some byte are `magnitude`; codes contiguous, any shape."""
    return bool(_holds(codes.reshape(-1), np.uint8(magnitude)))


def _scales(q: QTensor) -> NDArray[np.float32]:
    """Multipliers as float32, in the shape they have."""
    assert q.scale is not None
    if q.scheme.scale == "bf16":
        scale = q.scale.float()
    elif q.scheme.scale == "e4m3":
        scale = e4m3.decode(q.scale)
    else:
        scale = fp8_block.decode_scale(q.scale)
    found: NDArray[np.float32] = scale.contiguous().numpy()
    return found


@cache
def _table(element: str, bits: int) -> NDArray[np.float32]:
    """The value of every code of `bits` bits."""
    codes = torch.arange(1 << bits)
    if element == "e4m3":
        values = e4m3.decode(codes.to(torch.uint8).view(torch.float8_e4m3fn))
    else:
        values = e2m1.VALUES if element == "e2m1" else codes.float() - (1 << (bits - 1))
    found: NDArray[np.float32] = values.numpy()
    return found


@cache
def _pairs(element: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two values of every byte: of its low nibble (the even column), and of its high one."""
    table, byte = _table(element, 4), np.arange(256)
    return table[byte & 15], table[byte >> 4]


@compiled
def _nibbles(  # type: ignore[no-untyped-def]
    codes: Any, scale: Any, width: Any, even: Any, odd: Any, factor: Any, out: Any
):
    """Rows of groups of `width` bytes; a row of codes may end in bytes that mean nothing."""
    for row in range(scale.shape[0]):
        for group in range(scale.shape[1]):
            step, first = scale[row, group], group * width
            for i in range(first, first + width):
                byte = codes[row, i]
                out[row, 2 * i] = even[byte] * step * factor
                out[row, 2 * i + 1] = odd[byte] * step * factor


@compiled
def _bytes(  # type: ignore[no-untyped-def]
    codes: Any, scale: Any, height: Any, width: Any, table: Any, out: Any
):
    """Blocks of `height` rows by `width` columns, ragged at the edges."""
    rows, columns = out.shape
    for row in range(rows):
        for block in range(scale.shape[1]):
            step, first = scale[row // height, block], block * width
            for i in range(first, min(first + width, columns)):
                out[row, i] = table[codes[row, i]] * step


@compiled
def _stream(  # type: ignore[no-untyped-def]
    codes: Any, scale: Any, bits: Any, width: Any, table: Any, out: Any
):
    """Codes of 2 or 3 bits, a little-endian bit stream a row, in groups of `width` elements."""
    mask = (1 << bits) - 1
    for row in range(out.shape[0]):
        held, there, at = np.int64(0), 0, 0
        for group in range(scale.shape[1]):
            step = scale[row, group]
            for i in range(group * width, (group + 1) * width):
                if there < bits:
                    held |= np.int64(codes[row, at]) << there
                    there += 8
                    at += 1
                out[row, i] = table[held & mask] * step
                held >>= bits
                there -= bits


@compiled
def _holds(codes, magnitude):  # type: ignore[no-untyped-def]
    for first in range(0, codes.size, 4096):
        found = np.uint8(0)
        for i in range(first, min(first + 4096, codes.size)):
            found |= np.uint8((codes[i] & np.uint8(127)) == magnitude)
        if found:
            return True
    return False
