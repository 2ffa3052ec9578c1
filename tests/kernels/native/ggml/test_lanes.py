"""The tile scans and the symmetric search against the same written in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from v4quant_kernels import ggml
from v4quant_kernels.ggml_types import get_type
from v4quant_kernels.native.ggml import lanes as ggml_lanes
from v4quant_kernels.native.ggml.scan import LANES
from v4quant_kernels.ref.ggml_blocks import SHAPES, take_apart

SIZE = 16
LOW, HIGH = np.float32(-4), np.float32(3)


def tile(generator: torch.Generator, positive: bool = False) -> np.ndarray:
    x = torch.randn(SIZE * LANES, generator=generator)
    numbers: np.ndarray = (x.abs() if positive else x).numpy()
    return numbers


def test_scans_of_a_tile(generator: torch.Generator) -> None:
    x, w = tile(generator), tile(generator, positive=True)
    step = (0.1 + torch.rand(LANES, generator=generator)).numpy()
    step[::2] *= -1
    step[5] = 0
    with np.errstate(divide="ignore"):
        inverse = np.where(step == 0, 0, 1 / step).astype(np.float32)
    qq, xq, error = (np.empty(LANES, np.float32) for _ in range(3))
    ggml_lanes.tile_sums(x, w, SIZE, LOW, HIGH, inverse, qq, xq)
    ggml_lanes.tile_errors(x, w, SIZE, LOW, HIGH, step, inverse, error)
    xs, ws = (v.reshape(SIZE, LANES).astype(np.float64) for v in (x, w))
    q = np.rint(np.clip(x.reshape(SIZE, LANES) * inverse, LOW, HIGH)).astype(np.float64)
    np.testing.assert_allclose(qq, (ws * q * q).sum(0), rtol=1e-5)
    np.testing.assert_allclose(xq, (ws * xs * q).sum(0), rtol=1e-5)
    np.testing.assert_allclose(error, (ws * (xs - step * q) ** 2).sum(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["q3_k", "q6_k", "q5_0", "q4_0"])
def test_codes_and_scales_are_the_best_for_each_other(
    name: str, generator: torch.Generator
) -> None:
    """No other integer serves a weight better; seldom a neighbouring scale (beyond the reach)."""
    shape = SHAPES[name]
    x = torch.randn(9, 512, generator=generator)  # fills no whole number of tiles
    blocks = take_apart(ggml.encode(x, name).view(-1, get_type(name).block_bytes), name)
    subs = x.double().view(-1, shape.subs, shape.sub)
    step = blocks.step().double()
    q = blocks.q.view(subs.shape)
    nearest = (subs / step[..., None]).round().clamp(*shape.q)
    off = (q - nearest).abs()
    assert off.max() <= 1 and (off > 0).double().mean() < 1e-3  # ties, in float32
    error = ((subs - step[..., None] * q) ** 2).sum(-1)
    if shape.sc is None or blocks.sc is None:
        return
    for move in (-1, 1):
        sc = (blocks.sc.double() + move).clamp(*shape.sc)
        other = blocks.d.double()[:, None] * sc
        codes = (subs / other[..., None]).nan_to_num(0, 0, 0).round().clamp(*shape.q)
        there = ((subs - other[..., None] * codes) ** 2).sum(-1)
        assert (error <= there * (1 + 1e-5)).double().mean() > 0.97
