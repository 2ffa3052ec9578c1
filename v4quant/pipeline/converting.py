"""The conversions of a run: side by side, so that the source is read once for all of them.

Targets that go to a repository share the disk meanwhile. Where `--disk-cap` is too little for all
at once, or a repository's shards cannot stay on this disk, they are made one after the other.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

from v4quant.conversion.job import JobResult, Request, run_jobs
from v4quant.conversion.output_folder import as_begun, holds_anothers
from v4quant.conversion.overwrite import replacing
from v4quant.conversion.plan import Plan, make_plan
from v4quant.conversion.workers import fit_workers
from v4quant.hub.shard_cache import DiskCapError
from v4quant.pipeline.job import Job, Target
from v4quant.publishing.card import CardRequest
from v4quant.publishing.hub_folders import open_delivery, share_cap
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.checkpoint import Checkpoint


@dataclass(frozen=True)
class Converted:
    """cap: bytes of disk for the output's files when all targets are read side by side."""

    result: JobResult
    cap: int


def convert_all(
    job: Job,
    targets: Sequence[Target],
    source: Checkpoint,
    evidence: Sequence[tuple[Evidence | None, str]],
    workers: int | None,
    disk: int | None,
) -> list[Converted]:
    """Convert to every target. Raises what planning, writing and delivering raise."""
    threads = workers or os.cpu_count() or 1
    plans = [
        replace(make_plan(source, target.recipe, digest), device=job.limits.device)
        for target, (_, digest) in zip(targets, evidence, strict=True)
    ]
    wanted = [_Wanted(t, p, e) for t, p, (e, _) in zip(targets, plans, evidence, strict=True)]
    together = len(wanted) > 1 and _may_share(job, wanted, disk)
    groups = [wanted] if together else [[one] for one in wanted]
    done = []
    for group in groups:
        shares = [one.share(job, disk, len(group)) for one in group]
        results = _convert(job, group, shares, threads)
        for one, share, result in zip(group, shares, results, strict=True):
            # Without a cap each has room for its largest file.
            least = 0 if disk is not None else max(s.nbytes for s in one.plan.shards)
            done.append(Converted(result, max(share * len(group) // len(wanted), least)))
    return done


@dataclass(frozen=True)
class _Wanted:
    target: Target
    plan: Plan
    stats: Evidence | None

    def share(self, job: Job, disk: int | None, sharers: int) -> int:
        """Its part of the disk cap. Raises DiskCapError."""
        work = self.target.folder if self.target.repo else None
        return share_cap(self.plan, disk, work, sharers, job.kept_source)


def _may_share(job: Job, wanted: Sequence[_Wanted], disk: int | None) -> bool:
    """Whether the source stays where it is and the disk holds what goes to repositories."""
    if wanted[0].plan.checkpoint.origin is not None and not job.kept_source:
        return False
    try:
        for one in wanted:
            one.share(job, disk, len(wanted))
    except DiskCapError:
        return False
    return True


def _convert(
    job: Job, group: Sequence[_Wanted], shares: Sequence[int], threads: int
) -> list[JobResult]:
    recipes = [one.target.recipe for one in group]
    what = ", ".join(f"{recipe.scheme} ({recipe.format})" for recipe in recipes)
    beside = ", side by side from one read of the source" if len(group) > 1 else ""
    job.watcher.step(f"Quantize to {what}{beside}")
    threads = min(fit_workers(one.plan, threads, job.limits.max_memory) for one in group)
    with ExitStack() as stack:
        requests = [
            _request(job, one, share, stack) for one, share in zip(group, shares, strict=True)
        ]
        results = run_jobs(requests, threads, job.progress)
    named = [
        replace(result, output=str(one.target.folder))
        for one, result in zip(group, results, strict=True)
    ]
    for result in named:
        job.watcher.converted(result)
    return named


def _request(job: Job, one: _Wanted, share: int, stack: ExitStack) -> Request:
    """Where the job is done, and where its shards go; `stack` puts the result in its place."""
    target, plan = one.target, one.plan
    replaces = job.overwrite and not target.repo and holds_anothers(plan, target.folder)
    place = stack.enter_context(replacing(target.folder, replaces, request=plan.digest))
    plan = as_begun(plan, place)
    if not target.repo:
        return Request(plan, place, one.stats)
    card = CardRequest(target.repo)
    delivery = open_delivery(target.repo, place, plan, share, True, card)
    stack.callback(delivery.stop)
    return Request(plan, place, one.stats, delivery)
