"""run: the whole job of a run file, each step through the same function as its own command."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from v4quant.api.arguments import (
    PathLike,
    Size,
    forward_options,
    output_of,
    path_of,
    size_of,
    source_of,
    tool_facts,
)
from v4quant.conversion.output_folder import check_folder
from v4quant.conversion.overwrite import refuse_others, tidy
from v4quant.conversion.plan import make_plan
from v4quant.devices import arithmetic_threads, find_device
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant.evaluation.report import write_report
from v4quant.evaluation.result import Evaluation, evaluation_from_dict
from v4quant.existing import NewFiles, report_file, statistics_file
from v4quant.hub.refs import HubRef, parse_hub
from v4quant.outputs import refuse_inputs
from v4quant.own_folders import (
    is_made_home,
    make_home,
    own_folder,
    remove_own_folder,
)
from v4quant.pipeline.calibrating import calibrate_all
from v4quant.pipeline.checking import check_all
from v4quant.pipeline.converting import convert_all
from v4quant.pipeline.costs import expected_costs, with_effort
from v4quant.pipeline.job import ALONE, STATS_NAME, Job, Target, corpus_of, key_of
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline, load_pipeline
from v4quant.pipeline.results import Conversion, RunResult, RunWatcher, SilentWatcher
from v4quant.pipeline.step_cache import RECORD_NAME, FinishedSteps
from v4quant.planner.choices import Effort
from v4quant.planner.footprint import Outline, footprint, outline_checkpoint
from v4quant.progress import default_progress
from v4quant.publishing.card import CardRequest
from v4quant.publishing.card_ladder import Sibling
from v4quant.publishing.hub_folders import keep_source, update_card
from v4quant.publishing.serving import serve_command
from v4quant.source import Source, open_source
from v4quant_calibration.solve.solution import Evidence, Solution
from v4quant_calibration.statistics.coverage import coverage
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.json_object import read_json_object
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_kernels.progress import Progress

_MAX_EVALUATION_BYTES = 2**26
_REPORTS = ("report.html", "report.md")
_SOURCE, _CANDIDATE = "source", "candidate"


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
    overwrite: bool = False,
    progress: Progress | None = None,
    watcher: RunWatcher | None = None,
) -> RunResult:
    """Calibrate, quantize, verify and evaluate as a run file, or the preset `demo`, says.

    model: which built-in model a preset is run on, "v4" or "v41".

    Results go to `out`: the checkpoint in `checkpoint/` (of a ladder, each in a folder of its
    name), statistics, evaluation and report beside it. effort: choose the solver and the text to
    calibrate on by how long they may take, instead of what the file says; a conversion whose solver
    the file does not name is solved where this machine does it within a day. The same call again
    resumes, and repeats nothing that is done except verification. overwrite: a solution or
    conversion that v4quant made of something else is replaced, each when the new one is whole;
    what still answers is reused. workers: threads of the
    conversion. threads: of passes and solvers.

    Raises RecipeError for what the file asks, and what the steps raise.
    """
    started = time.monotonic()
    pipeline = load_pipeline(recipe, model)
    folder = output_of(out) if out is not None else Path(f"v4quant-{Path(recipe).stem}")
    limits = Resources(size_of(max_memory), None, find_device(device), folder)
    job = Job(folder, limits, default_progress(progress), watcher or SilentWatcher(), overwrite)
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
        made = [_may_be_made(t, source, overwrite and not t.repo) for t in targets]
        _refuse_files(job, pipeline)
        for line in expected_costs(pipeline, outline, cores):
            job.watcher.note(line)
        if disk is None:
            job = replace(job, kept_source=_keep_source(job, pipeline, source, outline))
        evidence = calibrate_all(job, pipeline, targets, source)
        converted = convert_all(job, targets, source, evidence, workers, disk)
        done = []
        checked = check_all(job, pipeline.verify, targets, source, made)
        for target, one, (verified, place) in zip(targets, converted, checked, strict=True):
            path = place.repo if isinstance(place, HubRef) else str(place)
            layout, model = target.recipe.layout, one.result.first_file
            serve = serve_command(layout, path, model, isinstance(place, HubRef))
            done.append((place, Conversion(target.name, str(place), one.result, verified, serve)))
        found = None
        if pipeline.evaluate is not None:
            places = [place for place, _ in done]
            caps = [one.cap for one in converted]
            found = _evaluate_all(job, pipeline.evaluate, source, places, evidence, caps)
            _update_cards(places, found)
    for name in (_SOURCE, *(_candidate_folder(i) for i in range(len(done)))):
        remove_own_folder(folder, name)
    first = done[0][1]
    return RunResult(
        first.checkpoint, str(folder), first.conversion, found,
        all(one.verified for _, one in done), first.serve, time.monotonic() - started,
        tuple(one for _, one in done) if pipeline.is_ladder else (),
    )  # fmt: skip


def _keep_source(job: Job, pipeline: Pipeline, source: Checkpoint, outline: Outline) -> int:
    """Let a repository's shards stay for all passes over them, if the disk has room; how many
    bytes, else 0."""
    if source.origin is None:
        return 0
    beside = sum(footprint(outline, rung.recipe).total for rung in pipeline.rungs)
    kept, size = keep_source(source, beside), f"{source.file_bytes / 1e9:.1f} GB"
    job.watcher.note(
        f"the source's {size} are fetched once and stay here until the run ends"
        if kept
        else f"this disk has no room for the source's {size} beside the results, so every step "
        "fetches it again"
    )
    return kept


def _refuse_files(job: Job, pipeline: Pipeline) -> None:
    """Refuse files of others under the names of results, where no run has been; begin the record.

    Raises OutputError.
    """
    if not (job.folder / RECORD_NAME).is_file():
        names = ("evaluation.json", *_REPORTS) if pipeline.evaluate is not None else ()
        files = [report_file(job.folder / name) for name in names]
        stats = [statistics_file(job.folder / STATS_NAME)] if pipeline.calibrate else []
        NewFiles([*files, *stats], job.overwrite)
    FinishedSteps(job.folder).begin()


def _cores(workers: int | None) -> int:
    return workers or os.cpu_count() or 1


def _candidate_folder(index: int) -> str:
    return f"{_CANDIDATE}-{index}" if index else _CANDIDATE


def _targets(pipeline: Pipeline, folder: Path) -> list[Target]:
    """Where every conversion goes: `checkpoint` alone, in a ladder a folder by its name each."""
    repo = parse_hub(pipeline.target).repo if pipeline.target else ""
    if not pipeline.is_ladder:
        return [Target(ALONE, pipeline.recipe, folder / ALONE, folder / "solution", repo)]
    return [
        Target(
            rung.name, rung.recipe, folder / rung.name, folder / f"solution-{rung.name}",
            f"{repo}-{rung.name}" if repo else "",
        )
        for rung in pipeline.rungs
    ]  # fmt: skip


def _may_be_made(target: Target, source: Checkpoint, overwrite: bool) -> bool:
    """Plan the conversion and check its folder; whether this run made the folder.

    What cannot be planned or written is not calibrated first.
    """
    make_plan(source, target.recipe)
    if overwrite:
        tidy(target.folder)
        refuse_others(target.folder)
        if not target.folder.exists():
            make_home(target.folder)
    elif not (target.folder / (target.recipe.layout.index or MANIFEST_NAME)).exists():
        check_folder(target.folder)
    return is_made_home(target.folder)


def _evaluate_all(
    job: Job,
    step: CorpusStep,
    source: Checkpoint,
    places: Sequence[Source],
    evidence: Sequence[tuple[Evidence | None, str]],
    caps: Sequence[int],
) -> Evaluation:
    """All conversions beside the source, in one pass; the first one's figures, others beside."""
    job.watcher.step("Evaluate: perplexity and KL against the source, with a noise floor")
    file, done = job.folder / "evaluation.json", FinishedSteps(job.folder)
    with ExitStack() as opened:
        candidates = []
        for index, (place, cap) in enumerate(zip(places, caps, strict=True)):
            hub = isinstance(place, HubRef)
            near = own_folder(job.folder, _candidate_folder(index)) if hub else None
            candidates.append(opened.enter_context(open_source(place, near, cap)))
        digests = [d for c, (_, moments) in zip(candidates, evidence, strict=True)
                   for d in (c.digest(), moments)]  # fmt: skip
        key = key_of(step, source, *digests)
        if done.has(key, file):
            job.watcher.note(f"{file} is of these checkpoints, corpus and settings: reused")
            result = evaluation_from_dict(read_json_object(file, _MAX_EVALUATION_BYTES))
        else:
            figures = evaluate_checkpoint(
                candidates[0], source, corpus_of(step, source, job.limits.max_memory),
                forward_options(step.activations),
                job.progress, others=candidates[1:], resources=job.limits, until=opened,
            )  # fmt: skip
            if (stats := evidence[0][0]) is not None:
                seen = stats.stats if isinstance(stats, Solution) else stats
                figures["coverage"] = coverage(seen)
            result = evaluation_from_dict({"tool": tool_facts(), **figures})
            write_report(result, file)
            done.add(key, file)
    for name in _REPORTS:
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
