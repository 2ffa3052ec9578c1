"""Tiled FP8 against a loop over tiles in numpy."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant_kernels import codec, native
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block
from v4quant_kernels.scheme import SCHEMES

FP8 = SCHEMES["fp8"]
SHAPES = [(128, 128), (256, 384), (1, 1), (127, 129), (130, 64), (300, 256), (256, 300)]
SCALE_DTYPES = [torch.float8_e8m0fnu, torch.float32]


def random_matrix(shape: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    rows = torch.exp2(torch.randint(-20, 20, (shape[0], 1), generator=generator).float())
    return torch.randn(shape, generator=generator) * rows


def by_definition(x: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(exponents per tile, dequantized float64 matrix), a tile at a time."""
    tiles = tuple(-(-n // b) for n, b in zip(x.shape, block, strict=True))
    exponents = np.zeros(tiles, np.int64)
    values = np.empty(x.shape, np.float64)
    for r, c in np.ndindex(*tiles):
        place = np.s_[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
        amax = Fraction(float(np.abs(x[place]).max()))
        k = -127
        while amax and Fraction(2) ** k * 448 < amax:
            k += 1
        exponents[r, c] = k if amax else 0
        scale = np.exp2(float(exponents[r, c]))
        elements = (x[place] / scale).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
        values[place] = elements.astype(np.float64) * scale
    return exponents, values


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_against_a_loop(
    shape: tuple[int, int], scale_dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = random_matrix(shape, generator)
    q = fp8_block.quantize(x, FP8, scale_dtype=scale_dtype)
    exponents, values = by_definition(x.numpy(), (128, 128))
    assert q.scale is not None and q.scale.dtype == scale_dtype
    assert torch.equal(fp8_block.decode_scale(q.scale), e8m0.power_of_two(torch.tensor(exponents)))
    assert q.codes.shape == shape and q.codes.dtype == torch.float8_e4m3fn
    assert q.codes.is_contiguous()
    assert torch.equal(fp8_block.dequantize(q).double(), torch.from_numpy(values))


def test_tile_comes_from_the_scheme(generator: torch.Generator) -> None:
    scheme = replace(FP8, block=(32, 32))
    x = random_matrix((70, 96), generator)
    q = fp8_block.quantize(x, scheme)
    exponents, values = by_definition(x.numpy(), (32, 32))
    assert q.scale is not None and q.scale.shape == (3, 3)
    assert e8m0.exponents(q.scale).tolist() == exponents.tolist()
    assert torch.equal(fp8_block.dequantize(q).double(), torch.from_numpy(values))


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES)
def test_quantizing_again_keeps_every_value(
    scale_dtype: torch.dtype, generator: torch.Generator
) -> None:
    x = random_matrix((200, 150), generator)
    once = fp8_block.dequantize(fp8_block.quantize(x, FP8, scale_dtype=scale_dtype))
    again = fp8_block.dequantize(fp8_block.quantize(once, FP8, scale_dtype=scale_dtype))
    assert torch.equal(again, once)
    assert torch.equal(once.bfloat16().float(), once), "exact in bfloat16"


def test_zero_tiles_have_scale_one() -> None:
    x = torch.zeros(129, 256)
    x[128, 128:] = -0.0
    for dtype in SCALE_DTYPES:
        q = fp8_block.quantize(x, FP8, scale_dtype=dtype)
        assert q.scale is not None
        assert q.scale.float().tolist() == [[1.0, 1.0]] * 2
        back = fp8_block.dequantize(q)
        assert torch.equal(back, x) and torch.equal(torch.signbit(back), torch.signbit(x))


def test_ends_of_float32() -> None:
    largest = torch.finfo(torch.float32).max
    for dtype in SCALE_DTYPES:
        x = torch.tensor([[largest, -largest, 2.0**-149]])
        back = fp8_block.dequantize(fp8_block.quantize(x, FP8, scale_dtype=dtype))
        assert back.isfinite().all() and back[0, 0] >= 0.75 * largest
        tiny = torch.tensor([[2.0**-118, 2.0**-127, 2.0**-149]])
        back = fp8_block.dequantize(fp8_block.quantize(tiny, FP8, scale_dtype=dtype))
        assert back.tolist() == [[2.0**-118, 2.0**-127, 0.0]]


def test_scale_turns_exactly_after_448() -> None:
    above = float(np.nextafter(np.float32(448), np.float32(np.inf)))
    for amax, exponent in ((448.0, 0), (above, 1), (224.0, -1), (225.0, 0)):
        q = fp8_block.quantize(torch.tensor([[0.5, -amax]]), FP8)
        assert q.scale is not None and e8m0.exponents(q.scale).item() == exponent


def test_dequantize_any_float32_scale(generator: torch.Generator) -> None:
    x = random_matrix((130, 130), generator)
    q = fp8_block.quantize(x, FP8)
    scale = torch.rand(2, 2, generator=generator) + 0.5
    rows = scale.repeat_interleave(128, 0)[:130]
    expected = q.codes.float() * rows.repeat_interleave(128, 1)[:, :130]
    assert torch.equal(fp8_block.dequantize(replace(q, scale=scale)), expected)


def test_given_scale_is_used_or_refused() -> None:
    x = torch.tensor([[3.0, 1e9]])
    q = fp8_block.quantize(x, FP8, scale=torch.tensor([[2.0]]))
    assert fp8_block.dequantize(q).tolist() == [[3.0, 896.0]]
    for bad in (0.0, torch.nan, torch.inf):
        with pytest.raises(NonFiniteWeight):
            fp8_block.quantize(x, FP8, scale=torch.tensor([[bad]]))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_widening_keeps_every_value(
    shape: tuple[int, int],
    compiled: bool,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every code under every scale that `widens_exactly` allows, in float64."""
    if not compiled:
        monkeypatch.setattr(native, "available", lambda: False)
    for block in ((128, 128), (32, 32)):
        scheme = replace(FP8, block=block)
        tiles = tuple(-(-n // b) for n, b in zip(shape, block, strict=True))
        exponent = torch.randint(-110, 111, tiles, generator=generator)
        codes = torch.randint(256, shape, generator=generator).byte()
        codes[(codes & 0x7F) == 0x7F] = 0x80  # NaN is refused before
        elements = codes.view(torch.float8_e4m3fn)
        q = QTensor(scheme, shape, elements, e8m0.encode_exponent(exponent))
        assert q.scale is not None and fp8_block.widens_exactly(q.scale)
        each = exponent.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        wanted = elements.double() * 2.0 ** each[: shape[0], : shape[1]].double()
        got = codec.widen(q)
        assert torch.equal(got.double(), wanted)
        assert torch.equal(got.signbit(), wanted.signbit())


def test_which_scales_widen_exactly() -> None:
    for exponents, exact in (
        ([0, 110], True),
        ([-110, 3], True),
        ([0, 111], False),
        ([-111], False),
    ):
        assert fp8_block.widens_exactly(e8m0.encode_exponent(torch.tensor([exponents]))) == exact
    assert not fp8_block.widens_exactly(torch.tensor([[255]], dtype=torch.uint8))
    assert not fp8_block.widens_exactly(torch.ones(1, 1)), "float32 scales may be no powers of two"


def test_only_matrices() -> None:
    with pytest.raises(UnsupportedScheme, match="matrices"):
        fp8_block.quantize(torch.ones(2, 2, 2), FP8)
