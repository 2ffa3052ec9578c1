"""GGML blocks taken apart: integers and half-precision scales out of bytes, and back.

GGUF files store a quantized row as a sequence of blocks. For every type here a weight is

    value = (d * sc) * q + offset,    offset = -(dmin * m)  or  minimum

in float32, with one rounding an operation: `q` a small integer, `d` and `dmin` float16 of the
block, `sc` and `m` small integers of a sub-block of 16 or 32 ("K" types, blocks of 256; the others
have one sub-block and no `sc`). That makes K-types a uniform grid whose step and offset change
every sub-block, and both are themselves quantized against a scale of the block.

| type | block | bytes | bits | q | sub-block | sc | m |
|------|------:|------:|-----:|---|----------:|----|---|
| q8_0 | 32 | 34 | 8.5 | -128..127 | 32 | | |
| q5_1 | 32 | 24 | 6 | 0..31 | 32 | | float16 minimum, added |
| q5_0 | 32 | 22 | 5.5 | -16..15 | 32 | | |
| q4_0 | 32 | 18 | 4.5 | -8..7 | 32 | | |
| q6_k | 256 | 210 | 6.5625 | -32..31 | 16 | -128..127 | |
| q5_k | 256 | 176 | 5.5 | 0..31 | 32 | 0..63 | 0..63 |
| q4_k | 256 | 144 | 4.5 | 0..15 | 32 | 0..63 | 0..63 |
| q3_k | 256 | 110 | 3.4375 | -4..3 | 16 | -32..31 | |
| q2_k | 256 | 84 | 2.625 | 0..3 | 16 | 0..15 | 0..15 |
| q2_0 | 64 | 18 | 2.25 | -1..2 | 64 | | |

The bits lie as C structures lay them: elements 32 or 64 apart share a byte, six-bit scales are
split over twelve bytes. `take_apart` and `put_together` are inverse to each other on every byte
(proved in the tests), so an encoder only chooses integers, and error feedback can keep the scales
and replace `q`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_kernels.ref import ggml_codebooks
from v4quant_kernels.ref.ggml_fields import (
    Blocks,
    BlockShape,
    Format,
    Join,
    half_at,
    half_bytes,
    join_fields,
    signed,
    split_fields,
    unsigned,
)

SHAPES: dict[str, BlockShape] = {
    "q8_0": BlockShape(32, 32, (-128, 127)),
    "q5_1": BlockShape(32, 32, (0, 31), None, True),
    "q5_0": BlockShape(32, 32, (-16, 15)),
    "q4_0": BlockShape(32, 32, (-8, 7)),
    "q6_k": BlockShape(256, 16, (-32, 31), (-128, 127)),
    "q5_k": BlockShape(256, 32, (0, 31), (0, 63), True),
    "q4_k": BlockShape(256, 32, (0, 15), (0, 63), True),
    "q3_k": BlockShape(256, 16, (-4, 3), (-32, 31)),
    "q2_k": BlockShape(256, 16, (0, 3), (0, 15), True),
    "q2_0": BlockShape(64, 64, (-1, 2)),
    **ggml_codebooks.SHAPES,
}


def take_apart(data: Tensor, name: str) -> Blocks:
    """Blocks from uint8 `[B, bytes]`."""
    return _FORMATS[name][0](data)


def put_together(blocks: Blocks, name: str, join: Join | None = None) -> Tensor:
    """uint8 `[B, bytes]` from blocks whose integers are in range.

    `join`: a faster function than `join_fields` that does the same.
    """
    return _FORMATS[name][1](blocks, join or join_fields)


def _from_q8_0(data: Tensor) -> Blocks:
    return Blocks(signed(data[:, 2:]), half_at(data, 0))


def _to_q8_0(b: Blocks, join: Join) -> Tensor:
    return torch.cat([half_bytes(b.d), unsigned(b.q)], 1)


def _from_q4_0(data: Tensor) -> Blocks:
    return Blocks(signed(split_fields(data[:, 2:], 4).flatten(1), 8), half_at(data, 0))


def _to_q4_0(b: Blocks, join: Join) -> Tensor:
    return torch.cat([half_bytes(b.d), join(unsigned(b.q, 8).view(-1, 2, 16), 4)], 1)


def _fifth_bits(data: Tensor) -> Tensor:
    """`[B, 32]` zeros and ones from four bytes per block, element 0 in the lowest bit."""
    return split_fields(data[:, :, None], 1).flatten(1)


def _from_q5(data: Tensor, at: int) -> Tensor:
    """The unsigned five-bit codes behind `at` bytes of scales."""
    low = split_fields(data[:, at + 4 :], 4).flatten(1)
    return low | (_fifth_bits(data[:, at : at + 4]) << 4)


def _to_q5(u: Tensor, join: Join) -> list[Tensor]:
    # Bit 4 of eight bytes: a product brings the bit of byte i to bit i of the highest byte.
    eight = (u.view(torch.int64) >> 4) & 0x0101010101010101
    high = ((eight * 0x0102040810204080) >> 56).to(torch.uint8)
    return [high, join((u & 15).view(-1, 2, 16), 4)]


def _from_q5_0(data: Tensor) -> Blocks:
    return Blocks(signed(_from_q5(data, 2), 16), half_at(data, 0))


def _to_q5_0(b: Blocks, join: Join) -> Tensor:
    return torch.cat([half_bytes(b.d), *_to_q5(unsigned(b.q, 16), join)], 1)


def _from_q5_1(data: Tensor) -> Blocks:
    return Blocks(signed(_from_q5(data, 4)), half_at(data, 0), None, half_at(data, 2))


def _to_q5_1(b: Blocks, join: Join) -> Tensor:
    assert b.dmin is not None
    return torch.cat([half_bytes(b.d), half_bytes(b.dmin), *_to_q5(unsigned(b.q), join)], 1)


def _from_q2_0(data: Tensor) -> Blocks:
    # The only type whose neighbours share a byte: element i in bits 2 (i mod 4) of byte i / 4.
    return Blocks(signed(split_fields(data[:, 2:, None], 2).flatten(1), 1), half_at(data, 0))


def _to_q2_0(b: Blocks, join: Join) -> Tensor:
    qs = join(unsigned(b.q, 1).view(-1, 16, 4, 1), 2).flatten(1)
    return torch.cat([half_bytes(b.d), qs], 1)


def _from_q2_k(data: Tensor) -> Blocks:
    scales, qs = data[:, :16], data[:, 16:80].reshape(-1, 2, 32)
    q = signed(split_fields(qs, 2).flatten(1))
    d, dmin = half_at(data, 80), half_at(data, 82)
    return Blocks(q, d, signed(scales & 15), dmin, signed(scales >> 4))


def _to_q2_k(b: Blocks, join: Join) -> Tensor:
    assert b.sc is not None and b.m is not None and b.dmin is not None
    scales = unsigned(b.sc) | (unsigned(b.m) << 4)
    qs = join(unsigned(b.q).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([scales, qs, half_bytes(b.d), half_bytes(b.dmin)], 1)


def _from_q3_k(data: Tensor) -> Blocks:
    high = split_fields(data[:, :32], 1).flatten(1)
    low = split_fields(data[:, 32:96].reshape(-1, 2, 32), 2).flatten(1)
    packed = data[:, 96:108]
    sc = split_fields(packed[:, :8], 4).flatten(1) | (
        split_fields(packed[:, 8:], 2).flatten(1) << 4
    )
    return Blocks(signed(low | (high << 2), 4), half_at(data, 108), signed(sc, 32))


def _to_q3_k(b: Blocks, join: Join) -> Tensor:
    assert b.sc is not None
    u, sc = unsigned(b.q, 4), unsigned(b.sc, 32)
    high = join((u >> 2).view(-1, 8, 32), 1)
    low = join((u & 3).view(-1, 2, 4, 32), 2).flatten(1)
    scales = [join((sc & 15).view(-1, 2, 8), 4), join((sc >> 4).view(-1, 4, 4), 2)]
    return torch.cat([high, low, *scales, half_bytes(b.d)], 1)


def _from_six_bits(packed: Tensor) -> tuple[Tensor, Tensor]:
    """`sc` and `m`, int8 `[B, 8]`, from the twelve bytes of q4_k and q5_k."""
    first, second, third = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    sc = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], 1)
    m = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], 1)
    return signed(sc), signed(m)


def _to_six_bits(b: Blocks) -> Tensor:
    assert b.sc is not None and b.m is not None
    sc, m = unsigned(b.sc), unsigned(b.m)
    first = sc[:, :4] | ((sc[:, 4:] >> 4) << 6)
    second = m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (sc[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _from_q4_k(data: Tensor) -> Blocks:
    q = split_fields(data[:, 16:].reshape(-1, 4, 32), 4).flatten(1)
    sc, m = _from_six_bits(data[:, 4:16])
    return Blocks(signed(q), half_at(data, 0), sc, half_at(data, 2), m)


def _to_q4_k(b: Blocks, join: Join) -> Tensor:
    assert b.dmin is not None
    qs = join(unsigned(b.q).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([half_bytes(b.d), half_bytes(b.dmin), _to_six_bits(b), qs], 1)


def _from_q5_k(data: Tensor) -> Blocks:
    high = split_fields(data[:, 16:48], 1).flatten(1)
    low = split_fields(data[:, 48:].reshape(-1, 4, 32), 4).flatten(1)
    sc, m = _from_six_bits(data[:, 4:16])
    return Blocks(signed(low | (high << 4)), half_at(data, 0), sc, half_at(data, 2), m)


def _to_q5_k(b: Blocks, join: Join) -> Tensor:
    assert b.dmin is not None
    u = unsigned(b.q)
    high = join((u >> 4).view(-1, 8, 32), 1)
    qs = join((u & 15).view(-1, 4, 2, 32), 4).flatten(1)
    return torch.cat([half_bytes(b.d), half_bytes(b.dmin), _to_six_bits(b), high, qs], 1)


def _from_q6_k(data: Tensor) -> Blocks:
    # Nibbles of elements 64 apart, high pairs of elements 32 apart, in halves of 128.
    low = split_fields(data[:, :128].reshape(-1, 2, 64), 4).flatten(1)
    high = split_fields(data[:, 128:192].reshape(-1, 2, 32), 2).flatten(1)
    return Blocks(signed(low | (high << 4), 32), half_at(data, 208), signed(data[:, 192:208]))


def _to_q6_k(b: Blocks, join: Join) -> Tensor:
    assert b.sc is not None
    u = unsigned(b.q, 32)
    low = join((u & 15).view(-1, 2, 2, 64), 4).flatten(1)
    high = join((u >> 4).view(-1, 2, 4, 32), 2).flatten(1)
    return torch.cat([low, high, unsigned(b.sc), half_bytes(b.d)], 1)


_FORMATS: dict[str, Format] = {
    "q8_0": (_from_q8_0, _to_q8_0),
    "q4_0": (_from_q4_0, _to_q4_0),
    "q5_0": (_from_q5_0, _to_q5_0),
    "q5_1": (_from_q5_1, _to_q5_1),
    "q2_k": (_from_q2_k, _to_q2_k),
    "q3_k": (_from_q3_k, _to_q3_k),
    "q4_k": (_from_q4_k, _to_q4_k),
    "q5_k": (_from_q5_k, _to_q5_k),
    "q6_k": (_from_q6_k, _to_q6_k),
    "q2_0": (_from_q2_0, _to_q2_0),
    **ggml_codebooks.FORMATS,
}
