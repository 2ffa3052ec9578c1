"""Rotary positions: two frequency tables for one model.

The last `qk_rope_head_dim` values of a head are pairs (2i, 2i+1), read as complex numbers and
turned by position * f_i. Layers without compression use f_i = rope_theta^(-2i/rd). Layers with
compression use compress_rope_theta and YaRN at every length, long or short: slow frequencies are
divided by `factor`, fast ones kept, and a linear ramp joins them between the dims whose
wavelength makes `beta_slow` and `beta_fast` turns in the original context. No magnitude
correction on top. Because keys are also values, attention's output is turned back by the query's
own position, which makes it relative again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from v4quant_formats.model_config import ModelConfig, Yarn


def rope_frequencies(config: ModelConfig, ratio: int) -> Tensor:
    """Radians per position, float32 `[qk_rope_head_dim / 2]`, for a layer's compression ratio."""
    dim = config.qk_rope_head_dim
    theta = config.compress_rope_theta if ratio else config.rope_theta
    # As the release computes them: another order of operations moves far positions' angles enough
    # to turn roundings of activations.
    frequencies = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if ratio == 0 or config.yarn is None:
        return frequencies
    ramp = _yarn_ramp(config.yarn, dim, theta)
    return frequencies / config.yarn.factor * ramp + frequencies * (1 - ramp)


def rope_table(config: ModelConfig, ratio: int, length: int, device: torch.device) -> Tensor:
    """Unit complex numbers e^(i * position * f), complex64 `[length, qk_rope_head_dim / 2]`."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(config, ratio).to(device))
    return torch.polar(torch.ones_like(angles), angles)


def rotate_tail_(x: Tensor, table: Tensor) -> Tensor:
    """Turn the rope tail of x in place and return x.

    x: float32 `[T, dim]` or `[T, heads, dim]`. table: complex64 `[T, rope_dim / 2]`, row t for
    x[t]; its conjugate turns back.
    """
    tail = x[..., -2 * table.shape[-1] :]
    pairs = torch.view_as_complex(tail.reshape(*tail.shape[:-1], table.shape[-1], 2))
    turns = table if x.dim() == 2 else table.unsqueeze(1)
    tail.copy_(torch.view_as_real(pairs * turns).flatten(-2))
    return x


def _yarn_ramp(yarn: Yarn, dim: int, theta: float) -> Tensor:
    """0 where a frequency is kept, 1 where it is divided; `[dim / 2]`."""

    def dim_of_turns(turns: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(dim_of_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of_turns(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    return ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
