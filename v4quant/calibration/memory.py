"""What `calibrate --max-memory` does, by the estimates of `evaluation_memory`.

A calibration is a forward pass of one model, or with propagation of two, and holds statistics
beside: float64 sums of every channel of every expert of every stage. Every round of text is planned
on its own. Solving wants a layer's rows all at once and takes what is left for the moments of as
many experts as fit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from v4quant.evaluation.memory import Work, plan_evaluation
from v4quant.memory import Limits
from v4quant.own_folders import remove_if_empty
from v4quant_calibration.forward.kept import UNFINISHED, KeptStore, remove_kept
from v4quant_calibration.forward.scratch import Scratch
from v4quant_calibration.forward.stream import MemoryStore, StreamStore
from v4quant_calibration.model.options import ForwardOptions
from v4quant_calibration.solve.dense_solver import dense_bytes
from v4quant_calibration.solve.layer_solver import expert_bytes
from v4quant_calibration.solve.solve import SolveTarget
from v4quant_calibration.statistics.collect import OpenRoom, Room
from v4quant_formats.model_config import ModelConfig
from v4quant_formats.shards import output_error

# Streams of a solving run without a cap stay in memory up to so many bytes.
_MOST_STREAMS = 4 * 2**30
_F64 = 8
# What this command takes that `evaluate`, whose estimate it builds on, does not: measured.
_OWN_BYTES = 12 * 2**20


class KeptRounds:
    """What the rounds of one calibration keep of their finished layers, beside its output."""

    def __init__(self, out: Path, run: str) -> None:
        """out: what is calibrated to. run: digest of all that decides its numbers but the text."""
        self.folder = out.with_name(f"{out.name}{UNFINISHED}")
        self._key = run
        self._rounds: list[Path] = []

    @contextmanager
    def round(self, base: StreamStore, windows: Sequence[Tensor]) -> Iterator[KeptStore]:
        """A store for a round over some windows; a round depends on all before it."""
        sha = hashlib.sha256(self._key.encode())
        for window in windows:
            sha.update(f"{len(window)}:".encode() + window.numpy().tobytes())
        self._key = sha.hexdigest()
        folder = self.folder / self._key[:24]
        self._rounds.append(folder)
        try:
            with KeptStore(base, folder, self._key) as store:
                yield store
        finally:
            remove_if_empty(self.folder)

    def remove(self) -> None:
        """The calibration is complete: nothing is kept any more."""
        for folder in self._rounds:
            remove_kept(folder)
        remove_if_empty(self.folder)


def statistics_bytes(config: ModelConfig, stages: int) -> int:
    """Sums over all experts of all stages, and one of them on its way to the file."""
    stage = config.n_routed_experts * (config.hidden_size + config.moe_intermediate_size)
    return _F64 * stage * (stages + 1)


@contextmanager
def calibration_room(
    config: ModelConfig,
    held: int,
    limits: Limits,
    out: Path,
    kept: KeptRounds,
    windows: Sequence[Tensor],
    options: ForwardOptions,
) -> Iterator[Room]:
    """Memory for a round of calibration: pieces within the limits, streams beside `out` if need be.

    held: bytes of the statistics. kept: where finished layers are kept, so that a killed round goes
    on. Raises SizeError, and OutputError for files.
    """
    work = _work(config, windows, 1, held)
    plan = plan_evaluation(config, work, limits)
    with _store(plan.spill, out) as store, kept.round(store, windows) as keeping:
        yield Room(plan.apply(options), keeping)


def fit_solving(
    config: ModelConfig,
    targets: Sequence[SolveTarget],
    held: int,
    windows: Sequence[Tensor],
    limits: Limits,
    out: Path,
) -> tuple[list[SolveTarget], OpenRoom]:
    """Targets whose moments fit what a pass over `windows` leaves within the limits, and its room.

    held: bytes of one target's statistics. Targets are solved one after another, a layer at a
    time, so only the streams of their models and their statistics add up. Raises SizeError.
    """
    held *= len(targets)
    propagate = targets[0].settings.propagate
    models = 1 + len(targets) * propagate
    row = 4 * config.hc_mult * config.hidden_size
    spill = limits.host is None and 2 * models * row * sum(map(len, windows)) > _MOST_STREAMS
    if limits == Limits():
        return list(targets), partial(_solving_room, spill, lambda options: options, out)
    # The layer's inputs of the model that streams beside, attention's and the experts'; moments of
    # the experts' over all tokens, and a copy.
    beside = 2 * 4 * config.hidden_size * sum(map(len, windows)) * propagate
    beside += 2 * _F64 * config.hidden_size**2
    dense = any(".attn." in module for t in targets for module in t.settings.schemes or ())
    least = expert_bytes(config.hidden_size, config.moe_intermediate_size)
    if dense:
        least = max(least, dense_bytes(config))
    work = replace(_work(config, windows, models, held), together=True, working=beside + least)
    plan = plan_evaluation(config, work, limits, on_disk=spill)
    left = limits.host - plan.nbytes if limits.host is not None else 0
    if limits.device is not None:
        left = limits.device - plan.device_bytes
    fitted = [replace(t, settings=replace(t.settings, memory=least + left)) for t in targets]
    return fitted, partial(_solving_room, plan.spill, plan.apply, out)


@contextmanager
def _solving_room(
    spill: bool,
    apply: Callable[[ForwardOptions], ForwardOptions],
    out: Path,
    windows: Sequence[Tensor],
    options: ForwardOptions,
) -> Iterator[Room]:
    """The one round of a solving run, as `fit_solving` planned it."""
    with _store(spill, out) as store:
        yield Room(apply(options), store)


def _work(config: ModelConfig, windows: Sequence[Tensor], models: int, held: int) -> Work:
    """A pass without scores. Router scores of a layer are kept, and copied piece by piece."""
    lengths = tuple(len(ids) for ids in windows)
    scores = 6 * config.n_routed_experts * sum(lengths)
    return Work(models, 0, lengths, False, models, scored=False, held=held + scores + _OWN_BYTES)


@contextmanager
def _store(spill: bool, out: Path) -> Iterator[StreamStore]:
    """Streams in memory or in files beside `out`, which nothing is resumed from."""
    if not spill:
        yield MemoryStore()
        return
    key = hashlib.sha256(f"streams of {out.name}".encode()).hexdigest()
    folder = out.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(folder, error) from None
    with Scratch(folder, key, resumes=False) as scratch:
        try:
            yield scratch
        finally:
            scratch.remove()
