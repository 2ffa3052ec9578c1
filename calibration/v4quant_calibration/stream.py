"""Run whole models layer by layer, several side by side, in the memory of one layer.

Between two layers a model's entire state is its residual streams; a scored text needs no KV cache.
So the loops are swapped: for each layer, for each model, push all tokens of all sequences through,
then forget the layer. Comparing two checkpoints of any size therefore takes the streams of both and
one expert. Side by side also allows the question no end result answers: what does the candidate's
layer do on the *reference's* input ("local")? There an error stands out in the layer that makes it,
before it drowns in the streams.

At the end, logits leave in slices, because a full `[tokens, vocab]` matrix is larger than the
streams it comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from v4quant_calibration.model.block import layer_forward
from v4quant_calibration.model.hyper_connection import HyperWeights, head_streams, load_hyper
from v4quant_calibration.model.mtp import STAGE, mtp_forward, next_tokens
from v4quant_calibration.model.numerics import rms_norm
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_formats.model_config import ModelConfig

Streams = list[Tensor]
"""Residual streams of each sequence, float32 `[T_i, hc_mult, hidden_size]`."""

LOGIT_ROWS = 256


@dataclass(frozen=True)
class StreamModel:
    """One model of a run: weights, options, and who watches it.

    `local_observer` watches its layers when they run on the reference's input instead.
    """

    params: Params
    options: ForwardOptions = field(default_factory=ForwardOptions)
    observer: Observer | None = None
    local_observer: Observer | None = None


@dataclass(frozen=True)
class LayerResult:
    """One layer's streams; the first model is the reference.

    before, after: each model's streams around the layer. local: by model index, the model's layer
    applied to `before[0]`. What the reference's layer added is `after[0] - before[0]`, the
    yardstick for `local[i] - after[0]`.
    """

    layer: str
    before: list[Streams]
    after: list[Streams]
    local: dict[int, Streams]


@dataclass(frozen=True)
class LogitSlice:
    """Positions start .. stop - 1 of one sequence: each model's float32 logits `[n, vocab]`."""

    sequence: int
    start: int
    stop: int
    logits: list[Tensor]


OnLayer = Callable[[LayerResult], None]
Progress = Callable[[str, int, int], None]
"""Called with what was finished ("layers.3"), how many steps are done, and how many there are."""


@torch.no_grad()
def stream_forward(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    *,
    local: Collection[int] = (),
    on_layer: OnLayer | None = None,
    progress: Progress | None = None,
) -> list[Streams]:
    """Push sequences through the trunk of every model; returns each model's final streams.

    sequences: int64 token ids `[T_i]`, T_i >= 1. local: models whose layers also run on the first
    model's input (on_layer receives the result). Raises NonFiniteActivation naming a layer,
    and whatever the parameter providers raise.
    """
    streams = [_embed(model.params, config, sequences) for model in models]
    for index in range(config.num_hidden_layers):
        layer = f"layers.{index}"
        after = [
            _step(model, config, index, before, sequences)
            for model, before in zip(models, streams, strict=True)
        ]
        if on_layer is not None:
            beside = {
                i: _layer(models[i], config, layer, streams[0], sequences, models[i].local_observer)
                for i in local
            }
            on_layer(LayerResult(layer, streams, after, beside))
            del beside
        streams = after
        if progress is not None:
            progress(layer, index + 1, config.num_hidden_layers)
    return streams


@torch.no_grad()
def stream_mtp(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    streams: Sequence[Streams],
) -> list[Streams]:
    """Each model's streams after its MTP stage, from its final trunk streams.

    The stage is fed with the true next token, and with token 0 at the last position, whose row is
    therefore meaningless to score.
    """
    return [
        mtp_forward(
            model.params,
            config,
            trunk,
            [next_tokens(ids.to(part.device)) for ids, part in zip(sequences, trunk, strict=True)],
            model.options,
            model.observer,
        )
        for model, trunk in zip(models, streams, strict=True)
    ]


def stream_logits(
    models: Sequence[StreamModel],
    config: ModelConfig,
    streams: Sequence[Streams],
    *,
    stage: str = "",
    rows: int = LOGIT_ROWS,
) -> Iterator[LogitSlice]:
    """Logits of all models, slice by slice, in the order of sequences and positions.

    stage: "" for the trunk (row s predicts token s + 1), "mtp.0" for streams of `stream_mtp`
    (row s predicts token s + 2). rows: the most positions a slice holds.
    """
    heads = [_load_head(model.params, stage) for model in models]
    for sequence, parts in enumerate(zip(*streams, strict=True)):
        for start in range(0, parts[0].shape[0], rows):
            stop = min(start + rows, parts[0].shape[0])
            logits = [
                head.logits(part[start:stop], config)
                for head, part in zip(heads, parts, strict=True)
            ]
            yield LogitSlice(sequence, start, stop, logits)


def mtp_logits(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    streams: Sequence[Streams],
    *,
    rows: int = LOGIT_ROWS,
) -> Iterator[LogitSlice]:
    """Logits of the MTP stage, slice by slice, from the trunk's final streams."""
    after = stream_mtp(models, config, sequences, streams)
    yield from stream_logits(models, config, after, stage=STAGE, rows=rows)


@dataclass(frozen=True)
class _Head:
    """Collapse, norm and vocabulary projection; the release runs all of it in float32."""

    hyper: HyperWeights
    norm: Tensor
    head: Tensor

    @torch.no_grad()
    def logits(self, streams: Tensor, config: ModelConfig) -> Tensor:
        """`[n, hc_mult, hidden]` to `[n, vocab]`."""
        collapsed = head_streams(streams, self.hyper, config)
        return rms_norm(collapsed, self.norm, config.rms_norm_eps) @ self.head.mT


def _load_head(params: Params, stage: str) -> _Head:
    prefix = f"{stage}." if stage else ""
    return _Head(load_hyper(params, f"{prefix}hc_head"), params(f"{prefix}norm"), params("head"))


def _embed(params: Params, config: ModelConfig, sequences: Sequence[Tensor]) -> Streams:
    """hc_mult equal streams of each token's embedding."""
    embedding = params("embed")
    return [
        embedding[ids.to(embedding.device)].unsqueeze(1).repeat(1, config.hc_mult, 1)
        for ids in sequences
    ]


def _layer(
    model: StreamModel,
    config: ModelConfig,
    layer: str,
    streams: Streams,
    sequences: Sequence[Tensor],
    observer: Observer | None,
) -> Streams:
    """One layer of one model on any model's streams."""
    token_ids = [ids.to(streams[0].device) for ids in sequences]
    return layer_forward(model.params, config, layer, streams, token_ids, model.options, observer)


def _step(
    model: StreamModel,
    config: ModelConfig,
    index: int,
    streams: Streams,
    sequences: Sequence[Tensor],
) -> Streams:
    """One layer of one model on its own streams, with the options' noise on what comes out."""
    after = _layer(model, config, f"layers.{index}", streams, sequences, model.observer)
    options = model.options
    if options.stream_noise:
        generator = torch.Generator().manual_seed(options.noise_seed * 65537 + index)
        for part in after:
            noise = torch.randn(part.shape, generator=generator).mul_(options.stream_noise)
            part.mul_(noise.add_(1).to(part.device))
    return after
