"""The trunk of V4.1 for training: what differs from V4 is written here, under the official names.

Compressed keys, index keys and the list of chosen entries belong to source layers and are read by
the layers behind them; a sublayer's input weights come from the sublayer before it; two Engrams add
what they look up. Parameters carry the names of the release, so writing it is a matter of formats.

What the loss cannot teach is taught as for V4: `RouterBalance` moves the routers' bias, and the
indexers learn the attention that their entries get, summed over the layers that read their list.
They learn it on every `INDEX_EVERY`-th query: scores of all queries cost as much as the layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from tiny_v4_training.model import attention_kl
from tiny_v4_training.v41_engram import Engram, HashPlan, unit

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


class Norm(nn.Module):
    """RMS norm with a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x / rms(x) * weight` in float32."""
        return unit(x.float()) * self.weight


class Indexer(nn.Module):
    """Scores of entries for each query: `sum_h w_h relu(q_h . k)`."""

    def __init__(self, c: Mapping[str, Any], has_keys: bool) -> None:
        super().__init__()
        self.heads, self.dim, self.rope = (
            c["index_n_heads"],
            c["index_head_dim"],
            c["qk_rope_head_dim"],
        )
        self.wq_b = _linear(c["q_lora_rank"], self.heads * self.dim)
        self.weights_proj = _linear(c["hidden_size"], self.heads)
        if has_keys:
            self.wk = _linear(c["head_dim"], self.dim)
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
        self.wkv = _linear(c["hidden_size"], c["head_dim"])
        self.norm = Norm(c["head_dim"])
        if ratio > 1:
            self.wgate = _linear(c["hidden_size"], c["head_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length // ratio, head_dim]`."""
        kv = self.wkv(x).float()
        if self.ratio > 1:
            whole = x.shape[1] // self.ratio * self.ratio
            groups = (-1, self.ratio)
            share = self.wgate(x[:, :whole]).float().unflatten(1, groups).softmax(2)
            kv = (share * kv[:, :whole].unflatten(1, groups)).sum(2)
        return self.norm(kv)


class Attention(nn.Module):
    """Window attention, and over the entries of the shared cache where the layer reads one."""

    def __init__(self, c: Mapping[str, Any], layer: int | None) -> None:
        super().__init__()
        self.c, self.layer = c, layer
        self.ratio = 0 if layer is None else c["compress_ratios"][layer]
        heads, dim, groups = c["num_attention_heads"], c["head_dim"], c["o_groups"]
        self.wq_a = _linear(c["hidden_size"], c["q_lora_rank"])
        self.q_norm = Norm(c["q_lora_rank"])
        self.wq_b = _linear(c["q_lora_rank"], heads * dim)
        self.wkv = _linear(c["hidden_size"], dim)
        self.kv_norm = Norm(dim)
        self.wo_a = _linear(heads * dim // groups, groups * c["o_lora_rank"])
        self.wo_b = _linear(groups * c["o_lora_rank"], c["hidden_size"])
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
        return self.wo_b((grouped @ matrices.mT).transpose(1, 2).flatten(-2))

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


class Expert(nn.Module):
    """`w2 (silu(min(w1 x, limit)) * clamp(w3 x))`, the shared expert."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.w1, self.w3 = _linear(width, inner), _linear(width, inner)
        self.w2, self.limit = _linear(inner, width), c["swiglu_limit"]

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]`."""
        return self.w2(clamped(self.w1(x), self.w3(x), self.limit))


class Moe(nn.Module):
    """Router, routed experts (fused as transformers has them), shared expert."""

    def __init__(self, c: Mapping[str, Any], experts: int, top: int) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.limit = c["swiglu_limit"]
        self.gate = DeepseekV4TopKRouter(
            SimpleNamespace(
                num_experts_per_tok=top,
                num_local_experts=experts,
                hidden_size=width,
                scoring_func=c["scoring_func"],
                routed_scaling_factor=c["routed_scaling_factor"],
            )
        )
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))
        self.shared_experts = Expert(c)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, length, hidden]`."""
        flat = x.flatten(0, 1)
        _, weights, chosen = self.gate(flat)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.gate.num_experts).tolist()
        tokens = order // chosen.shape[1]
        parts = []
        for expert, given in enumerate(flat[tokens].split(counts)):
            if len(given):
                up = F.linear(given, self.gate_up_proj[expert])
                parts.append(
                    F.linear(clamped(*up.chunk(2, -1), self.limit), self.down_proj[expert])
                )
        routed = torch.cat(parts).float() * weights.flatten()[order].unsqueeze(-1)
        out = torch.zeros_like(flat).index_add(0, tokens, routed)
        return (out + self.shared_experts(flat)).view_as(x)


def clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """The activation of an expert between its matrices."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class Layer(nn.Module):
    """One layer: an Engram perhaps, then attention and experts between hyper-connections."""

    def __init__(
        self, c: Mapping[str, Any], layer: int | None, experts: int, top: int, rows: int | None
    ) -> None:
        super().__init__()
        width, m = c["hidden_size"], c["hc_mult"]
        self.streams, self.iterations, self.eps = m, c["hc_sinkhorn_iters"], c["hc_eps"]
        if rows is not None:
            self.engram = Engram(c, rows)
        self.attn_norm, self.ffn_norm = Norm(width), Norm(width)
        self.attn = Attention(c, layer)
        self.ffn = Moe(c, experts, top)
        for part in ("attn", "ffn"):
            self.register_parameter(
                f"hc_{part}_fn", nn.Parameter(torch.empty((2 + m) * m, m * width))
            )
            self.register_parameter(f"hc_{part}_base", nn.Parameter(torch.zeros((2 + m) * m)))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.ones(3)))

    def forward(self, h: Tensor, pre: Tensor, p: Any) -> tuple[Tensor, Tensor]:
        """New streams and the weights that the next layer's attention is fed with."""
        attn_pre, post, comb = self.mix(h, "attn")
        u = self.attn(self.attn_norm(collapse(pre, h)), p)
        h = expand(post, u, comb, h)
        ffn_pre, post, comb = self.mix(h, "ffn")
        v = self.ffn(self.ffn_norm(collapse(attn_pre, h)))
        return expand(post, v, comb, h), ffn_pre

    def mix(self, h: Tensor, part: str) -> tuple[Tensor, Tensor, Tensor]:
        """pre, post `[..., m]` and the mixing matrix `[..., m, m]` of a sublayer."""
        n = self.streams
        fn, base, scale = (getattr(self, f"hc_{part}_{x}") for x in ("fn", "base", "scale"))
        m = F.linear(unit(h.flatten(-2)), fn).float()
        pre = torch.sigmoid(m[..., :n] * scale[0] + base[:n]) + self.eps
        post = 2 * torch.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
        comb = (m[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n))
        return pre, post, sinkhorn(comb, self.iterations, self.eps)


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """Rows and columns of `[..., m, m]` brought to sum 1, columns last."""
    c = logits.softmax(-1) + eps
    c = c / (c.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(-1, keepdim=True) + eps)
        c = c / (c.sum(-2, keepdim=True) + eps)
    return c


def collapse(pre: Tensor, h: Tensor) -> Tensor:
    """`sum_j pre_j h_j`."""
    return (pre.unsqueeze(-2) @ h).squeeze(-2).float()


def expand(post: Tensor, out: Tensor, comb: Tensor, h: Tensor) -> Tensor:
    """`post_k out + sum_j comb[j, k] h_j`."""
    return post.unsqueeze(-1) * out.unsqueeze(-2).float() + (comb.mT @ h).float()


class V41Trunk(nn.Module):
    """The language model. `plan` holds the Engram's constants."""

    def __init__(self, c: Mapping[str, Any], plan: HashPlan) -> None:
        super().__init__()
        self.c, self.plan = c, plan
        self.embed = nn.Embedding(c["vocab_size"], c["hidden_size"])
        rows = dict(zip(c["engram_layer_ids"], plan.rows, strict=True))
        experts, top = c["n_routed_experts"], c["num_experts_per_tok"]
        self.layers = nn.ModuleList(
            Layer(c, i, experts, top, rows.get(i)) for i in range(c["num_hidden_layers"])
        )
        self.norm = Norm(c["hidden_size"])
        self.head = _linear(c["hidden_size"], c["vocab_size"])
        self.engram_on = True

    def forward(
        self, ids: Tensor, everything: bool = False, mute: bool = False
    ) -> tuple[Tensor, Pass, Tensor]:
        """Logits `[batch, length, vocab]`, what the indexers did, and DSpark's inputs.

        The last are means over streams at the inputs of the target layers, side by side. mute:
        window layers before the first source pass no attention on.
        """
        c = self.c
        muted = range(c["kv_source_layer_ids"][0] if mute else 0)
        p = Pass(rope_angles(c, ids.shape[1]), everything, muted)
        h, pre = start_streams(self.embed(ids), c["hc_mult"])
        targets = []
        for i, layer in enumerate(self.layers):
            if i in c["engram_layer_ids"] and self.engram_on:
                rows = self.plan.row_ids(ids, c["engram_layer_ids"].index(i))
                h = layer.engram(h, rows)
            if i in c["dspark_target_layer_ids"]:
                targets.append(h.mean(2))
            h, pre = layer(h, pre, p)
        return self.head(self.norm(collapse(pre, h))), p, torch.cat(targets, dim=-1)


def index_loss(p: Pass) -> Tensor:
    """Sum over index sources of KL(attention to its entries || softmax of its scores)."""
    terms = [attention_kl(a, s) for a, s in zip(p.attended, p.scores, strict=True) if a.numel()]
    return torch.stack(terms).sum() if terms else torch.zeros(())


def start_streams(embedded: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Equal streams `[..., m, hidden]` and one-hot input weights `[..., m]`."""
    pre = embedded.new_zeros(*embedded.shape[:-1], m)
    pre[..., 0] = 1.0
    return embedded.unsqueeze(-2).expand(*embedded.shape[:-1], m, -1), pre


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
        return rd * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))

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


def initialise(model: nn.Module, std: float) -> None:
    """Normal weights of `std` for every matrix; vectors keep what their modules chose."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(("q_weight", "k_weight")):
            nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, Engram):
            module.initialise()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)
