"""The router: which experts a token visits, and with what weight.

Scores are sqrt(softplus(gate . x)) in float32. The first layers choose by a table from token id to
experts (`tid2eid`); the others take the top_k of score + bias, where the bias only balances load
during training and never enters the weights. In V4.1's trunk positions of images have a bias of
their own. Weights are the chosen scores, normalised to sum one,
times `routed_scaling_factor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from v4quant_calibration.model.numerics import top_k_lowest_index
from v4quant_calibration.model.params import Params
from v4quant_formats.model_config import LayerFacts, ModelConfig


@dataclass(frozen=True)
class Routing:
    """Experts of each token, int64 `[T, top_k]`, and their weights, float32 `[T, top_k]`."""

    expert_ids: Tensor
    weights: Tensor


def image_positions(token_ids: Tensor, config: ModelConfig) -> Tensor:
    """Which tokens stand for parts of an image, bool `[T]`; none in V4's text trunk."""
    if config.image_token_id is None:
        return torch.zeros_like(token_ids, dtype=torch.bool)
    return token_ids == config.image_token_id


def route(
    x: Tensor, token_ids: Tensor, params: Params, facts: LayerFacts, config: ModelConfig
) -> Routing:
    """Route T tokens: x normalised `[T, hidden]`, token_ids int64 `[T]`.

    Raises NonFiniteActivation when scores are NaN.
    """
    gate = f"{facts.name}.ffn.gate"
    scores = softplus(x @ params(gate).mT).sqrt()
    if facts.hashed:
        expert_ids = params(f"{gate}.tid2eid")[token_ids]
    else:
        biased = scores + params(f"{gate}.bias")
        images = image_positions(token_ids, config)
        if not facts.draft and bool(images.any()):
            seen = scores + params(f"{gate}.bias_vl")
            biased = torch.where(images.unsqueeze(-1), seen, biased)
        expert_ids = top_k_lowest_index(biased, facts.experts_per_token, gate)
    chosen = torch.gather(scores, -1, expert_ids)
    weights = chosen / chosen.sum(-1, keepdim=True) * config.routed_scaling_factor
    return Routing(expert_ids, weights)
