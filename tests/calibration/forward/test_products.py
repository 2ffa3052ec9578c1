"""`--products bf16` in the reference forward: what it multiplies, and the floor beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.kernels.twins.test_bf16_product import assert_sums_are_float32
from v4quant_calibration.evaluation.noise_floor import EXACT, PRODUCTS, floor_options
from v4quant_calibration.forward.checkpoint_params import CheckpointParams
from v4quant_calibration.model.numerics import linear, product, quantized_input
from v4quant_calibration.model.options import ForwardOptions
from v4quant_formats.model_config import load_model_config
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.cpu_products import has_bf16_units
from v4quant_kernels.twins.bf16_product import rounded

TINY = Path(__file__).parents[2] / "data" / "tiny-a"
CONFIG = load_model_config(TINY)
BF16 = ForwardOptions(matmul_dtype=torch.bfloat16)


def test_nothing_is_lost_where_operands_are_bf16_already(generator: torch.Generator) -> None:
    """A routed expert's matrix times inputs rounded as the release does it."""
    official = ForwardOptions(activations="official")
    with open_checkpoint(TINY) as checkpoint:
        weight = CheckpointParams(checkpoint)("layers.1.ffn.experts.0.w1")
    x = quantized_input(torch.randn(50, weight.shape[1], generator=generator), CONFIG, official)
    assert torch.equal(weight, rounded(weight)) and torch.equal(x, rounded(x))
    assert_sums_are_float32(linear(x, weight, BF16), x, weight.mT)
    if not has_bf16_units():
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
