"""Engram: rows of a large table, chosen by the last few tokens, added to the streams.

A hash of each n-gram of token ids that ends at a position chooses one row a head (see
`v4quant_formats.engram`); the rows of all orders and heads side by side, E, give by one matrix a
key for every stream and a value for all. With h_j stream j and weights q_j, k_j,

    gate_j = sigmoid(signed_root(sum(h_j q_j k_j key_j) / (rms(h_j) rms(key_j) sqrt(d))))
    h_j   += gate_j * value

where signed_root(x) = sign(x) sqrt(max(|x|, 1e-6)). N-grams end where the text begins and do not
reach over an image; what would lie there is the padding token. Positions of images are left alone.

Tables are larger than any memory, so rows are gathered from the file, those of a piece of the text
in one go, sorted and each once; and the matrix, the model's largest, is read a stream at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from v4quant_calibration.model.numerics import (
    inverse_rms,
    linear,
    quantized_input,
    require_finite,
)
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import TOKEN_MAP, Params, gather_rows, read_rows
from v4quant_calibration.model.router import image_positions
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.engram import EngramTable
from v4quant_formats.model_config import LayerFacts, ModelConfig

_LEAST = 1e-6


def engram_forward(
    params: Params,
    config: ModelConfig,
    facts: LayerFacts,
    before: Streams,
    after: Streams,
    token_ids: Tensor,
    options: ForwardOptions,
) -> None:
    """Add a layer's Engram to the streams, from `before` to `after`, which may be the same.

    token_ids: int64 `[T]` of all sequences end to end. Raises NonFiniteActivation.
    """
    assert config.v41 is not None and facts.engram is not None, facts
    module, hidden = f"{facts.name}.engram", config.hidden_size
    table = config.v41.engram_tables[facts.engram]
    token_map, dead = params(TOKEN_MAP).cpu(), image_positions(token_ids, config)
    pad = int(token_map[config.v41.engram_pad_token_id])
    rows = hash_rows(token_ids.cpu(), before.shape.lengths, dead.cpu(), table, token_map, pad)
    weights = params(f"{module}.q_weight") * params(f"{module}.k_weight")
    for start, stop in spans(0, before.shape.tokens, options.row_chunk):
        looked_up = gather_rows(params, f"{module}.embed", rows[start:stop].flatten())
        looked_up = looked_up.view(stop - start, -1).to(before.shape.dtype)
        looked_up = quantized_input(looked_up, config, options)

        def product(part: int, x: Tensor = looked_up) -> Tensor:
            block = read_rows(params, f"{module}.wkv", part * hidden, (part + 1) * hidden)
            return linear(x, block, options)

        streams = before.read(start, stop)
        gates = torch.stack(
            [
                _gate(streams[:, j], product(j), weights[j], config.rms_norm_eps)
                for j in range(config.hc_mult)
            ],
            dim=1,
        )
        gates = gates.masked_fill(dead[start:stop].unsqueeze(-1), 0.0)
        value = product(config.hc_mult)
        updated = streams + gates.unsqueeze(-1) * value.unsqueeze(1)
        require_finite(updated, module)
        if after is not before:
            after.write_pre(start, before.read_pre(start, stop))
        after.write(start, updated)


def hash_rows(
    token_ids: Tensor,
    lengths: tuple[int, ...],
    dead: Tensor,
    table: EngramTable,
    token_map: Tensor,
    pad: int,
) -> Tensor:
    """Rows of a table that each token looks up, int64 `[T, columns]`.

    token_ids, dead: int64 and bool `[T]` of sequences of those lengths, end to end; no n-gram
    reaches a dead token or over a sequence's start. token_map: int64 `[vocab]`; pad: its value for
    what is not reached.
    """
    place = torch.cat([torch.arange(length) for length in lengths])
    compressed = token_map[token_ids]
    orders = len(table.multipliers)
    heads = len(table.primes) // (orders - 1)
    alive, mixed, columns = ~dead, torch.zeros_like(token_ids), []
    for distance, factor in enumerate(table.multipliers):
        if distance:
            alive = alive & (place >= distance) & ~dead.roll(distance)
        found = torch.where(alive, compressed.roll(distance), pad)
        mixed = mixed ^ (found * factor)
        if distance:
            chosen = slice((distance - 1) * heads, distance * heads)
            primes = torch.tensor(table.primes[chosen])
            columns.append(mixed.unsqueeze(1) % primes + torch.tensor(table.offsets[chosen]))
    return torch.cat(columns, 1)


def _gate(stream: Tensor, key: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gate `[n]` of a stream `[n, d]` and its key."""
    dot = (stream * weight * key).sum(-1)
    dot = dot * inverse_rms(stream, eps).squeeze(-1) * inverse_rms(key, eps).squeeze(-1)
    dot = dot * stream.shape[-1] ** -0.5
    return torch.sigmoid(dot.abs().clamp(min=_LEAST).sqrt().copysign(dot))
