"""DSpark of V4.1, trained on the finished trunk: a block of tokens drafted at once.

After position p the stages see, in each position's window, keys made of the trunk's states at its
target layers, and a block `[y, noise, ...]` of which y is the token at p + 1. Slot i predicts the
token at p + 2 + i from its state and, through the Markov head, from the token before it, which in
training is the true one. The confidence head learns whether the slot's best token is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_v4_training.v41_attention import Attention
from tiny_v4_training.v41_model import Layer, V41Trunk, collapse, initialise, start_streams
from tiny_v4_training.v41_parts import Norm, rope_angles


class Block:
    """What the stages share: keys of the trunk's states, and where each block stands.

    main: `[batch, length, hidden]`. anchors: int64 `[batch, blocks]`, positions p.
    """

    def __init__(self, c: Mapping[str, Any], main: Tensor, anchors: Tensor) -> None:
        self.main, self.anchors, self.size = main, anchors, c["dspark_block_size"]
        self.angles = rope_angles(c, main.shape[1] + self.size + 1)[False]
        distance = anchors.unsqueeze(-1) - torch.arange(main.shape[1])
        self.visible = (distance >= 0) & (distance < c["sliding_window"])


class DraftAttention(Attention):
    """Attention of a stage: the window before the anchor and the whole block, both ways."""

    def forward(self, x: Tensor, p: Any) -> Tensor:
        """x: `[batch, blocks * size, hidden]`, block after block."""
        batch, blocks = p.anchors.shape
        steps = (p.anchors.unsqueeze(-1) + 1 + torch.arange(p.size)).flatten(1)
        angles = p.angles[steps]
        _, q = self.queries(x, angles.unsqueeze(1))
        far = self.window_keys(p.main, p.angles[: p.main.shape[1]])
        near = self.window_keys(x, angles)
        which = torch.arange(blocks).repeat_interleave(p.size)
        own = (which.unsqueeze(1) == which).expand(batch, -1, -1)
        visible = torch.cat([p.visible.repeat_interleave(p.size, dim=1), own], dim=-1)
        out, _ = self.attend(q, torch.cat([far, near], dim=1), visible)
        return self.project(out, angles.unsqueeze(1))


class Draft(nn.Module):
    """All stages. Embedding and head are the trunk's."""

    def __init__(self, c: Mapping[str, Any], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.c = c
        width, rank, vocab = c["hidden_size"], c["dspark_markov_rank"], c["vocab_size"]
        experts, top = c["dspark_n_routed_experts"], c["dspark_num_experts_per_tok"]
        self.mtp = nn.ModuleList(
            Layer(c, None, experts, top, None) for _ in range(c["num_nextn_predict_layers"])
        )
        for layer in self.mtp:
            layer.attn = DraftAttention(c, None)
        first: Any = self.mtp[0]
        last: Any = self.mtp[-1]
        sources = len(c["dspark_target_layer_ids"])
        first.main_proj = nn.Linear(sources * width, width, bias=False)
        first.main_norm = Norm(width)
        last.norm = Norm(width)
        last.markov_head = nn.ModuleDict(
            {"embed": nn.Embedding(vocab, rank), "head": nn.Linear(rank, vocab, bias=False)}
        )
        last.confidence_head = nn.ModuleDict({"proj": nn.Linear(width + rank, 1, bias=False)})
        initialise(self, c["initializer_range"])

    def forward(
        self, trunk: V41Trunk, targets: Tensor, anchors: Tensor, before: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Logits `[batch, blocks, size, vocab]` and confidence logits `[batch, blocks, size]`.

        targets: the trunk's states at its target layers `[batch, length, k * hidden]`. before:
        int64 `[batch, blocks, size]`, for each slot the token before the one it predicts.
        """
        c = self.c
        first: Any = self.mtp[0]
        last: Any = self.mtp[-1]
        block = Block(c, first.main_norm(first.main_proj(targets)), anchors)
        ids = torch.full_like(before, c["dspark_noise_token_id"])
        ids[..., 0] = before[..., 0]
        h, pre = start_streams(trunk.embed(ids).flatten(1, 2), c["hc_mult"])
        for layer in self.mtp:
            h, pre = layer(h, pre, block)
        x = collapse(pre, h).unflatten(1, (-1, block.size))
        previous = last.markov_head["embed"](before)
        logits = trunk.head(last.norm(x)) + last.markov_head["head"](previous)
        sure = last.confidence_head["proj"](torch.cat([x, previous.to(x.dtype)], dim=-1))
        return logits, sure.squeeze(-1)


def block_windows(windows: Tensor, size: int, every: int) -> tuple[Tensor, Tensor, Tensor]:
    """anchors `[batch, blocks]`, tokens before and tokens to predict `[batch, blocks, size]`."""
    length = windows.shape[1]
    at = torch.arange(every // 2, length - size - 2, every)
    slots = at.unsqueeze(1) + 1 + torch.arange(size)
    anchors = at.expand(windows.shape[0], -1)
    return anchors, windows[:, slots], windows[:, slots + 1]


def draft_loss(logits: Tensor, sure: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy over all slots, and that of the confidence in the best token."""
    flat = logits.flatten(0, -2).float()
    right = flat.detach().argmax(-1) == wanted.flatten()
    side = F.binary_cross_entropy_with_logits(sure.flatten().float(), right.float())
    return F.cross_entropy(flat, wanted.flatten()), side
