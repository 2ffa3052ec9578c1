"""Products in BF16: operands rounded, sums not; held to float64 with the bound of float32 sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.kernel_tools import KERNEL_SCHEMES, poisoned_allocations, random_qtensor
from v4quant_kernels import dispatch
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.reference64 import decode64
from v4quant_kernels.scheme import SCHEMES
from v4quant_kernels.twins import bf16_product as module
from v4quant_kernels.twins.bf16_product import Way, bf16_product, exact_product, rounded


def assert_sums_are_float32(found: Tensor, a: Tensor, b: Tensor, terms: int = 1) -> None:
    """|error| <= (k + 1) 2^-24 sum |a b|, whatever the order of the sum; products are exact.

    terms: of how many sums over k the result is the sum."""
    a, b = a.double(), b.double()
    bound = terms * (a.shape[-1] + 1) * 2.0**-24 * (a.abs() @ b.abs())
    assert found.dtype == torch.float32
    assert bool(((found.double() - a @ b).abs() <= bound).all())


@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 64), (64, 9)), ((3, 7, 32), (32, 6)), ((4, 5, 48), (4, 48, 8)), ((200, 512), (512, 300))],
)
@pytest.mark.parametrize("way", ["rounded", "units"])
def test_operands_are_rounded_and_sums_are_not(
    left: tuple[int, ...], right: tuple[int, ...], way: Way, generator: torch.Generator
) -> None:
    a, b = (torch.randn(shape, generator=generator) for shape in (left, right))
    found = bf16_product(a, b, way)
    assert_sums_are_float32(found, rounded(a), rounded(b))
    assert not torch.equal(found, rounded(found)), "a result rounded to BF16 would lose the sum"
    assert not torch.equal(found, a @ b)


@pytest.mark.parametrize("way", ["rounded", "units"])
def test_results_do_not_depend_on_the_number_of_rows(way: Way, generator: torch.Generator) -> None:
    """A library may round many rows and not a few: a row's product is the same in any company."""
    a, b = (torch.randn(shape, generator=generator) for shape in ((300, 512), (384, 512)))
    for weight in (b.T, b.T.contiguous()):
        for rows in (1, 2, 15, 64, 300):
            found = bf16_product(a[:rows], weight, way)
            assert_sums_are_float32(found, rounded(a[:rows]), rounded(weight))


def test_oneDNN_is_left_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        bf16_product(torch.ones(2, 3), torch.ones(2, 3), "units")
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_a_device_decides_how(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.ones(1)
    for units, expected in ((False, ("f32", "f32", "rounded")), (True, ("f32", "f32", "units"))):
        monkeypatch.setattr(dispatch, "has_bf16_units", lambda u=units: u)
        asked: tuple[Any, ...] = ("auto", "f32", "bf16")
        assert tuple(dispatch.product_way(here, p) for p in asked) == expected


def flushing(a: Tensor, b: Tensor, way: Way) -> Tensor:
    """A product as BF16 units take it: operands must be BF16 already, the subnormal ones are 0."""
    assert torch.equal(a, rounded(a)) and torch.equal(b, rounded(b)), "rounding would lose bits"
    a, b = (x.masked_fill(x.abs() < 2.0**-126, 0.0) for x in (a, b))
    out = a @ b
    return out.masked_fill(out.abs() < 2.0**-126, 0.0)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_weights_are_multiplied_exactly(
    scheme: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No scheme loses a bit to BF16 operands, integers times BF16 scales included."""
    taken = []
    monkeypatch.setattr(module, "product_of_bf16", lambda *a: taken.append(1) or flushing(*a))
    weight = random_qtensor(scheme, 270, 2 * max(128, SCHEMES[scheme].group_size), generator)
    x = torch.randn(7, weight.shape[1], generator=generator).bfloat16().float()
    with poisoned_allocations(monkeypatch):
        torch.empty(1)
        found = exact_product(x, weight, "units")
    terms = 2 if SCHEMES[scheme].element == "int" else 1
    assert len(taken) == terms
    assert_sums_are_float32(found, x, decode64(weight).T, terms + 1)


def with_scale(weight: QTensor, byte: int) -> QTensor:
    assert weight.scale is not None
    weight.scale.view(torch.uint8).fill_(byte)
    return weight


def test_numbers_that_units_would_lose_are_multiplied_in_float32(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "product_of_bf16", flushing)
    for byte, size in ((1, 1.0), (127, 2.0**-126), (60, 2.0**-50), (127, 1.0)):
        weight = with_scale(random_qtensor("mxfp4", 16, 64, generator), byte)
        x = (torch.randn(3, 64, generator=generator) * size).bfloat16().float()
        assert_sums_are_float32(exact_product(x, weight, "units"), x, decode64(weight).T)
        small = x.masked_fill(x == 0, torch.inf).abs().min() * 2.0 ** (byte - 128)
        assert torch.equal(
            exact_product(x, weight, "units"), exact_product(x, weight, "f32")
        ) or bool(small >= 2.0**-100)


def test_scales_that_are_no_powers_of_two(generator: torch.Generator) -> None:
    """Base releases may hold any float32 scale: their products stay in float32."""
    weight = random_qtensor("fp8", 128, 128, generator)
    scale = torch.full((1, 1), 0.7)
    weight = QTensor(weight.scheme, weight.shape, weight.codes, scale)
    x = torch.randn(3, 128, generator=generator).bfloat16().float()
    assert torch.equal(exact_product(x, weight, "rounded"), exact_product(x, weight, "f32"))


def test_nan_and_empty(generator: torch.Generator) -> None:
    weight = random_qtensor("mxfp4", 16, 64, generator)
    assert exact_product(torch.empty(0, 64), weight, "rounded").shape == (0, 16)
    assert not exact_product(torch.zeros(1, 64), weight, "rounded").any()
    x = torch.ones(2, 64)
    x[1, 3] = torch.nan
    out = exact_product(x, weight, "rounded")
    assert not out[0].isnan().any() and out[1].isnan().all()
