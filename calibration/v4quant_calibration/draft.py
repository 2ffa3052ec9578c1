"""Draft: would the multi-token-prediction stage's guesses still be accepted?

At position s the stage is given the trunk's streams and the next token, and guesses the token after
that. Greedy speculative decoding accepts the guess when it is what the model itself would choose
there, which is the trunk's own best token one position later: so each checkpoint's draft is held
against its *own* trunk, on the same held-out text, before and after. A conversion that changes both
alike loses nothing. The share that hits the token of the text is given beside it.

Only the classic stage (`mtp.0` with `e_proj`) is run; DSpark's chain is of another design.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.corpus import Corpus
from v4quant_calibration.divergence import DivergenceError, block_mean
from v4quant_calibration.logits import mtp_logits
from v4quant_calibration.model.streams import Streams
from v4quant_calibration.scoring import SMALL_TILES, FlatText, TileSize
from v4quant_calibration.stream import StreamModel, StreamStore
from v4quant_calibration.token_scores import Softmax
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

NO_DRAFT = "no classic draft stage (mtp.0.e_proj) in {path}; the draft was not scored"
DSPARK = (
    "{path} drafts with DSpark stages (mtp.0.main_proj), which guess blocks of five tokens from "
    "noise tokens; their arithmetic has no reference to be checked against here, so the draft was "
    "not scored"
)


@dataclass(frozen=True)
class DraftHits:
    """By scored position: whether the guess was the trunk's choice, and whether the text's.

    target, text: float64 `[n]` of 0 and 1; block: int64 `[n]`.
    """

    target: Tensor
    text: Tensor
    block: Tensor


@dataclass(frozen=True)
class DraftMember:
    """A checkpoint that ran: its model, final streams, and greedy choices by sequence."""

    checkpoint: Checkpoint
    model: StreamModel
    streams: Streams
    choices: Sequence[Tensor]


def score_drafts(
    members: Sequence[DraftMember],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    store: StreamStore,
    tile: TileSize,
) -> list[dict[str, Any]]:
    """`draft` of each candidate's result: of the members after the first, or of the only one."""
    progress.start("Draft", len(members), "model")
    hits: list[DraftHits | None] = []
    for member in members:
        hits.append(
            draft_hits(member.model, config, corpus, member.streams, member.choices, store, tile)
            if has_classic_draft(member.checkpoint)
            else None
        )
        progress.advance(1)
    progress.finish()
    reference = hits[0] if len(members) > 1 else None
    drafts: list[dict[str, Any]] = []
    for member, own in list(zip(members, hits, strict=True))[len(members) > 1 :]:
        lacking = member if own is None else members[0]
        if own is None or hits[0] is None:
            drafts.append({"note": _why_not(lacking.checkpoint)})
        else:
            drafts.append(draft_metrics(own, reference))
    return drafts


def _why_not(checkpoint: Checkpoint) -> str:
    dspark = any(f"mtp.0.main_proj.{part}" in checkpoint for part in PARTS)
    return (DSPARK if dspark else NO_DRAFT).format(path=checkpoint.path)


def has_classic_draft(checkpoint: Checkpoint) -> bool:
    """Whether the first draft stage is the one the forward pass runs."""
    return any(f"mtp.0.e_proj.{part}" in checkpoint for part in PARTS)


def draft_hits(
    model: StreamModel,
    config: ModelConfig,
    corpus: Corpus,
    streams: Streams,
    choices: Sequence[Tensor],
    store: StreamStore | None = None,
    tile: TileSize = SMALL_TILES,
) -> DraftHits:
    """Run one model's draft stage from its final trunk streams.

    choices: by sequence, the trunk's most probable successor of every position. The last two
    positions of a window have nothing to be held against and are left out. Raises DivergenceError
    when nothing remains.
    """
    unwatched = replace(model, observer=None, local_observer=None)
    text, chosen = FlatText(corpus), torch.cat(list(choices))
    # Position s guesses token s + 2, which is there when s + 1 has a successor in its window.
    there = text.known & text.known.roll(-1)
    guess = torch.empty_like(text.targets)
    for piece in mtp_logits(
        [unwatched],
        config,
        corpus.windows,
        [streams],
        store=store,
        rows=tile.rows,
        columns=tile.columns,
    ):
        if piece.first == 0:
            best = Softmax(text.targets[piece.start : piece.stop])
        best.add(piece.logits[0].float().cpu(), piece.first)
        if piece.last == config.vocab_size:
            guess[piece.start : piece.stop] = best.best[:, 0]
    if not bool(there.any()):
        raise DivergenceError(
            "no window has three tokens, which a draft needs; give a longer --seq-len or more text"
        )
    return DraftHits(
        target=(guess == chosen.roll(-1))[there].double(),
        text=(guess == text.targets.roll(-1))[there].double(),
        block=text.block[there],
    )


def draft_metrics(hits: DraftHits, reference: DraftHits | None) -> dict[str, Any]:
    """`draft` of the result: shares with block errors, and their paired change."""
    metrics: dict[str, Any] = {"tokens": len(hits.target), "candidate": _shares(hits)}
    if reference is not None:
        change, error = block_mean(hits.target - reference.target, hits.block)
        metrics["reference"] = _shares(reference)
        metrics |= {"change": change, "change_stderr": error}
    return metrics


def _shares(hits: DraftHits) -> dict[str, float]:
    target, target_error = block_mean(hits.target, hits.block)
    text, text_error = block_mean(hits.text, hits.block)
    return {
        "target_agreement": target,
        "target_agreement_stderr": target_error,
        "text_agreement": text,
        "text_agreement_stderr": text_error,
    }
