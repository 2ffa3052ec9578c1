"""Draft hits: of every guess of a draft stage, whether greedy decoding would accept it.

A guess is accepted when it is what the trunk itself chooses there. The trunk's choices are known
along the text, so every guess is held against the choice that follows the text before it, and what
a guess is given of earlier ones (DSpark's Markov term) is the text's token. The first guess of a
block is thereby judged exactly. A later one is reached in service only when the ones before were
accepted, and is then given the trunk's own choices; the run of hits a block begins with counts
accepted tokens exactly where the text is what the trunk would write, and estimates it elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.divergence import DivergenceError
from v4quant_calibration.evaluation.scoring import FlatText, TileSize
from v4quant_calibration.evaluation.token_scores import Softmax
from v4quant_calibration.forward.drafts import Drafts, stream_dspark
from v4quant_calibration.forward.logits import LogitTile, markov_rows, mtp_logits, stream_logits
from v4quant_calibration.forward.stream import StreamModel, StreamStore
from v4quant_calibration.model.dspark import DraftBlocks, confidence, draft_blocks, require_blocks
from v4quant_calibration.model.streams import Streams
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class DraftHits:
    """By draft and guess: whether it was the trunk's choice, and whether the text's.

    target, text: float64 `[n, guesses]` of 0 and 1; block: int64 `[n]`, the block of the text a
    draft belongs to. confidence: float64 `[n, guesses]`, the probability of acceptance that the
    draft itself states, if it does.
    """

    target: Tensor
    text: Tensor
    block: Tensor
    confidence: Tensor | None = None


def classic_hits(
    model: StreamModel,
    config: ModelConfig,
    corpus: Corpus,
    streams: Streams,
    choices: Sequence[Tensor],
    store: StreamStore,
    tile: TileSize,
) -> DraftHits:
    """Hits of the MTP stage, which guesses one token per position, from the final trunk streams.

    choices: by sequence, the trunk's most probable successor of every position. The last two
    positions of a window have nothing to be held against and are left out. Raises DivergenceError
    when nothing remains.
    """
    text, chosen = FlatText(corpus), torch.cat(list(choices))
    # Position s guesses token s + 2, which is there when s + 1 has a successor in its window.
    there = text.known & text.known.roll(-1)
    if not bool(there.any()):
        raise DivergenceError(
            "no window has three tokens, which a draft needs; give a longer --seq-len or more text"
        )
    guesses = _Guesses(text.targets, config)
    for piece in mtp_logits(
        [_unwatched(model)],
        config,
        corpus.windows,
        [streams],
        store=store,
        rows=tile.rows,
        columns=tile.columns,
    ):
        guesses.add(piece)
    return DraftHits(
        target=(guesses.best == chosen.roll(-1))[there].double().unsqueeze(1),
        text=(guesses.best == text.targets.roll(-1))[there].double().unsqueeze(1),
        block=text.block[there],
    )


def dspark_hits(
    model: StreamModel,
    config: ModelConfig,
    corpus: Corpus,
    drafts: Drafts,
    taps: Sequence[Streams],
    choices: Sequence[Tensor],
    store: StreamStore,
    tile: TileSize,
) -> DraftHits:
    """Hits of DSpark's blocks, one behind another through the text.

    taps: what the trunk left for the stages. Raises DraftError when no window is long enough.
    """
    blocks = draft_blocks(corpus.windows, config)
    require_blocks(blocks)
    stages = drafts.stages
    (rows,) = stream_dspark([_unwatched(model)], config, stages, blocks, [taps], store=store)
    text, chosen = FlatText(corpus), torch.cat(list(choices))
    after = _rows_after(blocks, corpus)
    guesses = _Guesses(text.targets[after], config)
    for piece in stream_logits(
        [model],
        config,
        [rows],
        stage=stages[-1],
        previous=blocks.previous,
        rows=tile.rows,
        columns=tile.columns,
    ):
        guesses.add(piece)
    markov = markov_rows(model.params, config, stages[-1], blocks.previous)
    sure = confidence(model.params, config, stages[-1], rows, markov, tile.rows)
    shape = (-1, blocks.size)
    return DraftHits(
        target=(guesses.best == chosen[after]).double().view(shape),
        text=(guesses.best == text.targets[after]).double().view(shape),
        block=text.block[after].view(shape)[:, 0],
        confidence=sure.double().sigmoid().cpu().view(shape),
    )


def _rows_after(blocks: DraftBlocks, corpus: Corpus) -> Tensor:
    """Of each row, the place in the flat text whose successor it guesses, int64 `[rows]`."""
    found, first = [], 0
    for ids, anchors in zip(corpus.windows, blocks.anchors, strict=True):
        places = anchors.unsqueeze(1) + 1 + torch.arange(blocks.size)
        found.append(first + places.flatten())
        first += len(ids)
    return torch.cat(found)


def _unwatched(model: StreamModel) -> StreamModel:
    return replace(model, observer=None, local_observer=None)


class _Guesses:
    """The most probable token of every row, found tile by tile."""

    def __init__(self, targets: Tensor, config: ModelConfig) -> None:
        """targets: int64 `[n]`, any ids of the vocabulary."""
        self._targets, self._config = targets, config
        self.best = torch.empty_like(targets)

    def add(self, piece: LogitTile) -> None:
        """The next tile of the only model."""
        if piece.first == 0:
            self._softmax = Softmax(self._targets[piece.start : piece.stop])
        self._softmax.add(piece.logits[0].float().cpu(), piece.first)
        if piece.last == self._config.vocab_size:
            self.best[piece.start : piece.stop] = self._softmax.best[:, 0]
