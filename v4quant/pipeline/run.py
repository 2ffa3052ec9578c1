"""run: the whole job of a run file, each step through the same function as its own command."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from v4quant.api.arguments import (
    PathLike,
    Size,
    config_of,
    forward_options,
    path_of,
    read_corpus,
    size_of,
    source_of,
    tool_facts,
)
from v4quant.builtin import resolve_corpus
from v4quant.calibration.collect import (
    calibrate_to,
    draw_corpus,
    reserve_of,
    solve_settings,
    solve_several_to,
)
from v4quant.calibration.provenance import provenance_of
from v4quant.checks.kernel_check import check_kernels
from v4quant.checks.verify import verify as verify_checkpoint
from v4quant.conversion.calibrated import load_calibrated, solved_part
from v4quant.conversion.job import JobResult, as_begun, check_folder, run_job
from v4quant.conversion.plan import make_plan
from v4quant.conversion.workers import fit_workers
from v4quant.devices import arithmetic_threads, find_device
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant.evaluation.report import write_report
from v4quant.evaluation.result import Evaluation, evaluation_from_dict
from v4quant.hub.refs import HubRef, parse_hub
from v4quant.outputs import refuse_inputs
from v4quant.own_folders import is_made_home, own_folder, remove_if_empty, remove_own_folder
from v4quant.pipeline.costs import expected_costs, with_effort
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline, VerifyStep, load_pipeline
from v4quant.pipeline.results import Conversion, RunResult, RunWatcher, SilentWatcher
from v4quant.pipeline.step_cache import FinishedSteps, step_key
from v4quant.planner.choices import Effort
from v4quant.planner.footprint import outline_checkpoint
from v4quant.progress import default_progress
from v4quant.publishing.card import CardRequest, Sibling
from v4quant.publishing.hub_folders import open_delivery, share_cap, update_card
from v4quant.recipe import Recipe
from v4quant.source import Source, open_source
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.solve.solution import SOLUTION_NAME, Evidence, Solution
from v4quant_calibration.solve.solve import SolveTarget
from v4quant_calibration.statistics.coverage import coverage
from v4quant_calibration.statistics.provenance import Provenance
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.sidecars import TOKENIZER, place_of
from v4quant_kernels.progress import Progress

_SOURCE, _CANDIDATE, _ALONE = "source", "candidate", "checkpoint"


@dataclass(frozen=True)
class _Run:
    """What all steps of a run share."""

    folder: Path
    limits: Resources
    progress: Progress
    watcher: RunWatcher


@dataclass(frozen=True)
class _Target:
    """A conversion and where its parts go. repo: "" for a folder."""

    name: str
    recipe: Recipe
    folder: Path
    solution: Path
    repo: str

    @property
    def solves(self) -> bool:
        """Whether calibration chooses its codes."""
        return self.recipe.solver == "gptq"


def run(
    recipe: str,
    *,
    model: str = "v4",
    out: PathLike | None = None,
    workers: int | None = None,
    device: str = "cpu",
    threads: int | None = None,
    max_memory: Size = None,
    disk_cap: Size = None,
    effort: Effort | None = None,
    progress: Progress | None = None,
    watcher: RunWatcher | None = None,
) -> RunResult:
    """Calibrate, quantize, verify and evaluate as a run file, or the preset `demo`, says.

    model: which built-in model a preset is run on, "v4" or "v41".

    Results go to `out`: the checkpoint in `checkpoint/` (of a ladder, each in a folder of its
    name), statistics, evaluation and report beside it. effort: choose the solver and the text to
    calibrate on by how long they may take, instead of what the file says; a conversion whose solver
    the file does not name is solved where this machine does it within a day. The same call again
    resumes, and repeats nothing that is done except verification. workers: threads of the
    conversion. threads: of passes and solvers.

    Raises RecipeError for what the file asks, and what the steps raise.
    """
    started = time.monotonic()
    pipeline = load_pipeline(recipe, model)
    folder = Path(out) if out is not None else Path(f"v4quant-{Path(recipe).stem}")
    limits = Resources(size_of(max_memory), None, find_device(device), folder)
    job = _Run(folder, limits, default_progress(progress), watcher or SilentWatcher())
    disk, where = size_of(disk_cap), source_of(pipeline.source)
    scratch = own_folder(folder, _SOURCE) if isinstance(where, HubRef) else None
    words = path_of(pipeline.tokenizer or None)
    with (
        arithmetic_threads(threads),
        open_source(where, scratch, disk, tokenizer=words) as source,
    ):
        refuse_inputs((), [source], (), [folder])
        outline, cores = outline_checkpoint(source), _cores(workers)
        pipeline = with_effort(pipeline, outline, effort, cores)
        targets = _targets(pipeline, folder)
        made = {t.name: _may_be_made(t, source) for t in targets}
        for line in expected_costs(pipeline, outline, cores):
            job.watcher.note(line)
        evidence = _calibrate_all(job, pipeline, targets, source)
        done, shares = [], {}
        for target, (stats, digest) in zip(targets, evidence, strict=True):
            converted, shares[target.name] = _convert(
                job, target, source, stats, digest, workers, disk
            )
            verified, place = _check(job, pipeline.verify, target, source, made[target.name])
            path = place.repo if isinstance(place, HubRef) else str(place)
            serve = target.recipe.layout.serve.format(path=path, file=converted.first_file)
            done.append((place, Conversion(target.name, str(place), converted, verified, serve)))
        found = None
        if pipeline.evaluate is not None:
            places = [place for place, _ in done]
            cap = min(shares.values()) // len(targets)
            found = _evaluate_all(job, pipeline.evaluate, source, places, evidence, cap)
            _update_cards(places, found)
    for name in (_SOURCE, *(_candidate_folder(i) for i in range(len(done)))):
        remove_own_folder(folder, name)
    first = done[0][1]
    return RunResult(
        first.checkpoint, str(folder), first.conversion, found,
        all(one.verified for _, one in done), first.serve, time.monotonic() - started,
        tuple(one for _, one in done) if pipeline.is_ladder else (),
    )  # fmt: skip


def _cores(workers: int | None) -> int:
    return workers or os.cpu_count() or 1


def _candidate_folder(index: int) -> str:
    return f"{_CANDIDATE}-{index}" if index else _CANDIDATE


def _targets(pipeline: Pipeline, folder: Path) -> list[_Target]:
    """Where every conversion goes: `checkpoint` alone, in a ladder a folder by its name each."""
    repo = parse_hub(pipeline.target).repo if pipeline.target else ""
    if not pipeline.is_ladder:
        return [_Target(_ALONE, pipeline.recipe, folder / _ALONE, folder / "solution", repo)]
    return [
        _Target(
            rung.name, rung.recipe, folder / rung.name, folder / f"solution-{rung.name}",
            f"{repo}-{rung.name}" if repo else "",
        )
        for rung in pipeline.rungs
    ]  # fmt: skip


def _may_be_made(target: _Target, source: Checkpoint) -> bool:
    """Plan the conversion and check its folder; whether this run made the folder.

    What cannot be planned or written is not calibrated first.
    """
    make_plan(source, target.recipe)
    if not (target.folder / (target.recipe.layout.index or MANIFEST_NAME)).exists():
        check_folder(target.folder)
    return is_made_home(target.folder)


def _calibrate_all(
    job: _Run, pipeline: Pipeline, targets: Sequence[_Target], source: Checkpoint
) -> list[tuple[Evidence | None, str]]:
    """What is known of the text for every target: its own solution, or shared statistics.

    A solution holds the statistics of the same text, so a ladder with one needs no pass for others.
    """
    step = pipeline.calibrate
    if step is None:
        return [load_calibrated(source, None, target.recipe) for target in targets]
    solving = [t for t in targets if t.solves]
    shared = solving[0].solution if solving else job.folder / "stats.v4q"
    _calibrate(job, step, solving, source, shared)
    return [load_calibrated(source, t.solution if t.solves else shared, t.recipe) for t in targets]


def _calibrate(
    job: _Run, step: CorpusStep, solving: Sequence[_Target], source: Checkpoint, shared: Path
) -> None:
    """Solve every target that is to be solved, in one forward pass of the source; without any,
    write statistics to `shared`."""
    names = [t.name for t in solving if t.name != _ALONE]
    whose = f" for {', '.join(names)}" if names else ""
    job.watcher.step(f"Calibrate{whose}: what every expert's inputs look like")
    done = FinishedSteps(job.folder)
    steps = [
        (t.solution / SOLUTION_NAME, _step_key(step, source, json.dumps(solved_part(t.recipe))))
        for t in solving
    ] or [(shared, _step_key(step, source))]
    todo = [i for i, (file, key) in enumerate(steps) if not done.has(key, file)]
    for file, _ in (s for i, s in enumerate(steps) if i not in todo):
        whole = file.parent if solving else file
        job.watcher.note(f"{whole} is of this checkpoint, corpus and settings: reused")
    if not todo:
        return

    def load(tokens: int | None) -> Corpus:
        return _corpus(
            replace(step, tokens=tokens), source, job.limits.max_memory, reserve_of(step.tokens)
        )

    corpus = draw_corpus(load, step.tokens)
    job.watcher.note(f"{sum(map(len, corpus.windows)):,} tokens in {len(corpus.windows)} windows")
    if corpus.skipped_rows:
        job.watcher.note(f"{corpus.skipped_rows:,} of the rows read are unusable and were left out")
    forward = (source, config_of(source), corpus, forward_options(step.activations))
    where = (job.progress, job.limits.max_memory, job.limits.device)
    if solving:
        wanted = [
            SolveTarget(
                solve_settings(source, solving[i].recipe, step.propagate), solving[i].solution,
                _provenance(job, step, solving[i].recipe),
            )
            for i in todo
        ]  # fmt: skip
        found = solve_several_to(*forward, step.min_tokens, wanted, *where)
    else:
        made = _provenance(job, step, None)
        found = calibrate_to(*forward, step.min_tokens, None, shared, *where, provenance=made)
    for i in todo:
        file, key = steps[i]
        done.add(key, file)
    job.watcher.calibrated(found.stats)


def _provenance(job: _Run, step: CorpusStep, recipe: Recipe | None) -> Provenance:
    return provenance_of(
        step.corpus, recipe, step.propagate, tokens=step.tokens, seq_len=step.seq_len,
        mode=step.mode, chat_keys=step.chat_keys, skip_bad_rows=step.skip_bad_rows,
        activations=step.activations, min_tokens=step.min_tokens, device=job.limits.device.type,
    )  # fmt: skip


def _convert(
    job: _Run,
    target: _Target,
    source: Checkpoint,
    stats: Evidence | None,
    digest: str,
    workers: int | None,
    disk: int | None,
) -> tuple[JobResult, int]:
    """The conversion's result, and the output's share of the disk cap."""
    recipe = target.recipe
    plan = as_begun(make_plan(source, recipe, digest), target.folder)
    plan = replace(plan, device=job.limits.device)
    job.watcher.step(f"Quantize to {recipe.scheme} ({recipe.format})")
    threads = fit_workers(plan, _cores(workers), job.limits.max_memory)
    share, delivery = share_cap(plan, disk, target.folder if target.repo else None), None
    if target.repo:
        request = CardRequest(target.repo)
        delivery = open_delivery(target.repo, target.folder, plan, share, True, request)
    result = run_job(plan, target.folder, stats, threads, job.progress, delivery=delivery)
    job.watcher.converted(result)
    return result, share


def _check(
    job: _Run, step: VerifyStep | None, target: _Target, source: Checkpoint, made: bool
) -> tuple[bool, Source]:
    """Whether all holds, and where the checkpoint is. A repository was checked by its digests."""
    if not target.repo:
        return _verify(job, step, target, source), target.folder
    if made:
        remove_if_empty(target.folder)
    place = HubRef(target.repo)
    job.watcher.note(f"{place} holds every file with the digest the manifest says")
    return True, place


def _verify(job: _Run, step: VerifyStep | None, target: _Target, source: Checkpoint) -> bool:
    """Verify; False when something differs."""
    if step is None:
        return True
    job.watcher.step("Verify: hashes, every value against the source, kernels on real tensors")
    result = verify_checkpoint(target.folder, source if step.source else None, job.progress)
    for finding in result.findings:
        job.watcher.note(f"{finding.where}: {finding.problem}")
    if not result.findings:
        job.watcher.note(
            f"{result.files} files and {result.modules} modules are as the manifest says; "
            f"{result.exact} hold exactly the source's values"
        )
    checks = []
    if step.kernels:
        with open_source(target.folder) as output:
            checks = check_kernels(output, job.progress)
    for check in checks:
        verdict = "ok" if check.ok else "DIFFERS"
        job.watcher.note(
            f"kernel {check.name} on {check.scheme}: error {check.max_abs_error:.2e} within "
            f"{check.bound:.2e}: {verdict}"
        )
    return not result.findings and all(c.ok for c in checks)


def _evaluate_all(
    job: _Run,
    step: CorpusStep,
    source: Checkpoint,
    places: Sequence[Source],
    evidence: Sequence[tuple[Evidence | None, str]],
    cap: int,
) -> Evaluation:
    """All conversions beside the source, in one pass; the first one's figures, others beside."""
    job.watcher.step("Evaluate: perplexity and KL against the source, with a noise floor")
    file, done = job.folder / "evaluation.json", FinishedSteps(job.folder)
    with ExitStack() as opened:
        candidates = []
        for index, place in enumerate(places):
            hub = isinstance(place, HubRef)
            near = own_folder(job.folder, _candidate_folder(index)) if hub else None
            candidates.append(opened.enter_context(open_source(place, near, cap)))
        digests = [d for c, (_, moments) in zip(candidates, evidence, strict=True)
                   for d in (c.digest(), moments)]  # fmt: skip
        key = _step_key(step, source, *digests)
        if done.has(key, file):
            job.watcher.note(f"{file} is of these checkpoints, corpus and settings: reused")
            result = evaluation_from_dict(json.loads(file.read_bytes()))
        else:
            figures = evaluate_checkpoint(
                candidates[0], source, _corpus(step, source, job.limits.max_memory),
                forward_options(step.activations),
                job.progress, others=candidates[1:], resources=job.limits,
            )  # fmt: skip
            if (stats := evidence[0][0]) is not None:
                seen = stats.stats if isinstance(stats, Solution) else stats
                figures["coverage"] = coverage(seen)
            result = evaluation_from_dict({"tool": tool_facts(), **figures})
            write_report(result, file)
            done.add(key, file)
    for name in ("report.html", "report.md"):
        write_report(result, job.folder / name)
    return result


def _update_cards(places: Sequence[Source], found: Evaluation) -> None:
    """Every repository's card with its own figures, and its siblings'."""
    each = list(zip(places, found.figures.everyone, strict=True))
    siblings = tuple(
        Sibling(place.repo, one.candidate.scheme, int(one.candidate.bytes or 0),
                one.kl_mean or 0.0, one.top1_agreement or 0.0, one.verdict.grade)
        for place, one in each if isinstance(place, HubRef)
    )  # fmt: skip
    for place, one in each:
        if isinstance(place, HubRef):
            others = siblings if len(siblings) > 1 else ()
            update_card(place.repo, CardRequest(place.repo, one, siblings=others))


def _corpus(
    step: CorpusStep, source: Checkpoint, max_memory: int | None, enough: int | None = None
) -> Corpus:
    config = config_of(source)
    return read_corpus(
        step.corpus, source, config, step.seq_len, step.tokens, step.mode, step.chat_keys,
        step.skip_bad_rows, enough, max_memory,
    )  # fmt: skip


def _step_key(step: CorpusStep, source: Checkpoint, *digests: str) -> str:
    files = [*resolve_corpus(list(step.corpus)), place_of(source, TOKENIZER)]
    return step_key(step, files, source.digest(), *digests)
