"""The router: which experts a token visits, and with what weight.

Scores are sqrt(softplus(gate . x)) in float32. The first layers choose by a table from token id to
experts (`tid2eid`); the others take the top_k of score + bias, where the bias only balances load
during training and never enters the weights. Weights are the chosen scores, normalised to sum one,
times `routed_scaling_factor`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from v4quant_calibration.model.numerics import top_k_lowest_index
from v4quant_calibration.model.params import Params
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Experts of each token, int64 `[T, top_k]`, and their weights, float32 `[T, top_k]`."""

    expert_ids: Tensor
    weights: Tensor


def route(
    x: Tensor, token_ids: Tensor, params: Params, layer: str, hashed: bool, config: ModelConfig
) -> Routing:
    """Route T tokens: x normalised `[T, hidden]`, token_ids int64 `[T]`.

    `hashed` says whether the layer has a table instead of a bias. Raises NonFiniteActivation
    when scores are NaN.
    """
    gate = f"{layer}.ffn.gate"
    scores = softplus(x @ params(gate).mT).sqrt()
    if hashed:
        expert_ids = params(f"{gate}.tid2eid")[token_ids]
    else:
        biased = scores + params(f"{gate}.bias")
        expert_ids = top_k_lowest_index(biased, config.num_experts_per_tok, gate)
    chosen = torch.gather(scores, -1, expert_ids)
    weights = chosen / chosen.sum(-1, keepdim=True) * config.routed_scaling_factor
    return Routing(expert_ids, weights)
