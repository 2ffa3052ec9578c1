"""E4M3 against exact rational arithmetic and ml_dtypes."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction

import ml_dtypes
import numpy as np
import torch

from v4quant_kernels.ref import e4m3

ALL_CODES = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)


def by_definition(code: int) -> Fraction:
    """The magnitude of a code 0..126."""
    exponent, mantissa = code >> 3, code & 7
    if exponent == 0:
        return Fraction(mantissa, 8) / 2**6
    return (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)


MAGNITUDES = [by_definition(code) for code in range(127)]


def nearest_code(x: float) -> int:
    magnitude = min(Fraction(abs(x)), MAGNITUDES[-1])
    above = bisect_left(MAGNITUDES, magnitude)
    candidates = {max(above - 1, 0), above}
    best = min(candidates, key=lambda c: (abs(MAGNITUDES[c] - magnitude), c % 2))
    return best + (128 if np.signbit(x) else 0)


def test_decode_every_code() -> None:
    decoded = e4m3.decode(ALL_CODES)
    assert [Fraction(v) for v in decoded[:127].tolist()] == MAGNITUDES
    assert decoded[127].isnan() and decoded[255].isnan()
    assert torch.equal(decoded[128:255], -decoded[:127])
    assert bool(torch.signbit(decoded[128]))
    assert MAGNITUDES[1] == Fraction(e4m3.SMALLEST) and MAGNITUDES[-1] == Fraction(e4m3.MAX)


def test_decode_keeps_any_shape_and_stride() -> None:
    codes = ALL_CODES.view(4, 8, 8).transpose(0, 2)
    expected = codes.float()
    assert torch.equal(e4m3.decode(codes).nan_to_num(999), expected.nan_to_num(999))


def test_encode_every_value_and_midpoint() -> None:
    grid = np.array([float(m) for m in MAGNITUDES], np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2]).astype(np.float32)
    inf = np.float32(np.inf)
    near = np.concatenate([points, np.nextafter(points, inf), np.nextafter(points, -inf)])
    x = np.concatenate([np.abs(near), -np.abs(near)])
    codes = e4m3.encode(torch.from_numpy(x)).view(torch.uint8).tolist()
    assert codes == [nearest_code(float(v)) for v in x]


def test_encode_every_bfloat16_like_ml_dtypes() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()].float().clamp(-448, 448)  # ml_dtypes does not saturate
    theirs = x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert torch.equal(e4m3.encode(x).view(torch.uint8), torch.from_numpy(theirs))


def test_encode_random(generator: torch.Generator) -> None:
    exponents = torch.randint(-14, 9, (8192,), generator=generator)
    x = torch.randn(8192, generator=generator) * torch.exp2(exponents.float())
    x = x.clamp(-448, 448)
    theirs = x.numpy().astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    assert torch.equal(e4m3.encode(x).view(torch.uint8), torch.from_numpy(theirs))


def test_saturates_and_never_makes_nan() -> None:
    largest = torch.finfo(torch.float32).max
    x = torch.tensor([448.0, 456.0, 464.0, 464.1, 480.0, 1e6, largest, torch.inf])
    assert torch.equal(e4m3.decode(e4m3.encode(x)), torch.full((8,), 448.0))
    assert torch.equal(e4m3.decode(e4m3.encode(-x)), torch.full((8,), -448.0))
    assert e4m3.encode(torch.tensor([torch.nan])).float().isnan().all()


def test_keeps_the_sign_of_zero() -> None:
    codes = e4m3.encode(torch.tensor([0.0, -0.0, 2.0**-20, -(2.0**-20)]))
    assert codes.view(torch.uint8).tolist() == [0, 128, 0, 128]
