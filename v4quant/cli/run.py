"""`v4quant run`: the whole pipeline, each step through the same function as its own command."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from v4quant.builtin import resolve_corpus
from v4quant.calibration.collect import calibrate_to, draw_corpus, solve_settings
from v4quant.checks.kernel_check import check_kernels
from v4quant.checks.verify import verify as verify_checkpoint
from v4quant.cli import _exit, _output
from v4quant.cli._options import forward_options, read_corpus, tool_facts
from v4quant.cli.calibrate import coverage_text
from v4quant.cli.evaluate import finding_lines, has_findings
from v4quant.cli.quantize import summary
from v4quant.conversion.calibrated import read_evidence, solved_part
from v4quant.conversion.job import JobResult, check_folder, run_job
from v4quant.conversion.plan import make_plan
from v4quant.conversion.workers import fit_workers
from v4quant.devices import find_device
from v4quant.evaluation.evaluate import Resources, evaluate_checkpoint
from v4quant.evaluation.report import write_report
from v4quant.hub.refs import SCHEME, HubRef, parse_hub
from v4quant.own_folders import is_made_home, own_folder, remove_if_empty, remove_own_folder
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline, VerifyStep, load_pipeline
from v4quant.pipeline.step_cache import FinishedSteps, step_key
from v4quant.publishing.card import CardRequest
from v4quant.publishing.hub_folders import open_target, share_cap, update_card
from v4quant.sizes import parse_size
from v4quant.source import Source, open_source, resolve_source
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.solve.solution import SOLUTION_NAME, Evidence, Solution
from v4quant_calibration.statistics.coverage import coverage
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.manifest import MANIFEST_NAME
from v4quant_formats.model_config import ModelConfig, parse_model_config

_SOURCE, _CANDIDATE = "source", "candidate"  # folders for shards from the hub


@click.command(epilog="Example: v4quant run demo    (or: v4quant run my-run.toml --out converted)")
@click.argument("recipe")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for all results.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads (default: all cores).")
@click.option("--device", default="cpu", show_default=True, help="Where experts are recoded, "
              "passes run and solvers work: cpu, cuda, cuda:0, ...")  # fmt: skip
@click.option("--max-memory", help="Cap on every step's memory, like 6GB.")
@click.option("--disk-cap", help="Disk for shards coming from or going to the hub.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def run(
    ctx: click.Context,
    recipe: str,
    out: Path | None,
    workers: int | None,
    device: str,
    max_memory: str | None,
    disk_cap: str | None,
    as_json: bool,
) -> None:
    """Calibrate, quantize, verify and evaluate as RECIPE (a TOML file, or `demo`) says.

    Results go to --out: the checkpoint in `checkpoint/`, statistics, evaluation and report beside
    it. Running the same command again resumes, and repeats nothing that is done but verification.
    """
    pipeline = load_pipeline(recipe)
    folder = out or Path(f"v4quant-{Path(recipe).stem}")
    started = time.monotonic()
    limits = Resources(parse_size(max_memory) if max_memory else None, None, find_device(device))
    disk = parse_size(disk_cap) if disk_cap else None
    where = resolve_source(pipeline.source)
    repo = parse_hub(pipeline.target).repo if pipeline.target else None
    target = folder / "checkpoint"
    scratch = own_folder(folder, _SOURCE) if isinstance(where, HubRef) else None
    with open_source(where, scratch, disk) as source:
        # What cannot be planned or written should not be calibrated first.
        make_plan(source, pipeline.recipe)
        if not (target / (pipeline.recipe.layout.index or MANIFEST_NAME)).exists():
            check_folder(target)
        made = is_made_home(target)
        stats, digest = _calibrate(pipeline, source, folder, limits)
        plan = replace(make_plan(source, pipeline.recipe, digest), device=limits.device)
        _output.heading(f"Quantize to {pipeline.recipe.scheme} ({pipeline.recipe.format})")
        threads = fit_workers(plan, workers or os.cpu_count() or 1, limits.max_memory)
        share = share_cap(plan, disk, repo is not None)
        delivery = None
        if repo is not None:
            delivery = open_target(repo, target, plan, share, True, CardRequest(repo))
        progress = _output.TerminalProgress()
        job = run_job(plan, target, stats, threads, progress, delivery=delivery)
        _output.note(summary(job))
        place: Source = target
        if repo is None:
            failed = _verify(pipeline.verify, source, target)
        else:
            failed, place = False, HubRef(repo)
            if made:
                remove_if_empty(target)
            _output.note(f"{place} holds every file with the digest the manifest says")
        result = None
        if pipeline.evaluate is not None:
            near = own_folder(folder, _CANDIDATE) if repo is not None else None
            with open_source(place, near, share) as candidate:
                result = _evaluate(
                    pipeline.evaluate, source, candidate, stats, digest, folder, limits
                )
        if repo is not None and result is not None:
            update_card(repo, CardRequest(repo, result))
    for name in (_SOURCE, _CANDIDATE):
        remove_own_folder(folder, name)
    seconds = time.monotonic() - started
    if as_json:
        _output.emit({"conversion": vars(job), "evaluation": result, "seconds": seconds})
    else:
        _output.data("")
        _output.data(_closing_table(pipeline, job, result, folder, str(place), seconds))
    if failed or (result is not None and has_findings(result)):
        ctx.exit(_exit.DIFFERENT)


def _calibrate(
    pipeline: Pipeline, source: Checkpoint, folder: Path, limits: Resources
) -> tuple[Evidence | None, str]:
    step, recipe = pipeline.calibrate, pipeline.recipe
    if step is None:
        return read_evidence(source, None, recipe)
    solves = recipe.solver == "gptq"
    _output.heading("Calibrate: what every expert's inputs look like")
    out = folder / ("solution" if solves else "stats.v4q")
    file, done = out / SOLUTION_NAME if solves else out, FinishedSteps(folder)
    solved_for = (json.dumps(solved_part(recipe)),) if solves else ()
    key = _step_key(step, source, *solved_for)
    if done.has(key, file):
        _output.note(f"{out} is of this checkpoint, corpus and settings: reused")
        return read_evidence(source, out, recipe)
    config = parse_model_config(dict(source.config))

    def load(tokens: int | None) -> Corpus:
        return _corpus(replace(step, tokens=tokens), source, config)

    corpus = draw_corpus(load, step.tokens)
    _output.note(f"{sum(map(len, corpus.windows)):,} tokens in {len(corpus.windows)} windows")
    settings = solve_settings(source, recipe) if solves else None
    options, progress = forward_options(step.activations), _output.TerminalProgress()
    found = calibrate_to(
        source, config, corpus, options, step.floor, settings, out, progress,
        limits.max_memory, limits.device,
    )  # fmt: skip
    done.add(key, file)
    _output.note(coverage_text(found.stats))
    return read_evidence(source, out, recipe)


def _verify(step: VerifyStep | None, source: Checkpoint, target: Path) -> bool:
    """Verify; True when something differs."""
    if step is None:
        return False
    _output.heading("Verify: hashes, every value against the source, kernels on real tensors")
    progress = _output.TerminalProgress()
    result = verify_checkpoint(target, source if step.source else None, progress)
    for finding in result.findings:
        _output.note(f"{finding.where}: {finding.problem}")
    if not result.findings:
        _output.note(
            f"{result.files} files and {result.modules} modules are as the manifest says; "
            f"{result.exact} hold exactly the source's values"
        )
    checks = check_kernels(target, progress) if step.kernels else []
    for check in checks:
        verdict = "ok" if check.ok else "DIFFERS"
        _output.note(
            f"kernel {check.name} on {check.scheme}: error {check.max_abs_error:.2e} within "
            f"{check.bound:.2e}: {verdict}"
        )
    return bool(result.findings) or not all(c.ok for c in checks)


def _evaluate(
    step: CorpusStep,
    source: Checkpoint,
    candidate: Checkpoint,
    stats: Evidence | None,
    moments: str,
    folder: Path,
    limits: Resources,
) -> dict[str, Any]:
    _output.heading("Evaluate: perplexity and KL against the source, with a noise floor")
    file, done = folder / "evaluation.json", FinishedSteps(folder)
    key = _step_key(step, source, candidate.digest(), moments)
    if done.has(key, file):
        _output.note(f"{file} is of these checkpoints, corpus and settings: reused")
        result: dict[str, Any] = json.loads(file.read_bytes())
    else:
        config = parse_model_config(dict(source.config))
        corpus = _corpus(step, source, config)
        options, progress = forward_options(step.activations), _output.TerminalProgress()
        figures = evaluate_checkpoint(
            candidate, source, corpus, options, progress, resources=limits
        )
        result = {"tool": tool_facts(), **figures}
        if stats is not None:
            result["coverage"] = coverage(stats.stats if isinstance(stats, Solution) else stats)
        write_report(result, file)
        done.add(key, file)
    for name in ("report.html", "report.md"):
        write_report(result, folder / name)
    return result


def _corpus(step: CorpusStep, source: Checkpoint, config: ModelConfig) -> Corpus:
    return read_corpus(step.corpus, source, config, step.seq_len, step.tokens, step.mode)


def _step_key(step: CorpusStep, source: Checkpoint, *digests: str) -> str:
    files = [*resolve_corpus(list(step.corpus)), source.path / "tokenizer.json"]
    return step_key(step, files, source.digest(), *digests)


def _closing_table(
    pipeline: Pipeline,
    job: JobResult,
    result: dict[str, Any] | None,
    folder: Path,
    place: str,
    seconds: float,
) -> str:
    rows = [("", "before", "after")]
    rows.append(("size", _output.human_bytes(job.bytes_in), _output.human_bytes(job.bytes_out)))
    if result is not None:
        before, after, floor = result["reference"], result["candidate"], result["noise_floor"]
        bits = tuple(f"{x['expert_bits_per_weight']:.3f}" for x in (before, after))
        rows += [
            ("expert weights", before["scheme"], after["scheme"]),
            ("bits per expert weight", bits[0], bits[1]),
            ("perplexity", f"{result['reference_perplexity']:.3f}", f"{result['perplexity']:.3f}"),
            ("mean KL, nats", f"floor {floor['kl_mean']:.1e}", f"{result['kl_mean']:.1e}"),
            ("top-1 agreement", f"floor {100 * floor['top1_agreement']:.2f} %",
             f"{100 * result['top1_agreement']:.2f} %"),
        ]  # fmt: skip
    lines = [_output.table(rows[1:], rows[0]), ""]
    if result is not None:
        lines.append(result["verdict"]["text"])
        lines += finding_lines(result)
        lines.append(f"report:      {folder / 'report.html'}")
    lines.append(f"checkpoint:  {place}")
    path = place.removeprefix(SCHEME)
    lines.append(f"serve with:  {pipeline.recipe.layout.serve.format(path=path)}")
    lines.append(f"took {seconds:.0f} s")
    return "\n".join(lines)
