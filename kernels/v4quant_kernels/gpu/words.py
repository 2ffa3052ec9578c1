"""Words to numbers inside a kernel; the word codes are those of `v4quant_kernels.words`.

For bfloat16 a word becomes one, two or four *pairs*: int32 values holding two bfloat16 side by
side, so that every instruction works on two weights. A pair of a block of 16 words is 32
neighbouring columns, which are decoded and multiplied before the next pair is looked at. E2M1 and
E4M3 patterns shifted into place are bfloat16 numbers too small by a power of two (2^126 and 2^120);
the multiplication that repairs this also applies the group's scale, both being one bfloat16
`multiplier`. Integers with an offset (8 or 128) are left where bfloat16's subnormals have their
bits, and their last exponent: there a pattern n is n * 2^-133, and 2^127 times that, minus 2^-6 of
the offset, is 2^-6 of the integer in one instruction. All of it is exact.

For FP8 an E2M1 word becomes two words of four E4M3 numbers by a byte table of eight magnitudes.
The group's scale is part of the table: 2^r adds `r` to every exponent field, which works for
-5 <= r <= 6, where nothing is subnormal.

Two steps are one machine instruction that Triton cannot express, `fma.rn.bf16x2` (sm_80 and later)
and `prmt.b32`. The interpreter has no assembly: there, COMPUTE is float32 and the same values come
from plain arithmetic.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fma2(a, b, c):
    """a * b + c for both bfloat16 halves of int32 operands, rounded once; subnormals are kept."""
    return tl.inline_asm_elementwise(
        "fma.rn.bf16x2 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def select_bytes(low, high, selectors, COMPUTE: tl.constexpr):
    """Four bytes of the table (low, high), chosen by the low four nibbles (0..7) of `selectors`."""
    if tl.float32 == COMPUTE:
        chosen = tl.zeros_like(selectors)
        for place in tl.static_range(4):
            selector = (selectors >> (4 * place)) & 7
            table = tl.where(selector < 4, low, high)
            chosen |= ((table >> (8 * (selector & 3))) & 0xFF) << (8 * place)
    else:
        chosen = tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selectors],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return chosen


@triton.jit
def _flatten(parts):
    """`[R, W, ...]` to `[R, all]`."""
    ROWS: tl.constexpr = parts.shape[0]
    return tl.reshape(parts, (ROWS, parts.numel // ROWS))


@triton.jit
def _halves(pairs, COMPUTE: tl.constexpr):
    """COMPUTE `[R, K]` numbers of int32 `[R, K/2]` bfloat16 pairs."""
    if tl.float32 == COMPUTE:
        low = (pairs << 16).to(tl.float32, bitcast=True)
        high = (pairs & -0x10000).to(tl.float32, bitcast=True)
    else:
        low = (pairs & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return _flatten(tl.join(low, high))


@triton.jit
def index_vectors(words, scales, COMPUTE: tl.constexpr):
    """COMPUTE `[R, 128]` of FP4 vectors: natural nibbles int32 `[R, 16]`, four scale bytes `[R]`.

    Columns come out in another order (pairs of columns c and c + 4 of each eight), the same for
    queries and keys, which a dot product does not notice. E8M0 scales of any size: first the
    pattern becomes the E2M1 number, then the scale multiplies it.
    """
    ROWS: tl.constexpr = words.shape[0]
    low = ((words << 12) & -0x7FFF8000) | ((words << 6) & 0x01C001C0)
    second = ((words << 8) & -0x7FFF8000) | ((words << 2) & 0x01C001C0)
    third = ((words << 4) & -0x7FFF8000) | ((words >> 2) & 0x01C001C0)
    last = (words & -0x7FFF8000) | ((words >> 6) & 0x01C001C0)
    pairs = _flatten(tl.join(tl.join(low, third), tl.join(second, last)))
    grouped = tl.reshape(pairs, (ROWS, 4, 16))
    byte = (scales[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255
    bits = tl.where(byte == 0, 0x40, tl.where(byte == 255, 0x7FC0, byte << 7))
    if tl.float32 == COMPUTE:
        factor = (bits << 16).to(tl.float32, bitcast=True)[:, :, None]
        first = (grouped << 16).to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2^126
        other = (grouped & -0x10000).to(tl.float32, bitcast=True) * 8.507059173023462e37
        values = _flatten(tl.join(first * factor, other * factor))
    else:
        numbers = fma2(grouped, 0x7E807E80, -0x7FFF8000)
        twice = tl.broadcast_to((bits | (bits << 16))[:, :, None], grouped.shape)
        products = fma2(numbers, twice, -0x7FFF8000)
        values = whole_operands(_halves(tl.reshape(products, (ROWS, 64)), COMPUTE))
    return values


@triton.jit
def whole_operands(values):
    """bfloat16 `values`, behind an instruction that does nothing but is not a pure function.

    Where Triton sees `tl.join` among the ancestors of a tensor core's operand it takes the operand
    for half as wide as it is, and on machines before sm_90 does without the instruction that loads
    matrices: one time and a half as many instructions in all. It looks no further back than this.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def spread_integers(words, pair: tl.constexpr, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    """COMPUTE `[R, 2W]`: 2^-6 times pair `pair` of integers, which are stored with an offset."""
    # Both nibbles of a byte are subnormal; only bytes need be moved.
    UPPER: tl.constexpr = CODE == "i4" and pair % 2 == 1
    to_sixtyfourths: tl.constexpr = 0x7D007D00 if UPPER else 0x7F007F00  # 2^123 or 2^127
    # 0xBE00BE00, -8 / 64, or 0xC000C000, -128 / 64
    offset: tl.constexpr = -0x41FF4200 if CODE == "i4" else -0x3FFF4000
    if CODE == "i4":
        moved = words >> (8 * (pair // 2))
        pairs = moved & 0x00F000F0 if UPPER else moved & 0x000F000F
    elif pair == 0:
        tl.static_assert(CODE == "i8")
        pairs = words & 0x00FF00FF
    else:
        none = tl.zeros_like(words)
        pairs = select_bytes(words, none, none + 0x4341, COMPUTE)  # bytes 1 and 3
    if tl.float32 == COMPUTE:
        factor = _halves(tl.zeros_like(pairs) + to_sixtyfourths, COMPUTE)
        values = _halves(pairs, COMPUTE) * factor + _halves(tl.zeros_like(pairs) + offset, COMPUTE)
    else:
        values = _halves(fma2(pairs, to_sixtyfourths, offset), COMPUTE)
    return values


@triton.jit
def spread_patterns(words, pair: tl.constexpr, CODE: tl.constexpr):
    """int32 pair `pair` of E2M1 or E4M3 words, bits in place, nothing multiplied."""
    if CODE == "t16":
        if pair == 0:
            pairs = (words & -0x7E7F7E80) | ((words >> 8) & 0x00400040)  # 0x81808180
        elif pair < 3:
            pairs = (words << (4 * pair - 2)) & -0x7E3F7E40  # 0x81C081C0
        else:
            # A rotation is one instruction, as a shift is.
            turned = words.to(tl.uint32, bitcast=True) >> 20
            turned = (words << 12) | turned.to(tl.int32, bitcast=True)
            pairs = turned & -0x7E3F7E40
    else:
        tl.static_assert(CODE == "e16")
        if pair == 0:
            pairs = words & -0x780F7810  # 0x87F087F0
        else:
            pairs = (words << 4) & -0x7F0F7F10  # 0x80F080F0
            pairs |= (words >> 4) & 0x07000700
    return pairs


@triton.jit
def spread_floats(words, multiplier, pair: tl.constexpr, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    """COMPUTE `[R, 2W]`: pair `pair` of E2M1 or E4M3 words times `multiplier`.

    multiplier: int32 `[R, G]`, twice the bits of a bfloat16, for G groups of neighbouring columns.
    """
    pairs = spread_patterns(words, pair, CODE)
    if multiplier.shape[1] == 1:
        twice = tl.broadcast_to(multiplier, pairs.shape)
    else:
        EACH: tl.constexpr = words.shape[1] // multiplier.shape[1]
        shape: tl.constexpr = (words.shape[0], multiplier.shape[1], EACH)
        twice = tl.reshape(tl.broadcast_to(multiplier[:, :, None], shape), pairs.shape)
    if tl.float32 == COMPUTE:
        factor = (twice << 16).to(tl.float32, bitcast=True)
        low = (pairs << 16).to(tl.float32, bitcast=True) * factor
        high = (pairs & -0x10000).to(tl.float32, bitcast=True) * factor
        values = _flatten(tl.join(low, high))
    else:
        # -0 leaves products as they are, signs of zero included.
        values = _halves(fma2(pairs, twice, -0x7FFF8000), COMPUTE)
    return values


@triton.jit
def plain_floats(words, COMPUTE: tl.constexpr):
    """COMPUTE `[R, 2W]` of bfloat16 words."""
    return _halves(words, COMPUTE)


@triton.jit
def as_fp8(fours):
    """E4M3 `[R, K]` of int32 `[R, K/4]`, first column in the lowest byte."""
    even = tl.join(fours.to(tl.int8), (fours >> 16).to(tl.int8))
    odd = tl.join((fours >> 8).to(tl.int8), (fours >> 24).to(tl.int8))
    return _flatten(tl.join(even, odd)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def fp8_table(exponent):
    """Both halves of the byte table: E4M3 of the eight E2M1 magnitudes times 2^exponent."""
    low = 0x3C383000 + exponent * 0x08080800  # 0, 0.5, 1, 1.5
    high = 0x4C484440 + exponent * 0x08080808  # 2, 3, 4, 6
    return low, high


@triton.jit
def fp8_numbers(words, exponent, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    """E4M3 `[R, K]` of `words`: b8 as they are, t8 times 2^exponent, int32 `[R, G]` in -5..6."""
    if CODE == "b8":
        fours = words
    else:
        ROWS: tl.constexpr = words.shape[0]
        GROUPS: tl.constexpr = exponent.shape[1]
        grouped = tl.reshape(words, (ROWS, GROUPS, words.shape[1] // GROUPS))
        low, high = fp8_table(exponent[:, :, None])
        low, high = tl.broadcast_to(low, grouped.shape), tl.broadcast_to(high, grouped.shape)
        selectors = grouped & 0x77777777
        first = select_bytes(low, high, selectors, COMPUTE) | (grouped & -0x7F7F7F80)
        second = select_bytes(low, high, selectors >> 16, COMPUTE)
        second |= (grouped << 4) & -0x7F7F7F80  # 0x80808080
        fours = _flatten(tl.join(first, second))
    return as_fp8(fours)


@triton.jit
def _signed_bytes(low, high, selectors, COMPUTE: tl.constexpr):
    """As `select_bytes`, with the top bit of each of the four nibbles as the sign of its byte."""
    chosen = select_bytes(low, high, selectors & 0x7777, COMPUTE)
    if tl.float32 == COMPUTE:
        for place in tl.static_range(4):
            chosen |= ((selectors >> (4 * place + 3)) & 1) << (8 * place + 7)
    else:
        # The table's signs are set here, and a nibble's top bit asks for the sign alone, repeated:
        # 0xFF. Otherwise bit 0 is 0, because E2M1 leaves the lower mantissa bits of E4M3 empty.
        filled = select_bytes(low, high, selectors, COMPUTE)
        chosen = (chosen & 0x7F7F7F7F) | ((filled << 7) & -0x7F7F7F80)
    return chosen


@triton.jit
def fp8_fours(words, factors, base, COMPUTE: tl.constexpr):
    """int32 `[R, K/4]` of four E4M3 each: natural nibbles times 2^(factors - base).

    factors: int32 `[R, G]`. base: int32 scalar or `[R, G]`. The difference is in -5..6.
    """
    ROWS: tl.constexpr = words.shape[0]
    GROUPS: tl.constexpr = factors.shape[1]
    grouped = tl.reshape(words, (ROWS, GROUPS, words.shape[1] // GROUPS))
    low, high = fp8_table(0 - base)
    if tl.float32 != COMPUTE:
        low, high = low | -0x7F7F7F80, high | -0x7F7F7F80
    low += factors * 0x08080800
    high += factors * 0x08080808
    low = tl.broadcast_to(low[:, :, None], grouped.shape)
    high = tl.broadcast_to(high[:, :, None], grouped.shape)
    first = _signed_bytes(low, high, grouped, COMPUTE)
    second = _signed_bytes(low, high, grouped >> 16, COMPUTE)
    return _flatten(tl.join(first, second))


@triton.jit
def byte_of(words, place, COMPUTE: tl.constexpr):
    """Byte `place` (0..3) of each word, int32."""
    if tl.float32 == COMPUTE:
        byte = (words >> (8 * place)) & 255
    else:
        none = tl.zeros_like(words)
        byte = select_bytes(words, none, place + 0x4440, COMPUTE)
    return byte
