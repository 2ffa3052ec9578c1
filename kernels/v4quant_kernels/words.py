"""Words: weight codes arranged so that a kernel decodes several with one instruction.

A GPU reads weights as 32-bit words and its cheapest instructions treat a word as two bfloat16 (or
four FP8) numbers. Decoding codes in the order a file stores them spends most of its time moving
them to where those numbers have their bits. Here they are put there once, when weights are loaded:
a word holds `8` (or 4, or 2) columns of one row, and a *word code* says at which bits.

| code | holds | for | a kernel takes out |
|---|---|---|---|
| t16 | 8 E2M1 | bfloat16 pairs | `x<<2 & M`, `x<<6 & M`, `rotate(x, 12) & M`, and the rest |
| t8 | 8 E2M1 | FP8 by a table of bytes | selectors `x & 0x77777777`, signs `x` and `x<<4` |
| i4 | 8 integers + 8 | bfloat16 pairs | `x & 0x000F000F`, `x & 0x00F000F0`, and these of `x>>8` |
| i8 | 4 integers + 128 | bfloat16 pairs | `x & 0x00FF00FF`, and its other bytes |
| e16 | 4 E4M3 | bfloat16 pairs | `x & 0x87F087F0`, and one pair in two pieces |
| b8 | 4 E4M3 | FP8 as it is | the word |
| n4 | 8 E2M1 | block-scaled tensor cores | the word (the bytes of a checkpoint) |
| w16 | 2 bfloat16 | bfloat16 as it is | the word |

M is 0x81C081C0: the sign and the `eem` bits of two bfloat16. Column 2j of a word is the low half of
pair j, column 2j+1 the high half.

Codes for bfloat16 are multiplied 32 columns at a time. So their columns are *spread* over blocks of
16 words: pair j of the words of a block holds the block's columns 32j to 32j+31, two a word.
Shifting and masking all 16 words then gives 32 neighbouring columns in place, the operand of one
short product, and nothing has to be taken apart. In codes for FP8 a word's columns are neighbours.

A code is a table of pieces `(column, mask, shift)`: the bits `mask` of that column's code move left
by `shift`. Every bit of a word is used once, so arranging can be undone, and a new code is a new
table here and its branch in `gpu/words.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

Piece = tuple[int, int, int]


def _t16() -> list[Piece]:
    """The sign of each number at bit 15 of a half, the others at 8 to 6, moved as the table says.

    Left by 2 or 6 two pairs, rotated left by 12 another; what is left of each half, bits 15, 14, 8
    and 7, is the first pair but for its lowest bit.
    """
    pieces = []
    for half in (0, 16):
        column = half // 16
        pieces += [(column, 8, half + 12), (column, 6, half + 6), (column, 1, half + 14)]
        for pair, left in ((1, 2), (2, 6)):
            pieces += [(2 * pair + column, 8, half + 12 - left)]
            pieces += [(2 * pair + column, 7, half + 6 - left)]
        # Rotated by 12 the sign stays in its half, and the rest comes from the other one.
        pieces += [(6 + column, 8, half), (6 + column, 7, 26 - half)]
    return pieces


def _t8() -> list[Piece]:
    signs = [(c, 8, 8 * c + 4 if c < 4 else 8 * (c - 4)) for c in range(8)]
    return [(c, 7, 4 * c) for c in range(8)] + signs


def _e16() -> list[Piece]:
    pieces = []
    for half in (0, 16):
        pieces += [(half // 16, 128, half + 8), (half // 16, 127, half + 4)]
        # What is left of each half: bits 14 to 11 and 3 to 0, four places from where they belong.
        second = 2 + half // 16
        pieces += [(second, 128, half + 4), (second, 15, half), (second, 112, half + 8)]
    return pieces


def _by_pairs(bits: int) -> list[Piece]:
    """Column 2j at place j of the low half, column 2j+1 at place j of the high half."""
    return [(c, (1 << bits) - 1, c // 2 * bits + 16 * (c % 2)) for c in range(32 // bits)]


PIECES: dict[str, list[Piece]] = {
    "t16": _t16(),
    "t8": _t8(),
    "i4": _by_pairs(4),
    "i8": _by_pairs(8),
    "e16": _e16(),
    "n4": [(c, 15, 4 * c) for c in range(8)],
    "b8": [(c, 255, 8 * c) for c in range(4)],
    "w16": [(c, 65535, 16 * c) for c in range(2)],
}
"""For each word code: (column, mask, shift left; negative is right)."""


def columns_per_word(code: str) -> int:
    """How many columns one word holds."""
    return 1 + max(column for column, _, _ in PIECES[code])


STEP = 128
"""Columns that kernels multiply at a step: as many activations as share a scale."""

SPREAD = ("t16", "e16", "i4", "i8", "w16")
"""Codes whose pairs hold neighbouring columns of a block of 16 words."""


def columns_per_block(code: str) -> int:
    """What the columns of a row are a multiple of: those of a word, or of 16 if they are spread."""
    return columns_per_word(code) * (16 if code in SPREAD else 1)


def _spread(codes: Tensor, code: str) -> Tensor:
    """Columns of blocks `[pair, word, half]` in the order of words, `[word, pair, half]`."""
    if code not in SPREAD:
        return codes
    blocks = codes.reshape(*codes.shape[:-1], -1, columns_per_word(code) // 2, 16, 2)
    return blocks.transpose(-3, -2).flatten(-4)


def _gather(codes: Tensor, code: str) -> Tensor:
    """The inverse of `_spread`."""
    if code not in SPREAD:
        return codes
    blocks = codes.reshape(*codes.shape[:-1], -1, 16, columns_per_word(code) // 2, 2)
    return blocks.transpose(-3, -2).flatten(-4)


def to_words(codes: Tensor, code: str) -> Tensor:
    """int32 `[..., K/c]` words of codes `[..., K]`; K is a multiple of `columns_per_block`."""
    by_word = _spread(codes, code).view(*codes.shape[:-1], -1, columns_per_word(code))
    words = torch.zeros(by_word.shape[:-1], dtype=torch.int32, device=codes.device)
    for column, mask, shift in PIECES[code]:
        bits = by_word[..., column].int() & mask
        words |= bits << shift if shift >= 0 else bits >> -shift
    return words


def from_words(words: Tensor, code: str) -> Tensor:
    """int32 `[..., K]` codes; the inverse of `to_words`."""
    columns = columns_per_word(code)
    codes = torch.zeros(*words.shape, columns, dtype=torch.int32, device=words.device)
    for column, mask, shift in PIECES[code]:
        codes[..., column] |= (words >> shift if shift >= 0 else words << -shift) & mask
    return _gather(codes.flatten(-2), code)
