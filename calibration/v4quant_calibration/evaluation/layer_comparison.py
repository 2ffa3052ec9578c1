"""Layer rows: what one layer of a candidate did, beside the reference's.

End results hide where an error comes from. A layer is judged on the reference's own input, relative
to what that layer adds; the streams tell what has added up; routers, indexers and experts say
whether the same computation was done at all. Finished rows go into the run's notes, so that a run
that was killed need not repeat their layers.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from v4quant_calibration.evaluation.layer_recorder import (
    LayerRecorder,
    expert_errors,
    index_agreement,
    output_gain,
    router_agreement,
)
from v4quant_calibration.forward.stream import LayerResult, StreamModel, StreamStore
from v4quant_calibration.model.observer import Observer
from v4quant_calibration.model.streams import distance
from v4quant_formats.model_config import ModelConfig


@dataclass(frozen=True)
class LayerRow:
    """One layer's error. Relative errors are Frobenius norms over all tokens.

    local: the candidate's layer on the reference's input, relative to what the layer adds.
    stream: the candidate's streams after the layer, relative to the reference's.
    router_agreement: share of the reference's chosen experts the candidate chose too.
    index_agreement: the same for the entries the indexer chose; None where it had no choice.
    expert_output_median, expert_output_largest, expert_output_worst: relative errors of the
    experts' outputs on the reference's input, on a sample of tokens, and the expert with the
    largest; None when no token was common. expert_gain, expert_gain_stderr: `output_gain` of them.
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
    expert_gain: float | None = None
    expert_gain_stderr: float | None = None


class LayerComparison:
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
        watch_of(original.observer).take_counts(store.notes.get("counts", []))

    def __call__(self, result: LayerResult) -> None:
        """A layer of one model is done."""
        if result.local is not None:
            candidate = self._candidates[result.model - 1]
            row = _layer_row(result, self._config, self._original, candidate)
            self.rows[result.model - 1].append(row)
        if result.model == len(self._candidates):
            watch = watch_of(self._original.observer)
            self._notes["layers"] = [[vars(row) for row in rows] for rows in self.rows]
            self._notes["counts"] = watch.counts()
            watch.forget()


def _layer_row(
    result: LayerResult, config: ModelConfig, original: StreamModel, candidate: StreamModel
) -> LayerRow:
    """One layer of one candidate."""
    assert result.local is not None
    watches = (original.observer, candidate.observer, candidate.local_observer)
    base, own, beside = (watch_of(w) for w in watches)
    errors, gain = expert_errors(base, beside), output_gain(base, beside)
    worst = max(errors, key=errors.__getitem__, default=None)
    size = distance(result.reference, None)
    added = distance(result.reference, result.before)
    row = LayerRow(
        name=result.layer,
        kind=config.facts(result.layer).kind,
        stream_relative_error=distance(result.after, result.reference) / max(size, 1e-30),
        local_relative_error=distance(result.local, result.reference) / max(added, 1e-30),
        router_agreement=router_agreement(base, own),
        index_agreement=index_agreement(base, own),
        expert_output_median=statistics.median_low(errors.values()) if errors else None,
        expert_output_largest=None if worst is None else errors[worst],
        expert_output_worst=worst,
        expert_gain=None if gain is None else gain.value,
        expert_gain_stderr=None if gain is None else gain.stderr,
    )
    for watch in (own, beside):
        watch.forget()
    return row


def watch_of(observer: Observer | None) -> LayerRecorder:
    """The watch of a model that has one."""
    assert isinstance(observer, LayerRecorder)
    return observer
