"""Gain: rows answer their inputs as loudly as before, whatever the format, and exact ones stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from v4quant_calibration.rounding.coders import coder_of
from v4quant_calibration.rounding.gain import LARGEST, row_gain, solved_gain, with_gain
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import optimal, rtn, solve_batch
from v4quant_kernels import codec, native
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.ref import row_sums as plain
from v4quant_kernels.row_sums import losses, row_sums
from v4quant_kernels.scheme import SCHEMES, get_scheme

LOSSY = ("int2-g64", "int3-g128", "int4-g32", "q2_k", "q3_k", "q4_k", "q4_0", "q5_1")
EACH = pytest.mark.parametrize("name", LOSSY)


def matrix(generator: torch.Generator, rows: int = 24, columns: int = 512) -> Tensor:
    return torch.randn(rows, columns, generator=generator) * 0.02


def kept(values: Tensor, coded: Tensor, moments: Tensor | None) -> Tensor:
    """<q, w>_H / <w, w>_H of every row, in float64."""
    h = torch.ones(values.shape[1]) if moments is None else moments
    weighted = values.double() * h.double()
    return (weighted * coded.double()).sum(1) / (weighted * values.double()).sum(1)


@EACH
@pytest.mark.parametrize("weighted", [True, False])
def test_rows_have_their_gain_again(name: str, weighted: bool, generator: torch.Generator) -> None:
    scheme, values = get_scheme(name), matrix(generator)
    moments = torch.rand(512, generator=generator, dtype=torch.float64) if weighted else None
    before = codec.dequantize(coder_of(scheme).search(values, moments).tensor)
    after = codec.dequantize(optimal(values, scheme, moments).tensor)
    lost, left = (1 - kept(values, coded, moments) for coded in (before, after))
    assert bool((lost > 0).all()), "least squares shrinks"
    # What is left is the rounding of the scales as they are stored: 2^-8 at most in BF16, whose
    # significands have 8 bits; less in blocks of GGUF, whose float16 have 11.
    assert float(left.abs().max()) < (2**-8 if name.startswith("int") else 2e-3), name
    assert float(left.abs().mean()) < 0.2 * float(lost.mean()) + 1e-4, name


@EACH
def test_the_errors_told_are_those_of_the_result(name: str, generator: torch.Generator) -> None:
    scheme, values = get_scheme(name), matrix(generator)
    found = optimal(values, scheme)
    again = measured(values, found.tensor)
    assert found.squared_error == pytest.approx(again.squared_error, rel=1e-12)
    assert found.squared_norm == pytest.approx(again.squared_norm, rel=1e-12)
    assert found.max_error == again.max_error
    exact = (codec.dequantize(found.tensor) - values).double()
    assert again.squared_error == pytest.approx(float(exact.square().sum()), rel=1e-12)


@pytest.mark.parametrize("name", ["int4-g32", "q8_0", "q2_k"])
def test_what_is_exact_stays(name: str, generator: torch.Generator) -> None:
    scheme = get_scheme(name)
    coded = codec.quantize(matrix(generator), scheme)
    values = codec.dequantize(coded)
    found = with_gain(values, measured(values, coded), None)
    assert found.tensor is coded
    mixed = values.clone()
    mixed[0] += 0.3 * values[0].abs().max()  # one row that is not
    found = with_gain(mixed, measured(mixed, coded), None)
    assert torch.equal(found.tensor.codes[1:], coded.codes[1:])
    assert torch.equal(codec.dequantize(found.tensor)[1:], values[1:])


def test_no_row_is_made_much_louder() -> None:
    values = torch.ones(4, 64)
    coded = torch.stack([torch.ones(64), torch.zeros(64), -torch.ones(64), 0.1 * torch.ones(64)])
    assert row_gain(values, coded, None).tolist() == [1.0, 1.0, 1.0, LARGEST]
    assert row_gain(torch.zeros(1, 64), torch.zeros(1, 64), None).tolist() == [1.0]
    tiny = torch.full((64,), 1e-310, dtype=torch.float64)
    assert row_gain(values, values, tiny).tolist() == [1.0] * 4


def test_sums_are_exact_in_any_order(generator: torch.Generator) -> None:
    values, coded = matrix(generator, 8, 3000), matrix(generator, 8, 3000)
    weights = torch.rand(3000, generator=generator, dtype=torch.float64).pow(8)
    order = torch.randperm(3000, generator=generator)
    for h in (weights, None):
        found = row_sums(values, coded, h)
        moved = row_sums(values[:, order], coded[:, order], None if h is None else h[order])
        told = plain.row_sums(values, coded, h)
        for a, b, c in zip(found, moved, told, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)


def test_losses_are_those_of_float64(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, coded = matrix(generator, 5, 77), matrix(generator, 5, 77)
    compiled = losses(values, coded)
    monkeypatch.setattr(native, "available", lambda: False)
    assert losses(values, coded) == pytest.approx(compiled, rel=1e-12)


@pytest.mark.parametrize("name", ["q4_0", "q2_k", "int2-g64"])
def test_scales_that_would_leave_their_range_stay(name: str) -> None:
    largest = 65000.0 if SCHEMES[name].is_block_type else 3.2e38
    coded = codec.quantize(torch.full((2, 256), largest * 0.9), SCHEMES[name])
    loud = codec.rescale(coded, torch.tensor([1.0, 1e6], dtype=torch.float64))
    assert bool(codec.dequantize(loud).isfinite().all())
    assert torch.equal(loud.codes, codec.rescale(coded, torch.ones(2, dtype=torch.float64)).codes)


def test_formats_without_scales_of_rows_are_refused(generator: torch.Generator) -> None:
    coded = codec.quantize(matrix(generator), SCHEMES["mxfp4"])
    with pytest.raises(UnsupportedScheme, match="rows have no scales"):
        codec.rescale(coded, torch.ones(24, dtype=torch.float64))


@pytest.mark.parametrize("name", ["int2-g64", "q2_k"])
def test_solved_rows_have_their_gain_under_the_full_moments(
    name: str, generator: torch.Generator
) -> None:
    columns = 256
    inputs = torch.randn(600, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    gram = (inputs.mT @ inputs / 600).unsqueeze(0)
    gram.diagonal(dim1=1, dim2=2).add_(0.01 * gram.diagonal(dim1=1, dim2=2).mean())
    source = codec.quantize(matrix(generator, 16, columns), SCHEMES["mxfp4"])
    ((solved,),) = solve_batch([[source]], gram, None, get_scheme(name))
    target = codec.dequantize(source).mT.unsqueeze(0)
    left = solved_gain(target, codec.dequantize(solved).mT.unsqueeze(0), gram) - 1
    assert float(left.abs().max()) < 4e-3


def test_plain_rounding_is_what_everybody_does(generator: torch.Generator) -> None:
    values = matrix(generator)
    assert torch.equal(
        rtn(values, get_scheme("int4-g32")).tensor.codes,
        codec.quantize(values, get_scheme("int4-g32")).codes,
    )
