"""`v4quant quantize`."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import click

from v4quant.cli import _output
from v4quant.cli._source import OUT, SOURCE
from v4quant.conversion.calibrated import read_evidence
from v4quant.conversion.job import JobResult, run_job
from v4quant.conversion.plan import Plan, make_plan
from v4quant.conversion.ranks import current_ranks
from v4quant.conversion.workers import fit_workers
from v4quant.devices import find_device
from v4quant.publishing.card import CardRequest
from v4quant.publishing.hub_folders import Destination, find_places, open_target, share_cap
from v4quant.recipe import Recipe, RecipeError, read_toml, recipe_from_table
from v4quant.sizes import parse_size
from v4quant.source import Source, open_source
from v4quant_calibration.rounding.solvers import SOLVER_NAMES
from v4quant_calibration.solve.solution import is_solution
from v4quant_formats.layouts.layout import ENGINE_CHOICES
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_kernels.progress import SilentProgress
from v4quant_kernels.scheme import SCHEMES

_SCHEMES = [s for s in SCHEMES if any(s in layout.schemes for layout in LAYOUTS.values())]


@click.command(
    epilog="Example: v4quant quantize DeepSeek-V4-Flash out --scheme int4-g32 --stats stats.v4q"
)
@click.argument("source", type=SOURCE)
@click.argument("out", type=OUT)
@click.option("--scheme", help=f"How experts are coded: {', '.join(_SCHEMES)}.")
@click.option("--format", "format_", help=f"Container: {', '.join(LAYOUTS)} (default by scheme).")
@click.option(
    "--engine",
    type=click.Choice(ENGINE_CHOICES),
    help="Write what this engine wants where engines differ (default neutral: what most load).",
)
@click.option("--recipe", "recipe_file", type=click.Path(path_type=Path), help="Recipe TOML file.")
@click.option(
    "--stats",
    "stats_file",
    type=click.Path(path_type=Path),
    help="What calibrate wrote: a file of statistics, or a solution's folder.",
)
@click.option(
    "--solver",
    type=click.Choice(SOLVER_NAMES),
    help="How integer codes are found: largest magnitude, best scales (the default), or by GPTQ "
    "in the solution given with --stats.",
)
@click.option("--draft", type=click.Choice(["convert", "drop"]), help="MTP / DSpark stages.")
@click.option(
    "--on-inexact",
    type=click.Choice(["nearest", "keep", "refuse"]),
    help="When a cast cannot hold every value: take the nearest and count, keep the stage as it "
    "is, or stop.",
)
@click.option("--dense", help="How dense matrices are coded, for gguf (default bf16, exact).")
@click.option("--split-size", help="Largest file, like 45GB, for gguf (default 45GB).")
@click.option("--unknown", type=click.Choice(["refuse", "copy"]), help="Tensors no V4 release has.")
@click.option("--workers", type=click.IntRange(1, 256), help="Threads (default: all cores).")
@click.option("--max-memory", help="Cap on memory, like 6GB; fewer workers are used to fit it.")
@click.option(
    "--device", default="cpu", show_default=True, help="Where experts are computed: cpu or cuda."
)
@click.option(
    "--disk-cap",
    help="Disk for shards coming from or going to the hub (default: three of each side).",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    help="Folder for such shards (default: inside OUT, or ./v4quant-OWNER--NAME for a hub OUT).",
)
@click.option("--public", is_flag=True, help="Create a hub OUT public (default: private).")
@click.option("--dry-run", is_flag=True, help="Print the plan; read headers only, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def quantize(
    source: Source,
    out: Destination,
    scheme: str | None,
    format_: str | None,
    engine: str | None,
    recipe_file: Path | None,
    stats_file: Path | None,
    solver: str | None,
    draft: str | None,
    on_inexact: str | None,
    dense: str | None,
    split_size: str | None,
    unknown: str | None,
    workers: int | None,
    max_memory: str | None,
    device: str,
    disk_cap: str | None,
    scratch: Path | None,
    public: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Convert checkpoint SOURCE into folder OUT. The same command again resumes.

    Either may be a repository on the hub, hf://owner/name: source shards are then fetched ahead of
    the work and deleted after it, output shards sent as they are finished and deleted here.

    Several processes, also on several machines with a shared disk, share the work when started by
    `torchrun --nproc-per-node N -m v4quant quantize ...`; the bytes are the same.
    """
    chosen = {
        "scheme": scheme,
        "format": format_,
        "engine": engine,
        "draft": draft,
        "on_inexact": on_inexact,
        "dense": dense,
        "split_size": split_size,
        "unknown": unknown,
        "solver": solver,
    }
    solved = stats_file is not None and is_solution(stats_file)
    recipe = _recipe(recipe_file, {k: v for k, v in chosen.items() if v is not None}, solved)
    cap = parse_size(max_memory) if max_memory else None
    disk = parse_size(disk_cap) if disk_cap else None
    with current_ranks() as ranks, ExitStack() as stack:
        places = find_places(source, out, scratch, ranks.size) if not dry_run else None
        checkpoint = stack.enter_context(
            open_source(source, places.scratch if places else None, disk, headers_only=dry_run)
        )
        stats, digest = read_evidence(checkpoint, stats_file, recipe)
        plan = replace(make_plan(checkpoint, recipe, digest), device=find_device(device))
        threads = fit_workers(plan, workers or os.cpu_count() or 1, cap)
        if places is None:
            if ranks.is_first:
                _show_plan(plan, out, threads, as_json)
            return
        progress = _output.TerminalProgress() if ranks.is_first else SilentProgress()
        share = share_cap(plan, disk, places.repo is not None)
        delivery = None
        if places.repo is not None:
            request = CardRequest(places.repo)
            delivery = open_target(places.repo, places.out, plan, share, not public, request)
        result = run_job(plan, places.out, stats, threads, progress, ranks, delivery)
        if places.repo is not None:
            places.leave()
            result = replace(result, output=str(out))
        if not ranks.is_first:
            return
    if as_json:
        _output.emit(result)
    else:
        _output.data(summary(result))


def _recipe(file: Path | None, options: dict[str, str], solved: bool) -> Recipe:
    """solved: whether there is a solution, which is packed unless another solver is named."""
    default = {"solver": "gptq"} if solved else {}
    table = {**default, **(read_toml(file) if file else {}), **options}
    if "scheme" not in table:
        raise RecipeError("no scheme given; use --scheme (for example int4-g32) or --recipe")
    return recipe_from_table(table, str(file or "options"))


def _show_plan(plan: Plan, out: Destination, workers: int, as_json: bool) -> None:
    facts = {
        "source": plan.checkpoint.label,
        "output": str(out),
        "scheme": plan.recipe.scheme,
        "format": plan.recipe.format,
        "engines": plan.recipe.layout.engines,
        "shards": len(plan.shards),
        "units": sum(len(s.units) for s in plan.shards),
        "tensors": sum(len(s.outputs) for s in plan.shards),
        "dropped": len(plan.dropped),
        "bytes_in": plan.bytes_in,
        "bytes_out": plan.bytes_out,
        "workers": workers,
    }
    if as_json:
        _output.emit(facts)
        return
    shown = {
        **facts,
        "bytes_in": _output.human_bytes(plan.bytes_in),
        "bytes_out": _output.human_bytes(plan.bytes_out),
    }
    _output.data(_output.table([(k.replace("_", " "), str(v)) for k, v in shown.items()]))


def summary(result: JobResult) -> str:
    """What a person wants to know after a conversion."""
    rows = [
        ("output", result.output),
        ("scheme", f"{result.scheme} ({result.format})"),
        ("bytes", f"{_output.human_bytes(result.bytes_in)} -> "
                  f"{_output.human_bytes(result.bytes_out)}"),
        ("modules", f"{result.copied_tensors} copied, {result.exact_tensors} re-encoded exactly, "
                    f"{result.lossy_tensors} lossy, {result.dropped_tensors} tensors dropped"),
        ("took", f"{result.seconds:.1f} s, peak memory "
                 f"{_output.human_bytes(result.peak_rss_bytes)}"),
    ]  # fmt: skip
    if result.lossy_tensors:
        loss = f"relative RMS {result.mean_relative_rms:.4f}, worst {result.worst_relative_rms:.4f}"
        rows.insert(4, ("weight error", loss))
    if result.altered_elements:
        rows.insert(4, ("not exact", f"{result.altered_elements:,} values changed in casts"))
    return _output.table(rows)
