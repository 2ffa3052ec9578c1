"""Draft stages, run on a text the trunk has been run on, for several models stage by stage.

Which design a checkpoint's stages are of, classic MTP or DSpark, its tensors tell. Either begins
with its own streams: of every next token, or of all draft blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from v4quant_calibration.forward.stream import (
    MemoryStore,
    StreamModel,
    StreamStore,
    Taps,
    embed,
    named,
    reading_width,
)
from v4quant_calibration.model.dspark import DraftBlocks, draft_blocks, project_trunk, stage_forward
from v4quant_calibration.model.mtp import STAGE, mtp_forward, next_tokens
from v4quant_calibration.model.numerics import NonFiniteActivation
from v4quant_calibration.model.streams import Streams
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import PARTS, draft_stages
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class Drafts:
    """Draft stages that can be run, in order, and their design."""

    kind: Literal["none", "classic", "dspark"]
    stages: tuple[str, ...]

    def taps(self, config: ModelConfig, models: int) -> Taps:
        """What the trunk must leave for the stages of so many models."""
        return Taps.of_config(config, models) if self.kind == "dspark" else Taps((), models)


def drafts_of(checkpoint: Checkpoint, config: ModelConfig) -> Drafts:
    """A checkpoint's draft stages.

    DSpark's can be run when config.json says what they are given.
    """
    stages = tuple(draft_stages(checkpoint.tensors))
    if _holds(checkpoint, f"{STAGE}.e_proj"):
        return Drafts("classic", stages[:1])
    if config.dspark is not None and _holds(checkpoint, f"{STAGE}.main_proj"):
        return Drafts("dspark", stages)
    return Drafts("none", ())


def _holds(checkpoint: Checkpoint, module: str) -> bool:
    return any(f"{module}.{part}" in checkpoint for part in PARTS)


@torch.no_grad()
def stream_drafts(
    drafts: Drafts,
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    streams: Sequence[Streams],
    taps: Taps,
    *,
    store: StreamStore | None = None,
) -> None:
    """Run the draft stages behind the trunk for what observers see there.

    Nothing happens where there are none, or no text long enough for a block.
    """
    if drafts.kind == "classic":
        stream_mtp(models, config, sequences, streams, store=store)
    elif drafts.kind == "dspark":
        blocks = draft_blocks(sequences, config)
        if len(blocks.token_ids):
            given = [taps.of(number) for number in range(len(models))]
            stream_dspark(models, config, drafts.stages, blocks, given, store=store)


@torch.no_grad()
def stream_mtp(
    models: Sequence[StreamModel],
    config: ModelConfig,
    sequences: Sequence[Tensor],
    streams: Sequence[Streams],
    *,
    store: StreamStore | None = None,
) -> list[Streams]:
    """Each model's streams after its MTP stage, from its final trunk streams.

    The stage is fed with the true next token, and with token 0 at the last position, whose row is
    therefore meaningless to score.
    """
    store = store or MemoryStore()
    ids = torch.cat([next_tokens(ids) for ids in sequences])
    found = []
    for number, (model, trunk) in enumerate(zip(models, streams, strict=True)):
        room = store.open(f"draft.{number}", trunk.shape)
        embed(model.params, ids, room)
        moved = ids.to(trunk.shape.device)
        _named(model, mtp_forward, config, trunk, room, moved, model.options, model.observer)
        found.append(room)
    return found


@torch.no_grad()
def stream_dspark(
    models: Sequence[StreamModel],
    config: ModelConfig,
    stages: Sequence[str],
    blocks: DraftBlocks,
    taps: Sequence[Sequence[Streams]],
    *,
    store: StreamStore | None = None,
) -> list[Streams]:
    """Each model's streams after the last DSpark stage, rows of all blocks.

    taps: by model and target layer, what the trunk left. Stage by stage all models run, as layers
    do.
    """
    store = store or MemoryStore()
    trunks, rooms = [], []
    for number, (model, given) in enumerate(zip(models, taps, strict=True)):
        trunk = store.open(f"draft.trunk.{number}", given[0].shape)
        _named(model, project_trunk, config, stages[0], given, trunk, model.options)
        shape = replace(
            trunk.shape,
            lengths=blocks.lengths,
            row=(config.hc_mult, config.hidden_size),
            pre=reading_width(config),
        )
        room = store.open(f"draft.{number}", shape)
        embed(model.params, blocks.token_ids, room)
        trunks.append(trunk)
        rooms.append(room)
    for stage in stages:
        for model, trunk, room in zip(models, trunks, rooms, strict=True):
            _named(
                model, stage_forward, config, stage, trunk, room, blocks, model.options,
                model.observer,
            )  # fmt: skip
    return rooms


def _named(model: StreamModel, run: Callable[..., None], *arguments: object) -> None:
    """Run a model's part, whose errors then begin with the model's name."""
    try:
        run(model.params, *arguments)
    except NonFiniteActivation as error:
        raise NonFiniteActivation(named(model, str(error))) from None
