"""The compressor: one KV entry for every 4 (CSA) or 128 (HCA) tokens, 1 or 2 in V4.1.

Each token offers a value and a gate per channel; an entry is, channel by channel, the softmax of
the gates over the slots of its block applied to their values. HCA pools the block's own 128
tokens. CSA blocks overlap: eight slots, the previous block's four tokens through the first half of
the projections and the block's own four through the second half; block 0 has no predecessor, which
a gate of minus infinity says. V4.1 has no positional term (`ape`) in its gates, and a block of one
token no gates. Only complete blocks give an entry, so a query never sees a block that holds a later
token. What is pooled is normalised; `entries_of` turns it to the position of its block's first
token.

Projections and pooling are float32 in the release too, so `matmul_dtype` does not apply here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.numerics import rms_norm
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rotate_tail_
from v4quant_formats.model_config import LayerFacts, ModelConfig


@dataclass(frozen=True)
class CompressorWeights:
    """wkv and wgate `[c * D, hidden]`, ape `[ratio, c * D]`, norm `[D]`; c = 2 for CSA, else 1.

    V4.1 has no ape, and no wgate where a block is one token.
    """

    wkv: Tensor
    wgate: Tensor | None
    ape: Tensor | None
    norm: Tensor


def load_compressor(params: Params, prefix: str, facts: LayerFacts) -> CompressorWeights:
    """Read the compressor called `prefix`, e.g. "layers.2.attn.compressor"."""
    return CompressorWeights(
        wkv=params(f"{prefix}.wkv"),
        wgate=params(f"{prefix}.wgate") if facts.gates_entries else None,
        ape=params(f"{prefix}.ape") if facts.places_entries else None,
        norm=params(f"{prefix}.norm"),
    )


def pool(x: Tensor, weights: CompressorWeights, facts: LayerFacts, config: ModelConfig) -> Tensor:
    """Latents of one sequence's blocks, normalised, before any position.

    x: float32 `[S, hidden]`, a sequence from position 0, or a piece of it from a multiple of
    `ratio` on, whose first entry then lacks its predecessor in CSA layers. Returns float32
    `[S // ratio, D]`.
    """
    blocks = x.shape[0] // facts.ratio
    whole = x[: blocks * facts.ratio]
    values = (whole @ weights.wkv.mT).view(blocks, facts.ratio, weights.wkv.shape[0])
    if weights.wgate is None:
        return rms_norm(values[:, 0], weights.norm, config.rms_norm_eps)
    gates = (whole @ weights.wgate.mT).view_as(values)
    if weights.ape is not None:
        gates += weights.ape
    if facts.overlaps:
        values, gates = _overlap(values, 0.0), _overlap(gates, -torch.inf)
    pooled = (gates.softmax(1) * values).sum(1)
    return rms_norm(pooled, weights.norm, config.rms_norm_eps)


def entries_of(latents: Tensor, table: Tensor, ratio: int) -> Tensor:
    """Latents `[n, D]` in place at their blocks' positions; table: rope rows from the first token's
    on, at least n * ratio."""
    return rotate_tail_(latents, table[: latents.shape[0] * ratio : ratio])


def _overlap(slots: Tensor, absent: float) -> Tensor:
    """`[blocks, 4, 2D]` to `[blocks, 8, D]`: predecessor's first half, then own second half."""
    before, own = slots.chunk(2, dim=-1)
    shifted = torch.cat([torch.full_like(before[:1], absent), before[:-1]])
    return torch.cat([shifted, own], dim=1)
