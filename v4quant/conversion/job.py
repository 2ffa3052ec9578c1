"""Job: a Plan being carried out, safe against kill, full disks and changing sources.

Shards are written one after the other (shard_writing.py). A shard counts once it is renamed and
journaled; the index is written last and makes the folder a checkpoint. The same plan gives the same
bytes whatever the number of workers or interruptions, because every unit is computed alone, in
fixed pieces.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from v4quant.conversion.delivery import Delivery, LocalDelivery
from v4quant.conversion.finish import finish_folder, travelling_sidecars
from v4quant.conversion.journal import (
    Journal,
    ShardFacts,
    begun_plan,
    begun_stem,
    journal_files,
    locked_output,
    refuse_survivors,
    remove_work,
)
from v4quant.conversion.plan import Plan, under_stem
from v4quant.conversion.ranks import Ranks
from v4quant.conversion.records import TensorRecord, record_from_dict
from v4quant.conversion.shard_writing import write_shards
from v4quant.conversion.size_by_role import warn_of_growth
from v4quant.conversion.words import warn_of_lost_words
from v4quant.own_folders import FOLDER, make_home
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.errors import OutputError
from v4quant_formats.manifest import (
    MANIFEST_NAME,
)
from v4quant_formats.shards import (
    remove_leftovers,
)
from v4quant_formats.system import peak_rss_bytes
from v4quant_kernels.progress import Progress, SilentProgress


@dataclass(frozen=True)
class JobResult:
    """What `quantize` reports (`--json`).

    first_file: of the output's shards; for GGUF the one that llama.cpp is given.
    engram_relative_rms: of the worst of V4.1's tables; _in_use: with every row weighted by how
    often the calibration text used it, 0 where that is not known.
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


def run_job(
    plan: Plan,
    out: Path,
    stats: Evidence | None = None,
    workers: int = 2,
    progress: Progress | None = None,
    ranks: Ranks | None = None,
    delivery: Delivery | None = None,
) -> JobResult:
    """Carry a plan out into folder `out`; the same call again resumes or confirms.

    With several ranks each calls this with the same plan and folder, and writes its share. With a
    `delivery` the shards leave `out` as they are finished. Raises OutputError (not empty, locked,
    full, not writable), what `convert_unit` raises and what the delivery raises.
    """
    started = time.monotonic()
    progress = progress or SilentProgress()
    delivery = delivery or LocalDelivery()
    ranks = ranks or Ranks()
    with ExitStack() as stack:
        stack.callback(delivery.stop)
        complete = _enter(plan, out, delivery, ranks, stack)
        if complete is not None:
            if ranks.is_first:
                # Left when the run that finished was killed between its last two steps.
                remove_work(out)
            return _result(plan, out, complete, started)
        if ranks.is_first:
            warn_of_growth(plan)
            warn_of_lost_words(plan)
        sidecars = travelling_sidecars(plan, stats)
        facts = {s.file: ShardFacts(s.nbytes, s.recorded) for s in plan.shards}
        journal = Journal(out, plan.digest, facts, ranks.run, ranks.rank, delivery.has, plan.stem)
        if ranks.is_first:
            small = ("config.json", plan.recipe.layout.index or MANIFEST_NAME, MANIFEST_NAME)
            remove_leftovers(out, [*facts, *(s.name for s in sidecars), *small])
        _check_earlier(journal, ranks, workers, progress)
        todo = [s for s in plan.shards if s.file not in journal.finished]
        _check_space(out, delivery.space([s.nbytes for s in todo]))
        # Every rank divides the same list: nobody may finish a shard before all have read it.
        ranks.barrier()
        if ranks.is_first:
            for shard in todo:  # renamed but not journaled when the run was killed: made again
                (out / shard.file).unlink(missing_ok=True)
            _deliver_again(out, journal, delivery)
        ranks.barrier(delivery.check)  # what lay here before is within rank 0's share of the disk
        write_shards(plan, ranks.share(todo), out, stats, workers, journal, delivery, progress)
        delivery.settle()
        ranks.barrier(delivery.check)
        delivery.look()
        journal.refresh()
        shards = [journal.finished[s.file] for s in plan.shards]
        ranks.barrier(delivery.check)  # the journals go below, when all have read them
        if ranks.is_first:
            delivery.finish(out, finish_folder(plan, out, shards, sidecars, stats))
            journal.remove()
        ranks.barrier()
    return _result(plan, out, [r for s in shards for r in s.records], started)


def as_begun(plan: Plan, out: Path) -> Plan:
    """The plan under the names that this conversion has in `out`, if it was begun there.

    Its source may have been moved or renamed since. Raises OutputError for a damaged journal.
    """
    if not plan.stem:
        return plan
    stem = begun_stem(out, plan.recipe.scheme)
    if stem is None and (found := LocalDelivery().manifest(out)) is not None:
        tail = plan.shards[0].file.removeprefix(plan.stem)
        if found.get("plan") == plan.digest:
            stem = str(found["files"][0]["name"]).removesuffix(tail)
    return under_stem(plan, stem) if stem else plan


def _enter(
    plan: Plan, out: Path, delivery: Delivery, ranks: Ranks, stack: ExitStack
) -> list[TensorRecord] | None:
    """Lock the folder for all ranks; the records of a checkpoint that is already whole.

    The folder is looked at before anything is made in it, and again when nobody else can change it.
    """
    if ranks.is_first:
        _complete(plan, out, delivery)
        stack.enter_context(locked_output(out))
        refuse_survivors(out)
    ranks.barrier()
    if not ranks.is_first:
        stack.enter_context(locked_output(out, ranks.rank))
    complete = _complete(plan, out, delivery)
    # Nobody changes the folder before all have looked.
    ranks.barrier()
    return complete


def _complete(plan: Plan, out: Path, delivery: Delivery) -> list[TensorRecord] | None:
    """The records of a checkpoint that this plan made. Raises OutputError for another's folder."""
    found = None if journal_files(out) else delivery.manifest(out)
    if found is not None and found.get("plan") == plan.digest:
        return [record_from_dict(row) for row in found["tensors"]]
    check_folder(out)
    return None


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


def holds_anothers(plan: Plan, out: Path) -> bool:
    """Whether there is something in a folder that is not this plan's, finished or begun.

    Raises OutputError and what reading a manifest raises.
    """
    if not out.is_dir():
        return out.exists()
    if journal_files(out):
        return begun_plan(out) != plan.digest
    found = LocalDelivery().manifest(out)
    return any(out.iterdir()) if found is None else found.get("plan") != plan.digest


def holds_own(plan: Plan, out: Path) -> bool:
    """Whether a folder holds this plan's conversion, finished or begun."""
    return out.is_dir() and any(out.iterdir()) and not holds_anothers(plan, out)


def check_folder(out: Path) -> None:
    """Create the output folder, or see that it is empty or has work to resume.

    Raises OutputError.
    """
    if not out.exists():
        make_home(out)
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder")
    entries = list(out.iterdir())
    for path in entries:
        if path.is_symlink():
            raise OutputError(
                f"{path}: is a symbolic link, which no conversion makes; choose another folder"
            )
    foreign = [p.name for p in entries if p.name != FOLDER]
    if foreign and not journal_files(out):
        raise OutputError(
            f"{out}: folder is not empty ({sorted(foreign)[0]}, ...) and holds no unfinished "
            "conversion to resume; choose a new folder (--overwrite replaces what v4quant made)"
        )


def _check_space(out: Path, needed: int) -> None:
    free = shutil.disk_usage(out).free
    if needed > free:
        raise OutputError(
            f"{out}: needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on this "
            "disk; free space or choose another folder"
        )


def _deliver_again(out: Path, journal: Journal, delivery: Delivery) -> None:
    """Hand over what an earlier run finished but could not deliver."""
    for shard in journal.finished.values():
        if (out / shard.file.name).exists():
            delivery.make_room(shard.file.nbytes)
            delivery.take(shard.file)


def _result(plan: Plan, out: Path, records: list[TensorRecord], started: float) -> JobResult:
    kinds = Counter("copied" if r.disposition == "copied" else r.exact for r in records)
    losses = [r.relative_rms for r in records if not r.exact]
    tables = [r for r in records if r.module.endswith(".engram.embed")]
    return JobResult(
        output=os.fspath(out),
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
