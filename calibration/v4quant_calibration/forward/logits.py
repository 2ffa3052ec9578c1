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

from v4quant_calibration.forward.drafts import stream_mtp
from v4quant_calibration.forward.stream import StreamModel, StreamStore, matrix_rows
from v4quant_calibration.model.hyper_connection import HyperWeights, collapse, load_collapse
from v4quant_calibration.model.mtp import STAGE
from v4quant_calibration.model.numerics import rms_norm
from v4quant_calibration.model.params import Params, read_rows
from v4quant_calibration.model.streams import Streams, spans
from v4quant_formats.deepseek_v4 import markov_modules
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels import dispatch

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


def head_inputs(
    params: Params, streams: Streams, start: int, stop: int, config: ModelConfig
) -> Tensor:
    """What the head multiplies, `[n, hidden]`, of the trunk's last rows start .. stop - 1."""
    return _load_head(params, "", None, config).inputs(streams, start, stop, config)[0]


@torch.no_grad()
def stream_logits(
    models: Sequence[StreamModel],
    config: ModelConfig,
    streams: Sequence[Streams],
    *,
    stage: str = "",
    previous: Tensor | None = None,
    rows: int = TILE_ROWS,
    columns: int | None = None,
) -> Iterator[LogitTile]:
    """Logits of all models, tile by tile.

    stage: "" for the trunk (row s predicts token s + 1), "mtp.0" for streams of `stream_mtp`
    (row s predicts token s + 2), or DSpark's last stage. previous: for that, int64 `[T]`, the
    token before the one each row guesses. rows, columns: the most positions and vocabulary entries
    of a tile (None: all). A head that fits into one tile's columns is read once, another once for
    every block of positions.
    """
    heads = [_load_head(model.params, stage, previous, config) for model in models]
    stretches = spans(0, config.vocab_size, columns)
    kept = [head.piece(*stretches[0]) for head in heads] if len(stretches) == 1 else None
    for start, stop in spans(0, streams[0].shape.tokens, rows):
        inputs = [
            head.inputs(part, start, stop, config)
            for head, part in zip(heads, streams, strict=True)
        ]
        for first, last in stretches:
            logits = []
            for number, (head, terms) in enumerate(zip(heads, inputs, strict=True)):
                pieces = kept[number] if kept else head.piece(first, last)
                products = [
                    dispatch.float32_product(x, piece.mT)
                    for x, piece in zip(terms, pieces, strict=True)
                ]
                logits.append(products[0] if len(products) == 1 else products[0] + products[1])
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


def markov_rows(params: Params, config: ModelConfig, stage: str, previous: Tensor) -> Tensor:
    """DSpark's w1 rows `[T, rank]` of the tokens `previous`, int64 `[T]`."""
    return matrix_rows(params, markov_modules(config, stage)[0], previous)


@dataclass(frozen=True)
class _Head:
    """Collapse and norm before the vocabulary projection; the release runs these in float32.

    markov: of every position w1 of the token before, for a stage that adds w2, called `second`,
    times it.
    """

    params: Params
    hyper: HyperWeights | None
    norm: Tensor
    markov: Tensor | None
    second: str

    def inputs(self, streams: Streams, start: int, stop: int, config: ModelConfig) -> list[Tensor]:
        """What `piece` multiplies, `[n, ...]` each, of rows start .. stop - 1."""
        x = collapse(streams, start, stop, self.hyper, config)
        x = rms_norm(x, self.norm, config.rms_norm_eps)
        return [x] if self.markov is None else [x, self.markov[start:stop]]

    def piece(self, first: int, last: int) -> list[Tensor]:
        """The matrices' rows of vocabulary first .. last - 1."""
        found = [read_rows(self.params, "head", first, last)]
        if self.markov is not None:
            found.append(read_rows(self.params, self.second, first, last))
        return found


def _load_head(params: Params, stage: str, previous: Tensor | None, config: ModelConfig) -> _Head:
    prefix = f"{stage}." if stage else ""
    markov = None if previous is None else markov_rows(params, config, stage, previous)
    hyper, norm = load_collapse(params, prefix, config), params(f"{prefix}norm")
    return _Head(params, hyper, norm, markov, markov_modules(config, stage)[1])
