"""Which search runs for which GGML type, and over which families of candidates.

A family is what a sub-block tries first: for symmetric types the largest magnitude over the step,
for types with minima the step as a fraction of (highest - lowest) / high together with how far the
lowest value is raised. The ranges were chosen on normal, heavy-tailed and FP4 weights such that
widening them further gains nothing on average.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v4quant_kernels.native.ggml import codebook_search
from v4quant_kernels.native.ggml import levels as ggml_levels
from v4quant_kernels.native.ggml import minimum as ggml_minimum
from v4quant_kernels.native.ggml import symmetric as ggml_symmetric
from v4quant_kernels.native.ggml.scan import F32, LANES
from v4quant_kernels.ref.ggml_blocks import SHAPES
from v4quant_kernels.ref.ggml_fields import Blocks, BlockShape

ROUNDS = 1
"""Times a real grid is solved again for the integers it assigns."""

TURNS = {"q2_k": 2, "q4_k": 3, "q5_k": 3}

_STEPS = {
    "q3_k": ((2.5, 4.8, 4, 2), (2.2, 5.5, 10, 5)),
    "q6_k": ((28.0, 36.0, 12, 5), (28.0, 36.0, 12, 5)),
    "q5_0": ((14.2, 16.2, 3, 0), (13.0, 18.0, 16, 0)),
    "q2_0": ((1.0, 3.4, 13, 0), (0.9, 4.0, 25, 0)),
    "q4_0": ((6.3, 8.7, 4, 0), (6.0, 9.5, 16, 0)),
}
"""Without and with importance: the ends and the number of steps of either sign, and how far `sc`
may be from the nearest. With importance more is worth its time, and llama.cpp takes more."""

_GRIDS = {
    "q2_k": ((0.8, 1.6), (0.0, 0.24)),
    "q4_k": ((0.94, 1.3), (0.0, 0.06)),
    "q5_k": ((0.97, 1.12), (0.0, 0.03)),
    "q5_1": ((0.97, 1.12), (0.0, 0.03)),
}
_EXACT_BITS = {"q8_0": 6, "q6_k": 4, "q5_0": 3}
"""Symmetric types that hold lattice points: the top binade of their integers."""


@cache
def _steps(name: str, uneven: bool) -> tuple[F32, int]:
    """The family of steps and the reach among scales."""
    first, last, count, reach = _STEPS[name][uneven]
    steps = np.linspace(first, last, count, dtype=np.float32)
    return np.concatenate([steps, -steps]), reach


@cache
def _grids(name: str) -> F32:
    factors, raised = _GRIDS[name]
    pairs = np.meshgrid(np.linspace(*factors, 8), np.linspace(*raised, LANES // 8), indexing="ij")
    return np.stack([p.reshape(-1) for p in pairs]).astype(np.float32)


@cache
def _window() -> F32:
    """Integers tried around the nearest: eight of sc, and four of m along its slope."""
    pairs = np.meshgrid(np.arange(-3, 5), np.arange(-1, LANES // 8 - 1), indexing="ij")
    return np.stack([p.reshape(-1) for p in pairs]).astype(np.float32)


def search(x: Tensor, name: str, importance: Tensor | None) -> Blocks:
    """Blocks from finite float32 `[rows, K]`, K a multiple of the block.

    `importance`: float32 `[K]`, not negative. Half-precision scales overflow to infinity.
    """
    shape = SHAPES[name]
    weights = _weights(importance, shape.block)
    if shape.codebook is not None:
        return codebook_search.search(x, name, torch.from_numpy(weights))
    blocks = x.reshape(-1, shape.block).numpy()
    count = blocks.shape[0]
    q = np.empty((count, shape.block), np.int8)
    d = np.empty(count, np.float32)
    if shape.levels:
        return _search_levels(blocks, weights, shape, q, d)
    if shape.sc is None:
        lowest = _search_single(blocks, weights, name, shape, q, d)
        return _as_blocks(q, d, None, lowest, None)
    sc = np.empty((count, shape.subs), np.int8)
    low, high = (np.float32(v) for v in shape.q)
    bottom, limit = (np.float32(v) for v in shape.sc)
    if not shape.has_minimum:
        bits = _EXACT_BITS.get(name, 0)
        steps, reach = _steps(name, _uneven(weights))
        ggml_symmetric.search_symmetric(
            blocks, weights, low, high, bottom, limit, bits, steps, reach, q, sc, d
        )
        return _as_blocks(q, d, sc, None, None)
    m, dmin = np.empty_like(sc), np.empty_like(d)
    ggml_minimum.search_minimum(
        blocks,
        weights,
        high,
        limit,
        name == "q5_k",
        _grids(name),
        _window(),
        ROUNDS,
        TURNS[name],
        q,
        sc,
        m,
        d,
        dmin,
    )
    return _as_blocks(q, d, sc, dmin, m)


def _search_levels(x: F32, weights: F32, shape: BlockShape, q: NDArray[np.int8], d: F32) -> Blocks:
    sc = np.empty((len(x), shape.subs), np.int8)
    levels = np.array(shape.levels, np.float32)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    limits = np.array(shape.sc or (), np.float32)
    ggml_levels.search_levels(x, weights, ggml_levels.FAMILY, limits, levels, middles, q, sc, d)
    return _as_blocks(q, d, sc if shape.sc else None, None, None)


def _search_single(
    x: F32, weights: F32, name: str, shape: BlockShape, q: NDArray[np.int8], d: F32
) -> F32 | None:
    """The types of one scale per block; returns the lowest values of q5_1."""
    low, high = (np.float32(v) for v in shape.q)
    if name == "q8_0":
        ggml_symmetric.round_bytes(x, _EXACT_BITS[name], q, d)
    elif shape.has_minimum:
        lowest = np.empty_like(d)
        ggml_minimum.search_single_minimum(x, weights, high, _grids(name), ROUNDS, q, d, lowest)
        return lowest
    else:
        bits = _EXACT_BITS.get(name, 0)
        steps, _ = _steps(name, _uneven(weights))
        ggml_symmetric.search_single(x, weights, low, high, bits, steps, q, d)
    return None


def _weights(importance: Tensor | None, block: int) -> F32:
    """float32 `[blocks a row, block]` about 1; zeros are lifted: every system stays solvable."""
    if importance is None:
        return np.ones((1, block), np.float32)
    weights = importance.double()
    mean = weights.mean()
    scaled = weights / mean if bool(mean > 0) else torch.ones_like(weights)
    return scaled.clamp(1e-6, 1e12).float().view(-1, block).numpy()


def _uneven(weights: F32) -> bool:
    return bool(weights.min() != weights.max())


def _as_blocks(
    q: NDArray[np.int8],
    d: F32,
    sc: NDArray[np.int8] | None,
    dmin: F32 | None,
    m: NDArray[np.int8] | None,
) -> Blocks:
    def half(x: F32) -> Tensor:
        return torch.from_numpy(x).half()

    return Blocks(
        torch.from_numpy(q),
        half(d),
        None if sc is None else torch.from_numpy(sc),
        None if dmin is None else half(dmin),
        None if m is None else torch.from_numpy(m),
    )
