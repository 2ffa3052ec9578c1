"""evaluate: perplexity of a checkpoint, and with a reference what the conversion cost.

Reference, candidate and noise floor go through the streamed forward side by side, so all see the
same tokens and every weight is read once. The floor is the reference again, with its residual
streams rounded to BF16 after every layer as served models carry them: two legitimate computations
of the same weights. A difference that is not above theirs is no damage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
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
from v4quant_calibration.model.observer import SilentObserver
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
    """

    name: str
    kind: str
    stream_relative_error: float
    local_relative_error: float
    router_agreement: float


@dataclass
class _Routing(SilentObserver):
    """Keeps the expert ids of the layer that ran last, and counts tokens per expert."""

    experts: int
    ids: dict[str, Tensor] = field(default_factory=dict)

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        """Remember the choice."""
        self.ids[layer] = expert_ids

    def counts(self) -> list[dict[str, Any]]:
        """Tokens each expert was given, by layer."""
        return [
            {
                "name": layer,
                "tokens_per_expert": torch.bincount(
                    ids.reshape(-1), minlength=self.experts
                ).tolist(),
            }
            for layer, ids in self.ids.items()
        ]


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
        CheckpointParams(checkpoint), options, _Routing(config.n_routed_experts)
    )
    if reference is None:
        return _alone(candidate, config, corpus, progress, sink)
    base = parse_model_config(dict(reference.config), str(reference.path / "config.json"))
    _check_same_model(config, base, checkpoint, reference)
    original = StreamModel(CheckpointParams(reference), options, _Routing(base.n_routed_experts))
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
    assert isinstance(original.observer, _Routing) and isinstance(candidate.observer, _Routing)
    mine_ids = candidate.observer.ids[result.layer]
    base_ids = original.observer.ids[result.layer]
    stays = (base_ids.unsqueeze(2) == mine_ids.unsqueeze(1)).any(2)
    return LayerRow(
        name=result.layer,
        kind=config.layer_kind(int(result.layer.rpartition(".")[2])),
        stream_relative_error=drift / max(_norm(reference), 1e-30),
        local_relative_error=local / max(added, 1e-30),
        router_agreement=float(stays.double().mean()),
    )


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
    assert isinstance(original.observer, _Routing)
    return {
        **result,
        "noise_floor": {**noise, "description": FLOOR_DESCRIPTION},
        "verdict": _verdict(result, noise),
        "layers": [vars(row) for row in rows],
        "kl_histogram": kl_histogram(records.kl, floor.kl),
        "coverage": {"measured_on": "evaluation", "layers": original.observer.counts()},
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
