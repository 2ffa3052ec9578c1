"""run: the whole job of a run file, each step through the same function as its own command."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from v4quant.api.arguments import (
    PathLike,
    Size,
    config_of,
    forward_options,
    read_corpus,
    size_of,
    source_of,
    tool_facts,
)
from v4quant.builtin import resolve_corpus
from v4quant.calibration.collect import calibrate_to, draw_corpus, solve_settings
from v4quant.checks.kernel_check import check_kernels
from v4quant.checks.verify import verify as verify_checkpoint
from v4quant.conversion.calibrated import read_evidence, solved_part
from v4quant.conversion.job import JobResult, check_folder, run_job
from v4quant.conversion.plan import make_plan
from v4quant.conversion.workers import fit_workers
from v4quant.devices import arithmetic_threads, find_device
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant.evaluation.report import write_report
from v4quant.evaluation.result import Evaluation, evaluation_from_dict
from v4quant.hub.refs import HubRef, parse_hub
from v4quant.own_folders import is_made_home, own_folder, remove_if_empty, remove_own_folder
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline, VerifyStep, load_pipeline
from v4quant.pipeline.step_cache import FinishedSteps, step_key
from v4quant.progress import default_progress
from v4quant.publishing.card import CardRequest
from v4quant.publishing.hub_folders import open_target, share_cap, update_card
from v4quant.source import Source, open_source
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.solve.solution import SOLUTION_NAME, Evidence, Solution
from v4quant_calibration.statistics.coverage import coverage
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_kernels.progress import Progress

_SOURCE, _CANDIDATE = "source", "candidate"


class RunWatcher(Protocol):
    """Who is told what happens, beside the bars of `Progress`."""

    def step(self, title: str) -> None:
        """A step begins."""

    def note(self, text: str) -> None:
        """Something worth knowing about the step."""

    def calibrated(self, stats: Stats) -> None:
        """Statistics have been collected."""

    def converted(self, job: JobResult) -> None:
        """The conversion is done."""


class SilentWatcher:
    """A watcher that ignores everything."""

    def step(self, title: str) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""

    def calibrated(self, stats: Stats) -> None:
        """Ignore."""

    def converted(self, job: JobResult) -> None:
        """Ignore."""


@dataclass(frozen=True)
class RunResult:
    """checkpoint: the folder or `hf://` name. folder: everything else. evaluation: None where the
    file asks for none. serve: a command line. verified: False when verification found a difference.
    """

    checkpoint: str
    folder: str
    conversion: JobResult
    evaluation: Evaluation | None
    verified: bool
    serve: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether verification held and no candidate looks damaged."""
        return self.verified and not (self.evaluation and self.evaluation.is_damaged)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints."""
        return {
            "conversion": asdict(self.conversion),
            "evaluation": self.evaluation and self.evaluation.as_dict(),
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    folder: Path
    limits: Resources
    progress: Progress
    watcher: RunWatcher


def run(
    recipe: str,
    *,
    out: PathLike | None = None,
    workers: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: Size = None,
    disk_cap: Size = None,
    progress: Progress | None = None,
    watcher: RunWatcher | None = None,
) -> RunResult:
    """Calibrate, quantize, verify and evaluate as a run file, or the preset `demo`, says.

    Results go to `out`: the checkpoint in `checkpoint/`, statistics, evaluation and report beside
    it. The same call again resumes, and repeats nothing that is done but verification. workers:
    threads of the conversion. threads: of passes and solvers.

    Raises RecipeError for what the file asks, and what the steps raise.
    """
    started = time.monotonic()
    pipeline = load_pipeline(recipe)
    folder = Path(out) if out is not None else Path(f"v4quant-{Path(recipe).stem}")
    limits = Resources(size_of(max_memory), None, find_device(device))
    job = _Run(folder, limits, default_progress(progress), watcher or SilentWatcher())
    disk, where = size_of(disk_cap), source_of(pipeline.source)
    scratch = own_folder(folder, _SOURCE) if isinstance(where, HubRef) else None
    with arithmetic_threads(threads), open_source(where, scratch, disk) as source:
        stats, digest, made = _calibrate_first(job, pipeline, source)
        converted, share = _convert(job, pipeline, source, stats, digest, workers, disk)
        verified, place = _check(job, pipeline, source, made)
        result = None
        if pipeline.evaluate is not None:
            near = own_folder(folder, _CANDIDATE) if isinstance(place, HubRef) else None
            with open_source(place, near, share) as candidate:
                result = _evaluate(job, pipeline.evaluate, source, candidate, stats, digest)
            if isinstance(place, HubRef):
                update_card(place.repo, CardRequest(place.repo, result))
    for name in (_SOURCE, _CANDIDATE):
        remove_own_folder(folder, name)
    path = place.repo if isinstance(place, HubRef) else str(place)
    serve = pipeline.recipe.layout.serve.format(path=path)
    seconds = time.monotonic() - started
    found = None if result is None else evaluation_from_dict(result)
    return RunResult(str(place), str(folder), converted, found, verified, serve, seconds)


def _calibrate_first(
    job: _Run, pipeline: Pipeline, source: Checkpoint
) -> tuple[Evidence | None, str, bool]:
    """Statistics and their digest; whether this run made the output folder.

    What cannot be planned or written is not calibrated first.
    """
    target = job.folder / "checkpoint"
    make_plan(source, pipeline.recipe)
    if not (target / (pipeline.recipe.layout.index or MANIFEST_NAME)).exists():
        check_folder(target)
    made = is_made_home(target)
    return *_calibrate(job, pipeline, source), made


def _calibrate(job: _Run, pipeline: Pipeline, source: Checkpoint) -> tuple[Evidence | None, str]:
    step, recipe = pipeline.calibrate, pipeline.recipe
    if step is None:
        return read_evidence(source, None, recipe)
    solves = recipe.solver == "gptq"
    job.watcher.step("Calibrate: what every expert's inputs look like")
    out = job.folder / ("solution" if solves else "stats.v4q")
    file, done = out / SOLUTION_NAME if solves else out, FinishedSteps(job.folder)
    solved_for = (json.dumps(solved_part(recipe)),) if solves else ()
    key = _step_key(step, source, *solved_for)
    if done.has(key, file):
        job.watcher.note(f"{out} is of this checkpoint, corpus and settings: reused")
        return read_evidence(source, out, recipe)
    config = config_of(source)

    def load(tokens: int | None) -> Corpus:
        return _corpus(replace(step, tokens=tokens), source)

    corpus = draw_corpus(load, step.tokens)
    job.watcher.note(f"{sum(map(len, corpus.windows)):,} tokens in {len(corpus.windows)} windows")
    settings = solve_settings(source, recipe) if solves else None
    found = calibrate_to(
        source, config, corpus, forward_options(step.activations), step.min_tokens, settings, out,
        job.progress, job.limits.max_memory, job.limits.device,
    )  # fmt: skip
    done.add(key, file)
    job.watcher.calibrated(found.stats)
    return read_evidence(source, out, recipe)


def _convert(
    job: _Run,
    pipeline: Pipeline,
    source: Checkpoint,
    stats: Evidence | None,
    digest: str,
    workers: int | None,
    disk: int | None,
) -> tuple[JobResult, int]:
    """The conversion's result, and the output's share of the disk cap."""
    recipe, target = pipeline.recipe, job.folder / "checkpoint"
    plan = replace(make_plan(source, recipe, digest), device=job.limits.device)
    job.watcher.step(f"Quantize to {recipe.scheme} ({recipe.format})")
    threads = fit_workers(plan, workers or os.cpu_count() or 1, job.limits.max_memory)
    repo = parse_hub(pipeline.target).repo if pipeline.target else None
    share, delivery = share_cap(plan, disk, target if repo is not None else None), None
    if repo is not None:
        delivery = open_target(repo, target, plan, share, True, CardRequest(repo))
    result = run_job(plan, target, stats, threads, job.progress, delivery=delivery)
    job.watcher.converted(result)
    return result, share


def _check(job: _Run, pipeline: Pipeline, source: Checkpoint, made: bool) -> tuple[bool, Source]:
    """Whether all holds, and where the checkpoint is. A repository was checked by its digests."""
    target = job.folder / "checkpoint"
    if not pipeline.target:
        return _verify(job, pipeline.verify, source), target
    if made:
        remove_if_empty(target)
    place = HubRef(parse_hub(pipeline.target).repo)
    job.watcher.note(f"{place} holds every file with the digest the manifest says")
    return True, place


def _verify(job: _Run, step: VerifyStep | None, source: Checkpoint) -> bool:
    """Verify; False when something differs."""
    if step is None:
        return True
    job.watcher.step("Verify: hashes, every value against the source, kernels on real tensors")
    target = job.folder / "checkpoint"
    result = verify_checkpoint(target, source if step.source else None, job.progress)
    for finding in result.findings:
        job.watcher.note(f"{finding.where}: {finding.problem}")
    if not result.findings:
        job.watcher.note(
            f"{result.files} files and {result.modules} modules are as the manifest says; "
            f"{result.exact} hold exactly the source's values"
        )
    checks = []
    if step.kernels:
        with open_source(target) as output:
            checks = check_kernels(output, job.progress)
    for check in checks:
        verdict = "ok" if check.ok else "DIFFERS"
        job.watcher.note(
            f"kernel {check.name} on {check.scheme}: error {check.max_abs_error:.2e} within "
            f"{check.bound:.2e}: {verdict}"
        )
    return not result.findings and all(c.ok for c in checks)


def _evaluate(
    job: _Run,
    step: CorpusStep,
    source: Checkpoint,
    candidate: Checkpoint,
    stats: Evidence | None,
    moments: str,
) -> dict[str, Any]:
    job.watcher.step("Evaluate: perplexity and KL against the source, with a noise floor")
    file, done = job.folder / "evaluation.json", FinishedSteps(job.folder)
    key = _step_key(step, source, candidate.digest(), moments)
    if done.has(key, file):
        job.watcher.note(f"{file} is of these checkpoints, corpus and settings: reused")
        result: dict[str, Any] = json.loads(file.read_bytes())
    else:
        figures = evaluate_checkpoint(
            candidate, source, _corpus(step, source), forward_options(step.activations),
            job.progress, resources=job.limits,
        )  # fmt: skip
        result = {"tool": tool_facts(), **figures}
        if stats is not None:
            result["coverage"] = coverage(stats.stats if isinstance(stats, Solution) else stats)
        write_report(result, file)
        done.add(key, file)
    for name in ("report.html", "report.md"):
        write_report(result, job.folder / name)
    return result


def _corpus(step: CorpusStep, source: Checkpoint) -> Corpus:
    config = config_of(source)
    return read_corpus(step.corpus, source, config, step.seq_len, step.tokens, step.mode)


def _step_key(step: CorpusStep, source: Checkpoint, *digests: str) -> str:
    files = [*resolve_corpus(list(step.corpus)), source.path / "tokenizer.json"]
    return step_key(step, files, source.digest(), *digests)
