"""The trunk of V4.1 for training: what differs from V4 is written here, under the official names.

A sublayer's input weights come from the sublayer before it; two Engrams add what they look up;
attention is in v41_attention. Parameters carry the names of the release, so writing it is a matter
of formats.

What the loss cannot teach is taught as for V4: `RouterBalance` moves the routers' bias, and the
indexers learn the attention that their entries get, summed over the layers that read their list.
They learn it on every `INDEX_EVERY`-th query: scores of all queries cost as much as the layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4TopKRouter

from tiny_v4_training.model import attention_kl
from tiny_v4_training.v41_attention import Attention, Pass
from tiny_v4_training.v41_engram import Engram, HashPlan, unit
from tiny_v4_training.v41_parts import Norm, plain_linear, rope_angles


class Expert(nn.Module):
    """`w2 (silu(min(w1 x, limit)) * clamp(w3 x))`, the shared expert."""

    def __init__(self, c: Mapping[str, Any]) -> None:
        super().__init__()
        width, inner = c["hidden_size"], c["moe_intermediate_size"]
        self.w1, self.w3 = plain_linear(width, inner), plain_linear(width, inner)
        self.w2, self.limit = plain_linear(inner, width), c["swiglu_limit"]

    def forward(self, x: Tensor) -> Tensor:
        """`[tokens, hidden]`."""
        out: Tensor = self.w2(clamped(self.w1(x), self.w3(x), self.limit))
        return out


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
                gate, value = up.chunk(2, -1)
                parts.append(F.linear(clamped(gate, value, self.limit), self.down_proj[expert]))
        routed = torch.cat(parts).float() * weights.flatten()[order].unsqueeze(-1)
        out = torch.zeros_like(flat).index_add(0, tokens, routed)
        both: Tensor = out + self.shared_experts(flat)
        return both.view_as(x)


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
        self.head = plain_linear(c["hidden_size"], c["vocab_size"])
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
                engram: Any = layer.engram
                h = engram(h, rows)
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


def initialise(model: nn.Module, std: float) -> None:
    """Normal weights of `std` for every matrix; vectors keep what their modules chose."""
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and not name.endswith(("q_weight", "k_weight")):
            nn.init.normal_(parameter, std=std)
    for module in model.modules():
        if isinstance(module, Engram):
            module.initialise()
