"""Fake quantization and the Hadamard rotation against numpy by definition."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant_kernels.ref import e8m0
from v4quant_kernels.twins import activation

KINDS = {
    "e4m3": (activation.fake_quant_e4m3, 448, np.float32(1e-4), ml_dtypes.float8_e4m3fn),
    "e2m1": (
        activation.fake_quant_e2m1,
        6,
        np.float32(6 * 2.0**-126),
        ml_dtypes.float4_e2m1fn,
    ),
}
EACH = pytest.mark.parametrize("kind", KINDS)


def by_definition(x: np.ndarray, kind: str, block: int) -> np.ndarray:
    """float64 result of one row, block by block; the scale search is by exact comparison."""
    _, maximum, floor, dtype = KINDS[kind]
    out = np.empty(x.shape, np.float64)
    for start in range(0, x.size, block):
        part = x[start : start + block]
        amax = max(np.float32(np.abs(part).max()), floor)
        ratio = Fraction(float(np.float32(amax) * (np.float32(1) / np.float32(maximum))))
        k = ratio.numerator.bit_length() - ratio.denominator.bit_length() - 1
        while Fraction(2) ** k < ratio:
            k += 1
        scale = np.exp2(np.float64(k))
        scaled = np.clip(part.astype(np.float64) / scale, -maximum, maximum).astype(np.float32)
        out[start : start + block] = scaled.astype(dtype).astype(np.float64) * scale
    return out


def rows(generator: torch.Generator, columns: int, low: int, high: int) -> torch.Tensor:
    exponent = torch.randint(low, high, (12, 1), generator=generator).double()
    return (torch.randn(12, columns, generator=generator) * torch.exp2(exponent)).float()


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("columns", "block"), [(256, 128), (192, 64), (96, 32), (100, 32), (7, 64)]
)
def test_by_definition(
    kind: str, dtype: torch.dtype, columns: int, block: int, generator: torch.Generator
) -> None:
    x = rows(generator, columns, -40, 40).to(dtype)
    before = x.clone()
    got = KINDS[kind][0](x, block)
    assert got.dtype == dtype and got.shape == x.shape
    assert torch.equal(x, before), "the input must not change"
    expected = np.stack([by_definition(row, kind, block) for row in x.float().numpy()])
    assert torch.equal(got.double(), torch.from_numpy(expected))


@EACH
def test_scale_turns_exactly_after_the_maximum(kind: str, generator: torch.Generator) -> None:
    """Maxima within a few units in the last place of maximum * 2^k."""
    maximum = np.float32(KINDS[kind][1])
    for k in range(-6, 7):
        edge = maximum * np.exp2(np.float32(k))
        bits = edge.view(np.int32) + np.arange(-4, 5, dtype=np.int32)
        x = rows(generator, 32, -10, -9)[:9].clone()
        x[:, 3] = torch.from_numpy(bits.view(np.float32))
        got = KINDS[kind][0](x, 32)
        expected = np.stack([by_definition(row, kind, 32) for row in x.numpy()])
        assert torch.equal(got.double(), torch.from_numpy(expected))


@EACH
def test_rounded_reciprocal_and_exact_quotient_choose_the_same_scale(kind: str) -> None:
    """Every mantissa of one binade; the others differ only in the exponent."""
    maximum = float(KINDS[kind][1])
    amax = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
    inverse = torch.tensor(1 / maximum, dtype=torch.float32)
    exact = e8m0.ceil_exponent(amax, maximum)
    assert torch.equal(e8m0.ceil_exponent(amax * inverse), exact)


@EACH
def test_small_and_zero_blocks(kind: str) -> None:
    fake_quant = KINDS[kind][0]
    zero = torch.zeros(2, 64)
    zero[1] = -0.0
    back = fake_quant(zero, 32)
    assert torch.equal(back, zero) and torch.equal(torch.signbit(back), torch.signbit(zero))
    x = torch.full((1, 32), 1e-5)
    x[0, 1] = 2.0**-149
    expected = by_definition(x[0].numpy(), kind, 32)
    assert torch.equal(fake_quant(x, 32).double()[0], torch.from_numpy(expected))


def test_e4m3_floor() -> None:
    """Below 1e-4 the scale stays at 2^-22, so values under 2^-32 vanish."""
    x = torch.tensor([[2.0**-31, 2.0**-32, 2.0**-33, -(2.0**-20)]])
    assert activation.fake_quant_e4m3(x, 4).tolist() == [[2.0**-31, 0.0, 0.0, -(2.0**-20)]]


@EACH
def test_blocks_do_not_see_each_other_and_leading_shape_is_free(
    kind: str, generator: torch.Generator
) -> None:
    fake_quant = KINDS[kind][0]
    x = torch.randn(2, 3, 4, 128, generator=generator)
    got = fake_quant(x, 32)
    assert torch.equal(got[1, 2, 3, 64:96], fake_quant(x[1, 2, 3, 64:96], 32))
    strided = x.transpose(0, 2)
    assert torch.equal(fake_quant(strided, 32), got.transpose(0, 2))


@EACH
def test_twice_is_once(kind: str, generator: torch.Generator) -> None:
    fake_quant = KINDS[kind][0]
    once = fake_quant(rows(generator, 96, -8, 8).bfloat16(), 32)
    assert torch.equal(fake_quant(once, 32), once)


@EACH
def test_poison_stays_visible(kind: str) -> None:
    x = torch.ones(2, 32)
    x[0, 5], x[1, 6] = torch.nan, -torch.inf
    got = KINDS[kind][0](x, 32)
    assert got[0, 5].isnan() and got[1, 6] == -torch.inf


def sylvester(n: int) -> np.ndarray:
    signs = [[(-1) ** (i & j).bit_count() for j in range(n)] for i in range(n)]
    return np.array(signs, np.float64)


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128, 256])
def test_hadamard(n: int, generator: torch.Generator) -> None:
    x = torch.randn(2, 5, n, generator=generator)
    exact = torch.from_numpy(x.double().numpy() @ sylvester(n) / np.sqrt(n))
    got = activation.hadamard(x)
    assert got.shape == x.shape and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=2e-6 * n**0.5)
    torch.testing.assert_close(activation.hadamard(got), x, rtol=0, atol=1e-5)


def test_hadamard_of_a_unit_vector_is_a_row_in_sylvester_order() -> None:
    n = 64
    rows_ = activation.hadamard(torch.eye(n)) * n**0.5
    assert torch.equal(rows_.double(), torch.from_numpy(sylvester(n)))


def test_hadamard_rounds_to_bfloat16_once(generator: torch.Generator) -> None:
    x = torch.randn(3, 128, generator=generator).bfloat16()
    assert torch.equal(activation.hadamard(x), activation.hadamard(x.float()).bfloat16())


@pytest.mark.parametrize("columns", [16, 64, 80, 512])
def test_e2m1_under_e4m3_scales_by_definition(columns: int, generator: torch.Generator) -> None:
    """V4.1's compressed entries: E4M3 scales round to nearest, so the largest may saturate."""
    x = rows(generator, columns, -14, 9)
    got = activation.fake_quant_e2m1_e4m3(x)
    groups = x.numpy().reshape(x.shape[0], -1, 16)
    amax = np.maximum(np.abs(groups).max(-1, keepdims=True), np.float32(6 * 2.0**-9))
    scale = (amax / np.float32(6)).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    codes = np.clip(groups / scale, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    expected = codes.astype(np.float32) * scale
    assert np.array_equal(got.numpy(), expected.reshape(x.shape))
    assert bool((np.abs(groups) > np.abs(expected)).any()), "something saturated or rounded down"


def test_e2m1_under_e4m3_scales_has_a_floor() -> None:
    """The smallest scale is E4M3's smallest number."""
    x = torch.zeros(1, 16)
    x[0, 0] = 2.0**-9
    assert activation.fake_quant_e2m1_e4m3(x)[0, 0] == 2.0**-9
    x[0, 0] = 2.0**-11
    assert activation.fake_quant_e2m1_e4m3(x)[0, 0] == 0
