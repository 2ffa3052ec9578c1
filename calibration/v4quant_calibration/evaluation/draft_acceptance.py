"""Draft: would the draft stages' guesses still be accepted?

Greedy speculative decoding accepts a guess when it is what the model itself would choose there, so
each checkpoint's draft is held against its *own* trunk, on the same held-out text, before and after
(`draft_hits.py`). A conversion that changes both alike loses nothing. The share that hits the token
of the text is given beside it. The classic MTP stage guesses one token behind the next; DSpark's
chain guesses blocks, of which also the run of hits they begin with is told: that many guesses a
round of decoding takes over, besides the token the trunk adds itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.divergence import block_mean
from v4quant_calibration.evaluation.draft_hits import DraftHits, classic_hits, dspark_hits
from v4quant_calibration.evaluation.scoring import TileSize
from v4quant_calibration.forward.drafts import drafts_of
from v4quant_calibration.forward.stream import StreamModel, StreamStore
from v4quant_calibration.model.streams import Streams
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import draft_stages
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

NO_DRAFT = "{path} holds no draft stages; the draft was not scored"
UNKNOWN = (
    "{path} has draft stages that cannot be run: neither mtp.0.e_proj of the classic design nor "
    "mtp.0.main_proj with the dspark_* keys of config.json; the draft was not scored"
)
OTHER_DESIGN = "{path} drafts by another design than the reference; the drafts were not compared"


@dataclass(frozen=True)
class DraftMember:
    """A checkpoint that ran: its model, final streams, taps, and greedy choices by sequence."""

    checkpoint: Checkpoint
    model: StreamModel
    streams: Streams
    choices: Sequence[Tensor]
    taps: Sequence[Streams] = ()


def score_drafts(
    members: Sequence[DraftMember],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    store: StreamStore,
    tile: TileSize,
) -> list[dict[str, Any]]:
    """`draft` of each candidate's result, or of the only member's.

    members: one checkpoint, or the reference, its candidates, and the reference's noise floor.
    """
    progress.start("Draft", len(members), "model")
    hits: list[DraftHits | None] = []
    for member in members:
        hits.append(_hits(member, config, corpus, store, tile))
        progress.advance(1)
    progress.finish()
    if len(members) == 1:
        return [_told(members[0], hits[0], None, None)]
    missing = members[0].checkpoint if hits[0] is None else None
    return [
        {"note": _why_not(missing)} if missing else _told(member, own, hits[0], hits[-1])
        for member, own in zip(members[1:-1], hits[1:-1], strict=True)
    ]


def _told(
    member: DraftMember,
    hits: DraftHits | None,
    reference: DraftHits | None,
    noise: DraftHits | None,
) -> dict[str, Any]:
    """A member's `draft`."""
    if hits is None:
        return {"note": _why_not(member.checkpoint)}
    if reference is not None and reference.target.shape != hits.target.shape:
        return {"note": OTHER_DESIGN.format(path=member.checkpoint.path)}
    return draft_metrics(hits, reference, noise)


def _hits(
    member: DraftMember,
    config: ModelConfig,
    corpus: Corpus,
    store: StreamStore,
    tile: TileSize,
) -> DraftHits | None:
    model, choices = member.model, member.choices
    drafts = drafts_of(member.checkpoint, config)
    if drafts.kind == "classic":
        return classic_hits(model, config, corpus, member.streams, choices, store, tile)
    if drafts.kind == "dspark":
        return dspark_hits(model, config, corpus, drafts, member.taps, choices, store, tile)
    return None


def _why_not(checkpoint: Checkpoint) -> str:
    note = UNKNOWN if draft_stages(checkpoint.tensors) else NO_DRAFT
    return note.format(path=checkpoint.path)


def draft_metrics(
    hits: DraftHits, reference: DraftHits | None, noise: DraftHits | None = None
) -> dict[str, Any]:
    """`draft` of the result: shares with block errors, their paired change, and noise's."""
    drafts, guesses = hits.target.shape
    metrics: dict[str, Any] = {
        "tokens": drafts * guesses,
        "block_size": guesses,
        "candidate": _shares(hits),
    }
    if reference is not None:
        metrics["reference"] = _shares(reference)
        metrics |= _changes(hits, reference, "")
        if noise is not None:
            metrics |= _changes(noise, reference, "noise_")
    return metrics


def _changes(hits: DraftHits, reference: DraftHits, prefix: str) -> dict[str, float]:
    """Paired changes against the reference, draft by draft."""
    moved = block_mean((hits.target - reference.target).mean(1), hits.block)
    longer = accepted_run(hits.target) - accepted_run(reference.target)
    changes = {"change": moved}
    if hits.target.shape[1] > 1:
        changes["accepted_length_change"] = block_mean(longer, hits.block)
    return {
        f"{prefix}{key}{part}": value
        for key, values in changes.items()
        for part, value in zip(("", "_stderr"), values, strict=True)
    }


def accepted_run(target: Tensor) -> Tensor:
    """Hits before the first miss of each draft: float64 `[n]` of `[n, guesses]`."""
    return target.cumprod(1).sum(1)


def _shares(hits: DraftHits) -> dict[str, Any]:
    target, target_error = block_mean(hits.target.mean(1), hits.block)
    text, text_error = block_mean(hits.text.mean(1), hits.block)
    shares: dict[str, Any] = {
        "target_agreement": target,
        "target_agreement_stderr": target_error,
        "text_agreement": text,
        "text_agreement_stderr": text_error,
    }
    if hits.target.shape[1] > 1:
        length, length_error = block_mean(accepted_run(hits.target), hits.block)
        shares |= {
            "accepted_length": length,
            "accepted_length_stderr": length_error,
            "by_position": hits.target.mean(0).tolist(),
        }
    if hits.confidence is not None:
        shares["confidence_by_position"] = hits.confidence.mean(0).tolist()
    return shares
