"""evaluate: perplexity of a checkpoint, and with a reference what the conversion cost.

Reference, candidate and noise floor go through the streamed forward side by side, so all see the
same tokens and every weight is read once. The floor is the reference again, with its residual
streams rounded to BF16 after every layer as served models carry them: two legitimate computations
of the same weights. A difference that is not above theirs is no damage.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.corpus import Corpus
from v4quant_calibration.divergence import (
    BLOCK_TOKENS,
    DivergenceError,
    TokenRecords,
    kl_histogram,
    score_tokens,
    summarise,
)
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.provider import CheckpointParams
from v4quant_calibration.stream import (
    LayerResult,
    LogitSlice,
    StreamModel,
    Streams,
    stream_forward,
    stream_logits,
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

FLOOR_DESCRIPTION = "the reference again, residual streams rounded to BF16 after every layer"
# A mean KL within this many standard errors above the floor's mean is not above the floor.
_ERRORS_ABOVE = 2.0

LogitSink = Callable[[LogitSlice], None]


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


def evaluate(
    checkpoint: Checkpoint,
    reference: Checkpoint | None,
    corpus: Corpus,
    options: ForwardOptions,
    progress: Progress,
    sink: LogitSink | None = None,
) -> dict[str, Any]:
    """Score `checkpoint` (against `reference`) on a corpus; returns the JSON object.

    sink receives every slice of logits: of the reference, the checkpoint and the noise floor, in
    this order, or of the checkpoint alone.
    Raises DivergenceError for models of different shape, NaN logits or too few tokens.
    """
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    candidate = StreamModel(
        CheckpointParams(checkpoint),
        options,
        LayerWatch(config.n_routed_experts, keep_outputs=False),
        LayerWatch(config.n_routed_experts, keep_outputs=True),
    )
    if reference is None:
        return _alone(candidate, config, corpus, progress, sink)
    base = parse_model_config(dict(reference.config), str(reference.path / "config.json"))
    _check_same_model(config, base, checkpoint, reference)
    watch = LayerWatch(base.n_routed_experts, keep_outputs=True)
    original = StreamModel(CheckpointParams(reference), options, watch)
    floor = replace(original, options=replace(options, round_streams=True), observer=None)
    rows: list[LayerRow] = []
    models = [original, candidate, floor]

    def on_layer(result: LayerResult) -> None:
        rows.append(_layer_row(result, config, original, candidate))

    streams = _run(models, config, corpus, progress, local=(1,), on_layer=on_layer)
    scored, floor_records = _score(models, config, corpus, streams, progress, sink)
    return _compare(scored, floor_records, rows, corpus, original)


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
    model: StreamModel,
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    sink: LogitSink | None,
) -> dict[str, Any]:
    streams = _run([model], config, corpus, progress)
    records, _ = _score([model], config, corpus, streams, progress, sink)
    return {**summarise(records), "corpora": _by_part(records, corpus)}


def _run(
    models: Sequence[StreamModel],
    config: ModelConfig,
    corpus: Corpus,
    progress: Progress,
    local: Sequence[int] = (),
    on_layer: Callable[[LayerResult], None] | None = None,
) -> list[Streams]:
    progress.start("Forward pass", config.num_hidden_layers, "layer")
    streams = stream_forward(
        models,
        config,
        corpus.windows,
        local=local,
        on_layer=on_layer,
        progress=lambda *_: progress.advance(1),
    )
    progress.finish()
    return streams


def _layer_row(
    result: LayerResult, config: ModelConfig, original: StreamModel, candidate: StreamModel
) -> LayerRow:
    reference, mine, before = result.after[0], result.after[1], result.before[0]
    added = _norm(a - b for a, b in zip(reference, before, strict=True))
    local = _norm(a - b for a, b in zip(result.local[1], reference, strict=True))
    drift = _norm(a - b for a, b in zip(mine, reference, strict=True))
    watches = (original.observer, candidate.observer, candidate.local_observer)
    base, own, beside = (_watch(w) for w in watches)
    errors = expert_errors(base, beside)
    worst = max(errors, key=errors.__getitem__, default=None)
    row = LayerRow(
        name=result.layer,
        kind=config.layer_kind(int(result.layer.rpartition(".")[2])),
        stream_relative_error=drift / max(_norm(reference), 1e-30),
        local_relative_error=local / max(added, 1e-30),
        router_agreement=router_agreement(base, own),
        index_agreement=index_agreement(base, own),
        expert_output_median=statistics.median_low(errors.values()) if errors else None,
        expert_output_largest=None if worst is None else errors[worst],
        expert_output_worst=worst,
    )
    for watch in (base, own, beside):
        watch.forget()
    return row


def _watch(observer: Observer | None) -> LayerWatch:
    assert isinstance(observer, LayerWatch)
    return observer


def _norm(parts: Any) -> float:
    total = sum(float(p.double().square().sum()) for p in parts)
    return float(total**0.5)


def _score(
    models: Sequence[StreamModel],
    config: ModelConfig,
    corpus: Corpus,
    streams: Sequence[Streams],
    progress: Progress,
    sink: LogitSink | None,
) -> tuple[TokenRecords, TokenRecords | None]:
    """Records of the scored model and, with three models, of the noise floor."""
    windows, part_of = corpus.windows, corpus.part_of
    columns: list[dict[str, list[Tensor]]] = [{}, {}]
    progress.start("Scoring", corpus.tokens, "tok")
    block = 0
    for piece in stream_logits(models, config, streams):
        ids = windows[piece.sequence]
        if sink is not None:
            sink(piece)
        # The last position of a window predicts nothing that is known.
        stop = min(piece.stop, len(ids) - 1)
        rows = slice(0, stop - piece.start)
        targets = ids[piece.start + 1 : stop + 1]
        logits = [x[rows] for x in piece.logits]
        _check_finite(logits, piece, config)
        reference = logits[0] if len(models) > 1 else None
        block += int(piece.start % BLOCK_TOKENS == 0)
        place = {
            "block": torch.full((len(targets),), block),
            "part": torch.full((len(targets),), part_of[piece.sequence]),
        }
        scored = logits[1] if reference is not None else logits[0]
        _append(columns[0], score_tokens(scored, targets, reference) | place)
        if len(models) > 2:
            _append(columns[1], score_tokens(logits[2], targets, reference) | place)
        progress.advance(piece.stop - piece.start)
    progress.finish()
    first, second = (
        TokenRecords(**{k: torch.cat(v) for k, v in c.items()}) if c else None for c in columns
    )
    assert first is not None
    return first, second


def _append(columns: dict[str, list[Tensor]], new: dict[str, Tensor]) -> None:
    for key, value in new.items():
        columns.setdefault(key, []).append(value)


def _check_finite(logits: Sequence[Tensor], piece: LogitSlice, config: ModelConfig) -> None:
    for model, values in enumerate(logits):
        if not bool(torch.isfinite(values).all()):
            raise DivergenceError(
                f"logits of model {model} hold NaN or infinity in window {piece.sequence} although "
                f"all {config.num_hidden_layers} layers were finite; check head, norm and hc_head"
            )


def _compare(
    records: TokenRecords,
    floor: TokenRecords | None,
    rows: list[LayerRow],
    corpus: Corpus,
    original: StreamModel,
) -> dict[str, Any]:
    assert floor is not None and records.kl is not None and floor.kl is not None
    result = summarise(records)
    noise = summarise(floor)
    return {
        **result,
        "noise_floor": {**noise, "description": FLOOR_DESCRIPTION},
        "verdict": _verdict(result, noise),
        "layers": [vars(row) for row in rows],
        "kl_histogram": kl_histogram(records.kl, floor.kl),
        "coverage": {"measured_on": "evaluation", "layers": _watch(original.observer).counts()},
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
