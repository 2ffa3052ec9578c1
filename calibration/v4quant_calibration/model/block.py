"""One layer: the unit that a streamed run loads, uses on every token, and drops.

    streams -> (Engram) -> attention sublayer -> mixture-of-experts sublayer -> streams

Both sublayers read and write the residual streams through hyper-connections. Attention runs
sequence by sequence; the experts run over the tokens of all sequences at once, so that each is
decoded once, or over as many as `ForwardOptions.expert_tokens` allows. Streams are read and written
a piece at a time, wherever they live. A layer's name decides its weights ("layers.3", "mtp.0");
what kind of layer it is, `LayerFacts` say.
"""

from __future__ import annotations

from collections.abc import Callable
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
from v4quant_calibration.model.caches import SharedCaches
from v4quant_calibration.model.engram import engram_forward
from v4quant_calibration.model.experts import mixture_of_experts
from v4quant_calibration.model.hyper_connection import (
    HyperWeights,
    Mixing,
    load_hyper,
    mixing_weights,
    read_streams,
    reading_weights,
    write_streams,
)
from v4quant_calibration.model.numerics import require_finite, rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.model.rope import rope_table
from v4quant_calibration.model.router import route
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.model_config import LayerFacts, ModelConfig


def layer_forward(
    params: Params,
    config: ModelConfig,
    layer: str,
    before: Streams,
    after: Streams,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None = None,
    caches: SharedCaches | None = None,
    on_input: Callable[[Streams], None] | None = None,
) -> None:
    """Run one layer over sequences of any lengths, from the rows of `before` to those of `after`,
    which may be the same.

    layer: "layers.N", or the classic MTP stage. token_ids: int64 `[T]` of all sequences end to end.
    caches: what layers leave for later ones, for V4.1. on_input: shown the rows that attention is
    about to read, the Engram's part among them. Raises NonFiniteActivation naming the attention,
    the expert or else the layer whose result is not finite.
    """
    facts = config.facts(layer)
    if facts.engram is not None:
        engram_forward(params, config, facts, before, after, token_ids, options)
        before = after
    if on_input is not None:
        on_input(before)
    if observer is not None:
        observer.on_layer(layer, before, caches)
    attention_sublayer(params, config, layer, before, after, options, observer, caches)
    expert_sublayer(params, config, layer, after, token_ids, options, observer)


def expert_sublayer(
    params: Params,
    config: ModelConfig,
    layer: str,
    streams: Streams,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """A layer's second half, on the streams in place."""
    facts = config.facts(layer)
    sublayer = load_sublayer(params, config, layer, "ffn")
    for start, stop in spans(0, streams.shape.tokens, options.expert_tokens):
        _expert_pass(
            sublayer, params, facts, streams, start, token_ids[start:stop], options, observer
        )


@dataclass(frozen=True)
class Sublayer:
    """How a sublayer reads the streams, and writes what it makes of them."""

    hyper: HyperWeights
    norm: Tensor
    config: ModelConfig

    def read(self, streams: Streams, start: int, stop: int) -> tuple[Mixing, Tensor]:
        """Mixing weights and normalised input `[n, hidden]` of rows start .. stop - 1."""
        rows = streams.read(start, stop)
        mixing = mixing_weights(rows, self.hyper, self.config)
        x = read_streams(rows, reading_weights(streams, start, stop, mixing, self.config))
        return mixing, rms_norm(x, self.norm, self.config.rms_norm_eps)

    def mixed(self, streams: Streams, start: int, output: Tensor, mixing: Mixing) -> Tensor:
        """The rows from `start` on with the sublayer's output `[n, hidden]` written into them."""
        return write_streams(streams.read(start, start + output.shape[0]), output, mixing)

    def write(self, streams: Streams, start: int, rows: Tensor, mixing: Mixing) -> None:
        """Replace rows, and what the next sublayer is to read them by."""
        streams.write(start, rows)
        if self.config.delayed_mixing:
            streams.write_pre(start, mixing.pre.mT)


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
    caches: SharedCaches | None = None,
) -> None:
    """A layer's first half, from `before` to `after`; None leaves what it computes to observers."""
    facts = config.facts(layer)
    longest = max(before.shape.lengths)
    weights = load_attention(params, facts, indexer_matters(facts, longest, config))
    table = rope_table(config, facts.ratio, longest, before.shape.device)
    if after is None and caches is not None:
        caches = caches.reading()
    shared = AttentionLayer(facts, weights, table, config, options, observer, caches)
    sublayer = load_sublayer(params, config, layer, "attn")
    for number, (first, last) in enumerate(before.spans):
        pieces = spans(first, last, options.row_chunk)
        builder = EntryBuilder(shared, number, (first, last))
        for start, stop in pieces:
            mixing, x = sublayer.read(before, start, stop)
            builder.add(x, start - first)
        entries = builder.finish()
        for start, stop in pieces:
            if len(pieces) > 1:  # the inputs of a long sequence are computed twice, not kept
                mixing, x = sublayer.read(before, start, stop)
            output = attention(x, start - first, entries, shared)
            require_finite(output, f"{layer}.attn")
            if after is not None:
                sublayer.write(after, start, sublayer.mixed(before, start, output, mixing), mixing)


def _expert_pass(
    sublayer: Sublayer,
    params: Params,
    facts: LayerFacts,
    streams: Streams,
    first: int,
    token_ids: Tensor,
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """The experts on the rows from `first` on, which are replaced."""
    layer, config = facts.name, sublayer.config
    pieces = spans(first, first + token_ids.shape[0], options.row_chunk)
    found = [sublayer.read(streams, *piece) for piece in pieces]
    mixings = [mixing for mixing, _ in found]
    x = torch.cat([x for _, x in found])
    del found
    routing = route(x, token_ids, params, facts, config)
    if observer is not None:
        observer.on_route(layer, routing.expert_ids, routing.weights)
    output = mixture_of_experts(x, routing, params, layer, config, options, observer)
    for (start, stop), mixing in zip(pieces, mixings, strict=True):
        rows = sublayer.mixed(streams, start, output[start - first : stop - first], mixing)
        require_finite(rows, layer)
        sublayer.write(streams, start, rows.bfloat16() if options.round_streams else rows, mixing)
