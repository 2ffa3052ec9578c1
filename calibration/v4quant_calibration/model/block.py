"""One layer: the unit that a streamed run loads, uses on every token, and drops.

    streams -> attention sublayer -> mixture-of-experts sublayer -> streams

Both sublayers read and write the residual streams through hyper-connections. Attention runs
sequence by sequence; the experts run over the tokens of all sequences at once, so that each is
decoded once, or over as many as `ForwardOptions.expert_tokens` allows. Streams are read and written
a piece at a time, wherever they live. A layer's name decides its weights ("layers.3", "mtp.0"), its
index the attention kind and whether it routes by table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.attention import (
    AttentionLayer,
    EntryBuilder,
    attention,
    indexer_matters,
    load_attention,
)
from v4quant_calibration.model.experts import mixture_of_experts
from v4quant_calibration.model.hyper_connection import (
    HyperWeights,
    Mixing,
    load_hyper,
    mixing_weights,
    read_streams,
    write_streams,
)
from v4quant_calibration.model.numerics import require_finite, rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rope_table
from v4quant_calibration.model.router import route
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.model_config import ModelConfig


def layer_forward(
    params: Params,
    config: ModelConfig,
    layer: str,
    before: Streams,
    after: Streams,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None = None,
) -> None:
    """Run one layer over sequences of any lengths, from the rows of `before` to those of `after`,
    which may be the same.

    layer: "layers.N" or "mtp.0" (a window layer routed by bias). token_ids: int64 `[T]` of all
    sequences end to end, for the hash-routed layers. Raises NonFiniteActivation naming the
    attention, the expert or else the layer whose result is not finite.
    """
    if observer is not None:
        observer.on_layer(layer, before)
    attention_sublayer(params, config, layer, before, after, options, observer)
    _, hashed = _layer_facts(layer, config)
    expert_sublayer(params, config, layer, hashed, after, token_ids, options, observer)


def expert_sublayer(
    params: Params,
    config: ModelConfig,
    layer: str,
    hashed: bool,
    streams: Streams,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """A layer's second half, on the streams in place; hashed: whether it routes by token id."""
    read = load_sublayer(params, config, layer, "ffn")
    for start, stop in spans(0, streams.shape.tokens, options.expert_tokens):
        _expert_pass(
            read, params, layer, hashed, streams, start, token_ids[start:stop], options, observer
        )


def _layer_facts(layer: str, config: ModelConfig) -> tuple[int, bool]:
    """Compression ratio and whether the layer routes by token id."""
    kind, index = layer.split(".")
    if kind == "mtp":
        return 0, False
    return config.compress_ratios[int(index)], int(index) < config.num_hash_layers


@dataclass(frozen=True)
class Sublayer:
    """How a sublayer reads the streams."""

    hyper: HyperWeights
    norm: Tensor
    config: ModelConfig

    def __call__(self, rows: Tensor) -> tuple[Mixing, Tensor]:
        """Mixing weights and normalised input `[n, hidden]` of rows `[n, hc_mult, hidden]`."""
        mixing = mixing_weights(rows, self.hyper, self.config)
        x = read_streams(rows, mixing.pre)
        return mixing, rms_norm(x, self.norm, self.config.rms_norm_eps)


def load_sublayer(params: Params, config: ModelConfig, layer: str, half: str) -> Sublayer:
    """half: "attn" or "ffn"."""
    hyper, norm = load_hyper(params, f"{layer}.hc_{half}"), params(f"{layer}.{half}_norm")
    return Sublayer(hyper, norm, config)


def attention_sublayer(
    params: Params,
    config: ModelConfig,
    layer: str,
    before: Streams,
    after: Streams | None,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """A layer's first half, from `before` to `after`; None leaves what it computes to observers."""
    ratio, _ = _layer_facts(layer, config)
    longest = max(before.shape.lengths)
    use_indexer = indexer_matters(ratio, longest, config)
    weights = load_attention(params, layer, ratio, use_indexer)
    table = rope_table(config, ratio, longest, before.shape.device)
    shared = AttentionLayer(layer, ratio, weights, table, config, options, observer)
    read = load_sublayer(params, config, layer, "attn")
    for first, last in before.spans:
        pieces = spans(first, last, options.row_chunk)
        builder = EntryBuilder(shared, last - first)
        for start, stop in pieces:
            rows = before.read(start, stop)
            mixing, x = read(rows)
            builder.add(x, start - first)
        entries = builder.finish()
        for start, stop in pieces:
            if len(pieces) > 1:  # the inputs of a long sequence are computed twice, not kept
                rows = before.read(start, stop)
                mixing, x = read(rows)
            output = attention(x, start - first, entries, shared)
            require_finite(output, f"{layer}.attn")
            if after is not None:
                after.write(start, write_streams(rows, output, mixing))


def _expert_pass(
    read: Sublayer,
    params: Params,
    layer: str,
    hashed: bool,
    streams: Streams,
    first: int,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """The experts on the rows from `first` on, which are replaced."""
    pieces = spans(first, first + token_ids.shape[0], options.row_chunk)
    found = [read(streams.read(*piece)) for piece in pieces]
    mixings = [mixing for mixing, _ in found]
    x = torch.cat([x for _, x in found])
    del found
    routing = route(x, token_ids, params, layer, hashed, read.config)
    if observer is not None:
        observer.on_route(layer, routing.expert_ids, routing.weights)
    output = mixture_of_experts(x, routing, params, layer, read.config, options, observer)
    for (start, stop), mixing in zip(pieces, mixings, strict=True):
        rows = write_streams(
            streams.read(start, stop), output[start - first : stop - first], mixing
        )
        require_finite(rows, layer)
        streams.write(start, rows.bfloat16() if options.round_streams else rows)
