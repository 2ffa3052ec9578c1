"""The compiled finder of MXFP4 gives the torch twin's bytes, or None where it gives None."""

from __future__ import annotations

import torch

from v4quant_kernels import native
from v4quant_kernels.grids import find_mxfp4
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, grids, mx
from v4quant_kernels.scheme import SCHEMES


def same(found: QTensor | None, wanted: QTensor | None) -> bool:
    if found is None or wanted is None:
        return found is wanted
    assert found.scale is not None and wanted.scale is not None
    scales = (found.scale.view(torch.uint8), wanted.scale.view(torch.uint8))
    return torch.equal(found.codes, wanted.codes) and torch.equal(*scales)


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
