"""Word codes: arranging and undoing, and every code decoded in a kernel at every place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4quant_kernels.reference64 import e2m1_values, e4m3_table
from v4quant_kernels.scale_forms import from_pieces, from_ue5m3, in_pieces, to_ue5m3
from v4quant_kernels.words import (
    PIECES,
    columns_per_block,
    columns_per_word,
    from_words,
    to_words,
)

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from v4quant_kernels.gpu import gemm, words  # noqa: E402
from v4quant_kernels.gpu.interpreter import compute_type, interpreting  # noqa: E402

DEVICE = "cpu" if interpreting() else "cuda"
E2M1 = e2m1_values(torch.arange(16, dtype=torch.uint8).unsqueeze(1))[:, 0]


@triton.jit
def spread_kernel(
    words_ptr,
    scale_ptr,
    out_ptr,
    R: tl.constexpr,
    B: tl.constexpr,
    G: tl.constexpr,
    CODE: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """B blocks of words decoded with R rows' scales, G (below 5) of them in every 32 columns."""
    PAIRS: tl.constexpr = COLUMNS // 2
    line = tl.arange(0, R * B)[:, None]
    tile = tl.load(words_ptr + line % B * 16 + tl.arange(0, 16)[None, :])
    for pair in tl.static_range(PAIRS):
        if SCALE == "none":
            if CODE == "w16":
                values = words.plain_floats(tile, COMPUTE)
            else:
                values = words.spread_integers(tile, pair, CODE, COMPUTE)
        else:
            piece = tl.load(scale_ptr + line // B)
            twice = gemm.multiplier(piece, tl.arange(0, G)[None, :], SCALE)
            values = words.spread_floats(tile, twice, pair, CODE, COMPUTE)
        column = (line * PAIRS + pair) * 32 + tl.arange(0, 32)[None, :]
        tl.store(out_ptr + column, values.to(tl.float32))


@triton.jit
def fp8_kernel(
    words_ptr,
    exponent_ptr,
    out_ptr,
    R: tl.constexpr,
    W: tl.constexpr,
    CODE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.arange(0, R)[:, None]
    exponent = tl.load(exponent_ptr + row)
    tile = tl.load(words_ptr + row * W + tl.arange(0, W)[None, :])
    values = words.fp8_numbers(tile, exponent, CODE, COMPUTE)
    K: tl.constexpr = values.shape[1]
    tl.store(out_ptr + row * K + tl.arange(0, K)[None, :], values.to(tl.uint8, bitcast=True))


@triton.jit
def natural_kernel(words_ptr, scales_ptr, out_ptr, W: tl.constexpr, COMPUTE: tl.constexpr):
    tile = tl.load(words_ptr + tl.arange(0, W))[None, :]
    place = tl.arange(0, 4)[None, :]
    bytes_ = words.byte_of(tl.load(scales_ptr + tl.arange(0, 1))[:, None], place, COMPUTE)
    fours = words.fp8_fours(tile, bytes_, 127, COMPUTE)
    tl.store(out_ptr + tl.arange(0, 2 * W)[None, :], fours)


def same_bits(actual: Tensor, expected: Tensor) -> bool:
    return bool(((actual == expected) & (actual.signbit() == expected.signbit())).all())


def at_every_place(codes: Tensor, code: str) -> Tensor:
    """int32 `[codes * places]`: every code stands at every column of a word."""
    places = columns_per_word(code)
    turned = [codes.roll(i) for i in range(places)]
    return torch.stack(turned, dim=1).flatten().int()


def decoded(codes: Tensor, scale: Tensor, code: str, form: str) -> Tensor:
    """float32 `[R, K]`: the codes times each row's stored scales, uint8 `[R, groups of a part]`."""
    rows, groups = scale.shape
    pieces = torch.zeros(1 << (rows - 1).bit_length(), 4, dtype=torch.uint8)
    pieces[:rows, :groups] = scale
    out = torch.full((len(pieces), codes.numel()), torch.nan, device=DEVICE)
    columns = columns_per_word(code)
    spread_kernel[(1,)](
        to_words(codes, code).to(DEVICE), pieces.view(torch.int32).to(DEVICE), out, len(pieces),
        codes.numel() // columns // 16, groups, code, columns, form, compute_type(),
    )  # fmt: skip
    return out[:rows].cpu()


def whole_blocks(codes: Tensor, code: str) -> Tensor:
    """Every code at every place of a word, repeated up to a power of two of blocks."""
    places = columns_per_word(code)
    turned = torch.stack([codes.roll(i) for i in range(places)], dim=1)  # [codes, places]
    count = 16
    while count < len(turned):
        count *= 2
    turned = turned[torch.arange(count) % len(turned)]
    # Column 2j + half of word w of a block of 16 is column 32j + 2w + half of the block.
    blocks = turned.view(-1, 16, places // 2, 2).transpose(1, 2)
    return blocks.flatten().int()


@pytest.mark.parametrize("code", PIECES)
def test_arranging_can_be_undone_and_wastes_no_bit(code: str, generator: torch.Generator) -> None:
    columns, block = columns_per_word(code), columns_per_block(code)
    codes = torch.randint(1 << 32 // columns, (3, 5, block * 7), generator=generator).int()
    arranged = to_words(codes, code)
    assert arranged.shape == (3, 5, 7 * block // columns)
    assert torch.equal(from_words(arranged, code), codes)
    bits = [mask << shift if shift >= 0 else mask >> -shift for _, mask, shift in PIECES[code]]
    assert sum(b.bit_count() for b in bits) == 32 and sum(bits) == 2**32 - 1


def test_four_bit_words_of_checkpoints_are_their_bytes(generator: torch.Generator) -> None:
    packed = torch.randint(256, (4, 32), generator=generator, dtype=torch.uint8)
    codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)
    assert torch.equal(to_words(codes, "n4").view(torch.uint8), packed)


@pytest.mark.parametrize(("group", "width"), [(16, 1), (32, 1), (128, 1), (32, 2), (128, 2)])
def test_scales_in_pieces(group: int, width: int, generator: torch.Generator) -> None:
    """Whole pieces; a piece holds what parts of 32 columns in turn multiply by."""
    dtype = torch.uint8 if width == 1 else torch.bfloat16
    for groups in (1, 7, 8):
        scale = torch.randint(1, 120, (3, groups), generator=generator).to(dtype)
        pieces = in_pieces(scale, group)
        filled = -(-groups // 8) * 8 if group == 16 else -(-groups * width // 4) * 4 // width
        assert pieces.shape == (3, filled)
        assert torch.equal(from_pieces(pieces, group, groups), scale)
    if group == 16:
        assert torch.equal(pieces[:, :4], scale[:, ::2])
        assert torch.equal(pieces[:, 4:], scale[:, 1::2])


@pytest.mark.parametrize(("code", "bias", "least"), [("t16", 126, 121), ("e16", 120, 123)])
def test_every_code_times_every_power_of_two(code: str, bias: int, least: int) -> None:
    if code == "t16":
        codes, table = whole_blocks(torch.arange(16), code), E2M1
    else:
        numbers = torch.arange(256)[(torch.arange(256) & 127) != 127]
        codes, table = whole_blocks(numbers, code), e4m3_table()
    fields = torch.arange(least, 255) if code == "t16" else torch.tensor([least, 124, 200, 246])
    out = decoded(codes, fields.to(torch.uint8).unsqueeze(1), code, "field")
    # The pattern is 2^-bias times the element, the multiplier 2^(field - 127).
    expected = table[codes.long()] * torch.exp2(fields.double().unsqueeze(1) - 127 - bias)
    assert same_bits(out, expected.float())
    assert torch.equal(out.bfloat16().float(), out)  # what a GPU holds between the steps


def test_every_nvfp4_product() -> None:
    """All 16 x 127 pairs of an element and a scale, times the 2^-8 that `row_scale` takes back."""
    scales = torch.stack((torch.arange(127), torch.arange(127).flip(0)), dim=1)
    codes = whole_blocks(torch.arange(16), "t16")
    out = decoded(codes, to_ue5m3(scales), "t16", "ue5m3")
    scale = e4m3_table()[scales].repeat_interleave(16, 1).repeat(1, codes.numel() // 32)
    expected = E2M1[codes.long()] * scale * 2.0**-8
    assert torch.equal(out, expected.float()) and torch.equal(out.bfloat16().float(), out)
    assert torch.equal(from_ue5m3(to_ue5m3(scales)), scales)


@pytest.mark.parametrize(("code", "size"), [("i4", 16), ("i8", 256), ("w16", 65536)])
def test_every_integer_and_bfloat16(code: str, size: int) -> None:
    codes = whole_blocks(torch.arange(size), code)
    out = decoded(codes, torch.zeros(1, 1, dtype=torch.uint8), code, "none")[0]
    if code == "w16":
        expected = (codes << 16).view(torch.float32)
        number = ~expected.isnan()
        assert same_bits(out[number], expected[number]) and out[~number].isnan().all()
    else:
        assert torch.equal(out.bfloat16().float(), out)
        expected = codes - (8 if code == "i4" else 128)
        assert torch.equal(out, expected / 64)


def test_every_e2m1_times_a_power_of_two_as_e4m3() -> None:
    exponents = torch.arange(-5, 7).repeat(2)[:16]
    codes = at_every_place(torch.arange(16), "t8")
    arranged = to_words(codes, "t8").expand(16, -1).contiguous()
    out = torch.zeros(16, codes.numel(), dtype=torch.uint8, device=DEVICE)
    fp8_kernel[(1,)](
        arranged.to(DEVICE), exponents.int().to(DEVICE), out, 16, arranged.shape[1], "t8",
        compute_type(),
    )  # fmt: skip
    expected = E2M1[codes.long()] * torch.exp2(exponents.double()).unsqueeze(1)
    assert same_bits(e4m3_table()[out.cpu().long()], expected)


def test_natural_nibbles_times_scales_as_e4m3() -> None:
    """Every code at every place of packed bytes, with every scale byte at every place."""
    codes = at_every_place(torch.arange(16), "n4").repeat(4)
    packed = to_words(codes, "n4").to(DEVICE)
    for first in range(122, 134):
        scales = torch.tensor([122 + (first + i) % 12 for i in range(4)], dtype=torch.uint8)
        out = torch.zeros(2 * packed.numel(), dtype=torch.int32, device=DEVICE)
        natural_kernel[(1,)](
            packed, scales.view(torch.int32).to(DEVICE), out, packed.numel(), compute_type()
        )
        scale = torch.exp2(scales.double() - 127).repeat_interleave(codes.numel() // 4)
        found = e4m3_table()[out.cpu().view(torch.uint8).long()]
        assert same_bits(found, E2M1[codes.long()] * scale)


def test_fp8_words_are_the_codes() -> None:
    codes = torch.arange(256).int()
    arranged = to_words(codes, "b8")[None]
    out = torch.zeros(1, 256, dtype=torch.uint8, device=DEVICE)
    zero = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    fp8_kernel[(1,)](arranged.to(DEVICE), zero, out, 1, 64, "b8", compute_type())
    assert torch.equal(out.cpu()[0].int(), codes)
