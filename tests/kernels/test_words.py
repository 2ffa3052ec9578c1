"""Word codes: arranging and undoing, and every code decoded in a kernel at every place."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4quant_kernels.reference64 import e2m1_values, e4m3_table
from v4quant_kernels.runtime import _from_ue5m3, _to_ue5m3
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
def scaled_kernel(
    words_ptr,
    scale_ptr,
    out_ptr,
    R: tl.constexpr,
    W: tl.constexpr,
    G: tl.constexpr,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    row = tl.arange(0, R)[:, None]
    stored = tl.load(scale_ptr + row * G + tl.arange(0, G)[None, :])
    bits = gemm.multiplier_bits(stored, SCALE)
    tile = tl.load(words_ptr + row * W + tl.arange(0, W)[None, :])
    values = words.scaled_floats(tile, bits, CODE, COMPUTE)
    K: tl.constexpr = values.shape[1]
    tl.store(out_ptr + row * K + tl.arange(0, K)[None, :], values.to(tl.float32))


@triton.jit
def plain_kernel(words_ptr, out_ptr, W: tl.constexpr, CODE: tl.constexpr, COMPUTE: tl.constexpr):
    if CODE == "w16":
        tile = tl.load(words_ptr + tl.arange(0, W))[None, :]
        values = words.plain_floats(tile, COMPUTE)
        tl.store(out_ptr + tl.arange(0, 2 * W)[None, :], values.to(tl.float32))
    else:
        PAIRS: tl.constexpr = 4 if CODE == "i4" else 2
        block = tl.arange(0, W // 16)[:, None]
        tile = tl.load(words_ptr + block * 16 + tl.arange(0, 16)[None, :])
        for pair in tl.static_range(PAIRS):
            values = words.spread_integers(tile, pair, CODE, COMPUTE)
            column = (block * PAIRS + pair) * 32 + tl.arange(0, 32)[None, :]
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


def scaled(codes: Tensor, scale: Tensor, code: str, form: str) -> Tensor:
    """float32 `[R, K]`: each row's codes times that row's `[R, G]` stored scales."""
    rows, groups = scale.shape
    arranged = to_words(codes, code).expand(rows, -1).contiguous().to(DEVICE)
    out = torch.full((rows, codes.numel()), torch.nan, device=DEVICE)
    scaled_kernel[(1,)](
        arranged, scale.to(DEVICE), out, rows, arranged.shape[1], groups, code, form, compute_type()
    )
    return out.cpu()


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


@pytest.mark.parametrize(("code", "bias", "least"), [("t16", 126, 121), ("e16", 120, 123)])
def test_every_code_times_every_power_of_two(code: str, bias: int, least: int) -> None:
    if code == "t16":
        codes, table = at_every_place(torch.arange(16), code), E2M1
    else:
        numbers = torch.arange(256)[(torch.arange(256) & 127) != 127]
        codes, table = at_every_place(torch.cat((numbers, numbers[:2])), code), e4m3_table()
    codes = codes[: codes.numel() // 128 * 128]
    fields = torch.arange(least, 255) if code == "t16" else torch.tensor([least, 124, 200, 246])
    fields = torch.cat((fields, fields[:1].expand(-len(fields) % 4)))
    for part in fields.view(-1, 4):
        out = scaled(codes, part.to(torch.uint8).unsqueeze(1), code, "field")
        # The pattern is 2^-bias times the element, the multiplier 2^(field - 127).
        expected = table[codes.long()] * torch.exp2(part.double().unsqueeze(1) - 127 - bias)
        assert same_bits(out, expected.float())
        assert torch.equal(out.bfloat16().float(), out)  # what a GPU holds between the steps


def test_every_nvfp4_product() -> None:
    """All 16 x 127 pairs of an element and a scale, times the 2^-8 that `row_scale` takes back."""
    scales = torch.arange(128)
    scales[127] = 0
    codes = at_every_place(torch.arange(16), "t16")
    out = scaled(codes, _to_ue5m3(scales).unsqueeze(1), "t16", "ue5m3")
    expected = E2M1[codes.long()] * e4m3_table()[scales].unsqueeze(1) * 2.0**-8
    assert torch.equal(out, expected.float()) and torch.equal(out.bfloat16().float(), out)
    assert torch.equal(_from_ue5m3(_to_ue5m3(scales)), scales)


@pytest.mark.parametrize(("code", "size"), [("i4", 16), ("i8", 256), ("w16", 65536)])
def test_every_integer_and_bfloat16(code: str, size: int) -> None:
    codes = at_every_place(torch.arange(size), code)
    arranged = to_words(codes, code)
    out = torch.full((codes.numel(),), torch.nan, device=DEVICE)
    plain_kernel[(1,)](arranged.to(DEVICE), out, arranged.numel(), code, compute_type())
    if code == "w16":
        expected = (codes << 16).view(torch.float32)
        number = ~expected.isnan()
        assert same_bits(out.cpu()[number], expected[number]) and out.cpu()[~number].isnan().all()
    else:
        assert torch.equal(out.bfloat16().float(), out)
        expected = codes - 8 if code == "i4" else codes - 256 * (codes >> 7)
        assert torch.equal(out.cpu(), expected.float())


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
