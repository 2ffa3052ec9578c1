"""Encoding into GGML types: errors bounded, what is exact stays exact, bad input refused."""

from __future__ import annotations

import pytest
import torch

from v4quant_kernels import ggml
from v4quant_kernels.errors import NonFiniteWeight, WeightOutOfRange
from v4quant_kernels.ref.ggml_blocks import SHAPES

EACH = pytest.mark.parametrize("name", list(SHAPES))

# Relative rms error that a type must not exceed on normal numbers.
LIMIT = {
    "q8_0": 0.006,
    "q6_k": 0.02,
    "q5_1": 0.04,
    "q5_0": 0.05,
    "q5_k": 0.045,
    "q4_0": 0.1,
    "q4_k": 0.09,
    "q3_k": 0.22,
    "q2_k": 0.4,
}


def relative_rms(x: torch.Tensor, name: str) -> float:
    back = ggml.decode(ggml.encode(x, name), name)
    return float((back - x).norm() / x.norm())


@EACH
def test_error_on_normal_numbers(name: str, generator: torch.Generator) -> None:
    x = torch.randn(16, 512, generator=generator) * 0.02
    assert relative_rms(x, name) < LIMIT[name]


@EACH
def test_zeros_stay_zero(name: str) -> None:
    x = torch.zeros(2, 512)
    assert torch.equal(ggml.decode(ggml.encode(x, name), name), x)
    x[1, 256:] = torch.linspace(-1, 1, 256)
    back = ggml.decode(ggml.encode(x, name), name)
    assert (back[0] == 0).all() and (back[1, :256] == 0).all()


@EACH
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_nonfinite_is_refused(name: str, bad: float) -> None:
    x = torch.ones(2, 256)
    x[1, 77] = bad
    with pytest.raises(NonFiniteWeight):
        ggml.encode(x, name)
    with pytest.raises(NonFiniteWeight, match="importance"):
        ggml.encode(torch.ones(2, 256), name, x[1])


@EACH
def test_too_large_for_half_precision_scales(name: str) -> None:
    x = torch.full((1, 256), 3e38)
    x[0, ::2] = -3e38
    with pytest.raises(WeightOutOfRange, match="too large"):
        ggml.encode(x, name)


def test_float_types_are_plain_casts(generator: torch.Generator) -> None:
    x = torch.randn(3, 5, generator=generator)
    assert torch.equal(ggml.decode(ggml.encode(x, "f32"), "f32"), x)
    assert torch.equal(ggml.decode(ggml.encode(x, "bf16"), "bf16"), x.bfloat16().float())
    assert torch.equal(ggml.decode(ggml.encode(x, "f16"), "f16"), x.half().float())
    with pytest.raises(WeightOutOfRange):
        ggml.encode(x * 1e6, "f16")
