"""Words to numbers inside a kernel; the word codes are those of `v4quant_kernels.words`.

For bfloat16 a word becomes one, two or four *pairs*: int32 values holding two bfloat16 side by
side, so that every instruction works on two weights. E2M1 and E4M3 patterns shifted into place are
bfloat16 numbers too small by a power of two (2^126 and 2^120); the multiplication that repairs this
also applies the group's scale, both being one bfloat16 `multiplier`. Integers are put under the
exponent of 128, and 136 (or 128, 256) is subtracted. All of it is exact.

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
def pattern_pairs(words, CODE: tl.constexpr):
    """int32 `[R, K/2]` pairs of `words` `[R, W]`: bits in place, nothing multiplied."""
    if CODE == "t16":
        M: tl.constexpr = -0x7E3F7E40  # 0x81C081C0
        rest = (words << 1) & -0x7FFF8000  # 0x80008000
        rest |= (words >> 3) & 0x01800180
        rest |= (words >> 7) & 0x00400040
        even = tl.join(words & M, (words << 6) & M)
        pairs = tl.join(even, tl.join((words << 3) & M, rest))
    elif CODE == "e16":
        low = ((words << 8) & -0x7FFF8000) | ((words << 4) & 0x07F007F0)
        high = (words & -0x7FFF8000) | ((words >> 4) & 0x07F007F0)
        pairs = tl.join(low, high)
    else:
        tl.static_assert(CODE == "w16")
        pairs = words
    return _flatten(pairs)


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
def scaled_floats(words, multiplier, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    """COMPUTE `[R, K]`: E2M1 or E4M3 words times `multiplier`, bfloat16 bits `[R, G]` per group."""
    pairs = pattern_pairs(words, CODE)
    ROWS: tl.constexpr = pairs.shape[0]
    PAIRS: tl.constexpr = pairs.shape[1]
    GROUPS: tl.constexpr = multiplier.shape[1]
    grouped = tl.reshape(pairs, (ROWS, GROUPS, PAIRS // GROUPS))
    if tl.float32 == COMPUTE:
        factor = (multiplier << 16).to(tl.float32, bitcast=True)[:, :, None]
        low = (grouped << 16).to(tl.float32, bitcast=True) * factor
        high = (grouped & -0x10000).to(tl.float32, bitcast=True) * factor
        values = _flatten(tl.join(low, high))
    else:
        twice = (multiplier | (multiplier << 16))[:, :, None]
        # -0 leaves products as they are, signs of zero included.
        products = fma2(grouped, tl.broadcast_to(twice, grouped.shape), -0x7FFF8000)
        values = _halves(tl.reshape(products, (ROWS, PAIRS)), COMPUTE)
    return values


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
    """bfloat16 `values`, behind an instruction that does nothing but is no pure function.

    Where Triton sees `tl.join` among the ancestors of a tensor core's operand it takes the operand
    for half as wide as it is, and on machines before sm_90 does without the instruction that loads
    matrices: one time and a half as many instructions in all. It looks no further back than this.
    """
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], dtype=tl.bfloat16, is_pure=False, pack=2
    )


@triton.jit
def plain_floats(words, COMPUTE: tl.constexpr):
    """COMPUTE `[R, K]` of bfloat16 words."""
    return _halves(pattern_pairs(words, "w16"), COMPUTE)


@triton.jit
def spread_integers(words, pair, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    """COMPUTE `[R, 2W]`: pair `pair` of offset (i4) or two's complement (i8) integers."""
    if CODE == "i4":
        pairs = ((words >> (4 * pair)) & 0x000F000F) | 0x43004300
        offset = tl.zeros_like(pairs) - 0x3CF73CF8  # 0xC308C308, -136 twice
    else:
        tl.static_assert(CODE == "i8")
        pairs = words >> (8 * pair)
        # Seven bits under 128; minus 128, or minus 256 where the sign bit is set.
        offset = (pairs & 0x00800080) | -0x3CFF3D00  # 0xC300C300
        pairs = (pairs & 0x007F007F) | 0x43004300
    if tl.float32 == COMPUTE:
        values = _halves(pairs, COMPUTE) + _halves(offset, COMPUTE)
    else:
        values = _halves(fma2(pairs, 0x3F803F80, offset), COMPUTE)
    return values


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
