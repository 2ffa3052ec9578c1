"""NVFP4 against float64 by definition and compressed-tensors' decompressor."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.quantization import preset_name_to_scheme

from v4quant_kernels.errors import NonFiniteWeight, UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import nvfp4
from v4quant_kernels.scheme import SCHEMES

NVFP4 = SCHEMES["nvfp4"]


def random_matrix(generator: torch.Generator, spread: int = 6) -> torch.Tensor:
    exponent = torch.randint(-spread, 1, (32, 8, 1), generator=generator)
    return (torch.randn(32, 8, 16, generator=generator) * torch.exp2(exponent.float())).view(32, -1)


def scales(q: QTensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert q.scale is not None and q.scale.dtype == torch.float8_e4m3fn
    assert q.global_scale is not None and q.global_scale.dtype == torch.float32
    assert q.global_scale.shape == ()
    return q.scale.float(), q.global_scale


def test_dequantize_by_definition(generator: torch.Generator) -> None:
    codes = torch.randint(0, 256, (128, 8), generator=generator, dtype=torch.uint8)
    scale = torch.arange(127, dtype=torch.uint8).repeat(2)[:128, None].view(torch.float8_e4m3fn)
    global_scale = torch.rand((), generator=generator) * 1e-3 + 1e-6
    q = QTensor(NVFP4, (128, 16), codes, scale, global_scale)
    nibbles = np.stack([codes.numpy() & 15, codes.numpy() >> 4], -1).reshape(128, 16)
    elements = nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    exact = elements * scale.double().numpy() * float(global_scale)
    assert torch.equal(nvfp4.dequantize(q), torch.from_numpy(exact.astype(np.float32)))


def test_dequantize_like_compressed_tensors(generator: torch.Generator) -> None:
    """Their divisor is our reciprocal; with a power of two their bfloat16 arithmetic is exact."""
    codes = torch.randint(0, 256, (16, 64), generator=generator, dtype=torch.uint8)
    bytes_ = torch.randint(0, 127, (16, 8), generator=generator, dtype=torch.uint8)
    scale = bytes_.view(torch.float8_e4m3fn)
    q = QTensor(NVFP4, (16, 128), codes, scale, torch.tensor(2.0**-12))
    theirs = NVFP4PackedCompressor.decompress(
        {
            "weight_packed": codes,
            "weight_scale": scale,
            "weight_global_scale": torch.tensor([2.0**12]),
        },
        preset_name_to_scheme("NVFP4", ["Linear"]),
    )
    assert torch.equal(nvfp4.dequantize(q), theirs["weight"].float())


def test_quantize_by_definition(generator: torch.Generator) -> None:
    x = random_matrix(generator)
    q = nvfp4.quantize(x, NVFP4)
    scale, global_scale = scales(q)
    assert global_scale == x.abs().max() / 2688
    groups = x.view(32, 8, 16)
    wanted = groups.abs().amax(-1) / (6 * global_scale)
    theirs = wanted.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert torch.equal(scale, torch.from_numpy(theirs))
    assert scale.max() == 448
    step = scale * global_scale
    elements = (groups / step[..., None]).numpy().astype(ml_dtypes.float4_e2m1fn)
    expected = torch.from_numpy(elements.astype(np.float32)) * scale[..., None] * global_scale
    assert torch.equal(nvfp4.dequantize(q), expected.view(32, -1))


def test_zero_groups_and_zero_matrices() -> None:
    x = torch.zeros(2, 32)
    q = nvfp4.quantize(x, NVFP4)
    assert scales(q)[1] == 1 and (scales(q)[0] == 1).all()
    assert torch.equal(nvfp4.dequantize(q), x)
    x[0, 3], x[1, 20] = 2.0, -0.0
    q = nvfp4.quantize(x, NVFP4)
    assert scales(q)[0].tolist() == [[448.0, 1.0], [1.0, 1.0]]
    back = nvfp4.dequantize(q)
    assert torch.equal(torch.signbit(back), torch.signbit(x))
    torch.testing.assert_close(back, x)


def test_no_zero_scale_for_a_group_that_holds_something() -> None:
    x = torch.zeros(1, 48)
    x[0, 0] = 2688.0  # the global scale is 1
    x[0, 16] = 2.0**-9  # would ask for the scale 2^-9 / 6, which rounds to 0
    x[0, 32] = 2.0**-30  # nothing can hold this
    q = nvfp4.quantize(x, NVFP4)
    assert scales(q)[0].tolist() == [[448.0, 2.0**-9, 2.0**-9]]
    assert nvfp4.dequantize(q)[0, ::16].tolist() == [2688.0, 2.0**-9, 0.0]


def test_tiny_and_huge_matrices_stay_finite() -> None:
    for size in (2.0**-149, 2.0**-120, 2.0**-60, 2.0**100, 3e38):
        x = torch.full((1, 16), size)
        q = nvfp4.quantize(x, NVFP4)
        scale, global_scale = scales(q)
        assert (scale > 0).all() and global_scale >= 2.0**-100
        back = nvfp4.dequantize(q)
        assert back.isfinite().all()
        if size > 2.0**-80:
            torch.testing.assert_close(back, x)


def test_quantizing_again_keeps_every_value(generator: torch.Generator) -> None:
    q = nvfp4.quantize(random_matrix(generator), NVFP4)
    assert scales(q)[0].min() >= 2.0**-6, "the premise: normal scales"
    once = nvfp4.dequantize(q)
    again = nvfp4.quantize(once, NVFP4, global_scale=q.global_scale)
    assert torch.equal(nvfp4.dequantize(again), once)
    assert torch.equal(scales(again)[0], scales(q)[0])


def test_global_scale_too_small_saturates() -> None:
    x = torch.tensor([[1.0, -1e6] * 8])
    q = nvfp4.quantize(x, NVFP4, global_scale=torch.tensor([1.0]))
    assert nvfp4.dequantize(q)[0, :2].tolist() == [0.0, -2688.0]


def test_given_scale_is_used(generator: torch.Generator) -> None:
    x = random_matrix(generator)
    q = nvfp4.quantize(x, NVFP4)
    same = nvfp4.quantize(x, NVFP4, scale=q.scale, global_scale=q.global_scale)
    assert torch.equal(same.codes, q.codes)


@pytest.mark.parametrize("bad", [0.0, -1.0, torch.inf, torch.nan])
def test_bad_scales_are_refused(bad: float) -> None:
    x = torch.ones(1, 16)
    with pytest.raises(NonFiniteWeight, match="global scale"):
        nvfp4.quantize(x, NVFP4, global_scale=torch.tensor(bad))
    if bad != torch.inf:
        scale = torch.tensor([[bad]]).to(torch.float8_e4m3fn)
        with pytest.raises(NonFiniteWeight, match="E4M3 scale"):
            nvfp4.quantize(x, NVFP4, scale=scale)


def test_columns_must_be_whole_groups() -> None:
    with pytest.raises(UnsupportedScheme, match="16 columns"):
        nvfp4.quantize(torch.ones(2, 24), NVFP4)
