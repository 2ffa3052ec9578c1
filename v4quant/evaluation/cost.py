"""What an evaluation will take, told before it begins.

Counted as `plan` counts forward passes, with what a layer's weights cost to decode, which each pass
does once. Held against measured commands in docs/costs.md. No GPU has been timed.
"""

from __future__ import annotations

from v4quant.planner.effort import CORE_FLOPS, START_SECONDS, active_weights
from v4quant_formats.model_config import Dimensions

_DECODED = 30e6  # weights a second and core, of experts and of both sides of a comparison


def evaluation_hours(
    config: Dimensions,
    tokens: int,
    candidates: int = 0,
    floors: int = 0,
    weights: bool = False,
    left: float = 1.0,
    cores: int = 1,
) -> float:
    """Hours that an evaluation of `tokens` takes on so many cores.

    candidates: beside a reference; 0 for a checkpoint alone, or beside saved logits. floors: noise
    floors. weights: whether matrices are compared. left: part of the layers that is not finished.
    """
    expert = 3 * config.moe_intermediate_size * config.hidden_size
    decoding = config.num_hidden_layers * config.n_routed_experts * expert / _DECODED
    # A candidate runs on its own activations, and layer by layer on the reference's.
    passes = 1 + 2 * candidates + floors
    products = tokens * 2 * active_weights(config) / CORE_FLOPS
    seconds = START_SECONDS + left * passes * (products + decoding)
    if weights and candidates:
        seconds += (1 + candidates) * decoding
    return seconds / cores / 3600
