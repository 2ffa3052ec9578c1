"""calibration: which text a run reads, and the one call behind `calibrate` and `run`.

The corpus is loaded twice when a number of tokens is given: those windows first, the rest as the
reserve from which starved experts are fed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from v4quant import __version__
from v4quant.calibration.memory import (
    KeptRounds,
    calibration_room,
    fit_solving,
    statistics_bytes,
)
from v4quant.checks.soundness import require_sound
from v4quant.conversion.calibrated import solved_part
from v4quant.conversion.overwrite import exchange, new_place, refuse_others, tidy
from v4quant.conversion.plan import make_plan
from v4quant.devices import CPU, device_bytes
from v4quant.memory import Limits
from v4quant.recipe import Recipe, RecipeError
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.corpus.errors import CorpusError
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.solve.settings import SolveSettings
from v4quant_calibration.solve.solve import SolveTarget, solve_several
from v4quant_calibration.solve.team import ALONE, Team
from v4quant_calibration.statistics.collect import Calibration, OpenRoom, calibrate, stages_of
from v4quant_calibration.statistics.provenance import Provenance
from v4quant_calibration.statistics.stats import write_stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.folder_lock import lock_beside, locked_folder
from v4quant_formats.model_config import ModelConfig
from v4quant_formats.system import return_freed_memory
from v4quant_kernels.cast import can_cast
from v4quant_kernels.errors import OptionError
from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.progress import Progress
from v4quant_kernels.scheme import SCHEMES, Scheme

_RESERVE = 16
Finishing = Callable[[Calibration], AbstractContextManager[None]]


@dataclass(frozen=True)
class DrawnCorpus:
    """Windows to read first, and those to draw from while experts are starved.

    skipped_rows: rows left out because they cannot be read.
    """

    windows: list[Tensor]
    reserve: list[Tensor]
    skipped_rows: int = 0


def reserve_of(tokens: int | None) -> int | None:
    """Tokens of a long text that are enough to draw from, where so many are read first."""
    return None if tokens is None else _RESERVE * tokens


def draw_corpus(load: Callable[[int | None], Corpus], tokens: int | None) -> DrawnCorpus:
    """Cut a corpus in two. load: reads it, with so many tokens or (None) whole.

    Raises what `load` raises.
    """
    corpus = load(tokens)
    first, skipped = corpus.windows, corpus.skipped_rows
    if tokens is None:
        return DrawnCorpus(first, [], skipped)
    taken = {ids.numpy().tobytes() for ids in first}
    rest = [ids for ids in load(None).windows if ids.numpy().tobytes() not in taken]
    return DrawnCorpus(first, rest, skipped)


def check_floor(corpus: DrawnCorpus, config: ModelConfig, floor: int) -> None:
    """Refuse a corpus that could not feed every expert even if routing were perfectly even.

    Raises CorpusError.
    """
    tokens = sum(len(ids) for ids in (*corpus.windows, *corpus.reserve))
    most = tokens * config.num_experts_per_tok // config.n_routed_experts
    if most < floor:
        raise CorpusError(
            f"the corpus holds {tokens:,} tokens, {most} for each of {config.n_routed_experts} "
            f"experts if all got the same, and the floor is {floor}; give more text or a lower "
            "--min-tokens"
        )


def solve_settings(checkpoint: Checkpoint, recipe: Recipe, propagate: bool = True) -> SolveSettings:
    """What a recipe asks a solver for.

    For GGUF files the plan says which matrices become which block type: those of the experts, of
    attention and the head, where they do; the others are the encoder's. Where layers have schemes
    of their own, they are solved for those. Raises what planning raises, and RecipeError where
    there is nothing to solve.
    """
    plain = SolveSettings(recipe.expert_scheme, propagate)
    if recipe.layout.mixes == "layer" and recipe.places:
        return replace(plain, schemes=_by_layer(checkpoint, recipe), recipe=solved_part(recipe))
    if recipe.layout.mixes != "projection":
        return plain
    units = [u for u in make_plan(checkpoint, recipe).units if not u.again]
    schemes = {
        stored.module: SCHEMES[kind.name]
        for unit in units
        if unit.action in ("experts", "blocks")
        for stored, wanted in zip(unit.sources, unit.outputs, strict=True)
        if (kind := block_type(wanted.dtype)) is not None and kind.coder
    }
    if not schemes:
        raise RecipeError("nothing in this recipe is coded by a scheme that could be solved for")
    return replace(plain, schemes=schemes, recipe=solved_part(recipe))


def _by_layer(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Scheme]:
    """The schemes of expert matrices that lose something in theirs."""
    schemes = {}
    for unit in make_plan(checkpoint, recipe).units:
        for stored in unit.sources:
            stage, expert, place = stored.module.partition(".ffn.experts.")
            if expert:
                scheme = recipe.scheme_for(stage, place.rpartition(".")[2])
                if scheme.coder and not can_cast(scheme):
                    schemes[stored.module] = scheme
    if not schemes:
        raise RecipeError("nothing in this recipe is coded by a scheme that could be solved for")
    return schemes


def calibrate_to(
    checkpoint: Checkpoint,
    config: ModelConfig,
    corpus: DrawnCorpus,
    options: ForwardOptions,
    floor: int,
    settings: SolveSettings | None,
    out: Path,
    progress: Progress,
    max_memory: int | None = None,
    device: torch.device = CPU,
    dense: bool = False,
    team: Team = ALONE,
    provenance: Provenance | None = None,
    overwrite: bool = False,
    finishing: Finishing | None = None,
) -> Calibration:
    """Calibrate, and with `settings` solve; writes file or folder `out`.

    max_memory: the most bytes this may take; streams then go to files beside `out` where they must.
    device: where passes run and solvers work. dense: inputs of dense matrices are in the returned
    statistics too (without `settings`). provenance: recorded with what is written. team: who solves
    together; more text for starved experts is drawn by its first rank. overwrite: another solution
    in `out` is replaced by this one when it is finished. finishing: held, without `settings`, while
    `out` is written and what was kept is removed. Raises what `check_floor`, `calibrate` and
    `solve` raise, and SizeError for too little memory.
    """
    targets = [] if settings is None else [solve_target(settings, out, provenance, overwrite)]
    work = _Work(
        checkpoint, config, corpus, options, floor, progress, max_memory, device, team,
        out, targets, dense, provenance, finishing,
    )  # fmt: skip
    return _calibrate_checked(work)


def solve_target(
    settings: SolveSettings, out: Path, provenance: Provenance | None, overwrite: bool
) -> SolveTarget:
    """A solution to be made in folder `out`, and with `overwrite` beside it while another one is
    there."""
    return SolveTarget(settings, out, provenance, new_place(out) if overwrite else None)


def solve_several_to(
    checkpoint: Checkpoint,
    config: ModelConfig,
    corpus: DrawnCorpus,
    options: ForwardOptions,
    floor: int,
    targets: Sequence[SolveTarget],
    progress: Progress,
    max_memory: int | None = None,
    device: torch.device = CPU,
) -> Calibration:
    """As `calibrate_to`, with several solutions from one forward pass of the original.

    The statistics returned are the first target's.
    """
    work = _Work(
        checkpoint, config, corpus, options, floor, progress, max_memory, device, ALONE,
        targets[0].folder, targets,
    )  # fmt: skip
    return _calibrate_checked(work)


@dataclass(frozen=True)
class _Work:
    """What a calibration reads, where it runs, and what it writes; see `calibrate_to`.

    out: the file of statistics, or the first target's folder. targets: solutions, if any.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    corpus: DrawnCorpus
    options: ForwardOptions
    floor: int
    progress: Progress
    max_memory: int | None
    device: torch.device
    team: Team
    out: Path
    targets: Sequence[SolveTarget]
    dense: bool = False
    provenance: Provenance | None = None
    finishing: Finishing | None = None


def _calibrate_checked(work: _Work) -> Calibration:
    """Check the input, and hold the locks of everything that is written."""
    require_sound(work.checkpoint)
    check_floor(work.corpus, work.config, work.floor)
    settings = work.targets[0].settings if work.targets else None
    require_work(work.team, settings, work.corpus.windows)
    with ExitStack() as stack:
        if work.team.is_first:
            for target in work.targets:
                if target.otherwise is not None:
                    tidy(target.folder)
                    refuse_others(target.folder)
            for place in dict.fromkeys([work.out, *(t.folder for t in work.targets)]):
                taken = f"{place}: another v4quant process is calibrating to it; give another --out"
                lock = lock_beside(place)
                stack.enter_context(locked_folder(lock.parent, taken, lock.name, stays=False))
        work.team.barrier()
        return _calibrate_locked(work)


def require_work(team: Team, settings: SolveSettings | None, windows: Sequence[Tensor]) -> None:
    """Refuse ranks that would have nothing to do. Raises OptionError."""
    if team.size == 1:
        return
    if settings is None:
        raise OptionError(
            "several ranks divide the work of solving; give --solve or --recipe, or run calibrate "
            "without torchrun"
        )
    if len(windows) < team.size:
        raise OptionError(
            f"the corpus has {len(windows)} windows for {team.size} ranks, which need one each; "
            "give more text, a shorter --seq-len, or start fewer ranks"
        )


def _run_key(
    checkpoint: Checkpoint,
    options: ForwardOptions,
    floor: int,
    corpus: DrawnCorpus,
    device: torch.device,
    dense: bool,
) -> str:
    """Digest of what decides a calibration's sums, but for the rounds' windows."""
    sha = hashlib.sha256()
    facts = (__version__, torch.__version__, checkpoint.digest(), options, floor, device, dense)
    sha.update(repr(facts).encode())
    for window in corpus.reserve:
        sha.update(f"{len(window)}:".encode() + window.numpy().tobytes())
    return sha.hexdigest()


def _calibrate_locked(work: _Work) -> Calibration:
    checkpoint, config, corpus, team = work.checkpoint, work.config, work.corpus, work.team
    out, targets = work.out, work.targets
    windows, first = corpus.windows, dict[str, Tensor]()
    held = statistics_bytes(config, len(stages_of(checkpoint, config)))
    limits = Limits.of(work.max_memory, device_bytes(work.device))
    run = _run_key(checkpoint, work.options, work.floor, corpus, work.device, work.dense)
    kept = KeptRounds(out, run)
    rooms: OpenRoom = partial(calibration_room, config, held, limits, out, kept)
    if work.max_memory is not None:
        return_freed_memory()
    if not targets or corpus.reserve:
        found = None
        if team.is_first:
            found = calibrate(
                checkpoint, config, windows, work.options, work.floor, work.progress,
                corpus.reserve, rooms, work.device, work.dense,
            )  # fmt: skip
            if not targets:
                with nullcontext() if work.finishing is None else work.finishing(found):
                    write_stats(out, replace(found.stats, provenance=work.provenance))
                    kept.remove()
                return found
        drawn = None if found is None else (found.windows, dict(found.stats.first))
        told = team.tell(drawn)
        assert told is not None and targets
        windows, first = told
    beside = out if team.size == 1 else out.with_name(f"{out.name}.rank{team.rank}")
    fitted, rooms = fit_solving(config, targets, held, windows, limits, beside)
    solutions = solve_several(
        checkpoint, config, windows, work.options, work.floor, fitted, work.progress, first, rooms,
        work.device, team,
    )  # fmt: skip
    for solution, target in zip(solutions, targets, strict=True):
        solution.close()
        if team.is_first and solution.folder != target.folder:
            exchange(target.folder)
    team.barrier()
    kept.remove()
    return Calibration(solutions[0].stats, windows)
