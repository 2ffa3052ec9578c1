"""Small parts that every module of the V4.1 trunk is made of: norms, matrices, angles, windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tiny_v4_training.v41_engram import unit


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight` in float32."""
        return unit(x.float()) * self.weight


def plain_linear(inputs: int, outputs: int) -> nn.Linear:
    """A matrix without a bias."""
    return nn.Linear(inputs, outputs, bias=False)


def window_visible(length: int, window: int) -> Tensor:
    """bool `[1, length, length]`: a query sees itself and `window - 1` keys before it."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    return ((distance >= 0) & (distance < window)).unsqueeze(0)


def rope_angles(c: Mapping[str, Any], length: int) -> dict[bool, Tensor]:
    """Unit complex numbers `[length, rope / 2]`, plain (False) and compressed with YaRN (True)."""
    rd, scaling = c["qk_rope_head_dim"], c["rope_scaling"]
    at = torch.arange(0, rd, 2, dtype=torch.float32) / rd
    plain = 1.0 / c["rope_theta"] ** at
    theta, original = c["compress_rope_theta"], scaling["original_max_position_embeddings"]

    def turn(beta: float) -> float:
        return float(rd * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta)))

    low = max(math.floor(turn(scaling["beta_fast"])), 0)
    high = min(math.ceil(turn(scaling["beta_slow"])), rd - 1)
    ramp = ((torch.arange(rd // 2) - low) / (high - low)).clamp(0, 1)
    wide = 1.0 / theta**at
    wide = wide / scaling["factor"] * ramp + wide * (1 - ramp)
    steps = torch.arange(length, dtype=torch.float32)
    return {
        far: torch.polar(torch.ones(length, rd // 2), torch.outer(steps, f))
        for far, f in ((False, plain), (True, wide))
    }


def rotate(x: Tensor, angles: Tensor, rope: int) -> Tensor:
    """x `[..., length, dim]` with its last `rope` dimensions turned in interleaved pairs."""
    still, turned = x[..., :-rope], x[..., -rope:].float()
    pairs = torch.view_as_complex(turned.unflatten(-1, (-1, 2)).contiguous())
    turned = torch.view_as_real(pairs * angles).flatten(-2)
    return torch.cat([still, turned.to(x.dtype)], dim=-1)
