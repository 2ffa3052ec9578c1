"""The table of schemes: every scheme round-trips, and what no scheme can hold is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from v4quant_kernels import codec
from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.scheme import SCHEMES, Scheme

EVERY = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=lambda s: s.name)

# Relative RMS error of each format on normal numbers: about step / sqrt(12), loosely bounded.
WORST = {"e2m1": 0.13, "e4m3": 0.03, "bf16": 0.002}
WORST_INT = {2: 0.9, 3: 0.3, 4: 0.13, 8: 0.008}
WORST_GGML = {1: 0.52, 2: 0.5, 3: 0.25, 4: 0.12, 5: 0.06, 6: 0.03, 8: 0.008}


@EVERY
def test_round_trip(scheme: Scheme, generator: torch.Generator) -> None:
    columns = 512 if scheme.element == "ggml" else 384
    x = torch.randn(48, columns, generator=generator) * 0.02
    before = x.clone()
    q = codec.quantize(x, scheme)
    assert torch.equal(x, before), "the input must not change"
    assert q.scheme is scheme and q.shape == (48, columns)
    copies = [t.clone() for t in (q.codes, q.scale) if t is not None]
    back = codec.dequantize(q)
    assert back.dtype == torch.float32 and back.shape == (48, columns)
    held = [t for t in (q.codes, q.scale) if t is not None]
    for tensor, copy in zip(held, copies, strict=True):
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))
    tables = {"int": WORST_INT, "ggml": WORST_GGML}
    table = tables.get(scheme.element)
    bound = table[scheme.bits] if table else WORST[scheme.element]
    assert (back - x).norm() / x.norm() < bound
    if scheme.element == "ggml":
        return  # two levels of scales: what is decoded need not lie on the grid chosen for it
    options = {"global_scale": q.global_scale} if scheme.has_global_scale else {}
    assert torch.equal(codec.dequantize(codec.quantize(back, scheme, **options)), back)


@EVERY
def test_stored_size_is_what_the_scheme_says(scheme: Scheme) -> None:
    q = codec.quantize(torch.ones(128, 256), scheme)
    extra = 4 if scheme.has_global_scale else 0
    assert q.nbytes == 128 * 256 * scheme.bits_per_weight / 8 + extra


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_non_finite_weights_are_refused(scheme: Scheme, bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(4, 128, dtype=dtype)
    x[3, 77] = bad
    with pytest.raises(NonFiniteWeight, match="NaN or infinity"):
        codec.quantize(x, scheme)


@EVERY
@pytest.mark.parametrize("shape", [(128,), (2, 2, 128), ()])
def test_only_matrices(scheme: Scheme, shape: tuple[int, ...]) -> None:
    with pytest.raises(UnsupportedScheme):
        codec.quantize(torch.ones(shape), scheme)


@EVERY
def test_columns_that_are_not_whole_groups(scheme: Scheme) -> None:
    x = torch.ones(3, 127)
    if scheme.block[0] == 1 and scheme.group_size > 1:
        with pytest.raises(UnsupportedScheme, match=scheme.name):
            codec.quantize(x, scheme)
    else:
        assert torch.equal(codec.dequantize(codec.quantize(x, scheme)), x)


def test_fp8_scales_in_float32() -> None:
    x = torch.ones(4, 4)
    q = codec.quantize(x, SCHEMES["fp8"], scale_dtype=torch.float32)
    assert q.scale is not None and q.scale.dtype == torch.float32
    assert torch.equal(codec.dequantize(q), x)
    base = replace(SCHEMES["fp8"], name="fp8-base", scale="f32")
    assert torch.equal(codec.dequantize(replace(q, scheme=base)), x)


def test_bfloat16_overflow_is_refused() -> None:
    x = torch.full((1, 2), torch.finfo(torch.float32).max)
    with pytest.raises(NonFiniteWeight, match="bfloat16"):
        codec.quantize(x, SCHEMES["bf16"])


def test_unknown_combination_is_named() -> None:
    odd = replace(SCHEMES["bf16"], name="odd", scale="e8m0")
    with pytest.raises(UnsupportedScheme, match="odd"):
        codec.quantize(torch.ones(1, 1), odd)
