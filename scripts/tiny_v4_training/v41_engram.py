"""The Engram of V4.1 as it is trained: vectors of hashed n-grams are added to the streams.

The rows follow from the tokenizer alone: tokens that read the same to a person share a compressed
id, an n-gram of those is multiplied, xored and taken modulo a prime per head, and every prime is
used once in the whole model. Row numbers are therefore constants of the text, and what is trained
are the tables and the projection that makes a key per stream and one value of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, normalizers
from torch import Tensor, nn

from v4quant_formats.engram import engram_tables

_SPACE = "\ue000"  # stands for a lone space while the ends are stripped
_GATE_FLOOR = 1e-6
ROW_SIZE = 16.0  # root mean square; streams of trained models of this width have 10 to 40


@dataclass(frozen=True)
class HashPlan:
    """The constants of the lookup: token map int64 `[vocab]`, and per Engram layer the rest."""

    token_map: Tensor
    compressed: int
    pad: int
    heads: int
    primes: tuple[tuple[int, ...], ...]  # per layer: order-major, then head
    multipliers: tuple[tuple[int, ...], ...]  # per layer: one per n-gram position

    @property
    def rows(self) -> list[int]:
        """Rows of each layer's table."""
        return [sum(p) for p in self.primes]

    def row_ids(self, ids: Tensor, layer: int) -> Tensor:
        """int64 `[batch, length, columns]`: the table rows of token ids `[batch, length]`."""
        c = self.token_map[ids]
        primes = torch.tensor(self.primes[layer])
        offsets = torch.cumsum(primes, 0) - primes
        mixed = c * self.multipliers[layer][0]
        columns = []
        for order, m in enumerate(self.multipliers[layer][1:], 1):
            before = torch.cat([torch.full_like(c[:, :order], self.pad), c[:, :-order]], dim=1)
            mixed = mixed ^ (before[:, : c.shape[1]] * m)
            part = slice((order - 1) * self.heads, order * self.heads)
            columns.append(mixed.unsqueeze(-1) % primes[part] + offsets[part])
        return torch.cat(columns, dim=-1)


def hash_plan(text_config: Mapping[str, Any], tokenizer: Tokenizer) -> HashPlan:
    """The plan that a `text_config` and a tokenizer give."""
    orders, heads = text_config["engram_max_ngram_size"], text_config["engram_n_heads"]
    mapping, size = token_map(tokenizer, text_config["vocab_size"])
    layers = text_config["engram_layer_ids"]
    start = text_config["engram_vocab_size"]
    tables = engram_tables(tuple(layers), start, heads, orders, size)
    return HashPlan(
        token_map=torch.tensor(mapping),
        compressed=size,
        pad=mapping[text_config["engram_pad_token_id"]],
        heads=heads,
        primes=tuple(table.primes for table in tables),
        multipliers=tuple(table.multipliers for table in tables),
    )


def token_map(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[int], int]:
    """Compressed id of every token id, and how many there are."""
    n = normalizers
    reads_as = n.Sequence(
        [
            n.NFKC(),
            n.NFD(),
            n.StripAccents(),
            n.Lowercase(),
            n.Replace(Regex(r"[ \t\r\n]+"), " "),
            n.Replace(Regex(r"^ $"), _SPACE),
            n.Strip(),
            n.Replace(_SPACE, " "),
        ]
    )
    seen: dict[str, int] = {}
    mapping = []
    for token in range(vocab_size):
        text = tokenizer.decode([token], skip_special_tokens=False)
        broken = "\ufffd" in text
        key = str(tokenizer.id_to_token(token)) if broken else reads_as.normalize_str(text) or text
        mapping.append(seen.setdefault(key, len(seen)))
    return mapping, len(seen)


class Engram(nn.Module):
    """One layer's tables and projection. Call with streams and row ids.

    `initialise` gives rows the size that streams have, and no value yet: with small rows a step of
    the projection would move the streams by a thousandth, and the model would learn to do without.
    """

    def __init__(self, text_config: Mapping[str, Any], rows: int) -> None:
        super().__init__()
        self.width, self.streams = text_config["hidden_size"], text_config["hc_mult"]
        columns = (text_config["engram_max_ngram_size"] - 1) * text_config["engram_n_heads"]
        self.embed = nn.Embedding(rows, text_config["engram_head_dim"])
        inputs = columns * text_config["engram_head_dim"]
        self.wkv = nn.Linear(inputs, (self.streams + 1) * self.width, bias=False)
        self.q_weight = nn.Parameter(torch.ones(self.streams, self.width))
        self.k_weight = nn.Parameter(torch.ones(self.streams, self.width))

    def initialise(self) -> None:
        """Rows of the streams' size, a projection that adds nothing yet."""
        nn.init.normal_(self.embed.weight, std=ROW_SIZE)
        with torch.no_grad():
            self.wkv.weight[-self.width :].zero_()

    def forward(self, h: Tensor, rows: Tensor) -> Tensor:
        """Streams `[batch, length, streams, hidden]` with the gated value added to each."""
        both = self.wkv(self.embed(rows).flatten(-2)).float()
        key, value = both.split([self.streams * self.width, self.width], dim=-1)
        key = unit(key.unflatten(-1, (self.streams, self.width)))
        dot = (unit(h) * (self.q_weight * self.k_weight) * key).sum(-1) * self.width**-0.5
        root = dot.abs().clamp_min(_GATE_FLOOR).sqrt()
        gate = torch.sigmoid(torch.copysign(root, dot))
        moved: Tensor = h + gate.unsqueeze(-1) * value.unsqueeze(2)
        return moved


def unit(x: Tensor) -> Tensor:
    """x divided by its root mean square over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-20)
