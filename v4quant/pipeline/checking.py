"""The third step of a run: verify all conversions, from one read of the source."""

from __future__ import annotations

from collections.abc import Sequence

from v4quant.checks.kernel_check import check_kernels
from v4quant.checks.verify import VerifyResult, verify_all
from v4quant.hub.refs import HubRef
from v4quant.own_folders import remove_if_empty
from v4quant.pipeline.job import ALONE, Job, Target
from v4quant.pipeline.recipe_file import VerifyStep
from v4quant.source import Source, open_source
from v4quant_formats.checkpoint import Checkpoint


def check_all(
    job: Job,
    step: VerifyStep | None,
    targets: Sequence[Target],
    source: Checkpoint,
    made: Sequence[bool],
) -> list[tuple[bool, Source]]:
    """Of every target whether all holds, and where the checkpoint is.

    A repository was checked by its digests. made: whether this run made the target's folder.
    """
    here = [target for target in targets if not target.repo]
    results = dict[str, VerifyResult]()
    if step is not None and here:
        job.watcher.step("Verify: hashes, every value against the source, kernels on real tensors")
        original = source if step.source else None
        found = verify_all([target.folder for target in here], original, job.progress)
        results = {target.name: one for target, one in zip(here, found, strict=True)}
    checked: list[tuple[bool, Source]] = []
    for target, is_ours in zip(targets, made, strict=True):
        if target.repo:
            checked.append((True, _published(job, target, is_ours)))
        else:
            checked.append((_holds(job, step, target, results.get(target.name)), target.folder))
    return checked


def _published(job: Job, target: Target, made: bool) -> Source:
    if made:
        remove_if_empty(target.folder)
    place = HubRef(target.repo)
    job.watcher.note(f"{place} holds every file with the digest the manifest says")
    return place


def _holds(job: Job, step: VerifyStep | None, target: Target, result: VerifyResult | None) -> bool:
    """Tell what was found; False when something differs."""
    if step is None or result is None:
        return True
    name = "" if target.name == ALONE else f"{target.name}: "
    for finding in result.findings:
        job.watcher.note(f"{name}{finding.where}: {finding.problem}")
    if not result.findings:
        job.watcher.note(
            f"{name}{result.files} files and {result.modules} modules are as the manifest says; "
            f"{result.exact} hold exactly the source's values"
        )
    checks = []
    if step.kernels:
        with open_source(target.folder) as output:
            checks = check_kernels(output, job.progress)
    for check in checks:
        verdict = "ok" if check.ok else "DIFFERS"
        job.watcher.note(
            f"{name}kernel {check.name} on {check.scheme}: error {check.max_abs_error:.2e} within "
            f"{check.bound:.2e}: {verdict}"
        )
    return not result.findings and all(c.ok for c in checks)
