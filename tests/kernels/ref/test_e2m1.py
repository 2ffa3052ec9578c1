"""E2M1 against exact rational arithmetic, ml_dtypes and compressed-tensors."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import torch
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8

from v4quant_kernels.ref import e2m1

MAGNITUDES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def nearest_code(x: float) -> int:
    """The definition: least distance, then the even code; the sign bit is that of x."""
    distance = [abs(Fraction(abs(x)) - m) for m in MAGNITUDES]
    best = min(range(8), key=lambda c: (distance[c], c % 2))
    return best + (8 if np.signbit(x) else 0)


def interesting_values() -> torch.Tensor:
    """Every value and midpoint with its two float32 neighbours, the ends of float32, both signs."""
    grid = np.array([float(m) for m in MAGNITUDES], np.float32)
    points = np.concatenate([grid, (grid[1:] + grid[:-1]) / 2, [np.float32(7), np.float32(1e30)]])
    points = points.astype(np.float32)
    inf = np.float32(np.inf)
    around = [points, np.nextafter(points, inf), np.nextafter(points, -inf)]
    ends = np.array([2**-149, 2**-126, 2**-127, np.finfo(np.float32).max], np.float32)
    positive = np.abs(np.concatenate([*around, ends]))
    return torch.from_numpy(np.concatenate([positive, -positive]))


def test_values_are_those_of_the_definition() -> None:
    expected = [float(m) for m in MAGNITUDES] + [-float(m) for m in MAGNITUDES]
    assert e2m1.VALUES.tolist() == expected
    assert torch.signbit(e2m1.VALUES).tolist() == [False] * 8 + [True] * 8
    theirs = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert same_bits(e2m1.VALUES, torch.from_numpy(theirs))


def test_encode_edges() -> None:
    x = interesting_values()
    assert e2m1.encode(x).tolist() == [nearest_code(v) for v in x.tolist()]


def test_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    expected = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    assert torch.equal(e2m1.round_values(ties), expected)
    assert torch.equal(e2m1.round_values(-ties), -expected)


def test_encode_every_bfloat16_like_ml_dtypes() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]  # infinities saturate, in ml_dtypes too
    theirs = x.float().numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert torch.equal(e2m1.encode(x), torch.from_numpy(theirs))
    assert torch.equal(e2m1.encode(x.float()), torch.from_numpy(theirs))


def test_encode_random_and_strided(generator: torch.Generator) -> None:
    x = (torch.randn(3, 5, 64, generator=generator) * 3).transpose(0, 2)
    theirs = x.contiguous().numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    before = x.clone()
    assert torch.equal(e2m1.encode(x), torch.from_numpy(theirs))
    assert torch.equal(x, before), "the input must not change"


def test_encode_matrices_larger_than_a_slice(generator: torch.Generator) -> None:
    x = torch.randn(700, 801, generator=generator).T * 3
    theirs = x.numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    assert torch.equal(e2m1.encode(x), torch.from_numpy(theirs))


def test_round_values_is_decode_of_encode(generator: torch.Generator) -> None:
    x = torch.cat([interesting_values(), torch.randn(4096, generator=generator) * 3])
    assert same_bits(e2m1.round_values(x), e2m1.decode(e2m1.encode(x)))
    assert e2m1.round_values(torch.tensor([torch.nan])).isnan().all()


def test_pack_puts_the_even_column_low() -> None:
    codes = torch.tensor([[1, 2, 15, 8]], dtype=torch.uint8)
    assert e2m1.pack(codes).tolist() == [[0x21, 0x8F]]


def test_pack_and_unpack_are_inverse() -> None:
    packed = ALL_BYTES.view(4, 8, 8)
    assert e2m1.unpack(packed).shape == (4, 8, 16)
    assert torch.equal(e2m1.pack(e2m1.unpack(packed)), packed)


def test_decode_packed_every_byte() -> None:
    packed = ALL_BYTES.view(2, 4, 32)
    assert same_bits(e2m1.decode_packed(packed), e2m1.decode(e2m1.unpack(packed)))
    strided = packed.transpose(0, 1)
    expected = e2m1.decode(e2m1.unpack(strided.contiguous()))
    assert same_bits(e2m1.decode_packed(strided), expected)
    theirs = unpack_fp4_from_uint8(packed.view(16, 16), 16, 32, torch.float32)
    assert same_bits(e2m1.decode_packed(packed.view(16, 16)), theirs)


def test_packing_agrees_with_compressed_tensors() -> None:
    values = e2m1.decode_packed(ALL_BYTES.view(16, 16))
    assert torch.equal(pack_fp4_to_uint8(values), ALL_BYTES.view(16, 16))
    assert torch.equal(e2m1.pack(e2m1.encode(values)), ALL_BYTES.view(16, 16))
