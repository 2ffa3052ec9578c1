"""Grids are found again from values alone, byte for byte wherever the values leave no choice."""

from __future__ import annotations

import pytest
import torch

from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block, mx
from v4quant_kernels.ref.grids import find_fp8_tiles, find_mxfp4
from v4quant_kernels.scheme import SCHEMES


def release_like(rows: int, columns: int, rng: torch.Generator) -> torch.Tensor:
    """Weights of several magnitudes, as they were before the release rounded them."""
    spread = torch.exp2(torch.randint(-12, 3, (rows, 1), generator=rng).float())
    return torch.randn(rows, columns, generator=rng) * spread


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mxfp4_is_found_with_its_own_bytes(dtype: torch.dtype, generator: torch.Generator) -> None:
    q = mx.quantize(release_like(128, 256, generator), SCHEMES["mxfp4"])
    found = find_mxfp4(mx.dequantize(q).to(dtype))
    assert found is not None and q.scale is not None and found.scale is not None
    # A group with neither 1/2 nor 3/2 lies on the grid of the next coarser scale as well.
    nibbles = torch.stack([q.codes & 7, q.codes >> 4 & 7], -1).view(128, 8, 32)
    fine = torch.isin(nibbles, torch.tensor([1, 3])).any(-1)
    assert fine.double().mean() > 0.99
    groups = found.codes.view(128, 8, 16), q.codes.view(128, 8, 16)
    assert torch.equal(groups[0][fine], groups[1][fine])
    scales = found.scale.view(torch.uint8), q.scale.view(torch.uint8)
    assert torch.equal(scales[0][fine], scales[1][fine])
    assert torch.equal(mx.dequantize(found), mx.dequantize(q))


def test_any_mxfp4_is_found_as_numbers(generator: torch.Generator) -> None:
    """Random codes under random scales, which no encoder would have chosen; zeros and -0 too."""
    codes = torch.randint(256, (64, 64), generator=generator, dtype=torch.uint8)
    codes[:4] &= 0x99  # magnitudes 0 and 1/2 only
    codes[4] = 0x88  # -0 everywhere
    exponents = torch.randint(-100, 100, (64, 4), generator=generator)
    q = QTensor(SCHEMES["mxfp4"], (64, 128), codes, e8m0.encode_exponent(exponents.int()))
    values = mx.dequantize(q)
    found = find_mxfp4(values)
    assert found is not None
    got = mx.dequantize(found)
    assert torch.equal(got, values) and torch.equal(torch.signbit(got), torch.signbit(values))


def test_one_value_off_the_grid_is_enough(generator: torch.Generator) -> None:
    values = mx.dequantize(mx.quantize(release_like(64, 128, generator), SCHEMES["mxfp4"]))
    row, column = (int(torch.randint(n, (), generator=generator)) for n in (64, 128))
    group = values[row, column // 32 * 32 :][:32]
    values[row, column] = 1.25 * float(group.abs().max())
    assert find_mxfp4(values) is None
    assert find_mxfp4(torch.ones(4, 33)) is None


@pytest.mark.parametrize("shape", [(256, 384), (200, 300)])
def test_fp8_tiles_are_found(shape: tuple[int, int], generator: torch.Generator) -> None:
    q = fp8_block.quantize(torch.randn(shape, generator=generator) / 50, SCHEMES["fp8"])
    values = fp8_block.dequantize(q)
    found = find_fp8_tiles(values.bfloat16())
    assert found is not None
    assert torch.equal(fp8_block.dequantize(found), values)
    values[-1, -1] = 1.03125 * float(values.abs().max())  # five significant bits
    assert find_fp8_tiles(values) is None
