"""Scoring: from final residual streams to one record per token and model.

Logits of all models pass by in slices, are reduced to records and forgotten; nothing of the size
`[tokens, vocab]` ever exists. All models but the first are scored against the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.corpus import Corpus
from v4quant_calibration.divergence import (
    BLOCK_TOKENS,
    DivergenceError,
    TokenRecords,
    score_tokens,
)
from v4quant_calibration.stream import LogitSlice, StreamModel, Streams, stream_logits
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

LogitSink = Callable[[LogitSlice], None]


_FEW_BLOCKS = 8
_SMALLEST_BLOCK = 16


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
) -> Scores:
    """Score every position whose successor the text knows. Raises DivergenceError for NaN."""
    columns: list[dict[str, list[Tensor]]] = [{} for _ in models[1:] or models]
    choices: list[list[Tensor]] = [[torch.empty_like(w) for w in corpus.windows] for _ in models]
    progress.start("Scoring", corpus.tokens, "tok")
    blocks = token_blocks(corpus)
    for piece in stream_logits(models, config, streams):
        ids = corpus.windows[piece.sequence]
        if sink is not None:
            sink(piece)
        _check_finite(piece, config)
        for chosen, logits in zip(choices, piece.logits, strict=True):
            chosen[piece.sequence][piece.start : piece.stop] = logits.argmax(-1)
        # The last position of a window predicts nothing that is known.
        stop = min(piece.stop, len(ids) - 1)
        rows = slice(0, stop - piece.start)
        targets = ids[piece.start + 1 : stop + 1]
        place = {
            "block": blocks[piece.sequence][piece.start : stop],
            "part": torch.full((len(targets),), corpus.part_of[piece.sequence]),
        }
        reference = piece.logits[0][rows] if len(models) > 1 else None
        scored = piece.logits[1:] or piece.logits
        for column, logits in zip(columns, scored, strict=True):
            for key, value in (score_tokens(logits[rows], targets, reference) | place).items():
                column.setdefault(key, []).append(value)
        progress.advance(piece.stop - piece.start)
    progress.finish()
    records = [TokenRecords(**{k: torch.cat(v) for k, v in c.items()}) for c in columns]
    return Scores(records, choices)


def _check_finite(piece: LogitSlice, config: ModelConfig) -> None:
    for model, values in enumerate(piece.logits):
        if not bool(torch.isfinite(values).all()):
            raise DivergenceError(
                f"logits of model {model} hold NaN or infinity in window {piece.sequence} although "
                f"all {config.num_hidden_layers} layers were finite; check head, norm and hc_head"
            )
