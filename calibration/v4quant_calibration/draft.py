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
from v4quant_calibration.scoring import token_blocks
from v4quant_calibration.stream import StreamModel, Streams, mtp_logits
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS
from v4quant_formats.model_config import ModelConfig

NO_DRAFT = "no classic draft stage (mtp.0.e_proj) in {path}; the draft was not scored"


@dataclass(frozen=True)
class DraftHits:
    """By scored position: whether the guess was the trunk's choice, and whether the text's.

    target, text: float64 `[n]` of 0 and 1; block: int64 `[n]`.
    """

    target: Tensor
    text: Tensor
    block: Tensor


def has_classic_draft(checkpoint: Checkpoint) -> bool:
    """Whether the first draft stage is the one the forward pass runs."""
    return any(f"mtp.0.e_proj.{part}" in checkpoint for part in PARTS)


def draft_hits(
    model: StreamModel,
    config: ModelConfig,
    corpus: Corpus,
    streams: Streams,
    choices: Sequence[Tensor],
) -> DraftHits:
    """Run one model's draft stage from its final trunk streams.

    choices: by sequence, the trunk's most probable successor of every position. The last two
    positions of a window have nothing to be held against and are left out. Raises DivergenceError
    when nothing remains.
    """
    unwatched = replace(model, observer=None, local_observer=None)
    found: dict[str, list[Tensor]] = {"target": [], "text": [], "block": []}
    blocks = token_blocks(corpus)
    for piece in mtp_logits([unwatched], config, corpus.windows, [streams]):
        ids = corpus.windows[piece.sequence]
        stop = min(piece.stop, len(ids) - 2)
        if stop <= piece.start:
            continue
        guess = piece.logits[0][: stop - piece.start].argmax(-1)
        target = choices[piece.sequence][piece.start + 1 : stop + 1]
        found["target"].append((guess == target).double())
        found["text"].append((guess == ids[piece.start + 2 : stop + 2]).double())
        found["block"].append(blocks[piece.sequence][piece.start : stop])
    if not found["block"]:
        raise DivergenceError(
            "no window has three tokens, which a draft needs; give a longer --seq-len or more text"
        )
    return DraftHits(**{name: torch.cat(parts) for name, parts in found.items()})


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
