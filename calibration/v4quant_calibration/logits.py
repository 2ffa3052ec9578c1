"""Logits: from final streams to next-token scores, a tile of positions by vocabulary at a time.

A full `[tokens, vocab]` matrix is larger than the streams it comes from, and the head in float32
larger than a layer. So logits leave in tiles: for a block of positions, one stretch of the
vocabulary after another, each with the piece of the head that makes it. Whoever needs a whole row
(a softmax) carries what it needs from tile to tile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.model.hyper_connection import HyperWeights, head_streams, load_hyper
from v4quant_calibration.model.mtp import STAGE
from v4quant_calibration.model.numerics import rms_norm
from v4quant_calibration.model.params import Params, read_rows
from v4quant_calibration.model.streams import Streams, spans
from v4quant_calibration.stream import StreamModel, StreamStore, stream_mtp
from v4quant_formats.model_config import ModelConfig

TILE_ROWS = 256


@dataclass(frozen=True)
class LogitTile:
    """Positions start .. stop - 1 over all sequences end to end, vocabulary first .. last - 1.

    logits: of each model, float32 `[stop - start, last - first]`. Tiles of the same positions
    follow each other, the vocabulary ascending.
    """

    start: int
    stop: int
    first: int
    last: int
    logits: list[Tensor]


@torch.no_grad()
def stream_logits(
    models: Sequence[StreamModel],
    config: ModelConfig,
    streams: Sequence[Streams],
    *,
    stage: str = "",
    rows: int = TILE_ROWS,
    columns: int | None = None,
) -> Iterator[LogitTile]:
    """Logits of all models, tile by tile.

    stage: "" for the trunk (row s predicts token s + 1), "mtp.0" for streams of `stream_mtp`
    (row s predicts token s + 2). rows, columns: the most positions and vocabulary entries of a
    tile (None: all). A head that fits into one tile's columns is read once, another once for every
    block of positions.
    """
    heads = [_load_head(model.params, stage) for model in models]
    stretches = spans(0, config.vocab_size, columns)
    kept = (
        [read_rows(model.params, "head", *stretches[0]) for model in models]
        if len(stretches) == 1
        else None
    )
    for start, stop in spans(0, streams[0].shape.tokens, rows):
        inputs = [
            head.inputs(part.read(start, stop), config)
            for head, part in zip(heads, streams, strict=True)
        ]
        for first, last in stretches:
            logits = []
            for number, (model, x) in enumerate(zip(models, inputs, strict=True)):
                piece = kept[number] if kept else read_rows(model.params, "head", first, last)
                logits.append(x @ piece.mT)
            yield LogitTile(start, stop, first, last, logits)


def mtp_logits(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    streams: Sequence[Streams],
    *,
    store: StreamStore | None = None,
    rows: int = TILE_ROWS,
    columns: int | None = None,
) -> Iterator[LogitTile]:
    """Logits of the MTP stage, tile by tile, from the trunk's final streams."""
    after = stream_mtp(models, config, sequences, streams, store=store)
    yield from stream_logits(models, config, after, stage=STAGE, rows=rows, columns=columns)


@dataclass(frozen=True)
class _Head:
    """Collapse and norm before the vocabulary projection; the release runs these in float32."""

    hyper: HyperWeights
    norm: Tensor

    def inputs(self, streams: Tensor, config: ModelConfig) -> Tensor:
        """`[n, hc_mult, hidden]` to `[n, hidden]`."""
        return rms_norm(head_streams(streams, self.hyper, config), self.norm, config.rms_norm_eps)


def _load_head(params: Params, stage: str) -> _Head:
    prefix = f"{stage}." if stage else ""
    return _Head(load_hyper(params, f"{prefix}hc_head"), params(f"{prefix}norm"))
