"""V4.1's forward pass written a second time, from the formulas alone and as plainly as they read.

It shares no code with the product. One sequence, everything at once, no pieces, no streaming; so it
suits models of a few layers and texts of a few hundred tokens. Results of it can be had for a model
of any shape and on the processor that runs the test, which stored results cannot give.

mode: "plain" rounds nothing; "kv" rounds what is cached (KV entries, index vectors); "act" also the
inputs of linears whose weights are FP8 or FP4. Everything is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

Params = Callable[[str], Tensor]
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@dataclass
class Shared:
    """What layers leave for later ones."""

    entries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    chosen: dict[int, Tensor] = field(default_factory=dict)
    candidates: Tensor | None = None


@dataclass(frozen=True)
class Result:
    """logits `[S, vocab]`; behind each layer: streams `[S, 4, d]`, reading weights `[S, 4]`;
    targets: what DSpark reads, `[S, d]` each."""

    logits: Tensor
    streams: list[Tensor]
    pre: list[Tensor]
    targets: list[Tensor]


class Formulas:
    """The model of a config.json (its dict) with dense float32 weights by official base name."""

    def __init__(self, params: Params, config: dict[str, Any], token_map: Tensor, mode: str):
        self.p, self.c, self.mode, self.token_map = params, config["text_config"], mode, token_map
        self.eps = self.c["rms_norm_eps"]

    def run(self, ids: Tensor, images: Tensor | None = None) -> Result:
        """The trunk on one sequence of ids `[S]`; images: bool `[S]`, positions of images."""
        c, p = self.c, self.p
        images = torch.zeros_like(ids, dtype=torch.bool) if images is None else images
        h = p("embed")[ids].unsqueeze(1).repeat(1, 4, 1)
        pre = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(len(ids), 1)
        shared, streams, pres, targets = Shared(), [], [], []
        for layer in range(c["num_hidden_layers"]):
            if layer in c["engram_layer_ids"]:
                h = self.engram(layer, h, ids, images)
            if layer in c["dspark_target_layer_ids"]:
                targets.append(h.mean(1))
            pre, h = self.layer(f"layers.{layer}", layer, pre, h, images, shared)
            streams.append(h)
            pres.append(pre)
        y = (pre.unsqueeze(-1) * h).sum(1)
        return Result(self.norm(y, "norm") @ p("head").T, streams, pres, targets)

    def layer(
        self, name: str, number: int, pre: Tensor, h: Tensor, images: Tensor, shared: Shared
    ) -> tuple[Tensor, Tensor]:
        """One layer: reading weights and streams behind it."""
        a_pre, h = self.sublayer(
            f"{name}.hc_attn",
            h,
            self.attention(name, number, self.read(h, pre, f"{name}.attn_norm"), shared),
        )
        f_pre, h = self.sublayer(
            f"{name}.hc_ffn", h, self.moe(name, self.read(h, a_pre, f"{name}.ffn_norm"), images)
        )
        return f_pre, h

    def read(self, h: Tensor, pre: Tensor, norm: str) -> Tensor:
        return self.norm((pre.unsqueeze(-1) * h).sum(1), norm)

    def sublayer(self, name: str, h: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """The streams after a sublayer's output; what the next sublayer is to read them by."""
        x = h.flatten(1)
        m = (x @ self.p(f"{name}_fn").T) * torch.rsqrt(x.square().mean(-1, True) + self.eps)
        base, scale, eps = self.p(f"{name}_base"), self.p(f"{name}_scale"), self.c["hc_eps"]
        pre = torch.sigmoid(m[:, :4] * scale[0] + base[:4]) + eps
        post = 2 * torch.sigmoid(m[:, 4:8] * scale[1] + base[4:8])
        comb = (m[:, 8:] * scale[2] + base[8:]).view(-1, 4, 4).softmax(-1) + eps
        comb = comb / (comb.sum(1, True) + eps)
        for _ in range(self.c["hc_sinkhorn_iters"] - 1):
            comb = comb / (comb.sum(2, True) + eps)
            comb = comb / (comb.sum(1, True) + eps)
        mixed = torch.einsum("sjk,sjd->skd", comb, h)
        return pre, post.unsqueeze(-1) * output.unsqueeze(1) + mixed

    def norm(self, x: Tensor, name: str) -> Tensor:
        return self.p(name) * x * torch.rsqrt(x.square().mean(-1, True) + self.eps)

    def linear(self, x: Tensor, name: str) -> Tensor:
        """A linear whose weight is FP8 or FP4."""
        return self.rounded(x) @ self.p(name).T

    def rounded(self, x: Tensor) -> Tensor:
        return e4m3(x) if self.mode == "act" else x

    def rope(self, x: Tensor, positions: Tensor, ratio: int, back: bool = False) -> Tensor:
        """Turn pairs of the last dimensions of x `[n, ..., D]`."""
        c, dim = self.c, self.c["qk_rope_head_dim"]
        theta = c["compress_rope_theta"] if ratio else c["rope_theta"]
        i = torch.arange(dim // 2, dtype=torch.float64)
        f = theta ** (-2 * i / dim)
        if ratio:
            yarn = c["rope_scaling"]
            full = yarn["original_max_position_embeddings"]

            def place(turns: float) -> float:
                return dim * math.log(full / (turns * 2 * math.pi)) / (2 * math.log(theta))

            low = max(math.floor(place(yarn["beta_fast"])), 0)
            high = min(math.ceil(place(yarn["beta_slow"])), dim - 1)
            ramp = ((i - low) / max(high - low, 1e-3)).clamp(0, 1)
            f = f / yarn["factor"] * ramp + f * (1 - ramp)
        angle = positions.double().view(-1, *[1] * (x.dim() - 1)) * f
        cos, sin = angle.cos().float(), angle.sin().float()
        sin = -sin if back else sin
        a, b = x[..., -dim::2], x[..., 1 - dim :: 2] if dim > 1 else x[..., :0]
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
        return torch.cat((x[..., :-dim], turned), -1)

    def attention(self, name: str, number: int, x: Tensor, shared: Shared) -> Tensor:
        """Attention of a trunk's layer on normalised inputs `[S, d]`."""
        s = torch.arange(len(x))
        ratio = self.c["compress_ratios"][number]
        low_rank, q = self.queries(name, x, s, ratio)
        window = self.window(name, x, s, ratio)
        ages = s.unsqueeze(1) - s
        seen = (ages >= 0) & (ages < self.c["sliding_window"])
        keys = window
        if ratio:
            source = max(n for n in self.c["kv_source_layer_ids"] if n <= number)
            if source == number:
                self.compress(name, number, x, shared)
            if number in self.c["index_source_layer_ids"]:
                self.choose(name, number, source, x, low_rank, shared)
            chooser = max(n for n in self.c["index_source_layer_ids"] if n <= number)
            keys = torch.cat((window, shared.entries[source]))
            seen = torch.cat((seen, shared.chosen[chooser]), 1)
        return self.attend(name, q, keys, seen, s, ratio)

    def queries(self, name: str, x: Tensor, s: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
        low_rank = self.norm(self.linear(x, f"{name}.attn.wq_a"), f"{name}.attn.q_norm")
        q = self.linear(low_rank, f"{name}.attn.wq_b")
        q = q.view(len(x), self.c["num_attention_heads"], self.c["head_dim"])
        return low_rank, self.rope(q, s, ratio)

    def window(self, name: str, x: Tensor, s: Tensor, ratio: int) -> Tensor:
        kv = self.norm(self.linear(x, f"{name}.attn.wkv"), f"{name}.attn.kv_norm")
        kv = self.rope(kv, s, ratio)
        return kv if self.mode == "plain" else e4m3(kv)

    def attend(
        self, name: str, q: Tensor, keys: Tensor, seen: Tensor, s: Tensor, ratio: int
    ) -> Tensor:
        """q `[S, H, D]`; keys, which are values too, `[n, D]`; seen `[S, n]`."""
        c = self.c
        scores = torch.einsum("shd,nd->shn", q, keys) * c["head_dim"] ** -0.5
        scores = scores.masked_fill(~seen.unsqueeze(1), -torch.inf)
        sink = self.p(f"{name}.attn.attn_sink").view(1, -1, 1).expand(len(q), -1, 1)
        p = torch.cat((scores, sink), -1).softmax(-1)[..., :-1]
        o = self.rope(torch.einsum("shn,nd->shd", p, keys), s, ratio, back=True)
        groups, rank = c["o_groups"], c["o_lora_rank"]
        wo_a = self.p(f"{name}.attn.wo_a").view(groups, rank, -1)
        z = torch.einsum("sgi,gri->sgr", o.reshape(len(q), groups, -1), wo_a)
        return self.linear(z.flatten(1), f"{name}.attn.wo_b")

    def compress(self, name: str, number: int, x: Tensor, shared: Shared) -> None:
        ratio, prefix = self.c["compress_ratios"][number], f"{name}.attn.compressor"
        count = len(x) // ratio
        parts = (x @ self.p(f"{prefix}.wkv").T)[: count * ratio].view(count, ratio, -1)
        if ratio > 1:
            gate = (x @ self.p(f"{prefix}.wgate").T)[: count * ratio].view(count, ratio, -1)
            parts = parts * gate.softmax(1)
        latent = self.norm(parts.sum(1), f"{prefix}.norm")
        places = torch.arange(count) * ratio
        entries = self.rope(latent, places, ratio)
        key = self.norm(latent @ self.p(f"{name}.attn.indexer.wk").T, f"{name}.attn.indexer.k_norm")
        key = self.rope(key, places, ratio)
        plain = self.mode == "plain"
        shared.entries[number] = entries if plain else e2m1_scaled(entries)
        shared.keys[number] = key if plain else e2m1(key)

    def choose(
        self, name: str, number: int, source: int, x: Tensor, low_rank: Tensor, shared: Shared
    ) -> None:
        """Which entries each query may read, bool `[S, n]`."""
        c, ratio = self.c, self.c["compress_ratios"][number]
        heads, dim = c["index_n_heads"], c["index_head_dim"]
        keys, s = shared.keys[source], torch.arange(len(x))
        q = self.linear(low_rank, f"{name}.attn.indexer.wq_b").view(len(x), heads, dim)
        q = self.rope(q, s, ratio)
        q = q if self.mode == "plain" else e2m1(q)
        w = (x @ self.p(f"{name}.attn.indexer.weights_proj").T) * (dim * heads) ** -0.5
        scores = torch.einsum("sh,shn->sn", w, torch.einsum("shd,nd->shn", q, keys).relu())
        visible = (s + 1) // ratio
        hidden = torch.arange(len(keys)) >= visible.unsqueeze(1)
        scores = scores.masked_fill(hidden, -torch.inf)
        first = c.get("candidate_source_layer_id", -1)
        if number == first:
            shared.candidates = self.blocks(scores, visible)
        elif shared.candidates is not None:
            scores = scores.masked_fill(~shared.candidates, -torch.inf)
        shared.chosen[number] = _largest(scores, c["index_topk"])

    def blocks(self, scores: Tensor, visible: Tensor) -> Tensor:
        """Entries of each query's best blocks, its newest among them."""
        size, (rows, columns) = self.c["candidate_block_size"], scores.shape
        count = -(-columns // size)
        padded = torch.full((rows, count * size), -torch.inf)
        padded[:, :columns] = scores
        best = padded.view(rows, count, size).amax(-1)
        some = visible > 0
        best[some, (visible[some] - 1) // size] = torch.inf
        kept = _largest(best, self.c["candidate_topk_blocks"])
        return kept.repeat_interleave(size, 1)[:, :columns]

    def moe(self, name: str, x: Tensor, images: Tensor) -> Tensor:
        c, prefix = self.c, f"{name}.ffn"
        top = c["num_experts_per_tok" if name[0] == "l" else "dspark_num_experts_per_tok"]
        affinity = softplus(x @ self.p(f"{prefix}.gate").T).sqrt()
        bias = torch.where(
            images.unsqueeze(1), self.p(f"{prefix}.gate.bias_vl"), self.p(f"{prefix}.gate.bias")
        )
        ids = (affinity + bias).topk(top, -1).indices
        weights = affinity.gather(1, ids)
        weights = weights / (weights.sum(-1, True) + 1e-20) * c["routed_scaling_factor"]
        x, routed = self.rounded(x), torch.zeros_like(x)
        for expert in ids.unique().tolist():
            rows, slot = (ids == expert).nonzero(as_tuple=True)
            part = self.expert(x[rows], f"{prefix}.experts.{expert}", weights[rows, slot])
            routed[rows] += part
        return routed + self.expert(x, f"{prefix}.shared_experts", torch.ones(len(x)))

    def expert(self, x: Tensor, name: str, weights: Tensor) -> Tensor:
        limit = self.c["swiglu_limit"]
        gate = (x @ self.p(f"{name}.w1").T).clamp(max=limit)
        up = (x @ self.p(f"{name}.w3").T).clamp(-limit, limit)
        return self.linear(silu(gate) * up * weights.unsqueeze(1), f"{name}.w2")

    def engram(self, layer: int, h: Tensor, ids: Tensor, images: Tensor) -> Tensor:
        """The streams with an Engram's part added."""
        name, d = f"layers.{layer}.engram", self.c["hidden_size"]
        looked_up = self.p(f"{name}.embed")[self.rows(layer, ids, images)].flatten(1)
        kv = self.linear(looked_up, f"{name}.wkv").view(len(ids), 5, d)
        key, value = kv[:, :4], kv[:, 4:]
        weight = self.p(f"{name}.q_weight") * self.p(f"{name}.k_weight")
        dot = (h * weight * key).sum(-1)
        for x in (h, key):
            dot = dot * torch.rsqrt(x.square().mean(-1) + self.eps)
        dot = dot * d**-0.5
        gate = torch.sigmoid(torch.copysign(dot.abs().clamp(min=1e-6).sqrt(), dot))
        return h + gate.masked_fill(images.unsqueeze(1), 0.0).unsqueeze(-1) * value

    def rows(self, layer: int, ids: Tensor, images: Tensor) -> Tensor:
        """Rows of the table, int64 `[S, columns]`."""
        c = self.c
        orders, heads = c["engram_max_ngram_size"], c["engram_n_heads"]
        size = c["engram_compressed_vocab_size"]
        bound = ((2**63 - 1) // size) // 2
        multipliers = np.random.default_rng(10007 * layer).integers(
            0, bound, size=orders, dtype=np.int64
        )
        factors = [int(m) * 2 + 1 for m in multipliers]
        primes = self.primes()[c["engram_layer_ids"].index(layer)]
        pad, found = int(self.token_map[c["engram_pad_token_id"]]), []
        for s in range(len(ids)):
            alive, mixed, row, offset = True, 0, [], 0
            for i, factor in enumerate(factors):
                alive = alive and s >= i and not bool(images[s - i])
                mixed ^= (int(self.token_map[ids[s - i]]) if alive else pad) * factor
                for prime in primes[(i - 1) * heads : i * heads] if i else ():
                    row.append(mixed % prime + offset)
                    offset += prime
            found.append(row)
        return torch.tensor(found)

    def primes(self) -> list[list[int]]:
        """Of every Engram layer, order by order; none is handed out twice."""
        c, used, out = self.c, set[int](), []
        for _ in c["engram_layer_ids"]:
            mine: list[int] = []
            for _ in range(c["engram_max_ngram_size"] - 1):
                number, wanted = c["engram_vocab_size"] - 1, len(mine) + c["engram_n_heads"]
                while len(mine) < wanted:
                    number += 1
                    prime = all(number % n for n in range(2, math.isqrt(number) + 1))
                    if prime and number not in used:
                        used.add(number)
                        mine.append(number)
            out.append(mine)
        return out

    def drafts(self, targets: list[Tensor], anchor: int, token: int) -> tuple[list[int], Tensor]:
        """Greedy drafts after position `anchor`, the next token being `token`, and their logits."""
        c, p, size = self.c, self.p, self.c["dspark_block_size"]
        main = self.linear(torch.cat(targets, -1)[: anchor + 1], "mtp.0.main_proj")
        main = self.norm(main, "mtp.0.main_norm")
        given = torch.tensor([token] + [c["dspark_noise_token_id"]] * (size - 1))
        h = p("embed")[given].unsqueeze(1).repeat(1, 4, 1)
        pre = torch.tensor([1.0, 0.0, 0.0, 0.0]).repeat(size, 1)
        places, old = anchor + 1 + torch.arange(size), torch.arange(anchor + 1)
        text = torch.zeros(size, dtype=torch.bool)
        last = f"mtp.{c['num_nextn_predict_layers'] - 1}"
        for stage in range(c["num_nextn_predict_layers"]):
            name = f"mtp.{stage}"
            x = self.read(h, pre, f"{name}.attn_norm")
            keys = self.window(name, main, old, 0)[-c["sliding_window"] :]
            keys = torch.cat((keys, self.window(name, x, places, 0)))
            _, q = self.queries(name, x, places, 0)
            seen = torch.ones(size, len(keys), dtype=torch.bool)
            output = self.attend(name, q, keys, seen, places, 0)
            pre, h = self.sublayer(f"{name}.hc_attn", h, output)
            output = self.moe(name, self.read(h, pre, f"{name}.ffn_norm"), text)
            pre, h = self.sublayer(f"{name}.hc_ffn", h, output)
        logits = self.read(h, pre, f"{last}.norm") @ p("head").T
        out = [token]
        for i in range(size):
            step = p(f"{last}.markov_head.head") @ p(f"{last}.markov_head.embed")[out[-1]]
            logits[i] += step
            out.append(int(logits[i].argmax()))
        return out[1:], logits


def _largest(scores: Tensor, count: int) -> Tensor:
    """Where the largest of each row are that are above -inf; of equal ones the first."""
    values, order = scores.sort(dim=-1, descending=True, stable=True)
    found = torch.zeros_like(scores, dtype=torch.bool)
    return found.scatter(1, order[:, :count], values[:, :count] > -torch.inf)


def _power(x: Tensor) -> Tensor:
    """The least power of two that is not below x."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), torch.where(mantissa == 0.5, exponent - 1, exponent))


def _blocks(x: Tensor, size: int, quantize: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.cat([quantize(part) for part in x.split(size, -1)], -1)


def e4m3(x: Tensor) -> Tensor:
    """E4M3 in blocks of 32 under a power of two."""

    def quantize(part: Tensor) -> Tensor:
        s = _power(part.abs().amax(-1, True).clamp(min=1e-4) / 448)
        return (part / s).clamp(-448, 448).to(torch.float8_e4m3fn).float() * s

    return _blocks(x, 32, quantize)


def e2m1(x: Tensor) -> Tensor:
    """E2M1 in blocks of 32 under a power of two."""

    def quantize(part: Tensor) -> Tensor:
        s = _power(part.abs().amax(-1, True).clamp(min=6 * 2.0**-126) / 6)
        return _nearest(part / s) * s

    return _blocks(x, 32, quantize)


def e2m1_scaled(x: Tensor) -> Tensor:
    """E2M1 in groups of 16 under an E4M3 number."""

    def quantize(part: Tensor) -> Tensor:
        s = (part.abs().amax(-1, True).clamp(min=6 * 2.0**-9) / 6).to(torch.float8_e4m3fn).float()
        return _nearest(part / s) * s

    return _blocks(x, 16, quantize)


def _nearest(x: Tensor) -> Tensor:
    """The nearest E2M1 number, of two the one whose code is even; at most 6."""
    size = x.abs().clamp(max=6)
    gaps = (size.unsqueeze(-1) - E2M1).abs()
    best = gaps.amin(-1, True) == gaps
    even = best & (torch.arange(8) % 2 == 0)
    code = torch.where(even.any(-1), even.int().argmax(-1), best.int().argmax(-1))
    return E2M1[code].copysign(x)
