"""evaluate: perplexity of a checkpoint, and with a reference what the conversion cost.

Reference, candidates and noise floors go through the streamed forward side by side, so all see the
same tokens, and the reference is read once however many candidates there are. A floor is the
reference again under another rounding (`noise_floor.py`): two legitimate computations of the same
weights. A difference that is not above theirs is no damage.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from v4quant_calibration.corpus import Corpus
from v4quant_calibration.divergence import (
    DivergenceError,
    TokenRecords,
    kl_histogram,
    summarise,
)
from v4quant_calibration.draft import (
    NO_DRAFT,
    DraftHits,
    draft_hits,
    draft_metrics,
    has_classic_draft,
)
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.streams import Streams, distance
from v4quant_calibration.noise_floor import floor_options
from v4quant_calibration.provider import CheckpointParams
from v4quant_calibration.scoring import SMALL_TILES, LogitSink, TileSize, score
from v4quant_calibration.stream import (
    LayerResult,
    MemoryStore,
    StreamModel,
    StreamStore,
    stream_forward,
)
from v4quant_calibration.watch import (
    LayerWatch,
    expert_errors,
    index_agreement,
    router_agreement,
)
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.model_config import ModelConfig, parse_model_config
from v4quant_kernels.progress import Progress

# A mean KL within this many standard errors above the floor's mean is not above the floor.
_ERRORS_ABOVE = 2.0


@dataclass(frozen=True)
class Measures:
    """What to measure beyond scores. floors: noise floors to run, 1 or 2; draft: the MTP stage."""

    floors: int = 1
    draft: bool = False


@dataclass(frozen=True)
class Room:
    """Where the run's streams live, and of how many logits at once it may make use."""

    store: StreamStore = field(default_factory=MemoryStore)
    tile: TileSize = SMALL_TILES


@dataclass(frozen=True)
class LayerRow:
    """One layer's error. Relative errors are Frobenius norms over all tokens.

    local: the candidate's layer on the reference's input, relative to what the layer adds.
    stream: the candidate's streams after the layer, relative to the reference's.
    router_agreement: share of the reference's chosen experts the candidate chose too.
    index_agreement: the same for the entries the indexer chose; None where it had no choice.
    expert_output_median, expert_output_largest, expert_output_worst: relative errors of the
    experts' outputs on the reference's input, on a sample of tokens, and the expert with the
    largest; None when no token was common.
    """

    name: str
    kind: str
    stream_relative_error: float
    local_relative_error: float
    router_agreement: float
    index_agreement: float | None
    expert_output_median: float | None
    expert_output_largest: float | None
    expert_output_worst: int | None


@dataclass(frozen=True)
class _Floor:
    """`noise_floor` of the result, and the KL of every token."""

    metrics: dict[str, Any]
    kl: Tensor


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
    config, room = _config(reference), room or Room()
    for checkpoint in checkpoints:
        _check_same_model(_config(checkpoint), config, checkpoint, reference)
    experts = config.n_routed_experts
    watch = LayerWatch(experts, keep_outputs=True)
    original = StreamModel(CheckpointParams(reference), options, watch, name=str(reference.path))
    candidates = [_candidate(c, options, experts) for c in checkpoints]
    variants = floor_options(options, measures.floors)
    floors = [replace(original, options=o, observer=None) for _, o in variants]
    layers = _LayerNotes(room.store, config, original, candidates)
    models, local = [original, *candidates, *floors], range(1, len(candidates) + 1)
    streams = _run(models, config, corpus, progress, room, local, layers)
    scores = score(models, config, corpus, streams, progress, sink, room.tile)
    floor = _noise_floor([d for d, _ in variants], scores.records[len(candidates) :])
    results = [
        _compare(records, floor, rows, corpus, original)
        for records, rows in zip(scores.records, layers.rows, strict=False)
    ]
    if measures.draft:
        members = list(
            zip([reference, *checkpoints], models, streams, scores.choices, strict=False)
        )
        drafts = _drafts(members, config, corpus, progress, room)
        for result, draft in zip(results, drafts, strict=True):
            result["draft"] = draft
    return results


class _LayerNotes:
    """The rows of finished layers, kept with the streams so that a run can go on."""

    def __init__(
        self,
        store: StreamStore,
        config: ModelConfig,
        original: StreamModel,
        candidates: Sequence[StreamModel],
    ) -> None:
        """Take over what an earlier process noted."""
        self._notes, self._config = store.notes, config
        self._original, self._candidates = original, candidates
        earlier = store.notes.get("layers", [[] for _ in candidates])
        self.rows = [[LayerRow(**row) for row in rows] for rows in earlier]
        _watch(original.observer).take_counts(store.notes.get("counts", []))

    def __call__(self, result: LayerResult) -> None:
        """A layer of one model is done."""
        if result.local is not None:
            candidate = self._candidates[result.model - 1]
            row = _layer_row(result, self._config, self._original, candidate)
            self.rows[result.model - 1].append(row)
        if result.model == len(self._candidates):
            watch = _watch(self._original.observer)
            self._notes["layers"] = [[vars(row) for row in rows] for rows in self.rows]
            self._notes["counts"] = watch.counts()
            watch.forget()


def _config(checkpoint: Checkpoint) -> ModelConfig:
    return parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))


def _candidate(checkpoint: Checkpoint, options: ForwardOptions, experts: int) -> StreamModel:
    return StreamModel(
        CheckpointParams(checkpoint),
        options,
        LayerWatch(experts, keep_outputs=False),
        LayerWatch(experts, keep_outputs=True, keep_picks=False),
        str(checkpoint.path),
    )


def _check_same_model(
    config: ModelConfig, base: ModelConfig, checkpoint: Checkpoint, reference: Checkpoint
) -> None:
    for name in vars(config):
        if name != "raw" and getattr(config, name) != getattr(base, name):
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
    config = _config(checkpoint)
    model = StreamModel(CheckpointParams(checkpoint), options, name=str(checkpoint.path))
    streams = _run([model], config, corpus, progress, room)
    scores = score([model], config, corpus, streams, progress, sink, room.tile)
    (records,) = scores.records
    result = {**summarise(records), "corpora": _by_part(records, corpus)}
    if measures.draft:
        members = [(checkpoint, model, streams[0], scores.choices[0])]
        (result["draft"],) = _drafts(members, config, corpus, progress, room)
    return result


def _drafts(
    members: Sequence[tuple[Checkpoint, StreamModel, Streams, list[Tensor]]],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    room: Room,
) -> list[dict[str, Any]]:
    """Draft figures of each candidate: the members after the first, or the only one."""
    progress.start("Draft", len(members), "model")
    hits: list[DraftHits | None] = []
    for checkpoint, model, streams, choices in members:
        there = has_classic_draft(checkpoint)
        hits.append(
            draft_hits(model, config, corpus, streams, choices, room.store, room.tile)
            if there
            else None
        )
        progress.advance(1)
    progress.finish()
    reference = hits[0] if len(members) > 1 else None
    drafts: list[dict[str, Any]] = []
    for (checkpoint, *_), own in list(zip(members, hits, strict=True))[len(members) > 1 :]:
        missing = checkpoint if own is None else members[0][0]
        if own is None or hits[0] is None:
            drafts.append({"note": NO_DRAFT.format(path=missing.path)})
        else:
            drafts.append(draft_metrics(own, reference))
    return drafts


def _noise_floor(descriptions: list[str], records: list[TokenRecords]) -> _Floor:
    """The run with the larger mean KL, with all runs listed."""
    runs = [{"description": d, **summarise(r)} for d, r in zip(descriptions, records, strict=True)]
    top = max(range(len(runs)), key=lambda i: runs[i]["kl_mean"])
    kl = records[top].kl
    assert kl is not None
    return _Floor({**runs[top], "runs": runs}, kl)


def _run(
    models: Sequence[StreamModel],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    room: Room,
    local: Sequence[int] = (),
    on_layer: Callable[[LayerResult], None] | None = None,
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
    )
    progress.finish()
    return streams


def _layer_row(
    result: LayerResult, config: ModelConfig, original: StreamModel, candidate: StreamModel
) -> LayerRow:
    """One layer of one candidate."""
    assert result.local is not None
    watches = (original.observer, candidate.observer, candidate.local_observer)
    base, own, beside = (_watch(w) for w in watches)
    errors = expert_errors(base, beside)
    worst = max(errors, key=errors.__getitem__, default=None)
    size = distance(result.reference, None)
    added = distance(result.reference, result.before)
    row = LayerRow(
        name=result.layer,
        kind=config.layer_kind(int(result.layer.rpartition(".")[2])),
        stream_relative_error=distance(result.after, result.reference) / max(size, 1e-30),
        local_relative_error=distance(result.local, result.reference) / max(added, 1e-30),
        router_agreement=router_agreement(base, own),
        index_agreement=index_agreement(base, own),
        expert_output_median=statistics.median_low(errors.values()) if errors else None,
        expert_output_largest=None if worst is None else errors[worst],
        expert_output_worst=worst,
    )
    for watch in (own, beside):
        watch.forget()
    return row


def _watch(observer: Observer | None) -> LayerWatch:
    assert isinstance(observer, LayerWatch)
    return observer


def _compare(
    records: TokenRecords,
    floor: _Floor,
    rows: list[LayerRow],
    corpus: Corpus,
    original: StreamModel,
) -> dict[str, Any]:
    assert records.kl is not None
    result = summarise(records)
    return {
        **result,
        "noise_floor": floor.metrics,
        "verdict": _verdict(result, floor.metrics),
        "layers": [vars(row) for row in rows],
        "kl_histogram": kl_histogram(records.kl, floor.kl),
        "coverage": {
            "measured_on": "evaluation",
            "layers": _watch(original.observer).counts(),
        },
        "corpora": _by_part(records, corpus),
    }


def _verdict(result: dict[str, Any], noise: dict[str, Any]) -> dict[str, Any]:
    kl, floor = result["kl_mean"], noise["kl_mean"]
    error = (result["kl_mean_stderr"] ** 2 + noise["kl_mean_stderr"] ** 2) ** 0.5
    above = kl > floor + _ERRORS_ABOVE * error
    ratio = f"{kl / floor:.1f} times" if floor > 0 else "above"
    text = (
        f"Mean KL {kl:.2e} nats is {ratio} the noise floor of {floor:.2e}: the conversion is "
        f"measurable. Perplexity changes by {100 * (result['perplexity_ratio'] - 1):+.2f} % "
        f"(standard error {100 * result['perplexity_ratio_stderr']:.2f} %)."
        if above
        else f"Mean KL {kl:.2e} nats is not above the noise floor of {floor:.2e}: no cost found."
    )
    return {"above_floor": above, "text": text}


def _by_part(records: TokenRecords, corpus: Corpus) -> list[dict[str, Any]]:
    """Metrics of each corpus file that has enough windows for an error bar."""
    rows = []
    for index, part in enumerate(corpus.parts):
        chosen = records.select(records.part == index)
        if chosen.block.unique().numel() >= 2:
            rows.append({"name": part.name, **summarise(chosen)})
    return rows
