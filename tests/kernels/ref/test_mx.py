"""MXFP4 and MXFP8 against exact rational arithmetic, ml_dtypes, GGUF and compressed-tensors."""

from __future__ import annotations

from fractions import Fraction

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, e4m3, mx
from v4quant_kernels.scheme import SCHEMES

SCHEME_NAMES = ["mxfp4", "mxfp8"]
MAXIMUM = {"mxfp4": 6, "mxfp8": 448}
THEIR_DTYPE = {"mxfp4": ml_dtypes.float4_e2m1fn, "mxfp8": ml_dtypes.float8_e4m3fn}


def e8m0(bytes_: list[list[int]]) -> torch.Tensor:
    return torch.tensor(bytes_, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def scale_bytes(q: QTensor) -> torch.Tensor:
    assert q.scale is not None and q.scale.dtype == torch.float8_e8m0fnu
    return q.scale.view(torch.uint8)


def rule(group: np.ndarray, maximum: int) -> int:
    """The byte of the smallest power of two under which nothing saturates."""
    amax = max(Fraction(abs(float(v))) for v in group)
    if amax == 0:
        return 127
    k = -127
    while Fraction(2) ** k * maximum < amax:
        k += 1
    return k + 127


def random_matrix(generator: torch.Generator, rows: int = 24, columns: int = 96) -> torch.Tensor:
    """Groups of very different magnitude, including many below float32's normal range."""
    exponent = torch.randint(-140, 100, (rows, columns // 32, 1), generator=generator)
    x = torch.randn(rows, columns // 32, 32, generator=generator, dtype=torch.float64)
    return (x * torch.exp2(exponent.double())).float().view(rows, columns)


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_against_numpy(name: str, generator: torch.Generator) -> None:
    x = random_matrix(generator)
    q = mx.quantize(x, SCHEMES[name])
    groups = x.numpy().reshape(24, 3, 32)
    expected = [[rule(g, MAXIMUM[name]) for g in row] for row in groups]
    assert scale_bytes(q).tolist() == expected
    scale = np.exp2(np.array(expected, np.float64) - 127)[..., None]
    elements = (groups / scale).astype(np.float32).astype(THEIR_DTYPE[name])
    decoded = elements.astype(np.float64) * scale
    assert torch.equal(mx.dequantize(q).double(), torch.from_numpy(decoded).view(24, 96))


@pytest.mark.parametrize("name", SCHEME_NAMES)
@pytest.mark.parametrize("exponent", [-127, -126, -1, 0, 1, 100, 118])
def test_scale_turns_exactly_after_the_maximum(name: str, exponent: int) -> None:
    edge = np.float32(MAXIMUM[name] * 2.0**exponent)
    x = torch.zeros(3, 32)
    x[0, 5] = -float(edge)
    x[1, 6] = float(np.nextafter(edge, np.float32(np.inf)))
    x[2, 7] = float(np.nextafter(edge, np.float32(0)))
    got = scale_bytes(mx.quantize(x, SCHEMES[name])).flatten().tolist()
    assert got == [rule(row, MAXIMUM[name]) for row in x.numpy()]
    assert got[:2] == [exponent + 127, exponent + 128]


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_zero_groups_and_signs_of_zero(name: str) -> None:
    x = torch.zeros(2, 64)
    x[1] = -0.0
    q = mx.quantize(x, SCHEMES[name])
    assert scale_bytes(q).tolist() == [[127, 127]] * 2
    back = mx.dequantize(q)
    assert torch.equal(back, x) and torch.equal(torch.signbit(back), torch.signbit(x))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_ends_of_float32_stay_finite(name: str) -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.zeros(2, 32)
    x[0, 0], x[0, 1], x[1, 0] = largest, -largest, 2.0**-149
    q = mx.quantize(x, SCHEMES[name])
    back = mx.dequantize(q)
    assert back.isfinite().all()
    assert back[0, 0] >= 0.75 * largest and back[0, 1] == -back[0, 0]
    assert scale_bytes(q)[1].item() == 0 and back[1, 0] == 0


@pytest.mark.parametrize("byte", [0, 1, 126, 127, 128, 252, 254])
def test_mxfp4_dequantizes_every_code_at_every_kind_of_scale(byte: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    q = QTensor(SCHEMES["mxfp4"], (16, 32), codes, e8m0([[byte]] * 16))
    scale = Fraction(2) ** (byte - 127)
    exact = [[Fraction(v) * scale for v in row] for row in e2m1.decode_packed(codes).tolist()]
    limit = Fraction(torch.finfo(torch.float32).max)
    got = mx.dequantize(q).tolist()
    for got_row, exact_row in zip(got, exact, strict=True):
        for value, wanted in zip(got_row, exact_row, strict=True):
            if abs(wanted) <= limit:
                assert Fraction(value) == wanted
            else:
                assert value == (float("inf") if wanted > 0 else -float("inf"))


def test_scale_byte_255_is_nan() -> None:
    codes = torch.full((1, 16), 0x22, dtype=torch.uint8)
    q = QTensor(SCHEMES["mxfp4"], (1, 32), codes, e8m0([[255]]))
    assert mx.dequantize(q).isnan().all()


def test_mxfp4_like_gguf(generator: torch.Generator) -> None:
    """GGUF puts element j low and j + 16 high; values must agree for every scale byte."""
    scale = torch.arange(254, dtype=torch.uint8)[:, None]  # 254: gguf overflows with a warning
    codes = torch.randint(0, 256, (254, 16), generator=generator, dtype=torch.uint8)
    unpacked = e2m1.unpack(codes)
    theirs_packed = unpacked[:, :16] | (unpacked[:, 16:] << 4)
    blocks = torch.cat([scale, theirs_packed], dim=1).numpy()
    with np.errstate(over="ignore"):
        theirs = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.MXFP4)
    q = QTensor(SCHEMES["mxfp4"], (254, 32), codes, scale.view(torch.float8_e8m0fnu))
    assert torch.equal(mx.dequantize(q), torch.from_numpy(theirs))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_quantizing_again_keeps_every_value(name: str, generator: torch.Generator) -> None:
    scheme = SCHEMES[name]
    once = mx.dequantize(mx.quantize(random_matrix(generator), scheme))
    assert torch.equal(mx.dequantize(mx.quantize(once, scheme)), once)


def test_any_mxfp4_file_survives_requantization(generator: torch.Generator) -> None:
    """Also groups no quantizer of ours would write (a maximum of 3 or less)."""
    codes = torch.randint(0, 256, (256, 16), generator=generator, dtype=torch.uint8)
    codes[1::2] &= 0b10111011  # magnitudes up to 1.5 only
    bytes_ = torch.randint(2, 252, (256, 1), generator=generator, dtype=torch.uint8)
    q = QTensor(SCHEMES["mxfp4"], (256, 32), codes, bytes_.view(torch.float8_e8m0fnu))
    values = mx.dequantize(q)
    assert torch.equal(mx.dequantize(mx.quantize(values, SCHEMES["mxfp4"])), values)
    assert torch.equal(values.bfloat16().float(), values), "exact in bfloat16"


def test_error_is_at_most_half_a_step(generator: torch.Generator) -> None:
    x = torch.randn(64, 256, generator=generator)
    for name, half_step in (("mxfp4", 1), ("mxfp8", 16)):
        q = mx.quantize(x, SCHEMES[name])
        amax = x.view(64, 8, 32).abs().amax(-1, keepdim=True)
        error = (mx.dequantize(q) - x).view(64, 8, 32).abs()
        # The largest step of the format, at a scale less than twice amax / maximum.
        assert (error <= half_step * 2 * amax / MAXIMUM[name]).all()


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_given_scale_is_used_and_saturates(name: str) -> None:
    x = torch.tensor([[1.0, 1e9, -1e9, 3.0] * 8])
    q = mx.quantize(x, SCHEMES[name], scale=e8m0([[128]]))
    top = 2.0 * MAXIMUM[name]
    assert scale_bytes(q).tolist() == [[128]]
    assert mx.dequantize(q)[0, :4].tolist() == [1.0, top, -top, 3.0]
    with pytest.raises(NonFiniteWeight):
        mx.quantize(x, SCHEMES[name], scale=e8m0([[255]]))


def test_shapes_and_dtypes(generator: torch.Generator) -> None:
    x = torch.randn(6, 64, generator=generator).bfloat16()
    q4, q8 = (mx.quantize(x, SCHEMES[name]) for name in SCHEME_NAMES)
    assert q4.codes.shape == (6, 32) and q4.codes.dtype == torch.uint8
    assert q8.codes.shape == (6, 64) and q8.codes.dtype == torch.float8_e4m3fn
    assert torch.equal(mx.dequantize(q8), mx.dequantize(mx.quantize(x.float(), SCHEMES["mxfp8"])))
    assert e4m3.decode(q8.codes).abs().max() <= 448
    transposed = mx.quantize(torch.randn(64, 6, generator=generator).T, SCHEMES["mxfp4"])
    assert transposed.shape == (6, 64)
    with pytest.raises(UnsupportedScheme, match="32 columns"):
        mx.quantize(x[:, :48], SCHEMES["mxfp4"])
