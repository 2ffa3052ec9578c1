"""The first step of a run: solutions for what is solved, in one pass, or statistics for all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from v4quant.api.arguments import config_of, forward_options
from v4quant.calibration.collect import (
    calibrate_to,
    draw_corpus,
    reserve_of,
    solve_settings,
    solve_several_to,
    solve_target,
)
from v4quant.calibration.provenance import provenance_of
from v4quant.conversion.calibrated import load_calibrated, solved_part
from v4quant.pipeline.job import ALONE, STATS_NAME, Job, Target, corpus_of, key_of
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline
from v4quant.pipeline.step_cache import FinishedSteps
from v4quant.recipe import Recipe
from v4quant_calibration.corpus.corpus import Corpus
from v4quant_calibration.solve.solution import SOLUTION_NAME, Evidence
from v4quant_calibration.statistics.provenance import Provenance
from v4quant_formats.checkpoint import Checkpoint


def calibrate_all(
    job: Job, pipeline: Pipeline, targets: Sequence[Target], source: Checkpoint
) -> list[tuple[Evidence | None, str]]:
    """What is known of the text for every target: its own solution, or shared statistics.

    A solution holds the statistics of the same text, so a ladder with one needs no pass for others.
    """
    step = pipeline.calibrate
    if step is None:
        return [load_calibrated(source, None, target.recipe) for target in targets]
    solving = [t for t in targets if t.solves]
    shared = solving[0].solution if solving else job.folder / STATS_NAME
    _calibrate(job, step, solving, source, shared)
    return [load_calibrated(source, t.solution if t.solves else shared, t.recipe) for t in targets]


def _calibrate(
    job: Job, step: CorpusStep, solving: Sequence[Target], source: Checkpoint, shared: Path
) -> None:
    """Solve every target that is to be solved, in one forward pass of the source; without any,
    write statistics to `shared`."""
    names = [t.name for t in solving if t.name != ALONE]
    whose = f" for {', '.join(names)}" if names else ""
    job.watcher.step(f"Calibrate{whose}: what every expert's inputs look like")
    done = FinishedSteps(job.folder)
    steps = [
        (t.solution / SOLUTION_NAME, key_of(step, source, json.dumps(solved_part(t.recipe))))
        for t in solving
    ] or [(shared, key_of(step, source))]
    todo = [i for i, (file, key) in enumerate(steps) if not done.has(key, file)]
    for file, _ in (s for i, s in enumerate(steps) if i not in todo):
        whole = file.parent if solving else file
        job.watcher.note(f"{whole} is of this checkpoint, corpus and settings: reused")
    if not todo:
        return

    def load(tokens: int | None) -> Corpus:
        return corpus_of(
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
            solve_target(
                solve_settings(source, solving[i].recipe, step.propagate), solving[i].solution,
                _provenance(job, step, solving[i].recipe), job.overwrite,
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


def _provenance(job: Job, step: CorpusStep, recipe: Recipe | None) -> Provenance:
    return provenance_of(
        step.corpus, recipe, step.propagate, tokens=step.tokens, seq_len=step.seq_len,
        mode=step.mode, chat_keys=step.chat_keys, skip_bad_rows=step.skip_bad_rows,
        activations=step.activations, min_tokens=step.min_tokens, device=job.limits.device.type,
    )  # fmt: skip
