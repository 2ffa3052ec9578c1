"""calibrate: stream tokens through the model and record what each expert's inputs look like.

The second moment of an input channel is the weight its squared weight error deserves: with inputs
of covariance C, the expected output error of a row error e is e C e^T, of which the scale search
uses the diagonal. Hash-routed layers and draft stages are covered like the others. Experts with
too few tokens cause more text to be drawn (`coverage`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant_calibration.coverage import Demand, next_round
from v4quant_calibration.draft_stream import drafts_of, stream_drafts
from v4quant_calibration.model.dspark import draft_blocks
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.provider import CheckpointParams
from v4quant_calibration.stats import StageStats, Stats
from v4quant_calibration.stream import StreamModel, stream_forward
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import trunk_stages
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

DEFAULT_FLOOR = 32


@dataclass(frozen=True)
class Calibration:
    """Statistics, and the windows they were measured on in the order drawn."""

    stats: Stats
    windows: list[Tensor]


class MomentObserver(SilentObserver):
    """Accumulates float64 sums of squares, magnitudes and token counts of every expert's inputs."""

    def __init__(
        self, config: ModelConfig, stages: Sequence[str], demand: Demand | None = None
    ) -> None:
        """Empty statistics for `stages`; `demand` learns which token ids starved experts want."""
        self._demand = demand
        experts = self._experts = config.n_routed_experts
        widths = {"w13": config.hidden_size, "w2": config.moe_intermediate_size}
        self.stages = {
            stage: StageStats(
                torch.zeros(experts, dtype=torch.int64),
                {k: torch.zeros(experts, w, dtype=torch.float64) for k, w in widths.items()},
                {k: torch.zeros(experts) for k in widths},
            )
            for stage in stages
        }

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """What this round adds is known now: tell the demand who is starved still."""
        if self._demand is not None:
            added = torch.bincount(expert_ids.flatten().cpu(), minlength=self._experts)
            self._demand.learn(layer, x, self.stages[layer].tokens + added)

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        """Rows that w1 and w3 multiply; they also count the expert's tokens."""
        self.stages[layer].tokens[expert] += x.shape[0]
        self._add(layer, "w13", expert, x)

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        """Rows that w2 multiplies."""
        self._add(layer, "w2", expert, h)

    def _add(self, layer: str, source: str, expert: int, rows: Tensor) -> None:
        stage = self.stages[layer]
        stage.sums[source][expert] += rows.double().square().sum(0).cpu()
        if rows.numel():
            largest = rows.abs().amax().float().cpu()
            stage.amax[source][expert] = torch.maximum(stage.amax[source][expert], largest)


def calibrate(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    progress: Progress,
    reserve: Sequence[Tensor] = (),
) -> Calibration:
    """Statistics of every routed expert over the given windows (int64 ids).

    floor: experts with fewer tokens are starved; while there are any, windows of `reserve` are
    drawn too.
    """
    options = replace(options, expert_tokens=None)  # demand is learned from whole layers
    drafts = drafts_of(checkpoint, config)
    stages = [*trunk_stages(config), *drafts.stages]
    params = CheckpointParams(checkpoint)
    demand = Demand(config, params, floor) if reserve else None
    observer = MomentObserver(config, stages, demand)
    model = StreamModel(params, options, observer)
    drawn, left, draw = list(windows), list(reserve), list(windows)
    first: dict[str, Tensor] = {}
    while draw:
        if demand is not None:
            demand.begin(draw)
        progress.start("Calibrating", len(stages), "layer")
        taps = drafts.taps(config, 1)
        streams = stream_forward(
            [model], config, draw, progress=lambda *_: progress.advance(1), taps=taps
        )
        if demand is not None and drafts.kind == "dspark":
            demand.follow(draft_blocks(draw, config).previous)
        stream_drafts(drafts, [model], config, draw, streams, taps)
        progress.advance(len(drafts.stages))
        progress.finish()
        first = first or {name: stage.tokens.clone() for name, stage in observer.stages.items()}
        starved = any(bool((s.tokens < floor).any()) for s in observer.stages.values())
        draw = []
        if demand is not None and starved and left:
            chosen = set(next_round(left, len(drawn), demand.wanted))
            draw = [ids for i, ids in enumerate(left) if i in chosen]
            left = [ids for i, ids in enumerate(left) if i not in chosen]
            drawn += draw
    return Calibration(Stats(checkpoint.digest(), floor, observer.stages, first), drawn)
