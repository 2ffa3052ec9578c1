"""Compiled finders of MXFP4 and FP8 tiles give the torch twin's bytes, or None where it does."""

from __future__ import annotations

import torch

from v4quant_kernels import native
from v4quant_kernels.grids import find_fp8_tiles, find_mxfp4
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block, grids, mx
from v4quant_kernels.scheme import SCHEMES


def same(found: QTensor | None, wanted: QTensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    assert found.scale is not None and wanted.scale is not None
    scales = (found.scale.view(torch.uint8), wanted.scale.view(torch.uint8))
    codes = (found.codes.view(torch.uint8), wanted.codes.view(torch.uint8))
    return torch.equal(*codes) and torch.equal(*scales)


def random_matrix(rng: torch.Generator) -> torch.Tensor:
    """Codes and scales as no encoder would choose them, over the whole range of E8M0."""
    rows, groups = (int(torch.randint(1, n, (), generator=rng)) for n in (20, 9))
    codes = torch.randint(256, (rows, groups * 16), generator=rng, dtype=torch.uint8)
    kind = int(torch.randint(4, (), generator=rng))
    codes &= (0xFF, 0x99, 0xBB, 0x88)[kind]  # few magnitudes, or zeros of both signs only
    lowest, highest = ((-126, 126), (-12, 3), (-127, -110), (110, 125))[
        int(torch.randint(4, (), generator=rng))
    ]
    exponents = torch.randint(lowest, highest, (rows, groups), generator=rng)
    scale = e8m0.encode_exponent(exponents.int())
    return mx.dequantize(QTensor(SCHEMES["mxfp4"], (rows, groups * 32), codes, scale))


def test_bytes_are_the_twins(generator: torch.Generator) -> None:
    assert native.available()
    for number in range(200):
        values = random_matrix(generator)
        if number % 3 == 1:  # one value moved by a step, which may still lie on the grid
            flat = values.view(-1)
            place = int(torch.randint(flat.numel(), (), generator=generator))
            flat[place] *= (0.5, 0.75, 1.5, 2.0, 1.25, -1.0, 0.125)[number % 7]
        if number % 3 == 2:
            values = values.bfloat16()
        wanted = grids.find_mxfp4(values)
        assert same(find_mxfp4(values), wanted), number
        assert number % 3 == 1 or wanted is not None or not bool(values.isfinite().all()), number


def test_what_is_no_matrix_of_groups() -> None:
    for shape in ((4, 33), (0, 32), (4, 0)):
        wanted = grids.find_mxfp4(torch.ones(shape))
        assert same(find_mxfp4(torch.ones(shape)), wanted), shape


def test_nan_and_infinity_are_on_no_grid() -> None:
    for value in (torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-45):
        values = torch.ones(9, 32)
        values[8, 31] = value
        assert same(find_mxfp4(values), grids.find_mxfp4(values)), value


def random_tiles(rng: torch.Generator, tile: int) -> torch.Tensor:
    """Codes and scales as no encoder would choose them, in tiles that may be ragged."""
    rows, columns = (int(torch.randint(1, 3 * tile, (), generator=rng)) for _ in range(2))
    codes = torch.randint(256, (rows, columns), generator=rng, dtype=torch.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E  # NaN
    # All numbers; small ones; zeros of both signs; a top of 448 over whole, then over fine steps.
    codes &= (0xFF, 0x8F, 0x80, 0xFE, 0xFF)[kind := int(torch.randint(5, (), generator=rng))]
    if kind > 2:
        codes[codes & 0x7F < 0x10] = 0x10
        codes[::7, ::5] = 0x7E
    lowest, highest = ((-100, 100), (-12, 3), (-127, -110), (110, 119))[
        int(torch.randint(4, (), generator=rng))
    ]
    shape = (-(-rows // tile), -(-columns // tile))
    exponents = torch.randint(lowest, highest, shape, generator=rng)
    q = QTensor(
        SCHEMES["fp8"].tiled((tile, tile)),
        (rows, columns),
        codes.view(torch.float8_e4m3fn),
        e8m0.encode_exponent(exponents.int()),
    )
    return fp8_block.dequantize(q)


def test_bytes_of_tiles_are_the_twins(generator: torch.Generator) -> None:
    coarser = 0
    for number in range(120):
        tile = (4, 32, 5, 16)[number % 4]
        scheme, values = SCHEMES["fp8"].tiled((tile, tile)), random_tiles(generator, tile)
        if number % 3 == 1:  # one value moved by a step, which may still lie on the grid
            flat = values.view(-1)
            place = int(torch.randint(flat.numel(), (), generator=generator))
            flat[place] *= (0.5, 0.75, 1.5, 2.0, 1.0625, -1.0, 0.125, 1.03125)[number % 8]
        if number % 3 == 2:
            values = values.bfloat16()
        wanted, found = grids.find_fp8_tiles(values, scheme), find_fp8_tiles(values, scheme)
        assert same(found, wanted), number
        if found is not None and wanted is not None:
            assert found.scheme == wanted.scheme and found.shape == wanted.shape
            fine = fp8_block.quantize(values, scheme)
            assert fine.scale is not None and found.scale is not None
            coarser += int((fine.scale.view(torch.uint8) != found.scale.view(torch.uint8)).sum())
    assert coarser > 0


def test_nan_and_infinity_are_in_no_tile() -> None:
    for value in (torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-45, -0.0):
        values = torch.ones(9, 32)
        values[8, 31] = value
        assert same(find_fp8_tiles(values), grids.find_fp8_tiles(values)), value
