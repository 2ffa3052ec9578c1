"""solve: calibrate and quantize in one pass, layer by layer, storing no statistics.

The full moments of one Flash expert's inputs take 80 MB, those of all experts 900 GB; even a
sample of 2,048 rows per expert would be 270 GB, more than the model. But a layer's inputs are all
there at the moment the streams reach its experts. So the moments are formed then, for a few experts
at a time within the memory cap, the experts' codes solved and written to the stage's file, and the
moments dropped. What remains is the result.

That also gives error propagation for nothing. Two models stream side by side: the reference, and
a candidate whose provider answers solved matrices from the files just written, so each layer is
solved on the inputs that the *converted* model will give it. Targets are corrected for the inputs'
error (`gram.CrossSums`). With propagation off there is one model, and every layer sees the
original's inputs.

What a layer does when its turn comes is told in layer_solver.py, what becomes of attention and head
in dense_solver.py. A layer whose file exists is only read, so an interrupted run repeats forward
passes but no solving.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from v4quant_calibration.forward.checkpoint_params import CPU, CheckpointParams
from v4quant_calibration.forward.drafts import drafts_of, stream_drafts
from v4quant_calibration.forward.stream import StreamModel, stream_forward
from v4quant_calibration.model.dspark import draft_blocks, require_blocks
from v4quant_calibration.model.observer import Observers
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.model.params import Params
from v4quant_calibration.rounding.coders import coder_of
from v4quant_calibration.solve.dense_solver import DenseSolver
from v4quant_calibration.solve.layer_solver import LayerSolver
from v4quant_calibration.solve.models import InputKeeper, SolvedParams
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solution import (
    HEAD,
    SOLUTION_VERSION,
    STATS_NAME,
    Solution,
    attention_file,
    begin_solution,
    clear_solution,
    finish_solution,
    holds_another,
    load_solution,
    stage_file,
)
from v4quant_calibration.solve.solving_bar import SolvingBar
from v4quant_calibration.solve.stage_writer import remove_parts
from v4quant_calibration.solve.team import ALONE, Team
from v4quant_calibration.statistics.collect import OpenRoom, all_in_memory
from v4quant_calibration.statistics.provenance import Provenance
from v4quant_calibration.statistics.stats import StageStats, Stats, write_stats
from v4quant_calibration.statistics.table_use import table_use
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import trunk_stages
from v4quant_formats.model_config import ModelConfig
from v4quant_kernels.progress import Progress


@dataclass(frozen=True)
class SolveTarget:
    """One solution to be made: of what, in which folder, and what is recorded of how.

    otherwise: the folder where it is made while `folder` holds another solution, which stays until
    the caller exchanges them.
    """

    settings: SolveSettings
    folder: Path
    provenance: Provenance | None = None
    otherwise: Path | None = None


def solve(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    settings: SolveSettings,
    folder: Path,
    progress: Progress,
    first: Mapping[str, Tensor] | None = None,
    open_room: OpenRoom = all_in_memory,
    device: torch.device = CPU,
    team: Team = ALONE,
) -> Solution:
    """`solve_several` for one target."""
    (found,) = solve_several(
        checkpoint, config, windows, options, floor, [SolveTarget(settings, folder)], progress,
        first, open_room, device, team,
    )  # fmt: skip
    return found


def solve_several(
    checkpoint: Checkpoint,
    config: ModelConfig,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    targets: Sequence[SolveTarget],
    progress: Progress,
    first: Mapping[str, Tensor] | None = None,
    open_room: OpenRoom = all_in_memory,
    device: torch.device = CPU,
    team: Team = ALONE,
) -> list[Solution]:
    """Solve what the targets name and windows (int64 ids) can reach; returns finished folders.

    The original's forward pass is run once for all targets, which propagate alike; every target
    has a model of its own beside it. A target's codes do not depend on the others.
    first: what is known of the first draw (`Stats.first`). open_room: where streams live. device:
    where passes run and solvers work; sums are taken in another order there, so codes may differ
    where two are as good. team: who solves together, each called with all windows; all return when
    the folders are finished. The same call again resumes, layer by layer. Raises SolutionError,
    UnsupportedScheme for a scheme that error feedback is not for, DraftError for text too short for
    a DSpark block, NonFiniteActivation naming what computed NaN, and OutputError.
    """
    propagate = targets[0].settings.propagate
    assert all(t.settings.propagate == propagate for t in targets), "targets propagate alike"
    for target in targets:
        if target.settings.schemes is None:
            coder_of(target.settings.scheme)
    drafts = drafts_of(checkpoint, config)
    if drafts.kind == "dspark":
        require_blocks(draft_blocks(windows, config))
    stages = [*trunk_stages(config), *drafts.stages]
    headers = [_header(checkpoint, windows, options, floor, t.settings) for t in targets]
    targets = _placed(targets, headers, team)
    if team.is_first:
        for target, header in zip(targets, headers, strict=True):
            begin_solution(target.folder, header)
            remove_parts(target.folder)
    team.barrier()
    everything, windows = windows, team.windows(windows)
    assert windows, f"{len(everything)} windows are too few for {team.size} ranks"
    open_layers = [s for t in targets for s in stages if not stage_file(t.folder, s).exists()]
    bar = SolvingBar(
        progress,
        len(targets) * len(stages) - len(open_layers),
        sum(config.facts(s).experts for s in open_layers),
    )
    keeper = InputKeeper() if propagate else None
    original = CheckpointParams(checkpoint, device)
    with ExitStack() as stack:
        converted: list[Params] = [
            stack.enter_context(closing(SolvedParams(checkpoint, t.folder, device)))
            if propagate
            else original
            for t in targets
        ]
        room = stack.enter_context(open_room(windows, options))
        store = room.store
        options = replace(room.options, expert_tokens=None)  # a layer is solved on all its rows
        solvers = [
            LayerSolver(
                checkpoint, config, stages, t.settings, t.folder, options, params, keeper, bar,
                team,
            )
            for t, params in zip(targets, converted, strict=True)
        ]  # fmt: skip
        if keeper is None:
            models = [StreamModel(original, options, Observers(solvers))]
        else:
            models = [StreamModel(original, options, keeper)]
            models += [StreamModel(p, options, s) for p, s in zip(converted, solvers, strict=True)]
        taps = drafts.taps(config, len(models))
        streams = stream_forward(models, config, windows, store=store, taps=taps)
        for number, (target, params) in enumerate(zip(targets, converted, strict=True), 1):
            dense = DenseSolver(
                checkpoint, config, target.settings, target.folder, options, params, keeper, team
            )
            pair = [0] if keeper is None else [0, number]
            dense.solve_head([models[i].params for i in pair], [streams[i] for i in pair])
        stream_drafts(drafts, models, config, windows, streams, taps, store=store)
    progress.finish()
    tables = table_use(original, config, everything)
    for target, header, solver in zip(targets, headers, solvers, strict=True):
        seen = {s: _joined(team, found) for s, found in solver.stages.items()}
        # Counts of the first draw are of the same routing only where nothing was propagated.
        draw = dict(first) if first and not propagate else {}
        stats = Stats(checkpoint.digest(), floor, seen, draw, tables=tables)
        if team.is_first:
            _finish(target.folder, header, stats, stages, target.provenance)
    team.barrier()
    return [load_solution(t.folder, checkpoint.digest()) for t in targets]


def _placed(
    targets: Sequence[SolveTarget], headers: Sequence[Mapping[str, Any]], team: Team
) -> list[SolveTarget]:
    """The targets with the folders they are made in, as the first rank finds them."""
    folders = None
    if team.is_first:
        folders = [
            t.otherwise if t.otherwise is not None and holds_another(t.folder, header) else t.folder
            for t, header in zip(targets, headers, strict=True)
        ]
        for folder, target, header in zip(folders, targets, headers, strict=True):
            if folder != target.folder and holds_another(folder, header):
                clear_solution(folder)
    folders = team.tell(folders)
    assert folders is not None
    return [replace(t, folder=folder) for t, folder in zip(targets, folders, strict=True)]


def _joined(team: Team, found: StageStats) -> StageStats:
    """What all ranks have seen of a stage's inputs."""
    return StageStats(
        team.total(found.tokens),
        {source: team.total(sums) for source, sums in found.sums.items()},
        {source: team.largest(amax) for source, amax in found.amax.items()},
    )


def _finish(
    folder: Path,
    header: Mapping[str, Any],
    stats: Stats,
    stages: Sequence[str],
    provenance: Provenance | None,
) -> None:
    """Write the statistics, and declare the folder finished."""
    write_stats(folder / STATS_NAME, stats)
    facts: dict[str, dict[str, Any]] = {
        stage: {"tokens": stats.stages[stage].tokens.tolist()} for stage in stages
    }
    for name in (*map(attention_file, stages), HEAD):
        if stage_file(folder, name).exists():
            facts[name] = {}
    finish_solution(folder, header, facts, provenance)


def _header(
    checkpoint: Checkpoint,
    windows: Sequence[Tensor],
    options: ForwardOptions,
    floor: int,
    settings: SolveSettings,
) -> dict[str, Any]:
    """What a solution depends on; a folder begun with another header is not resumed."""
    sha = hashlib.sha256()
    for window in windows:
        sha.update(window.numpy().tobytes())
        sha.update(b"|")
    return {
        "version": SOLUTION_VERSION,
        "source_digest": checkpoint.digest(),
        **settings.described(),
        "activations": options.activations,
        "products": options.products,
        "floor": floor,
        "windows": len(windows),
        "tokens": sum(len(w) for w in windows),
        "corpus_digest": sha.hexdigest(),
    }
