"""E8M0 against exact rational arithmetic and ml_dtypes."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.ref import e8m0

ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def ceil_log2(x: Fraction) -> int:
    """Least k with 2^k >= x, by integer arithmetic."""
    k = x.numerator.bit_length() - x.denominator.bit_length() - 1
    while Fraction(2) ** k < x:
        k += 1
    return k


def test_decode_every_byte() -> None:
    decoded = e8m0.decode(ALL_BYTES)
    assert [Fraction(v) for v in decoded[:255].tolist()] == [
        Fraction(2) ** (byte - 127) for byte in range(255)
    ]
    assert decoded[255].isnan()
    assert decoded[0].item() == 2.0**-127 > 0
    theirs = ALL_BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(decoded[:255], torch.from_numpy(theirs)[:255])


def test_decode_takes_either_dtype_and_any_shape() -> None:
    grid = ALL_BYTES[:250].view(5, 50).T
    assert torch.equal(e8m0.decode(grid), e8m0.decode(grid.view(torch.float8_e8m0fnu)))
    assert e8m0.decode(grid).shape == (50, 5)


def test_exponents() -> None:
    exponents = e8m0.exponents(ALL_BYTES.view(torch.float8_e8m0fnu))
    assert exponents.dtype == torch.int32
    assert exponents.tolist() == list(range(-127, 129))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_encode_exponent_inverts_exponents(dtype: torch.dtype) -> None:
    k = torch.arange(-127, 128, dtype=dtype)
    scale = e8m0.encode_exponent(k)
    assert scale.dtype == torch.float8_e8m0fnu
    assert torch.equal(scale.view(torch.uint8), ALL_BYTES[:255])
    assert torch.equal(e8m0.power_of_two(k), e8m0.decode(scale))


@pytest.mark.parametrize("k", [-128, 128, 1000])
def test_encode_exponent_refuses_what_does_not_fit(k: int) -> None:
    with pytest.raises(UnsupportedScheme, match="2\\^-127 to 2\\^127"):
        e8m0.encode_exponent(torch.tensor([0, k]))


def float32_corners() -> torch.Tensor:
    """1, 1.5 and 1.75 times every power of two in float32, with both neighbours."""
    powers = np.ldexp(np.float32(1), np.arange(-149, 128)).astype(np.float32)
    points = np.concatenate([powers, powers * np.float32(1.5), powers[:-1] * np.float32(1.75)])
    inf = np.float32(np.inf)
    near = np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])
    near = near[np.isfinite(near) & (near > 0)]
    return torch.from_numpy(near.astype(np.float32))


@pytest.mark.parametrize("divisor", [1.0, 6.0, 448.0])
def test_ceil_exponent_corners(divisor: float) -> None:
    x = float32_corners()
    expected = [ceil_log2(Fraction(v) / Fraction(divisor)) for v in x.tolist()]
    got = e8m0.ceil_exponent(x, divisor)
    assert got.dtype == torch.int32
    assert got.tolist() == expected


@pytest.mark.parametrize("divisor", [1.0, 6.0, 448.0])
def test_ceil_exponent_random_bit_patterns(generator: torch.Generator, divisor: float) -> None:
    bits = torch.randint(1, 0x7F800000, (4000,), generator=generator, dtype=torch.int32)
    x = bits.view(torch.float32)
    expected = [ceil_log2(Fraction(v) / Fraction(divisor)) for v in x.tolist()]
    assert e8m0.ceil_exponent(x, divisor).tolist() == expected


def test_ceil_exponent_of_zero_is_below_all_others() -> None:
    for divisor in (1.0, 6.0, 448.0):
        smallest = e8m0.ceil_exponent(torch.tensor([2.0**-149]), divisor)
        assert e8m0.ceil_exponent(torch.tensor([0.0]), divisor) < smallest
