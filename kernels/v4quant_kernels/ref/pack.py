"""Dense bit streams: integers of 2, 3, 4 or 8 bits side by side in bytes.

A signed integer `q` of `b` bits is stored as the unsigned `q + 2^(b-1)`. A row is one little-endian
bit stream along K: element `k` occupies bits `k*b` to `k*b + b - 1`, least significant first,
across byte borders (so three bits waste nothing: eight elements fill three bytes). A row ends in
zero bits up to a multiple of four bytes. Viewed as little-endian int32 this is exactly the
"pack-quantized" layout of compressed-tensors, and for four bits the low nibble is the even column.

The pattern repeats after `lcm(b, 8)` bits, a *period* of 1, 2, 4 or 8 elements in 1 or 3 bytes. All
work is done for one place in the period at a time, as a strided operation over the whole matrix,
so one loop of at most eight steps serves every width.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import TYPE_CHECKING

from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (2, 3, 4, 8)
"""The supported numbers of bits."""


def packed_bytes(columns: int, bits: int) -> int:
    """Bytes of one packed row: `ceil(columns * bits / 32) * 4`."""
    return -(-columns * bits // 32) * 4


def _period(bits: int) -> tuple[int, int]:
    """(elements, bytes) after which the stream is byte-aligned again."""
    assert bits in WIDTHS, bits
    common = gcd(bits, 8)
    return 8 // common, bits // common


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """For every element of a period: its number, its first byte, its first bit in that byte."""
    for element in range(_period(bits)[0]):
        yield element, *divmod(element * bits, 8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Pack integers `[N, K]` in `[-2^(bits-1), 2^(bits-1) - 1]`, any integer dtype.

    Returns uint8 `[N, ceil(K*bits/32)*4]`.
    """
    offset = 1 << (bits - 1)
    if values.numel():
        low, high = (int(bound) for bound in torch.aminmax(values))
        assert -offset <= low and high < offset, f"{low}..{high} does not fit {bits} bits"
    rows, columns = values.shape
    elements, step = _period(bits)
    unsigned = values.to(torch.uint8) + offset  # wraps modulo 256, as wanted for negative values
    if columns % elements:
        unsigned = torch.nn.functional.pad(unsigned, (0, -columns % elements))
    used = unsigned.shape[1] // elements * step
    width = packed_bytes(columns, bits)
    packed = unsigned.new_zeros(rows, max(used, width))
    stream = packed[:, :used]
    for element, byte, shift in _places(bits):
        part = unsigned[:, element::elements]
        stream[:, byte::step].bitwise_or_(part << shift)
        if shift + bits > 8:
            stream[:, byte + 1 :: step].bitwise_or_(part >> (8 - shift))
    return packed[:, :width].contiguous()


def unpack_bits(packed: Tensor, bits: int, columns: int) -> Tensor:
    """int8 `[N, columns]` of uint8 `[N, ceil(columns*bits/32)*4]`; the inverse of `pack_bits`."""
    assert packed.dtype == torch.uint8, packed.dtype
    assert packed.shape[1] == packed_bytes(columns, bits), (tuple(packed.shape), columns, bits)
    elements, step = _period(bits)
    periods = -(-columns // elements)
    if packed.shape[1] < periods * step:
        packed = torch.nn.functional.pad(packed, (0, periods * step - packed.shape[1]))
    stream = packed[:, : periods * step]
    values = packed.new_empty(packed.shape[0], periods * elements)
    for element, byte, shift in _places(bits):
        part = stream[:, byte::step] >> shift
        if shift + bits > 8:
            part.bitwise_or_(stream[:, byte + 1 :: step] << (8 - shift))
        values[:, element::elements] = part.bitwise_and_((1 << bits) - 1)
    signed = values.sub_(1 << (bits - 1)).view(torch.int8)  # wraps modulo 256 into the sign
    return signed[:, :columns].contiguous()
