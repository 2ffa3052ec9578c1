"""GGML types whose weights are points of a codebook: IQ1, IQ2, IQ3 and IQ4.

A weight is `d * sc * unit * q` as in `ggml_blocks`, but only some vectors of 8 or 4 neighbouring
`q` exist: a table of magnitudes (the grid) times signs. With s the bits stored of a sub-block's
scale, `sc` is the odd number 2 s + 1, and `unit` what makes that llama.cpp's scale:

| type | block | bytes | bits | vector | grid | signs | sub-block | sc | unit |
|------|------:|------:|-----:|-------:|-----:|-------|----------:|----|------|
| iq1_s | 256 | 50 | 1.5625 | 8 | 2048 | +-1/8 added to 32 | 32 | 1, 3 .. 15 | 1/8 |
| iq1_m | 256 | 56 | 1.75 | 8 | 2048 | +-1/8 added to 8 | 16 | 1, 3 .. 15 | 1/8 |
| iq2_xxs | 256 | 66 | 2.0625 | 8 | 256 | even of 8 | 32 | 1, 3 .. 31 | 1/8 |
| iq2_xs | 256 | 74 | 2.3125 | 8 | 512 | even of 8 | 16 | 1, 3 .. 31 | 1/8 |
| iq2_s | 256 | 82 | 2.5625 | 8 | 1024 | free | 16 | 1, 3 .. 31 | 1/8 |
| iq3_xxs | 256 | 98 | 3.0625 | 4 | 256 | even of 8 | 32 | 1, 3 .. 31 | 1/4 |
| iq3_s | 256 | 110 | 3.4375 | 4 | 512 | free | 32 | 1, 3 .. 31 | 1 |
| iq4_nl | 32 | 18 | 4.5 | 1 | 16 | in the grid | 32 | | 1 |
| iq4_xs | 256 | 136 | 4.25 | 1 | 16 | in the grid | 32 | -32 .. 31 | 1 |

"even of 8": seven bits are stored and the last sign is such that an even number is negative. IQ1's
grid is -1, 0, 1 and `q` eight times the sum of grid and 1/8. No IQ1, IQ2 or IQ3 code is zero.
Every product is exact in float32, so the order of factors does not matter. The order of a grid's
points is the file format; grids are read from the gguf package and never made again.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from v4quant_kernels.ref.ggml_fields import (
    Blocks,
    BlockShape,
    Codebook,
    Format,
    Join,
    half_at,
    half_bytes,
    signed,
    split_fields,
    unsigned,
)

_ODD_31, _ODD_15 = (1, 31), (1, 15)
_IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _vectors(
    sub: int, top: int, sc: tuple[int, int], unit: float, codebook: Codebook
) -> BlockShape:
    return BlockShape(256, sub, (-top, top), sc, unit=unit, odd_scales=True, codebook=codebook)


SHAPES: dict[str, BlockShape] = {
    "iq1_s": _vectors(32, 9, _ODD_15, 1 / 8, Codebook("IQ1_S", 8, "none", 32)),
    "iq1_m": _vectors(16, 9, _ODD_15, 1 / 8, Codebook("IQ1_M", 8, "none", 8)),
    "iq2_xxs": _vectors(32, 43, _ODD_31, 1 / 8, Codebook("IQ2_XXS", 8, "even")),
    "iq2_xs": _vectors(16, 43, _ODD_31, 1 / 8, Codebook("IQ2_XS", 8, "even")),
    "iq2_s": _vectors(16, 43, _ODD_31, 1 / 8, Codebook("IQ2_S", 8, "free")),
    "iq3_xxs": _vectors(32, 62, _ODD_31, 1 / 4, Codebook("IQ3_XXS", 4, "even")),
    "iq3_s": _vectors(32, 15, _ODD_31, 1.0, Codebook("IQ3_S", 4, "free")),
    "iq4_nl": BlockShape(32, 32, (-127, 113), levels=_IQ4_LEVELS),
    "iq4_xs": BlockShape(256, 32, (-127, 113), (-32, 31), levels=_IQ4_LEVELS),
}


@cache
def points(grid: str) -> Tensor:
    """int8 `[entries, vector]`: a grid of gguf's, in the order of its indices."""
    from gguf import quants

    kind = getattr(quants, grid)
    kind.init_grid()
    return torch.from_numpy(kind.grid[0, 0]).to(torch.int8)


def _gather(codebook: Codebook, index: Tensor) -> Tensor:
    """int8 `[B, 256]` of the grid from indices `[B, 256 / vector]`."""
    grid = points(codebook.grid).to(index.device)
    return grid[index.long()].flatten(1)


def _base(grid: Tensor) -> tuple[Tensor, Tensor]:
    """The values of a grid, ascending, and what a digit at each place of a vector counts."""
    values = grid.unique()
    return values, len(values) ** torch.arange(grid.shape[1])


@cache
def _indices(grid: str) -> Tensor:
    """int64: the index of every vector, written as a number of digits; -1 where there is none."""
    known = points(grid)
    values, digit = _base(known)
    keys = (torch.searchsorted(values, known) * digit).sum(1)
    found = torch.full((len(values) ** known.shape[1],), -1)
    found[keys] = torch.arange(len(known))
    return found


def find(codebook: Codebook, q: Tensor) -> Tensor:
    """int64 `[B, 256 / vector]`: indices of grid vectors, int8 `[B, 256]`. They must exist."""
    values, digit = (t.to(q.device) for t in _base(points(codebook.grid)))
    vectors = q.reshape(len(q), -1, codebook.vector)
    places = torch.searchsorted(values, vectors).clamp_(max=len(values) - 1)
    index = _indices(codebook.grid).to(q.device)[(places * digit).sum(2)]
    assert bool(((index >= 0) & (values[places] == vectors).all(2)).all()), "no vector of the grid"
    return index


def _bits_of(mask: Tensor) -> Tensor:
    """uint8 zeros and ones `[B, 8 n]` from bytes `[B, n]`, the lowest bit first."""
    return split_fields(mask.contiguous().unsqueeze(-1), 1).flatten(1)


def _with_signs(magnitudes: Tensor, masks: Tensor) -> Tensor:
    """Magnitudes int8 `[B, 256]`, negative where a bit of masks, uint8 `[B, 32]`, is set."""
    negative = _bits_of(masks).view(torch.int8)
    return magnitudes * (1 - 2 * negative)


def _sign_masks(q: Tensor, join: Join) -> Tensor:
    """uint8 `[B, 32]`: a bit for each of eight weights, set where it is negative."""
    negative = (q < 0).to(torch.uint8).view(len(q), 32, 8, 1)
    return join(negative, 1).flatten(1)


def _even_masks(seven: Tensor) -> Tensor:
    """Masks with an even number of bits from their seven lowest, uint8."""
    parity = seven ^ (seven >> 4)
    parity = parity ^ (parity >> 2)
    parity = (parity ^ (parity >> 1)) & 1
    return seven | (parity << 7)


def _words(data: Tensor, size: int) -> Tensor:
    """int64 of little-endian words of `size` bytes: uint8 `[B, size n]` to `[B, n]`."""
    parts = data.reshape(len(data), -1, size).long()
    return sum((parts[..., i] << (8 * i) for i in range(1, size)), parts[..., 0])


def _word_bytes(words: Tensor, size: int) -> Tensor:
    """The inverse of `_words`."""
    parts = [(words >> (8 * i)) & 255 for i in range(size)]
    return torch.stack(parts, -1).to(torch.uint8).flatten(1)


def _fields(words: Tensor, shifts: range, mask: int) -> Tensor:
    """int64 `[B, n len(shifts)]`: bit fields of int64 `[B, n]`."""
    return torch.stack([(words >> shift) & mask for shift in shifts], -1).flatten(1)


def _join_words(fields: Tensor, shifts: range) -> Tensor:
    """The inverse of `_fields`."""
    parts = fields.long().reshape(len(fields), -1, len(shifts))
    return (parts << torch.tensor(list(shifts), device=fields.device)).sum(-1)


def _scales(stored: Tensor) -> Tensor:
    """int8 odd numbers from the bits stored."""
    return (2 * stored + 1).to(torch.int8)


def _stored_scales(b: Blocks) -> Tensor:
    """The inverse of `_scales`, uint8 `[B, subs]`."""
    assert b.sc is not None
    return unsigned(b.sc) >> 1


def _signed_blocks(name: str, index: Tensor, masks: Tensor, scales: Tensor, d: Tensor) -> Blocks:
    shape = SHAPES[name]
    assert shape.codebook is not None
    q = _with_signs(_gather(shape.codebook, index), masks)
    return Blocks(q, d, _scales(scales), unit=shape.unit)


def _magnitude_indices(name: str, b: Blocks) -> Tensor:
    codebook = SHAPES[name].codebook
    assert codebook is not None
    return find(codebook, b.q.abs())


def _nibbles(data: Tensor) -> Tensor:
    """uint8 `[B, 2 n]`: the low and the high half of each of `[B, n]` bytes, in turn."""
    return split_fields(data.contiguous().unsqueeze(-1), 4).flatten(1)


def _join_nibbles(values: Tensor, join: Join) -> Tensor:
    return join(values.view(len(values), -1, 2, 1), 4).flatten(1)


def _from_iq2_xxs(data: Tensor) -> Blocks:
    eights = data[:, 2:].reshape(len(data), 8, 8)  # four indices, then signs and scale
    tail = _words(eights[:, :, 4:].flatten(1), 4)
    masks = _even_masks(_fields(tail, range(0, 28, 7), 127).to(torch.uint8))
    index = eights[:, :, :4].flatten(1)
    return _signed_blocks("iq2_xxs", index, masks, tail >> 28, half_at(data, 0))


def _even_tail(b: Blocks, join: Join) -> Tensor:
    """Four groups of seven signs and a scale in a word, uint8 `[B, 32]`."""
    signs = _join_words(_sign_masks(b.q, join) & 127, range(0, 28, 7))
    return _word_bytes(signs | (_stored_scales(b).long() << 28), 4)


def _to_iq2_xxs(b: Blocks, join: Join) -> Tensor:
    index = _magnitude_indices("iq2_xxs", b).to(torch.uint8).view(-1, 8, 4)
    tail = _even_tail(b, join).view(-1, 8, 4)
    return torch.cat([half_bytes(b.d), torch.cat([index, tail], 2).flatten(1)], 1)


def _from_iq2_xs(data: Tensor) -> Blocks:
    words = _words(data[:, 2:66], 2)
    masks = _even_masks((words >> 9).to(torch.uint8))
    return _signed_blocks("iq2_xs", words & 511, masks, _nibbles(data[:, 66:]), half_at(data, 0))


def _to_iq2_xs(b: Blocks, join: Join) -> Tensor:
    signs = (_sign_masks(b.q, join) & 127).long()
    words = _word_bytes(_magnitude_indices("iq2_xs", b) | (signs << 9), 2)
    return torch.cat([half_bytes(b.d), words, _join_nibbles(_stored_scales(b), join)], 1)


def _from_iq2_s(data: Tensor) -> Blocks:
    high = split_fields(data[:, 66:74].unsqueeze(-1), 2).flatten(1).long()
    index = data[:, 2:34].long() | (high << 8)
    scales = _nibbles(data[:, 74:])
    return _signed_blocks("iq2_s", index, data[:, 34:66], scales, half_at(data, 0))


def _to_iq2_s(b: Blocks, join: Join) -> Tensor:
    index = _magnitude_indices("iq2_s", b)
    low, high = (index & 255).to(torch.uint8), (index >> 8).to(torch.uint8)
    packed = join(high.view(-1, 8, 4, 1), 2).flatten(1)
    scales = _join_nibbles(_stored_scales(b), join)
    return torch.cat([half_bytes(b.d), low, _sign_masks(b.q, join), packed, scales], 1)


def _from_iq3_xxs(data: Tensor) -> Blocks:
    tail = _words(data[:, 66:], 4)
    masks = _even_masks(_fields(tail, range(0, 28, 7), 127).to(torch.uint8))
    return _signed_blocks("iq3_xxs", data[:, 2:66], masks, tail >> 28, half_at(data, 0))


def _to_iq3_xxs(b: Blocks, join: Join) -> Tensor:
    index = _magnitude_indices("iq3_xxs", b).to(torch.uint8)
    return torch.cat([half_bytes(b.d), index, _even_tail(b, join)], 1)


def _from_iq3_s(data: Tensor) -> Blocks:
    index = data[:, 2:66].long() | (_bits_of(data[:, 66:74]).long() << 8)
    scales = _nibbles(data[:, 106:])
    return _signed_blocks("iq3_s", index, data[:, 74:106], scales, half_at(data, 0))


def _to_iq3_s(b: Blocks, join: Join) -> Tensor:
    index = _magnitude_indices("iq3_s", b)
    low, high = (index & 255).to(torch.uint8), (index >> 8).to(torch.uint8)
    packed = join(high.view(-1, 8, 8, 1), 1).flatten(1)
    scales = _join_nibbles(_stored_scales(b), join)
    return torch.cat([half_bytes(b.d), low, packed, _sign_masks(b.q, join), scales], 1)


def _shifted_blocks(name: str, index: Tensor, down: Tensor, scales: Tensor, d: Tensor) -> Blocks:
    """`down`: int64 `[B, 256 / shift]`, 1 where 1/8 is taken away instead of added."""
    shape = SHAPES[name]
    assert shape.codebook is not None
    shift = (1 - 2 * down).to(torch.int8).repeat_interleave(shape.codebook.shift, 1)
    return Blocks(8 * _gather(shape.codebook, index) + shift, d, _scales(scales), unit=shape.unit)


def _shifted_indices(name: str, b: Blocks) -> tuple[Tensor, Tensor]:
    """Indices and `down` of `_shifted_blocks`."""
    codebook = SHAPES[name].codebook
    assert codebook is not None
    down = (b.q & 7) == 7
    grid = (b.q + 2 * down.to(torch.int8) - 1) >> 3
    return find(codebook, grid), down[:, :: codebook.shift].long()


def _from_iq1_s(data: Tensor) -> Blocks:
    words = _words(data[:, 34:], 2)
    index = data[:, 2:34].long() | (_fields(words, range(0, 12, 3), 7) << 8)
    scales, down = (words >> 12) & 7, words >> 15
    return _shifted_blocks("iq1_s", index, down, scales, half_at(data, 0))


def _to_iq1_s(b: Blocks, join: Join) -> Tensor:
    index, down = _shifted_indices("iq1_s", b)
    words = _join_words(index >> 8, range(0, 12, 3)) | (_stored_scales(b).long() << 12)
    tail = _word_bytes(words | (down << 15), 2)
    return torch.cat([half_bytes(b.d), (index & 255).to(torch.uint8), tail], 1)


def _from_iq1_m(data: Tensor) -> Blocks:
    high = _nibbles(data[:, 32:48]).long()
    index = data[:, :32].long() | ((high & 7) << 8)
    words = _words(data[:, 48:], 2)  # the top nibbles of four words make up d
    d = _join_words(words >> 12, range(0, 16, 4))
    scales = _fields(words, range(0, 12, 3), 7)
    return _shifted_blocks(
        "iq1_m", index, high >> 3, scales, half_at(_word_bytes(d[:, None], 2), 0)
    )


def _to_iq1_m(b: Blocks, join: Join) -> Tensor:
    index, down = _shifted_indices("iq1_m", b)
    high = _join_nibbles(((index >> 8) | (down << 3)).to(torch.uint8), join)
    d = _fields(_words(half_bytes(b.d), 2), range(0, 16, 4), 15)
    words = _join_words(_stored_scales(b), range(0, 12, 3)) | (d << 12)
    return torch.cat([(index & 255).to(torch.uint8), high, _word_bytes(words, 2)], 1)


def _levels(codes: Tensor) -> Tensor:
    """int8 values of IQ4 from their codes."""
    return torch.tensor(_IQ4_LEVELS, dtype=torch.int8, device=codes.device)[codes.long()]


def _level_codes(q: Tensor) -> Tensor:
    levels = torch.tensor(_IQ4_LEVELS, dtype=torch.int8, device=q.device)
    return torch.searchsorted(levels, q.contiguous()).to(torch.uint8)


def _from_iq4_nl(data: Tensor) -> Blocks:
    return Blocks(_levels(split_fields(data[:, 2:], 4).flatten(1)), half_at(data, 0))


def _to_iq4_nl(b: Blocks, join: Join) -> Tensor:
    return torch.cat([half_bytes(b.d), join(_level_codes(b.q).view(-1, 2, 16), 4)], 1)


def _from_iq4_xs(data: Tensor) -> Blocks:
    high = split_fields(data[:, 2:4].unsqueeze(-1), 2).flatten(1)
    sc = signed(_nibbles(data[:, 4:8]) | (high << 4), 32)
    codes = split_fields(data[:, 8:].reshape(-1, 8, 16), 4).flatten(1)
    return Blocks(_levels(codes), half_at(data, 0), sc)


def _to_iq4_xs(b: Blocks, join: Join) -> Tensor:
    assert b.sc is not None
    sc = unsigned(b.sc, 32)
    high = join((sc >> 4).view(-1, 2, 4, 1), 2).flatten(1)
    low = _join_nibbles(sc & 15, join)
    codes = join(_level_codes(b.q).view(-1, 8, 2, 16), 4).flatten(1)
    return torch.cat([half_bytes(b.d), high, low, codes], 1)


FORMATS: dict[str, Format] = {
    "iq1_s": (_from_iq1_s, _to_iq1_s),
    "iq1_m": (_from_iq1_m, _to_iq1_m),
    "iq2_xxs": (_from_iq2_xxs, _to_iq2_xxs),
    "iq2_xs": (_from_iq2_xs, _to_iq2_xs),
    "iq2_s": (_from_iq2_s, _to_iq2_s),
    "iq3_xxs": (_from_iq3_xxs, _to_iq3_xxs),
    "iq3_s": (_from_iq3_s, _to_iq3_s),
    "iq4_nl": (_from_iq4_nl, _to_iq4_nl),
    "iq4_xs": (_from_iq4_xs, _to_iq4_xs),
}
