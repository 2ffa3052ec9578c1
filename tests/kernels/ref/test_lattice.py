"""The assignment tables against direct rounding at every bfloat16 scale of their window."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from v4quant_kernels.ref.lattice import DEPTHS, integer_lattice

POINTS = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def bfloat16_between(low: float, high: float) -> np.ndarray:
    """Every positive bfloat16 in [low, high]."""
    values = torch.arange(1, 0x7F80, dtype=torch.int16).view(torch.bfloat16).double().numpy()
    return values[(low <= values) & (values <= high)]


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_assignments_round_to_nearest_everywhere(blocks: int) -> None:
    lattice = integer_lattice(4, blocks)
    scales = bfloat16_between(lattice.lowest_scale, lattice.highest_scale)
    assert scales[0] == lattice.lowest_scale and scales[-1] == lattice.highest_scale
    chosen = np.searchsorted(lattice.breakpoints.numpy(), scales.astype(np.float32))
    for depth in range(DEPTHS):
        values = POINTS / 2**depth
        nearest = np.clip(np.rint(values / scales[:, None]), -8, 7)
        table = lattice.quantized[depth].numpy()[chosen].astype(np.float64)
        ours = np.abs(table * scales[:, None] - values)
        best = np.abs(nearest * scales[:, None] - values)
        assert (ours == best).all(), depth  # equal, not identical: a tie may go either way


@pytest.mark.parametrize("blocks", [1, 4])
def test_deeper_blocks_round_to_zero(blocks: int) -> None:
    """The deepest row may stand for every deeper one, because it holds zeros only."""
    assert not integer_lattice(4, blocks).quantized[DEPTHS - 1].any()


def test_sums_and_bytes_agree_with_the_integers() -> None:
    lattice = integer_lattice(4, 4)
    n = len(lattice.breakpoints) + 1
    values = (torch.from_numpy(POINTS) * 0.5 ** torch.arange(DEPTHS)[:, None])[:, None]
    q = lattice.quantized.double()
    assert torch.equal(lattice.va.double().view(DEPTHS, 16, n), (values * q).transpose(1, 2))
    assert torch.equal(lattice.qq.double().view(DEPTHS, 16, n), (q * q).transpose(1, 2))
    table = lattice.byte_table().view(DEPTHS, n, 256)
    byte = torch.arange(256)
    assert torch.equal((table & 15).int() - 8, lattice.quantized[..., byte & 15].int())
    assert torch.equal((table >> 4).int() - 8, lattice.quantized[..., byte >> 4].int())


def test_above_the_window_half_the_scale_is_as_good() -> None:
    lattice = integer_lattice(4, 1)
    for scale in bfloat16_between(lattice.highest_scale, 8)[1:]:
        error = [
            np.abs(np.clip(np.rint(POINTS / t), -8, 7) * t - POINTS) for t in (scale, scale / 2)
        ]
        assert (error[1] <= error[0]).all(), scale
