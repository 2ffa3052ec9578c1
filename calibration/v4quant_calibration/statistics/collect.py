"""calibrate: stream tokens through the model and record what each expert's inputs look like.

The second moment of an input channel is the weight its squared weight error deserves: with inputs
of covariance C, the expected output error of a row error e is e C e^T, of which the scale search
uses the diagonal. Hash-routed layers and draft stages are covered like the others. Experts with
too few tokens cause more text to be drawn (`coverage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from v4quant_calibration.forward.checkpoint_params import CPU, CheckpointParams
from v4quant_calibration.forward.drafts import Drafts, drafts_of, stream_drafts
from v4quant_calibration.forward.stream import MemoryStore, StreamModel, StreamStore, stream_forward
from v4quant_calibration.model.dspark import draft_blocks
from v4quant_calibration.model.observer import SilentObserver
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.statistics.coverage import Demand, next_round
from v4quant_calibration.statistics.imatrix import spread_dense
from v4quant_calibration.statistics.stats import DenseInputs, StageStats, Stats
from v4quant_calibration.statistics.table_use import table_use
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import trunk_stages
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress

# Rows that are in float64 at once.
_ROWS = 1024
_DENSE = "dense."


@dataclass(frozen=True)
class Calibration:
    """Statistics, and the windows they were measured on in the order drawn."""

    stats: Stats
    windows: list[Tensor]


@dataclass(frozen=True)
class Room:
    """How a round works: options that say in which pieces, and where its streams live."""

    options: ForwardOptions
    store: StreamStore


OpenRoom = Callable[[Sequence[Tensor], ForwardOptions], AbstractContextManager[Room]]
"""Makes room for a round over some windows; leaving it drops the round's streams."""


@contextmanager
def all_in_memory(windows: Sequence[Tensor], options: ForwardOptions) -> Iterator[Room]:
    """Streams in memory, all tokens through the experts at once."""
    yield Room(options, MemoryStore())


class MomentObserver(SilentObserver):
    """Accumulates float64 sums of squares, magnitudes and token counts of every expert's inputs."""

    def __init__(
        self,
        config: ModelConfig,
        stages: Sequence[str],
        demand: Demand | None = None,
        dense: bool = False,
    ) -> None:
        """Empty statistics for `stages`; `demand` learns which token ids starved experts want.

        dense: the inputs of matrices outside the routed experts are summed as well.
        """
        self._demand = demand
        self.dense: dict[str, DenseInputs] | None = {} if dense else None
        widths = {"w13": config.hidden_size, "w2": config.moe_intermediate_size}

        def empty(experts: int) -> StageStats:
            return StageStats(
                torch.zeros(experts, dtype=torch.int64),
                {k: torch.zeros(experts, w, dtype=torch.float64) for k, w in widths.items()},
                {k: torch.zeros(experts) for k in widths},
            )

        self.stages = {stage: empty(config.facts(stage).experts) for stage in stages}

    def tensors(self) -> dict[str, Tensor]:
        """All sums so far, by name, for a StreamStore to keep."""
        found = {}
        for name, stage in self.stages.items():
            found[f"{name}.tokens"] = stage.tokens
            for source in stage.sums:
                found[f"{name}.{source}.sums"] = stage.sums[source]
                found[f"{name}.{source}.amax"] = stage.amax[source]
        for module, seen in (self.dense or {}).items():
            found[f"{_DENSE}{module}.sums"] = seen.sums
            found[f"{_DENSE}{module}.rows"] = torch.tensor([seen.rows])
        if self._demand is not None:
            found["wanted"] = self._demand.wanted
        return found

    def take(self, kept: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave in an earlier process."""
        if self.dense is not None:
            self.dense.clear()
        for name, value in self.tensors().items():
            value.copy_(kept[name])
        for name in kept:
            if self.dense is not None and name.startswith(_DENSE) and name.endswith(".sums"):
                module = name.removeprefix(_DENSE).removesuffix(".sums")
                rows = int(kept[f"{_DENSE}{module}.rows"])
                self.dense[module] = DenseInputs(kept[name], rows)

    def on_experts(self, layer: str, x: Tensor, expert_ids: Tensor, weights: Tensor) -> None:
        """What this round adds is known now: tell the demand who is starved still."""
        if self._demand is not None:
            tokens = self.stages[layer].tokens
            added = torch.bincount(expert_ids.flatten().cpu(), minlength=len(tokens))
            self._demand.learn(layer, x, tokens + added)

    def on_linear(self, module: str, x: Tensor) -> None:
        """Rows that a dense matrix multiplies."""
        if self.dense is None:
            return
        rows = x.reshape(-1, x.shape[-1])
        before = self.dense.get(module, DenseInputs(torch.zeros(rows.shape[1]).double(), 0))
        self.dense[module] = DenseInputs(before.sums + _squares(rows), before.rows + rows.shape[0])

    def on_expert_input(self, layer: str, expert: int, x: Tensor) -> None:
        """Rows that w1 and w3 multiply; they also count the expert's tokens."""
        self.stages[layer].tokens[expert] += x.shape[0]
        self._add(layer, "w13", expert, x)

    def on_expert_hidden(self, layer: str, expert: int, h: Tensor) -> None:
        """Rows that w2 multiplies."""
        self._add(layer, "w2", expert, h)

    def _add(self, layer: str, source: str, expert: int, rows: Tensor) -> None:
        stage = self.stages[layer]
        stage.sums[source][expert] += _squares(rows)
        if rows.numel():
            largest = rows.abs().amax().float().cpu()
            stage.amax[source][expert] = torch.maximum(stage.amax[source][expert], largest)


def _squares(rows: Tensor) -> Tensor:
    """Sums of squares, float64 `[K]` on the CPU, of rows `[n, K]`."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for part in torch.split(rows, _ROWS):
        total += part.double().square().sum(0).cpu()
    return total


def calibrate(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    progress: Progress,
    reserve: Sequence[Tensor] = (),
    open_room: OpenRoom = all_in_memory,
    device: torch.device = CPU,
    dense: bool = False,
) -> Calibration:
    """Statistics of every routed expert over the given windows (int64 ids).

    floor: experts with fewer tokens are starved; while there are any, windows of `reserve` are
    drawn too. open_room: memory for each round. device: where the arithmetic is done. dense: the
    inputs of other matrices are summed too.
    """
    drafts, stages = drafts_of(checkpoint, config), stages_of(checkpoint, config)
    params = CheckpointParams(checkpoint, device)
    demand = Demand(config, params, floor) if reserve else None
    observer = MomentObserver(config, stages, demand, dense)
    drawn, left, draw = list(windows), list(reserve), list(windows)
    first: dict[str, Tensor] = {}
    while draw:
        with open_room(draw, options) as room:
            done = room.store.finished
            label = f"Calibrating from layer {done}" if done else "Calibrating"
            progress.start(label, len(stages) - done, "layer")
            model = StreamModel(params, room.options, observer)
            _read(model, config, draw, drafts, demand, room.store, progress)
        progress.finish()
        first = first or {name: stage.tokens.clone() for name, stage in observer.stages.items()}
        starved = any(bool((s.tokens < floor).any()) for s in observer.stages.values())
        draw = []
        if demand is not None and starved and left:
            chosen = set(next_round(left, len(drawn), demand.wanted))
            draw = [ids for i, ids in enumerate(left) if i in chosen]
            left = [ids for i, ids in enumerate(left) if i not in chosen]
            drawn += draw
    seen = spread_dense(observer.dense or {})
    tables = table_use(params, config, drawn)
    stats = Stats(checkpoint.digest(), floor, observer.stages, first, seen, tables)
    return Calibration(stats, drawn)


def stages_of(checkpoint: Checkpoint, config: ModelConfig) -> list[str]:
    """The stages a calibration covers: the trunk's layers, and the drafts that can be run."""
    return [*trunk_stages(config), *drafts_of(checkpoint, config).stages]


def _read(
    model: StreamModel,
    config: ModelConfig,
    windows: Sequence[Tensor],
    drafts: Drafts,
    demand: Demand | None,
    store: StreamStore,
    progress: Progress,
) -> None:
    """One round: trunk and drafts over some windows, for what the model's observer sees."""
    if demand is not None:
        demand.begin(windows)
    observer = model.observer
    assert isinstance(observer, MomentObserver)
    if kept := store.keep(observer.tensors):
        observer.take(kept)
    taps = drafts.taps(config, 1)
    streams = stream_forward(
        [model], config, windows, progress=lambda *_: progress.advance(1), store=store, taps=taps
    )
    if demand is not None and drafts.kind == "dspark":
        demand.follow(draft_blocks(windows, config).previous)
    stream_drafts(drafts, [model], config, windows, streams, taps, store=store)
    progress.advance(len(drafts.stages))
