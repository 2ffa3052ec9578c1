"""The compressor: one KV entry for every 4 (CSA) or 128 (HCA) tokens.

Each token offers a value and a gate per channel; an entry is, channel by channel, the softmax of
the gates over the slots of its block applied to their values. HCA pools the block's own 128
tokens. CSA blocks overlap: eight slots, the previous block's four tokens through the first half of
the projections and the block's own four through the second half; block 0 has no predecessor, which
a gate of minus infinity says. Only complete blocks give an entry, so a query never sees a block
that holds a later token. The entry stands at the position of its block's first token.

Projections and pooling are float32 in the release too, so `matmul_dtype` does not apply here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.numerics import rms_norm
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rotate_tail_
from v4quant_formats.model_config import CSA_RATIO, ModelConfig


@dataclass(frozen=True)
class CompressorWeights:
    """wkv and wgate `[c * D, hidden]`, ape `[ratio, c * D]`, norm `[D]`; c = 2 for CSA, else 1."""

    wkv: Tensor
    wgate: Tensor
    ape: Tensor
    norm: Tensor


def load_compressor(params: Params, prefix: str) -> CompressorWeights:
    """Read the compressor called `prefix`, e.g. "layers.2.attn.compressor"."""
    names = ("wkv", "wgate", "ape", "norm")
    return CompressorWeights(*(params(f"{prefix}.{name}") for name in names))


def compress(
    x: Tensor, weights: CompressorWeights, ratio: int, table: Tensor, config: ModelConfig
) -> Tensor:
    """Compressed entries of one sequence, normalised and roped, before any rounding.

    x: float32 `[S, hidden]`, a sequence from position 0, or a piece of it from a multiple of
    `ratio` on, whose first entry then lacks its predecessor in CSA layers. table: rope table of at
    least S rows, the first for x[0]. Returns float32 `[S // ratio, D]`.
    """
    blocks = x.shape[0] // ratio
    whole = x[: blocks * ratio]
    values = (whole @ weights.wkv.mT).view(blocks, *weights.ape.shape)
    gates = (whole @ weights.wgate.mT).view(blocks, *weights.ape.shape) + weights.ape
    if ratio == CSA_RATIO:
        values, gates = _overlap(values, 0.0), _overlap(gates, -torch.inf)
    pooled = (gates.softmax(1) * values).sum(1)
    entries = rms_norm(pooled, weights.norm, config.rms_norm_eps)
    return rotate_tail_(entries, table[: blocks * ratio : ratio])


def _overlap(slots: Tensor, absent: float) -> Tensor:
    """`[blocks, 4, 2D]` to `[blocks, 8, D]`: predecessor's first half, then own second half."""
    before, own = slots.chunk(2, dim=-1)
    shifted = torch.cat([torch.full_like(before[:1], absent), before[:-1]])
    return torch.cat([shifted, own], dim=1)
