"""What a run will take: hours and sizes, told before it begins, and the solver an effort allows."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from v4quant.api.arguments import source_of
from v4quant.builtin import MIXED_CALIBRATION
from v4quant.hub.refs import is_hub
from v4quant.pipeline.recipe_file import CorpusStep, Pipeline, Rung, load_pipeline
from v4quant.planner.candidates import is_exact
from v4quant.planner.choices import Effort
from v4quant.planner.effort import (
    cost_at,
    cost_of,
    hours_text,
    hours_with_text,
    is_solved,
    level_of,
)
from v4quant.planner.footprint import Outline, footprint, outline_checkpoint
from v4quant.planner.loss import known_loss
from v4quant.sizes import human_bytes
from v4quant.source import open_source
from v4quant_kernels.scheme import get_scheme

_SEQ_LEN = 2048


@dataclass(frozen=True)
class PlannedRun:
    """What `run` would do. source: bytes of the source. steps: lines for people, in order.

    conversions: name, scheme, format, bytes and expected hours of each.
    """

    source: int
    steps: tuple[str, ...]
    conversions: tuple[dict[str, object], ...]


def plan_run(
    recipe: str,
    *,
    model: str = "v4",
    effort: Effort | None = None,
    workers: int | None = None,
) -> PlannedRun:
    """The whole of a run file, from headers alone; nothing is written.

    Raises RecipeError for what the file asks, and what planning the conversions raises.
    """
    pipeline, cores = load_pipeline(recipe, model), workers or os.cpu_count() or 1
    with open_source(source_of(pipeline.source), headers_only=True) as source:
        outline = outline_checkpoint(source)
    pipeline = with_effort(pipeline, outline, effort, cores)
    steps = list(expected_costs(pipeline, outline, cores))
    if (step := pipeline.calibrate) is not None:
        steps.insert(0, f"calibrate on {_text(step)}{_together(pipeline)}")
    if pipeline.verify is not None:
        steps.append("verify every file, and every value against the source")
    if (step := pipeline.evaluate) is not None:
        what = f"all {len(pipeline.rungs)} conversions" if pipeline.is_ladder else "the conversion"
        steps.append(f"evaluate {what} on {_text(step)}, in one pass")
    if pipeline.target:
        names = [f"{pipeline.target}-{r.name}" for r in pipeline.rungs]
        steps.append(f"publish as {', '.join(names) if pipeline.is_ladder else pipeline.target}")
    steps.append(_source_reads(pipeline))
    if is_hub(pipeline.source):
        steps.append(
            f"fetch the source once, where the disk of --out has {human_bytes(outline.nbytes)} for "
            "it beside the results; else for every step"
        )
    facts = []
    for rung in pipeline.rungs:
        nbytes = footprint(outline, rung.recipe).total
        facts.append(
            {
                "name": rung.name, "scheme": rung.recipe.scheme, "format": rung.recipe.format,
                "bytes": nbytes, "solver": rung.recipe.solver,
                "hours": _cost(outline, rung, pipeline.calibrate, nbytes, cores),
            }
        )  # fmt: skip
    return PlannedRun(outline.nbytes, tuple(steps), tuple(facts))


def _together(pipeline: Pipeline) -> str:
    """What conversions share of a calibration."""
    solved = sum(rung.recipe.solver == "gptq" for rung in pipeline.rungs)
    if solved > 1:
        return f": one forward pass of the source for all {solved} that are solved"
    return ": one set of statistics for all" if pipeline.is_ladder else ""


def _source_reads(pipeline: Pipeline) -> str:
    """How often a run reads the source's tensors, and for what; more text for starved experts
    takes further passes. All conversions are made, verified and evaluated side by side."""
    step = pipeline.calibrate
    solves = any(rung.recipe.solver == "gptq" for rung in pipeline.rungs)
    reads = []
    if step is not None:
        # With a number of tokens, a first pass sees which experts need more text.
        reads.append((1 + bool(solves and step.tokens), "to calibrate"))
    reads.append((1, "to convert"))
    if pipeline.verify is not None and pipeline.verify.source:
        reads.append((1, "to verify"))
    if pipeline.evaluate is not None:
        reads.append((1, "to evaluate"))
    told = ", ".join(f"{count} {what}" for count, what in reads)
    return f"in all the source is read at least {sum(n for n, _ in reads)} times: {told}"


def with_effort(
    pipeline: Pipeline, outline: Outline, effort: Effort | None, cores: int
) -> Pipeline:
    """The pipeline with the solver, and the text, that `effort` allows for each conversion.

    Without an effort what the file names stays, and the rest is chosen as by "hours", on as much
    text as the file says.
    """
    rungs, step = [], pipeline.calibrate
    for rung in pipeline.rungs:
        scheme = get_scheme(rung.recipe.scheme)
        exact = not is_solved(scheme) or is_exact(outline, scheme.name)
        if exact or (effort is None and rung.names_solver):
            rungs.append(rung)
            continue
        nbytes = footprint(outline, rung.recipe).total
        level = cost_of(outline, scheme, nbytes, effort or "hours", cores, exact=False).level
        solver = "gptq" if level.solves else "optimal"
        rungs.append(replace(rung, recipe=replace(rung.recipe, solver=solver)))
        if not level.tokens:
            continue
        step = step or CorpusStep((MIXED_CALIBRATION,), seq_len=_SEQ_LEN)
        if effort is not None or pipeline.calibrate is None:
            step = replace(step, tokens=max(level.tokens, step.tokens or 0))
        step = replace(step, propagate="--no-propagate" not in level.options)
    return replace(pipeline, rungs=tuple(rungs), calibrate=step)


def expected_costs(pipeline: Pipeline, outline: Outline, cores: int) -> list[str]:
    """A line for each conversion: its size, and the hours it is expected to take."""
    lines = []
    for rung in pipeline.rungs:
        nbytes = footprint(outline, rung.recipe).total
        hours = _cost(outline, rung, pipeline.calibrate, nbytes, cores)
        larger = " (larger than the source)" if nbytes > outline.nbytes else ""
        lines.append(
            f"{rung.name}: {human_bytes(nbytes)}{larger}, about {hours_text(hours)} on {cores} "
            f"cores by solver {rung.recipe.solver}"
            f"{_otherwise(outline, rung, pipeline.calibrate, nbytes, cores)}"
        )
    return lines


def _otherwise(
    outline: Outline, rung: Rung, step: CorpusStep | None, nbytes: int, cores: int
) -> str:
    """What less or more effort would take, and what is known of its loss."""
    recipe = rung.recipe
    scheme, solves = get_scheme(recipe.scheme), recipe.solver == "gptq"
    if not is_solved(scheme) or is_exact(outline, recipe.scheme):
        return ""
    effort: Effort = "minutes" if solves else "best"
    other = cost_of(outline, scheme, nbytes, effort, cores, exact=False)
    propagates = step is None or step.propagate
    solver = "optimal" if not solves else "propagated" if propagates else "refined"
    own = known_loss(recipe.scheme, solver, exact=False).kl
    kl = known_loss(recipe.scheme, other.level.solver, exact=False).kl
    told = f"; --effort {effort} takes {hours_text(other.hours)}"
    if not own or kl is None:
        return told
    return f"{told} and has {kl / own:.2g} times the KL (on the tiny model)"


def _cost(outline: Outline, rung: Rung, step: CorpusStep | None, nbytes: int, cores: int) -> float:
    scheme, solves = get_scheme(rung.recipe.scheme), rung.recipe.solver == "gptq"
    level = level_of(solves, step is None or step.propagate, step is not None)
    cost = cost_at(outline, scheme, nbytes, level, cores, exact=not is_solved(scheme))
    if step is None or not step.tokens:
        return cost.hours
    return hours_with_text(outline, cost, step.tokens)


def _text(step: CorpusStep) -> str:
    amount = f"{step.tokens:,} tokens of " if step.tokens else ""
    return f"{amount}{', '.join(step.corpus)}"
