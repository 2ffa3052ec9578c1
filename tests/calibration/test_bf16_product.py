"""Products in BF16: operands rounded, sums not; held to float64 with the bound of float32 sums."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from v4quant_calibration.model import bf16_product as module
from v4quant_calibration.model.bf16_product import bf16_product, has_units, rounded
from v4quant_calibration.model.numerics import linear, product, quantized_input
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.noise_floor import EXACT, PRODUCTS, floor_options
from v4quant_calibration.provider import CheckpointParams
from v4quant_formats.checkpoint import open_checkpoint

TINY = Path(__file__).parent.parent / "data" / "tiny-a"
BF16 = ForwardOptions(matmul_dtype=torch.bfloat16)


def assert_sums_are_float32(found: Tensor, a: Tensor, b: Tensor) -> None:
    """|error| <= (k + 1) 2^-24 sum |a b|, whatever the order of the sum; products are exact."""
    a, b = a.double(), b.double()
    bound = (a.shape[-1] + 1) * 2.0**-24 * (a.abs() @ b.abs())
    assert found.dtype == torch.float32
    assert bool(((found.double() - a @ b).abs() <= bound).all())


@pytest.mark.parametrize(
    ("left", "right"),
    [((5, 64), (64, 9)), ((3, 7, 32), (32, 6)), ((4, 5, 48), (4, 48, 8)), ((200, 512), (512, 300))],
)
@pytest.mark.parametrize("units", [False, True])
def test_operands_are_rounded_and_sums_are_not(
    left: tuple[int, ...],
    right: tuple[int, ...],
    units: bool,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a, b = (torch.randn(shape, generator=generator) for shape in (left, right))
    if units and not has_units():
        monkeypatch.setattr(module, "has_units", lambda: True)
        b = rounded(b)  # oneDNN rounds large ones only where the units are
    found = bf16_product(a, b)
    assert_sums_are_float32(found, rounded(a), rounded(b))
    assert not torch.equal(found, rounded(found)), "a result rounded to BF16 would lose the sum"
    assert not torch.equal(found, a @ b)


def test_oneDNN_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "has_units", lambda: True)
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(RuntimeError):
        bf16_product(torch.ones(2, 3), torch.ones(2, 3))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def test_nothing_is_lost_where_operands_are_bf16_already(generator: torch.Generator) -> None:
    """A routed expert's matrix times inputs rounded as the release does it."""
    official = ForwardOptions(activations="official")
    with open_checkpoint(TINY) as checkpoint:
        weight = CheckpointParams(checkpoint)("layers.1.ffn.experts.0.w1")
    x = quantized_input(torch.randn(50, weight.shape[1], generator=generator), official)
    assert torch.equal(weight, rounded(weight)) and torch.equal(x, rounded(x))
    assert_sums_are_float32(linear(x, weight, BF16), x, weight.mT)
    if not has_units():
        assert torch.equal(linear(x, weight, BF16), linear(x, weight, official))


def test_the_second_floor_is_the_other_kind_of_product() -> None:
    told, options = floor_options(ForwardOptions(), 2)[1]
    assert told == PRODUCTS and options.products == "bf16"
    (_, first), (told, options) = floor_options(BF16, 2)
    assert told == EXACT and options.products == "f32"
    assert first.products == "bf16" and first.round_streams


@pytest.mark.gpu
def test_on_a_gpu(generator: torch.Generator) -> None:
    for left, right in (((5, 64), (64, 9)), ((3, 7, 32), (32, 6)), ((4, 5, 48), (4, 48, 8))):
        a, b = (torch.randn(s, generator=generator) for s in (left, right))
        found = product(a.cuda(), b.cuda(), torch.bfloat16).cpu()
        torch.testing.assert_close(found, rounded(a) @ rounded(b), rtol=1e-4, atol=1e-4)
