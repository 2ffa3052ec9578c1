"""Scoring: from final residual streams to one record per token and model.

Logits of all models pass by in tiles, are reduced to records and forgotten; nothing of the size
`[tokens, vocab]` ever exists. All models but the first are scored against the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.divergence import BLOCK_TOKENS, DivergenceError, TokenRecords
from v4quant_calibration.evaluation.token_scores import Softmax, TokenScores
from v4quant_calibration.forward.logits import TILE_ROWS, LogitTile, stream_logits
from v4quant_calibration.forward.stream import StreamModel, named
from v4quant_calibration.model.mtp import next_tokens
from v4quant_calibration.model.streams import Streams
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

LogitSink = Callable[[LogitTile], None]


_FEW_BLOCKS = 8
_SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class TileSize:
    """Positions and vocabulary entries of which logits exist at once (None: all entries)."""

    rows: int = TILE_ROWS
    columns: int | None = None


SMALL_TILES = TileSize()


class SavedRows(Protocol):
    """A saved reference's rows for some positions, beside a model's."""

    def add(self, logits: Tensor, first: int) -> None:
        """The model's logits from vocabulary entry `first` on, `[n, c]`."""

    def columns(self) -> dict[str, Tensor]:
        """Columns of TokenRecords, once the model's softmax has seen every entry."""


class SavedReference(Protocol):
    """Next-token distributions of a reference that is not run.

    known: bool, of which positions it has one, over its windows end to end; None: of all.
    """

    @property
    def known(self) -> Tensor | None:
        """See the class."""

    def begin(self, start: int, model: Softmax) -> SavedRows:
        """Its rows from position `start` on, for the positions `model` is the softmax of."""


@dataclass(frozen=True)
class Scores:
    """Records of the models after the first (of the first when it is alone), and greedy choices.

    choices: by model and sequence, int64 `[T]`, the most probable successor of every position.
    """

    records: list[TokenRecords]
    choices: list[list[Tensor]]


def block_tokens(corpus: Corpus) -> int:
    """Tokens a block holds: 512, less for a text so short that few such blocks would come of it.

    Smaller blocks are less independent, so the error bar of a short text is on the small side; a
    few hundred tokens still deserve one.
    """
    blocks = sum(-(-len(window) // BLOCK_TOKENS) for window in corpus.windows)
    if blocks >= _FEW_BLOCKS:
        return BLOCK_TOKENS
    return min(BLOCK_TOKENS, max(_SMALLEST_BLOCK, corpus.tokens // _FEW_BLOCKS))


def token_blocks(corpus: Corpus) -> list[Tensor]:
    """By window, int64 `[T]`: the block each position belongs to. No two windows share one."""
    size, first, blocks = block_tokens(corpus), 0, []
    for window in corpus.windows:
        blocks.append(first + torch.arange(len(window)) // size)
        first += -(-len(window) // size)
    return blocks


def score(
    models: Sequence[StreamModel],
    config: ModelConfig,
    corpus: Corpus,
    streams: Sequence[Streams],
    progress: Progress,
    sink: LogitSink | None = None,
    tile: TileSize = SMALL_TILES,
    saved: SavedReference | None = None,
) -> Scores:
    """Score every position whose successor the text knows. Raises DivergenceError for NaN.

    saved: what the first model is scored against; its records then stand before the others'.
    """
    text = FlatText(corpus, None if saved is None else saved.known)
    columns: list[dict[str, Tensor]] = [{} for _ in models[saved is None :] or models]
    choices = [torch.empty_like(text.targets) for _ in models]
    progress.start("Scoring", corpus.tokens, "tok")
    tiles = stream_logits(models, config, streams, rows=tile.rows, columns=tile.columns)
    for piece in tiles:
        if sink is not None:
            sink(piece)
        _check_finite(piece, models, config)
        if piece.first == 0:
            scores = TokenScores(text.targets[piece.start : piece.stop], len(models))
            beside = saved.begin(piece.start, scores.softmax[0]) if saved else None
        scores.add(piece.logits, piece.first)
        if beside is not None:
            beside.add(piece.logits[0].float().cpu(), piece.first)
        if piece.last < config.vocab_size:
            continue
        for chosen, found in zip(choices, scores.softmax, strict=True):
            chosen[piece.start : piece.stop] = found.best[:, 0]
        found_columns = scores.columns() if beside is None or len(models) > 1 else []
        if beside is not None:
            found_columns.insert(0, beside.columns())
        for column, values in zip(columns, found_columns, strict=True):
            text.place(column, piece.start, values)
        progress.advance(piece.stop - piece.start)
    progress.finish()
    records = [text.records(column) for column in columns]
    lengths = [len(window) for window in corpus.windows]
    return Scores(records, [list(chosen.split(lengths)) for chosen in choices])


class FlatText:
    """A corpus' tokens end to end: what follows each, and whether that is known."""

    def __init__(self, corpus: Corpus, compared: Tensor | None = None) -> None:
        """The last position of a window predicts nothing that is known.

        compared: bool, at least as long as the text: which positions count (None: all).
        """
        windows = corpus.windows
        self.targets = torch.cat([next_tokens(ids) for ids in windows])
        self.known = torch.cat([torch.arange(len(ids)) < len(ids) - 1 for ids in windows])
        if compared is not None:
            self.known &= compared[: len(self.known)]
        self.block = torch.cat(token_blocks(corpus))
        lengths = torch.tensor([len(ids) for ids in windows])
        self.part = torch.tensor(corpus.part_of).repeat_interleave(lengths)

    def place(self, column: dict[str, Tensor], start: int, values: dict[str, Tensor]) -> None:
        """Put the values of the positions from `start` on in their places.

        Room for all positions is taken at once: small pieces kept between large ones that are
        dropped would leave memory in holes.
        """
        for key, value in values.items():
            if key not in column:
                column[key] = value.new_empty(len(self.targets))
            column[key][start : start + len(value)] = value

    def records(self, column: dict[str, Tensor]) -> TokenRecords:
        """The known positions."""
        whole = column | {"block": self.block, "part": self.part}
        return TokenRecords(**{key: value[self.known] for key, value in whole.items()})


def _check_finite(piece: LogitTile, models: Sequence[StreamModel], config: ModelConfig) -> None:
    for model, values in zip(models, piece.logits, strict=True):
        low, high = values.aminmax()
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            raise DivergenceError(
                named(
                    model,
                    f"logits of tokens {piece.start} to {piece.stop - 1} hold NaN or infinity "
                    f"although all {config.num_hidden_layers} layers were finite; check head, "
                    "norm and hc_head",
                )
            )
