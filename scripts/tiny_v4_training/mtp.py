"""The multi-token-prediction stage, trained on the finished trunk.

transformers does not know this stage, so it is built here from its layers: at position s the
trunk's streams h and the token s + 1 are joined per stream, x_j = e_proj . enorm(embedding) +
h_proj . hnorm(h_j); one window layer, an own collapse and norm, and the trunk's head give the
logits of token s + 2. The trunk is frozen: the stage must learn to follow it, not to change it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV4ForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4DecoderLayer,
    DeepseekV4HyperHead,
    DeepseekV4RMSNorm,
)

from tiny_v4_training.model import library_config


class MtpStage(nn.Module):
    """One draft stage. Embedding, head and rotary tables are the trunk's."""

    def __init__(self, raw: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        config = library_config(raw, extra_layers=1)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.window = config.sliding_window
        self.e_proj = nn.Linear(width, width, bias=False)
        self.h_proj = nn.Linear(width, width, bias=False)
        self.enorm = DeepseekV4RMSNorm(width, eps)
        self.hnorm = DeepseekV4RMSNorm(width, eps)
        self.norm = DeepseekV4RMSNorm(width, eps)
        self.layer = DeepseekV4DecoderLayer(config, config.num_hidden_layers - 1)
        self.hc_head = DeepseekV4HyperHead(config)
        for parameter in self.parameters():
            if parameter.ndim >= 2:
                nn.init.normal_(parameter, std=config.initializer_range)
        for module in (self.layer.attn_hc, self.layer.ffn_hc):
            nn.init.zeros_(module.base)
            nn.init.ones_(module.scale)
        nn.init.zeros_(self.hc_head.hc_base)
        nn.init.ones_(self.hc_head.hc_scale)
        nn.init.zeros_(self.layer.self_attn.sinks)

    def forward(self, trunk: DeepseekV4ForCausalLM, streams: Tensor, next_ids: Tensor) -> Tensor:
        """Logits `[batch, length, vocab]` of the token after the next.

        streams: the trunk's, `[batch, length, hc_mult, hidden]`. next_ids: int64 `[batch, length]`.
        """
        token = self.e_proj(self.enorm(trunk.model.embed_tokens(next_ids)))
        x = self.h_proj(self.hnorm(streams)) + token.unsqueeze(2)
        length = next_ids.shape[1]
        positions = torch.arange(length).unsqueeze(0)
        angles = trunk.model.rotary_emb(token, position_ids=positions, layer_type="main")
        x = self.layer(
            x,
            input_ids=next_ids,
            position_embeddings={"main": angles},
            position_ids=positions,
            attention_mask=window_mask(length, self.window),
        )
        logits: Tensor = trunk.lm_head(self.norm(self.hc_head(x)))
        return logits


def window_mask(length: int, window: int) -> Tensor:
    """Additive mask `[1, 1, length, length]`: a query sees itself and window - 1 keys before."""
    distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(1, 1, length, length).masked_fill(hidden, torch.finfo(torch.float32).min)


@torch.no_grad()
def trunk_streams(trunk: DeepseekV4ForCausalLM, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The trunk's final streams `[batch, length, hc_mult, hidden]` and its logits."""
    kept: list[Tensor] = []
    hook = trunk.model.hc_head.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        logits = trunk(ids, use_cache=False).logits
    finally:
        hook.remove()
    return kept[0], logits
