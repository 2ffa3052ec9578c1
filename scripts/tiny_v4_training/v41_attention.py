"""Attention of the V4.1 trunk: windows, shared compressed entries, and the choice among them.

Compressed keys, index keys and the list of chosen entries belong to source layers and are read by
the layers behind them, through the `Pass` that layers hand on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_v4_training.v41_parts import Norm, plain_linear, rotate, window_visible

INDEX_EVERY = 4


@dataclass
class Pass:
    """What layers hand on while one batch goes through."""

    angles: dict[bool, Tensor]  # compressed or not: complex64 [length, rope / 2]
    everything: bool  # let attention see every entry, not the chosen ones only
    muted: range = range(0)  # layers whose attention adds nothing
    entries: Tensor | None = None  # [batch, entries, head_dim]
    index_keys: Tensor | None = None
    ratio: int = 0
    chosen: Tensor | None = None  # bool [batch, length, entries]
    candidates: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)  # of each index source
    attended: list[Tensor] = field(default_factory=list)  # sums beside `scores`


class Indexer(nn.Module):
    """Scores of entries for each query: `sum_h w_h relu(q_h . k)`."""

    def __init__(self, c: Mapping[str, Any], has_keys: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.rope = (
            c["index_n_heads"],
            c["index_head_dim"],
            c["qk_rope_head_dim"],
        )
        self.wq_b = plain_linear(c["q_lora_rank"], self.heads * self.dim)
        self.weights_proj = plain_linear(c["hidden_size"], self.heads)
        if has_keys:
            self.wk = plain_linear(c["head_dim"], self.dim)
            self.k_norm = Norm(self.dim)

    def keys(self, latent: Tensor, angles: Tensor) -> Tensor:
        """Index keys `[batch, entries, dim]` of a compressor's latents, before their rope."""
        return rotate(self.k_norm(self.wk(latent)), angles, self.rope)

    def forward(self, x: Tensor, qr: Tensor, keys: Tensor, angles: Tensor) -> Tensor:
        """Scores `[batch, length, entries]`."""
        q = self.wq_b(qr).unflatten(-1, (self.heads, self.dim)).transpose(1, 2)
        q = rotate(q.float(), angles, self.rope)
        w = self.weights_proj(x).float() * (self.dim * self.heads) ** -0.5
        dots = F.relu(q @ keys.unsqueeze(1).mT).float()
        return torch.einsum("bhse,bsh->bse", dots, w)


class Compressor(nn.Module):
    """Latents of groups of `ratio` tokens: a softmax over the group per channel, then a norm."""

    def __init__(self, c: Mapping[str, Any], ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.wkv = plain_linear(c["hidden_size"], c["head_dim"])
        self.norm = Norm(c["head_dim"])
        if ratio > 1:
            self.wgate = plain_linear(c["hidden_size"], c["head_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length // ratio, head_dim]`."""
        kv = self.wkv(x).float()
        if self.ratio > 1:
            whole = x.shape[1] // self.ratio * self.ratio
            groups = (-1, self.ratio)
            share = self.wgate(x[:, :whole]).float().unflatten(1, groups).softmax(2)
            kv = (share * kv[:, :whole].unflatten(1, groups)).sum(2)
        entries: Tensor = self.norm(kv)
        return entries


class Attention(nn.Module):
    """Window attention, and over the entries of the shared cache where the layer reads one."""

    def __init__(self, c: Mapping[str, Any], layer: int | None) -> None:
        super().__init__()
        self.c, self.layer = c, layer
        self.ratio = 0 if layer is None else c["compress_ratios"][layer]
        heads, dim, groups = c["num_attention_heads"], c["head_dim"], c["o_groups"]
        self.wq_a = plain_linear(c["hidden_size"], c["q_lora_rank"])
        self.q_norm = Norm(c["q_lora_rank"])
        self.wq_b = plain_linear(c["q_lora_rank"], heads * dim)
        self.wkv = plain_linear(c["hidden_size"], dim)
        self.kv_norm = Norm(dim)
        self.wo_a = plain_linear(heads * dim // groups, groups * c["o_lora_rank"])
        self.wo_b = plain_linear(groups * c["o_lora_rank"], c["hidden_size"])
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        is_source = layer in c["kv_source_layer_ids"]
        if is_source:
            self.compressor = Compressor(c, self.ratio)
        if layer in c["index_source_layer_ids"]:
            self.indexer = Indexer(c, is_source)

    def forward(self, x: Tensor, p: Pass) -> Tensor:
        """`[batch, length, hidden]`."""
        if self.layer in p.muted:
            return torch.zeros_like(x)
        angles = p.angles[self.ratio > 0][: x.shape[1]]
        qr, q = self.queries(x, angles)
        keys = self.window_keys(x, angles)
        visible = window_visible(x.shape[1], self.c["sliding_window"]).expand(x.shape[0], -1, -1)
        if self.ratio:
            self._publish(x, qr, angles, p)
            assert p.entries is not None
            keys = torch.cat([keys, p.entries], dim=1)
            complete = self._complete(x.shape[1], p.entries.shape[1]).expand(x.shape[0], -1, -1)
            seen = complete if p.everything else p.chosen
            assert seen is not None
            visible = torch.cat([visible, seen], dim=-1)
        out, weights = self.attend(q, keys, visible)
        if self.ratio and self.training and p.scores:
            got = weights.detach()[:, :, ::INDEX_EVERY, x.shape[1] :].float().sum(1)
            p.attended[-1] = p.attended[-1] + got
        return self.project(out, angles)

    def queries(self, x: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """The query latent, and queries `[batch, heads, length, dim]` with rope."""
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (-1, self.c["head_dim"])).transpose(1, 2)
        return qr, rotate(q.float(), angles, self.c["qk_rope_head_dim"])

    def window_keys(self, x: Tensor, angles: Tensor) -> Tensor:
        """Keys, which are also the values, `[batch, length, dim]`."""
        return rotate(self.kv_norm(self.wkv(x)), angles, self.c["qk_rope_head_dim"])

    def attend(self, q: Tensor, keys: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[batch, heads, length, dim]` and weights; `visible` is bool."""
        kv = keys.unsqueeze(1)
        scores = (q @ kv.mT).float() * self.c["head_dim"] ** -0.5
        scores = scores.masked_fill(~visible.unsqueeze(1), float("-inf"))
        sink = self.attn_sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
        return weights @ kv, weights

    def project(self, out: Tensor, angles: Tensor) -> Tensor:
        """Undo the rope of the values and go back to the hidden width, group by group."""
        out = rotate(out.float(), angles.conj(), self.c["qk_rope_head_dim"]).transpose(1, 2)
        grouped = out.flatten(-2).unflatten(-1, (self.c["o_groups"], -1)).transpose(1, 2)
        matrices = self.wo_a.weight.unflatten(0, (self.c["o_groups"], -1))
        low_rank = (grouped @ matrices.mT).transpose(1, 2).flatten(-2)
        result: Tensor = self.wo_b(low_rank)
        return result

    def _complete(self, length: int, entries: int) -> Tensor:
        """Which entries each query may see: those whose tokens have all come."""
        ready = (torch.arange(length) + 1) // self.ratio
        return torch.arange(entries) < ready.unsqueeze(1)

    def _publish(self, x: Tensor, qr: Tensor, angles: Tensor, p: Pass) -> None:
        """Renew the shared entries and the shared list where this layer is their source."""
        rope = self.c["qk_rope_head_dim"]
        if hasattr(self, "compressor"):
            latent = self.compressor(x)
            at = angles[:: self.ratio][: latent.shape[1]]
            p.entries = rotate(latent, at, rope)
            p.index_keys = self.indexer.keys(latent.detach(), at)
        if not hasattr(self, "indexer"):
            return
        assert p.index_keys is not None
        x, qr = x.detach(), qr.detach()
        if self.training:
            some = slice(None, None, INDEX_EVERY)
            scores = self.indexer(x[:, some], qr[:, some], p.index_keys, angles[some])
            p.scores.append(scores)
            p.attended.append(torch.zeros_like(scores))
        if not p.everything:
            with torch.no_grad():
                p.chosen = self._choose(self.indexer(x, qr, p.index_keys, angles), p)

    def _choose(self, scores: Tensor, p: Pass) -> Tensor:
        c, entries = self.c, scores.shape[-1]
        complete = self._complete(scores.shape[1], entries)
        scores = scores.masked_fill(~complete, float("-inf"))
        source = c["candidate_source_layer_id"]
        if self.layer == source:
            p.candidates = candidate_entries(
                scores, complete, c["candidate_topk_blocks"], c["candidate_block_size"]
            )
        elif p.candidates is not None:
            scores = scores.masked_fill(~p.candidates, float("-inf"))
        best = scores.topk(min(c["index_topk"], entries), dim=-1).indices
        picked = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return picked & complete & (scores > float("-inf"))


@torch.no_grad()
def candidate_entries(scores: Tensor, complete: Tensor, blocks: int, size: int) -> Tensor:
    """bool like `scores`: entries of the best blocks, the newest visible block always among them.

    scores: `[batch, length, entries]`, -inf where an entry is not complete.
    """
    padded = F.pad(scores, (0, -scores.shape[-1] % size), value=float("-inf"))
    best = padded.unflatten(-1, (-1, size)).amax(-1)
    count = complete.sum(-1)
    newest = ((count - 1).clamp_min(0) // size).unsqueeze(-1)
    pinned = (torch.arange(best.shape[-1]) == newest) & (count > 0).unsqueeze(-1)
    best = best.masked_fill(pinned, float("inf"))
    top = best.topk(min(blocks, best.shape[-1]), dim=-1).indices
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, top, True)
    kept &= best > float("-inf")
    return kept.repeat_interleave(size, dim=-1)[..., : scores.shape[-1]]
