"""Encoding into GGML types: errors bounded, what is exact stays exact, bad input refused."""

from __future__ import annotations

import pytest
import torch

from v4quant_kernels import ggml
from v4quant_kernels.errors import NonFiniteWeight, WeightOutOfRange
from v4quant_kernels.ggml_types import get_type
from v4quant_kernels.ref import e2m1, ggml_plain
from v4quant_kernels.ref.ggml_blocks import SHAPES, put_together

EACH = pytest.mark.parametrize("name", list(SHAPES))

# Relative rms error on normal numbers: what llama.cpp's quantizer reaches without importance.
LIMIT = {
    "q8_0": 0.0057,
    "q6_k": 0.0178,
    "q5_1": 0.0379,
    "q5_0": 0.0428,
    "q5_k": 0.0362,
    "q4_0": 0.0863,
    "q4_k": 0.0718,
    "q3_k": 0.1507,
    "q2_k": 0.2980,
    "q2_0": 0.3600,
    "iq4_nl": 0.0765,
    "iq4_xs": 0.0770,
    "iq3_s": 0.1370,
    "iq3_xxs": 0.1820,
    "iq2_s": 0.2490,
    "iq2_xs": 0.3000,
    "iq2_xxs": 0.3440,
    "iq1_m": 0.4500,
    "iq1_s": 0.4850,
}
EXACT = ["q8_0", "q6_k", "q5_k", "q5_1", "q5_0"]


def fp4_matrix(generator: torch.Generator, rows: int, columns: int, octaves: int) -> torch.Tensor:
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    exponent = torch.randint(-octaves, 1, (rows, columns // 32, 1), generator=generator)
    scale = torch.exp2(exponent.float() - 6)
    return (e2m1.decode(codes).view(rows, -1, 32) * scale).view(rows, columns)


def weighted_error(
    x: torch.Tensor, data: torch.Tensor, name: str, importance: torch.Tensor
) -> torch.Tensor:
    """float64 `[blocks]`."""
    error = (ggml.decode(data, name).double() - x.double()) ** 2 * importance.double()
    return error.view(-1, get_type(name).block).sum(-1)


def relative_rms(x: torch.Tensor, name: str) -> float:
    back = ggml.decode(ggml.encode(x, name), name)
    return float((back - x).norm() / x.norm())


@EACH
def test_error_on_normal_numbers(name: str, generator: torch.Generator) -> None:
    x = torch.randn(64, 512, generator=generator) * 0.02
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


@pytest.mark.parametrize("name", EXACT)
def test_fp4_weights_stay_exact(name: str, generator: torch.Generator) -> None:
    """Scales up to 2^4 apart; a block's own codes may add one octave."""
    x = fp4_matrix(generator, 8, 768, octaves=4)
    assert torch.equal(ggml.decode(ggml.encode(x, name), name), x)
    x[3, 100] += 1.2345e-5  # no lattice point
    assert not torch.equal(ggml.decode(ggml.encode(x, name), name), x)


@pytest.mark.parametrize("name", ["q6_k", "q5_k"])
def test_units_too_far_apart_are_searched(name: str, generator: torch.Generator) -> None:
    x = fp4_matrix(generator, 8, 512, octaves=12)
    assert relative_rms(x, name) < LIMIT[name]


@EACH
def test_better_than_rounding_by_the_weights_given(name: str, generator: torch.Generator) -> None:
    for x in (
        torch.randn(16, 512, generator=generator) * 0.02,
        torch.randn(16, 512, generator=generator).pow(3),
        fp4_matrix(generator, 16, 512, octaves=2),
    ):
        importance = torch.exp(torch.randn(512, generator=generator))
        plain = ggml_plain.round_blocks(x.view(-1, get_type(name).block), name)
        theirs = weighted_error(x, put_together(plain, name).view(16, -1), name, importance)
        ours = weighted_error(x, ggml.encode(x, name, importance), name, importance)
        assert ours.sum() <= theirs.sum()
        assert (ours <= theirs).double().mean() > 0.9


@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"])
def test_importance_moves_the_error_where_it_matters_less(
    name: str, generator: torch.Generator
) -> None:
    x = torch.randn(32, 512, generator=generator)
    importance = torch.ones(512)
    importance[::4] = 50.0
    even, guided = (ggml.decode(ggml.encode(x, name, w), name) for w in (None, importance))
    assert ((guided - x)[:, ::4] ** 2).sum() < 0.9 * ((even - x)[:, ::4] ** 2).sum()


@EACH
def test_zero_importance_is_no_obstacle(name: str, generator: torch.Generator) -> None:
    x = torch.randn(2, 512, generator=generator)
    importance = torch.zeros(512)
    back = ggml.decode(ggml.encode(x, name, importance), name)
    assert torch.equal(back, ggml.decode(ggml.encode(x, name), name))
    importance[:64] = 1.0
    assert ggml.decode(ggml.encode(x, name, importance), name).isfinite().all()


@EACH
def test_rows_do_not_depend_on_their_company(name: str, generator: torch.Generator) -> None:
    x = torch.randn(7, 512, generator=generator)
    importance = torch.rand(512, generator=generator)
    whole = ggml.encode(x, name, importance)
    parts = [ggml.encode(part, name, importance) for part in (x[:2], x[2:])]
    assert torch.equal(whole, torch.cat(parts))


@EACH
@pytest.mark.parametrize("magnitude", [1e-30, 1e-7, 1e-5, 6e4])
def test_extreme_magnitudes_stay_finite(
    name: str, magnitude: float, generator: torch.Generator
) -> None:
    x = (torch.rand(2, 512, generator=generator) * 2 - 1) * magnitude
    x[1, :256] = magnitude
    back = ggml.decode(ggml.encode(x, name), name)
    assert back.isfinite().all()
    # Steps below 2^-24 do not exist: a range of 2e-7 may end up at one of its ends.
    assert (back - x).abs().max() <= (1.1 if magnitude > 1e-6 else 2.3) * magnitude
    if magnitude > 1:
        assert relative_rms(x, name) < LIMIT[name] * 1.5


@EACH
def test_no_rows_and_other_dtypes(name: str, generator: torch.Generator) -> None:
    assert ggml.encode(torch.zeros(0, 256), name).shape == (0, get_type(name).row_bytes(256))
    x = torch.randn(2, 256, generator=generator).bfloat16()
    assert torch.equal(ggml.encode(x, name), ggml.encode(x.float(), name))
