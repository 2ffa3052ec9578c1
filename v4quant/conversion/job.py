"""Job: a Plan being carried out, safe against kill, full disks and changing sources.

Several jobs on one source run side by side; of each, shards are written one after the other
(shard_writing.py). A shard counts once it is renamed and journaled; the index is written last and
makes the folder a checkpoint. The same plan gives the same bytes whatever the number of workers or
interruptions, and whatever runs beside it, because every unit is computed alone, in fixed pieces.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

from v4quant.conversion.delivery import Delivery, LocalDelivery
from v4quant.conversion.finish import finish_folder, travelling_sidecars
from v4quant.conversion.journal import (
    Journal,
    ShardFacts,
    locked_output,
    refuse_survivors,
    remove_work,
)
from v4quant.conversion.output_folder import complete_records
from v4quant.conversion.plan import Plan
from v4quant.conversion.ranks import Ranks
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.shard_writing import Writing, write_shards
from v4quant.conversion.size_by_role import warn_of_growth
from v4quant.conversion.units import ShardPlan
from v4quant.conversion.words import warn_of_lost_words
from v4quant.sizes import human_bytes
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.shards import WrittenFile, remove_leftovers
from v4quant_formats.small_files import read_begin
from v4quant_formats.system import peak_rss_bytes
from v4quant_kernels.progress import Progress, SilentProgress


@dataclass(frozen=True)
class JobResult:
    """What `quantize` reports (`--json`).

    first_file: of the output's shards; for GGUF the one that llama.cpp is given.
    engram_relative_rms: of the worst of V4.1's tables; _in_use: with every row weighted by how
    often the calibration text used it, 0 where that is not known. seconds, peak_rss_bytes: of this
    process, with all conversions that ran side by side.
    """

    output: str
    first_file: str
    format: str
    scheme: str
    tensors: int
    bytes_in: int
    bytes_out: int
    exact_tensors: int
    lossy_tensors: int
    copied_tensors: int
    dropped_tensors: int
    altered_elements: int
    worst_relative_rms: float
    mean_relative_rms: float
    engram_relative_rms: float
    engram_relative_rms_in_use: float
    seconds: float
    peak_rss_bytes: int


@dataclass(frozen=True)
class Request:
    """A plan to be carried out into folder `out`; with a delivery, shards leave it when finished.

    stats: what calibration found, if it did.
    """

    plan: Plan
    out: Path
    stats: Evidence | None = None
    delivery: Delivery = field(default_factory=LocalDelivery)


def run_job(
    plan: Plan,
    out: Path,
    stats: Evidence | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    delivery: Delivery | None = None,
) -> JobResult:
    """Carry one plan out; see `run_jobs`."""
    request = Request(plan, out, stats, delivery or LocalDelivery())
    return run_jobs([request], workers, progress, ranks)[0]


def run_jobs(
    requests: Sequence[Request],
    workers: int = 2,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
) -> list[JobResult]:
    """Carry plans of one source out, side by side; the same call again resumes or confirms.

    workers: threads that all of them share. With several ranks each calls this with the same plans
    and folders, and writes its share. Raises OutputError (not empty, locked, full, not writable),
    what `convert_unit` raises and what the deliveries raise.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        for request in requests:
            stack.callback(request.delivery.stop)
        jobs = [_begin(request, workers, progress, ranks, stack) for request in requests]
        open_jobs = [job for job in jobs if job.journal is not None]
        _check_space(open_jobs)
        # Every rank divides the same lists: nobody may finish a shard before all have read them.
        ranks.barrier()
        for job in open_jobs:
            if ranks.is_first:
                _clear(job)
            # What lay here before is within rank 0's share of the disk.
            ranks.barrier(job.request.delivery.check)
        if open_jobs:
            write_shards([job.writing(ranks) for job in open_jobs], workers, progress, ranks.check)
        records = [_finish(job, ranks) for job in jobs]
    return [_result(job.request, found, started) for job, found in zip(jobs, records, strict=True)]


@dataclass(frozen=True)
class _Job:
    """A request whose folder is held. journal: None where `complete`, the records, is known."""

    request: Request
    complete: tuple[TensorRecord, ...] = ()
    journal: Journal | None = None
    sidecars: tuple[WrittenFile, ...] = ()

    @property
    def todo(self) -> list[ShardPlan]:
        """Shards that are not finished."""
        assert self.journal is not None
        return [s for s in self.request.plan.shards if s.file not in self.journal.finished]

    def writing(self, ranks: Ranks) -> Writing:
        """This rank's part of what is to be written."""
        asked = self.request
        assert self.journal is not None
        mine = tuple(ranks.share(self.todo))
        return Writing(asked.plan, mine, asked.out, asked.stats, self.journal, asked.delivery)


def _begin(
    request: Request, workers: int, progress: Progress, ranks: Ranks, stack: ExitStack
) -> _Job:
    """Hold the folder, and see what is done in it. `stack` lets go of it."""
    plan, out, delivery = request.plan, request.out, request.delivery
    complete = _enter(plan, out, delivery, ranks, stack)
    if complete is not None:
        if ranks.is_first:
            # Left when the run that finished was killed between its last two steps.
            remove_work(out)
        return _Job(request, tuple(complete))
    if ranks.is_first:
        warn_of_growth(plan)
        warn_of_lost_words(plan)
    sidecars = travelling_sidecars(plan, request.stats)
    facts = {s.file: ShardFacts(s.nbytes, s.recorded) for s in plan.shards}
    journal = Journal(out, plan.digest, facts, ranks.run, ranks.rank, delivery.has, plan.stem)
    if ranks.is_first:
        small = ("config.json", plan.recipe.layout.index or MANIFEST_NAME, MANIFEST_NAME)
        remove_leftovers(out, [*facts, *(s.name for s in sidecars), *small])
    _check_earlier(journal, ranks, workers, progress)
    return _Job(request, (), journal, tuple(sidecars))


def _clear(job: _Job) -> None:
    """Remove what was renamed but not journaled when a run was killed: it is made again. Hand over
    what was finished but not delivered. Raises OutputError for somebody else's file."""
    journal, out = job.journal, job.request.out
    assert journal is not None
    for shard in job.todo:
        path = out / shard.file
        if os.path.lexists(path):
            if shard.file not in journal.named and not _is_begun(path, shard):
                raise OutputError(
                    f"{path}: is not what this conversion writes there; move it away, and the same "
                    "command goes on"
                )
            path.unlink()
    _deliver_again(out, journal, job.request.delivery)


def _is_begun(path: Path, shard: ShardPlan) -> bool:
    """Whether a file begins as the shard does, as far as it goes, or was lost to a power cut."""
    header = shard.file_plan().header
    with suppress(FormatError):
        begin = read_begin(path, len(header))
        return header.startswith(begin) or not any(begin)
    return False


def _finish(job: _Job, ranks: Ranks) -> Sequence[TensorRecord]:
    """All shards are written: what makes them a checkpoint. The records of all modules."""
    journal, delivery = job.journal, job.request.delivery
    if journal is None:
        return job.complete
    delivery.settle()
    ranks.barrier(delivery.check)
    delivery.look()
    journal.refresh()
    plan, out = job.request.plan, job.request.out
    shards = [journal.finished[s.file] for s in plan.shards]
    ranks.barrier(delivery.check)  # the journals go below, when all have read them
    if ranks.is_first:
        manifest = finish_folder(plan, out, shards, list(job.sidecars), job.request.stats)
        delivery.finish(out, manifest)
        journal.remove()
    ranks.barrier()
    return [record for shard in shards for record in shard.records]


def _enter(
    plan: Plan, out: Path, delivery: Delivery, ranks: Ranks, stack: ExitStack
) -> list[TensorRecord] | None:
    """Lock the folder for all ranks; the records of a checkpoint that is already whole.

    The folder is looked at before anything is made in it, and again when nobody else can change it.
    """
    if ranks.is_first:
        complete_records(plan, out, delivery)

        def look() -> None:
            refuse_survivors(out)
            complete_records(plan, out, delivery)

        stack.enter_context(locked_output(out, look=look))
    ranks.barrier()
    if not ranks.is_first:
        stack.enter_context(locked_output(out, ranks.rank))
    complete = complete_records(plan, out, delivery)
    # Nobody changes the folder before all have looked.
    ranks.barrier()
    return complete


def _check_earlier(journal: Journal, ranks: Ranks, threads: int, progress: Progress) -> None:
    """Compare the hashes of what other runs finished, each rank some; then all know the same."""
    ranks.barrier()
    names = sorted(journal.unchecked)[ranks.rank :: ranks.size]
    if names:
        progress.start("Checking", sum(journal.unchecked[n].file.nbytes for n in names), "B")
        journal.check(names, threads, progress.advance)
        progress.finish()
    ranks.barrier()
    journal.refresh()


def _check_space(jobs: Sequence[_Job]) -> None:
    """Refuse what their disks have no room for. Raises OutputError."""
    needs: dict[int, int] = {}
    for job in jobs:
        out = job.request.out
        disk = out.stat().st_dev
        needs[disk] = needs.get(disk, 0) + job.request.delivery.space([s.nbytes for s in job.todo])
        free = shutil.disk_usage(out).free
        if needs[disk] > free:
            raise OutputError(
                f"{out}: needs {human_bytes(needs[disk])}, but only {human_bytes(free)} are free "
                "on this disk; free space or choose another folder"
            )


def _deliver_again(out: Path, journal: Journal, delivery: Delivery) -> None:
    """Hand over what an earlier run finished but could not deliver."""
    for shard in journal.finished.values():
        if (out / shard.file.name).exists():
            delivery.make_room(shard.file.nbytes)
            delivery.take(shard.file)


def _result(request: Request, records: Sequence[TensorRecord], started: float) -> JobResult:
    plan = request.plan
    kinds = Counter("copied" if r.disposition == "copied" else r.exact for r in records)
    losses = [r.relative_rms for r in records if not r.exact]
    tables = [r for r in records if r.module.endswith(".engram.embed")]
    return JobResult(
        output=os.fspath(request.out),
        first_file=plan.shards[0].file,
        format=plan.recipe.format,
        scheme=plan.recipe.scheme,
        tensors=sum(len(s.outputs) for s in plan.shards),
        bytes_in=plan.checkpoint.file_bytes,
        bytes_out=plan.bytes_out,
        exact_tensors=kinds[True],
        lossy_tensors=kinds[False],
        copied_tensors=kinds["copied"],
        dropped_tensors=len(plan.dropped),
        altered_elements=sum(r.altered for r in records),
        worst_relative_rms=max(losses, default=0.0),
        mean_relative_rms=sum(losses) / len(losses) if losses else 0.0,
        engram_relative_rms=max((r.relative_rms for r in tables), default=0.0),
        engram_relative_rms_in_use=max((r.relative_rms_in_use for r in tables), default=0.0),
        seconds=time.monotonic() - started,
        peak_rss_bytes=peak_rss_bytes(),
    )
