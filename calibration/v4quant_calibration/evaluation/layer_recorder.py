"""Watching two models in one layer: do they choose the same, and does each expert answer the same?

Routers and indexers are the model's two discontinuities: a small error either leaves their choice
alone or changes it altogether, so agreement is a measure of its own. Experts are compared on the
reference's input (the local run), where each one's error is its own. Keeping all outputs would
take more memory than the model, so a few rows of each expert speak for it.

A watch holds one layer; `forget` it before the next. Only token counts live on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.evaluation.output_gains import OutputGain
from v4quant_calibration.model.observer import SilentObserver

SAMPLE_ROWS = 32
_FEWEST_EXPERTS = 8  # whose gains tell how far their median may be off
_MEDIAN_STDERR = 1.2533  # of a median, in standard errors of the mean


class LayerRecorder(SilentObserver):
    """Choices of one model in the layer that ran last, and a sample of its experts' outputs.

    expert_ids: int64 `[T, top_k]`. picks: int32 `[q, top_k]` blocks. outputs: by expert, tokens
    `[n]` and rows `[n, hidden]` of the first SAMPLE_ROWS tokens; empty unless asked for.
    """

    def __init__(self, experts: int, keep_outputs: bool, keep_picks: bool = True) -> None:
        """`experts`: routed experts of a layer."""
        self._experts = experts
        self._keep_picks = keep_picks
        self._keep = keep_outputs
        self._counts: dict[str, list[int]] = {}
        self.forget()

    def forget(self) -> None:
        """Drop the layer."""
        self.picks: list[Tensor] = []
        self.outputs: dict[int, tuple[Tensor, Tensor]] = {}
        self._ids: list[Tensor] = []
        self._first = 0

    @property
    def expert_ids(self) -> Tensor:
        """Chosen experts of all tokens so far."""
        return torch.cat(self._ids)

    def on_route(self, layer: str, expert_ids: Tensor, weights: Tensor) -> None:
        """Remember the choice and count it."""
        self._first = sum(len(ids) for ids in self._ids)
        self._ids.append(expert_ids)
        chosen = torch.bincount(expert_ids.reshape(-1), minlength=self._experts).tolist()
        before = self._counts.get(layer, [0] * self._experts) if self._first else [0] * len(chosen)
        self._counts[layer] = [a + b for a, b in zip(before, chosen, strict=True)]

    def on_index(self, layer: str, picks: Tensor) -> None:
        """Remember the choice."""
        if self._keep_picks:
            self.picks.append(picks.int())

    def on_expert_output(self, layer: str, expert: int, tokens: Tensor, y: Tensor) -> None:
        """Remember the first rows."""
        if not self._keep:
            return
        tokens, y = tokens[:SAMPLE_ROWS] + self._first, y[:SAMPLE_ROWS].clone()
        if expert in self.outputs:
            earlier = self.outputs[expert]
            if len(earlier[0]) >= SAMPLE_ROWS:
                return
            tokens, y = torch.cat([earlier[0], tokens]), torch.cat([earlier[1], y])
        self.outputs[expert] = (tokens[:SAMPLE_ROWS], y[:SAMPLE_ROWS])

    def take_counts(self, layers: list[dict[str, Any]]) -> None:
        """Go on from the `counts` of an earlier run."""
        self._counts = {row["name"]: row["tokens_per_expert"] for row in layers}

    def counts(self) -> list[dict[str, Any]]:
        """Tokens each expert was given, by layer."""
        return [
            {"name": layer, "tokens_per_expert": counts} for layer, counts in self._counts.items()
        ]


def router_agreement(reference: LayerRecorder, other: LayerRecorder) -> float:
    """Share of the reference's chosen experts that the other chose too."""
    stays = (reference.expert_ids.unsqueeze(2) == other.expert_ids.unsqueeze(1)).any(2)
    return float(stays.double().mean())


def index_agreement(reference: LayerRecorder, other: LayerRecorder) -> float | None:
    """Share of the entries the reference's indexer chose that the other's chose too.

    None where no query had more entries than it may read.
    """
    kept = chosen = 0
    for mine, theirs in zip(reference.picks, other.picks, strict=True):
        width = int(torch.maximum(mine.max(), theirs.max())) + 2
        marks = torch.zeros(mine.shape[0], width, dtype=torch.bool, device=mine.device)
        # Column 0 takes the marks of absent picks (-1) and is cleared.
        marks.scatter_(1, theirs.long() + 1, True)[:, 0] = False
        kept += int(marks.gather(1, mine.long() + 1).sum())
        chosen += int((mine >= 0).sum())
    return kept / chosen if chosen else None


def expert_errors(reference: LayerRecorder, other: LayerRecorder) -> dict[int, float]:
    """Relative error of each expert's sampled output, over tokens that both sent to it.

    ||other - reference|| / ||reference|| by expert; experts without a common token are absent.
    """
    return {
        expert: float((mine - right).norm() / right.norm())
        for expert, right, mine in _common_outputs(reference, other)
    }


def output_gain(reference: LayerRecorder, other: LayerRecorder) -> OutputGain | None:
    """The median over experts of <other, reference> / <reference, reference> of sampled outputs.

    The median, because one loud expert would decide a mean. None where few experts had a token in
    common.
    """
    gains = [
        float((mine * right).sum() / right.square().sum())
        for _, right, mine in _common_outputs(reference, other)
    ]
    if len(gains) < _FEWEST_EXPERTS:
        return None
    stderr = _MEDIAN_STDERR * statistics.stdev(gains) / len(gains) ** 0.5
    return OutputGain(statistics.median(gains), stderr)


def _common_outputs(
    reference: LayerRecorder, other: LayerRecorder
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Experts with both sides' outputs in float64, of the sampled tokens that both sent there."""
    for expert, (tokens, y) in reference.outputs.items():
        found = other.outputs.get(expert)
        if found is None:
            continue
        rows, columns = (tokens.unsqueeze(1) == found[0]).nonzero(as_tuple=True)
        right = y[rows].double()
        if float(right.norm()) > 0:
            yield expert, right, found[1][columns].double()
