"""One layer: the unit that a streamed run loads, uses on every token, and drops.

    streams -> attention sublayer -> mixture-of-experts sublayer -> streams

Both sublayers read and write the residual streams through hyper-connections. Attention runs
sequence by sequence; the experts run over the tokens of all sequences at once, so that each is
decoded once. A layer's name decides its weights ("layers.3", "mtp.0"), its index the attention kind
and whether it routes by table.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from v4quant_calibration.model.attention import (
    AttentionLayer,
    attention,
    indexer_matters,
    load_attention,
)
from v4quant_calibration.model.experts import mixture_of_experts
from v4quant_calibration.model.hyper_connection import (
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
from v4quant_formats.model_config import ModelConfig


def layer_forward(
    params: Params,
    config: ModelConfig,
    layer: str,
    streams: Sequence[Tensor],
    token_ids: Sequence[Tensor],
    options: ForwardOptions,
    observer: Observer | None = None,
) -> list[Tensor]:
    """Run one layer over sequences of any lengths.

    layer: "layers.N" or "mtp.0" (a window layer routed by bias). streams: float32
    `[T_i, hc_mult, hidden]` of each sequence, left unchanged. token_ids: int64 `[T_i]`, for the
    hash-routed layers. Returns new streams of the same shapes. Raises NonFiniteActivation naming
    the attention, the expert or else the layer whose result is not finite.
    """
    ratio, hashed = _layer_facts(layer, config)
    after = _attention_sublayer(params, config, layer, ratio, streams, options, observer)
    _expert_sublayer(params, config, layer, hashed, after, token_ids, options, observer)
    if options.round_streams:
        after = [part.bfloat16().float() for part in after]
    for part in after:
        require_finite(part, layer)
    return after


def _layer_facts(layer: str, config: ModelConfig) -> tuple[int, bool]:
    """Compression ratio and whether the layer routes by token id."""
    kind, index = layer.split(".")
    if kind == "mtp":
        return 0, False
    return config.compress_ratios[int(index)], int(index) < config.num_hash_layers


def _attention_sublayer(
    params: Params,
    config: ModelConfig,
    layer: str,
    ratio: int,
    streams: Sequence[Tensor],
    options: ForwardOptions,
    observer: Observer | None,
) -> list[Tensor]:
    longest = max(part.shape[0] for part in streams)
    use_indexer = indexer_matters(ratio, longest, config)
    weights = load_attention(params, layer, ratio, use_indexer)
    table = rope_table(config, ratio, longest, streams[0].device)
    shared = AttentionLayer(layer, ratio, weights, table, config, options, observer)
    hyper = load_hyper(params, f"{layer}.hc_attn")
    norm = params(f"{layer}.attn_norm")
    after = []
    for part in streams:
        mixing = mixing_weights(part, hyper, config)
        x = rms_norm(read_streams(part, mixing.pre), norm, config.rms_norm_eps)
        output = attention(x, shared)
        require_finite(output, shared.name + ".attn")
        after.append(write_streams(part, output, mixing))
    return after


def _expert_sublayer(
    params: Params,
    config: ModelConfig,
    layer: str,
    hashed: bool,
    streams: list[Tensor],
    token_ids: Sequence[Tensor],
    options: ForwardOptions,
    observer: Observer | None,
) -> None:
    """Replace each sequence's streams, one by one, so that old and new coexist for one only."""
    hyper = load_hyper(params, f"{layer}.hc_ffn")
    norm = params(f"{layer}.ffn_norm")
    mixings: list[Mixing] = []
    inputs = []
    for part in streams:
        mixing = mixing_weights(part, hyper, config)
        mixings.append(mixing)
        inputs.append(rms_norm(read_streams(part, mixing.pre), norm, config.rms_norm_eps))
    x = torch.cat(inputs)
    del inputs
    routing = route(x, torch.cat(list(token_ids)), params, layer, hashed, config)
    if observer is not None:
        observer.on_route(layer, routing.expert_ids, routing.weights)
    output = mixture_of_experts(x, routing, params, layer, config, options, observer)
    outputs = torch.split(output, [part.shape[0] for part in streams])
    for i, (part, out, mixing) in enumerate(zip(streams, outputs, mixings, strict=True)):
        streams[i] = write_streams(part, out, mixing)
