"""Integer groups against float64 by definition and compressed-tensors' unpacker."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1, intq
from v4quant_kernels.scheme import SCHEMES, Scheme

INTEGERS = [s for s in SCHEMES.values() if s.element == "int"]
EACH = pytest.mark.parametrize("scheme", INTEGERS, ids=lambda s: s.name)


def random_matrix(generator: torch.Generator, scheme: Scheme) -> torch.Tensor:
    exponent = torch.randint(-30, 10, (20, 3, 1), generator=generator).float()
    x = torch.randn(20, 3, scheme.group_size, generator=generator) * torch.exp2(exponent)
    return x.view(20, -1)


def integers(q: QTensor) -> torch.Tensor:
    return unpack_from_int32(q.codes.view(torch.int32), q.scheme.bits, torch.Size(q.shape))


def scale_of(q: QTensor) -> torch.Tensor:
    assert q.scale is not None and q.scale.dtype == torch.bfloat16
    return q.scale


@EACH
def test_by_definition(scheme: Scheme, generator: torch.Generator) -> None:
    x = random_matrix(generator, scheme)
    q = intq.quantize(x, scheme)
    groups = x.view(20, 3, -1)
    limit = 2 ** (scheme.bits - 1)
    wanted = groups.abs().amax(-1) / (limit - 1)
    assert torch.equal(scale_of(q), wanted.bfloat16())
    scale = scale_of(q).float().numpy()[..., None]
    expected = np.clip(np.rint(groups.numpy() / scale), -limit, limit - 1)
    assert q.codes.shape == (20, x.shape[1] * scheme.bits // 8)
    assert np.array_equal(integers(q).numpy().reshape(20, 3, -1), expected)
    exact = torch.from_numpy(expected * scale.astype(np.float64)).view(20, -1)
    assert torch.equal(intq.dequantize(q).double(), exact)


@EACH
def test_quantizing_again_keeps_codes_and_scales(
    scheme: Scheme, generator: torch.Generator
) -> None:
    q = intq.quantize(random_matrix(generator, scheme), scheme)
    again = intq.quantize(intq.dequantize(q), scheme)
    assert torch.equal(again.codes, q.codes)
    assert torch.equal(scale_of(again), scale_of(q))


@EACH
def test_zero_groups_and_the_ends_of_float32(scheme: Scheme) -> None:
    g = scheme.group_size
    x = torch.zeros(1, 3 * g)
    largest = torch.finfo(torch.float32).max
    x[0, g], x[0, g + 1] = largest, -largest
    x[0, 2 * g] = 2.0**-149
    q = intq.quantize(x, scheme)
    scale = scale_of(q).float()
    assert scale[0, 0] == 1
    assert scale[0, 2] == 2.0**-126, "the smallest normal number"
    assert scale.isfinite().all()
    back = intq.dequantize(q)
    assert (back[0, :g] == 0).all() and (back[0, 2 * g :] == 0).all()
    # One step of the coarsest grid at most, rounding of the scale included.
    assert 0.98 * largest <= back[0, g].double() and back[0, g + 1] == -back[0, g]


@EACH
def test_given_scale_is_rounded_used_and_clips(scheme: Scheme, generator: torch.Generator) -> None:
    x = random_matrix(generator, scheme)
    scale = x.view(20, 3, -1).abs().amax(-1) / 2**scheme.bits * 1.01  # about half the range
    q = intq.quantize(x, scheme, scale=scale)
    assert torch.equal(scale_of(q), scale.bfloat16())
    limit = 2 ** (scheme.bits - 1)
    assert integers(q).min() == -limit and integers(q).max() == limit - 1


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_bad_scales_are_refused(bad: float) -> None:
    scheme = SCHEMES["int4-g32"]
    with pytest.raises(NonFiniteWeight, match="scale"):
        intq.quantize(torch.ones(1, 32), scheme, scale=torch.tensor([[bad]]))


def test_ties_go_to_the_even_integer() -> None:
    x = torch.zeros(1, 32)
    x[0, :6] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    q = intq.quantize(x, SCHEMES["int4-g32"], scale=torch.ones(1, 1))
    assert integers(q)[0, :6].tolist() == [0, 2, 2, 0, -2, -2]


def test_mxfp4_is_exact_in_int8(generator: torch.Generator) -> None:
    codes = torch.randint(0, 16, (8, 32), generator=generator, dtype=torch.uint8)
    x = e2m1.decode(codes) * 2.0**-7
    q = intq.quantize(x, SCHEMES["int8-g32"], scale=torch.full((8, 1), 2.0**-8))
    assert torch.equal(intq.dequantize(q), x)


def test_columns_must_be_whole_groups() -> None:
    with pytest.raises(UnsupportedScheme, match="128 columns"):
        intq.quantize(torch.ones(2, 192), SCHEMES["int4-g128"])
