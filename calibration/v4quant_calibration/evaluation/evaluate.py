"""evaluate: perplexity of a checkpoint, and with a reference what the conversion cost.

Reference, candidates and noise floors go through the streamed forward side by side, so all see the
same tokens, and the reference is read once however many candidates there are. A floor is the
reference again under another rounding (`noise_floor.py`): two legitimate computations of the same
weights. A difference that is not above theirs is not damage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.evaluation.divergence import DivergenceError, TokenRecords, summarise
from v4quant_calibration.evaluation.draft_acceptance import DraftMember, score_drafts
from v4quant_calibration.evaluation.layer_comparison import LayerComparison, watch_of
from v4quant_calibration.evaluation.layer_recorder import LayerRecorder
from v4quant_calibration.evaluation.needle import Needles, needle_figures
from v4quant_calibration.evaluation.noise_floor import floor_options
from v4quant_calibration.evaluation.scoring import (
    SMALL_TILES,
    LogitSink,
    SavedReference,
    TileSize,
    score,
)
from v4quant_calibration.evaluation.verdict import by_part, compared, largest_floor
from v4quant_calibration.forward.checkpoint_params import CPU, CheckpointParams, model_config
from v4quant_calibration.forward.stream import (
    LayerResult,
    MemoryStore,
    StreamModel,
    StreamStore,
    Taps,
    stream_forward,
)
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.streams import Streams
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress


@dataclass(frozen=True)
class Measures:
    """What to measure beyond scores.

    floors: noise floors to run, 1 or 2; draft: the draft stages; needles: windows to run beside.
    """

    floors: int = 1
    draft: bool = False
    needles: Needles | None = None

    def taps(self, config: ModelConfig, models: int) -> Taps:
        """What the trunk leaves for the first `models` models' drafts: DSpark's stages need it."""
        return Taps.of_config(config, models) if self.draft else Taps((), models)

    def with_needles(self, corpus: Corpus) -> Corpus:
        """All that runs: the corpus and the needles behind it."""
        return corpus if self.needles is None else Corpus([*corpus.parts, self.needles.part])


@dataclass(frozen=True)
class Room:
    """Where the run's streams live, of how many logits at once it may make use, and which device
    does the arithmetic."""

    store: StreamStore = field(default_factory=MemoryStore)
    tile: TileSize = SMALL_TILES
    device: torch.device = CPU


def evaluate(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    sink: LogitSink | None = None,
    measures: Measures = Measures(),
    room: Room | None = None,
) -> dict[str, Any]:
    """Score `checkpoint` (against `reference`) on a corpus; returns the JSON object.

    sink receives every slice of logits: of the reference, the checkpoint and the noise floors, in
    this order, or of the checkpoint alone.
    Raises DivergenceError for models of different shape, NaN logits or too few tokens.
    """
    if reference is None:
        return _alone(checkpoint, corpus, options, progress, sink, measures, room or Room())
    return evaluate_all([checkpoint], reference, corpus, options, progress, sink, measures, room)[0]


def evaluate_all(
    checkpoints: Sequence[Checkpoint],
    reference: Checkpoint,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    sink: LogitSink | None = None,
    measures: Measures = Measures(),
    room: Room | None = None,
) -> list[dict[str, Any]]:
    """Score several conversions of one reference in one run; one JSON object each, in order.

    Their noise floor and coverage are the same. Raises as `evaluate` does.
    """
    config, room = model_config(reference), room or Room()
    for checkpoint in checkpoints:
        _check_same_model(model_config(checkpoint), config, checkpoint, reference)
    experts = config.n_routed_experts
    watch = LayerRecorder(experts, keep_outputs=True)
    params = CheckpointParams(reference, room.device)
    original = StreamModel(params, options, watch, name=str(reference.path))
    candidates = [_candidate(c, options, experts, room.device) for c in checkpoints]
    variants = floor_options(options, measures.floors)
    floors = [replace(original, options=o, observer=None) for _, o in variants]
    layers = LayerComparison(room.store, config, original, candidates)
    models, local = [original, *candidates, *floors], range(1, len(candidates) + 1)
    text = measures.with_needles(corpus)
    taps = measures.taps(config, 2 + len(checkpoints))
    streams = _run(models, config, text, progress, room, local, layers, taps)
    scores = score(models, config, text, streams, progress, sink, room.tile)
    told, found = zip(*(_apart(r, corpus) for r in scores.records), strict=True)
    floor = largest_floor([d for d, _ in variants], list(told[len(candidates) :]))
    results = []
    for number, rows in enumerate(layers.rows):
        result = compared(told[number], floor, corpus.parts)
        result["layers"] = [vars(row) for row in rows]
        counts = watch_of(original.observer).counts()
        result["coverage"] = {"measured_on": "evaluation", "layers": counts}
        if measures.needles is not None:
            floors_found = found[len(candidates) :]
            result["needle"] = needle_figures(measures.needles, found[number], floors_found)
        results.append(result)
    if measures.draft:
        # The first noise floor, too: what rounding alone does to acceptance.
        members = [
            DraftMember(one, models[n], streams[n], scores.choices[n], taps.of(n))
            for n, one in enumerate([reference, *checkpoints, reference])
        ]
        drafts = score_drafts(members, config, text, progress, room.store, room.tile)
        for result, draft in zip(results, drafts, strict=True):
            result["draft"] = draft
    return results


def _candidate(
    checkpoint: Checkpoint, options: ForwardOptions, experts: int, device: torch.device
) -> StreamModel:
    return StreamModel(
        CheckpointParams(checkpoint, device),
        options,
        LayerRecorder(experts, keep_outputs=False),
        LayerRecorder(experts, keep_outputs=True, keep_picks=False),
        str(checkpoint.path),
    )


def _check_same_model(
    config: ModelConfig, base: ModelConfig, checkpoint: Checkpoint, reference: Checkpoint
) -> None:
    # A conversion may have dropped its draft stages, and config.json's word of them.
    own = [n for n in vars(config) if n != "raw" and (n != "dspark" or config.dspark)]
    for name in own:
        if getattr(config, name) != getattr(base, name):
            raise DivergenceError(
                f"{checkpoint.path} and {reference.path} are different models: '{name}' is "
                f"{getattr(config, name)!r} and {getattr(base, name)!r}"
            )


def _alone(
    checkpoint: Checkpoint,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    sink: LogitSink | None,
    measures: Measures,
    room: Room,
) -> dict[str, Any]:
    config, text = model_config(checkpoint), measures.with_needles(corpus)
    params = CheckpointParams(checkpoint, room.device)
    model = StreamModel(params, options, name=str(checkpoint.path))
    taps = measures.taps(config, 1)
    streams = _run([model], config, text, progress, room, taps=taps)
    scores = score([model], config, text, streams, progress, sink, room.tile)
    records, found = _apart(scores.records[0], corpus)
    result = {**summarise(records), "corpora": by_part(records, corpus.parts)}
    if measures.needles is not None:
        result["needle"] = needle_figures(measures.needles, found, [])
    if measures.draft:
        member = DraftMember(checkpoint, model, streams[0], scores.choices[0], taps.of(0))
        (result["draft"],) = score_drafts([member], config, text, progress, room.store, room.tile)
    return result


def evaluate_saved(
    checkpoint: Checkpoint,
    saved: SavedReference,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    measures: Measures = Measures(),
    room: Room | None = None,
) -> dict[str, Any]:
    """Score `checkpoint` against logits that were saved; the reference itself is not read.

    The noise floor is then the checkpoint's own: it again under another rounding, against itself.
    There are no figures of layers, which need the reference's streams. Raises as `evaluate` does.
    """
    config, room = model_config(checkpoint), room or Room()
    params = CheckpointParams(checkpoint, room.device)
    model = StreamModel(params, options, name=str(checkpoint.path))
    variants = floor_options(options, measures.floors)
    models = [model, *(replace(model, options=o) for _, o in variants)]
    streams = _run(models, config, corpus, progress, room)
    scores = score(models, config, corpus, streams, progress, None, room.tile, saved)
    descriptions = [d.replace("the reference", "the candidate") for d, _ in variants]
    floor = largest_floor(descriptions, scores.records[1:])
    return compared(scores.records[0], floor, corpus.parts)


def _apart(records: TokenRecords, corpus: Corpus) -> tuple[TokenRecords, TokenRecords]:
    """Records of the corpus, and of the needles behind it."""
    mine = records.part < len(corpus.parts)
    return records.select(mine), records.select(~mine)


def _run(
    models: Sequence[StreamModel],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    room: Room,
    local: Sequence[int] = (),
    on_layer: Callable[[LayerResult], None] | None = None,
    taps: Taps | None = None,
) -> list[Streams]:
    """All layers. The unit of progress is a token through a layer of a model."""
    left = config.num_hidden_layers - room.store.finished
    progress.start(
        f"Forward pass from layer {room.store.finished}" if room.store.finished else "Forward pass",
        left * (len(models) + len(local)) * corpus.tokens,
        "tok",
    )
    streams = stream_forward(
        models,
        config,
        corpus.windows,
        local=local,
        on_layer=on_layer,
        progress=lambda *_: progress.advance(corpus.tokens),
        store=room.store,
        taps=taps,
    )
    progress.finish()
    return streams
