"""quantize: a checkpoint in another format, in a folder or a repository."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from v4quant.api.arguments import (
    PathLike,
    Size,
    SourceLike,
    adapter_of,
    destination_of,
    path_of,
    size_of,
    source_of,
)
from v4quant.conversion.calibrated import load_calibrated
from v4quant.conversion.job import JobResult, run_job
from v4quant.conversion.output_folder import as_begun, holds_own
from v4quant.conversion.overwrite import replacing
from v4quant.conversion.plan import make_plan
from v4quant.conversion.ranks import current_ranks
from v4quant.conversion.size_by_role import warn_of_growth
from v4quant.conversion.words import warn_of_lost_words
from v4quant.conversion.workers import fit_workers
from v4quant.devices import find_device
from v4quant.outputs import refuse_inputs
from v4quant.progress import default_progress
from v4quant.publishing.card import CardRequest
from v4quant.publishing.hub_folders import find_folders, open_delivery, open_shared, share_cap
from v4quant.recipe import Recipe, RecipeError, read_toml, recipe_from_table
from v4quant.source import open_source
from v4quant_calibration.solve.solution import is_solution
from v4quant_kernels.errors import OptionError
from v4quant_kernels.progress import Progress, SilentProgress


@dataclass(frozen=True)
class PlannedConversion:
    """What a conversion would do: sizes in bytes, counts, and the workers that fit."""

    source: str
    output: str
    scheme: str
    format: str
    engines: str
    shards: int
    units: int
    tensors: int
    dropped: int
    bytes_in: int
    bytes_out: int
    workers: int


def make_recipe(
    *,
    scheme: str | None = None,
    format: str | None = None,
    engine: str | None = None,
    recipe: Recipe | PathLike | None = None,
    stats: PathLike | None = None,
    solver: str | None = None,
    draft: str | None = None,
    on_inexact: str | None = None,
    unknown: str | None = None,
    dense: str | None = None,
    engram: str | None = None,
    split_size: str | None = None,
) -> Recipe:
    """The recipe that options describe; a recipe file's values come before the defaults, options
    before both. A solution in `stats` is packed unless another solver is named.

    Raises RecipeError, UnsupportedScheme or UnsupportedPair.
    """
    if isinstance(recipe, Recipe):
        return recipe
    options = {
        "scheme": scheme,
        "format": format,
        "engine": engine,
        "solver": solver,
        "draft": draft,
        "on_inexact": on_inexact,
        "unknown": unknown,
        "dense": dense,
        "engram": engram,
        "split_size": split_size,
    }
    file, solution = path_of(recipe), path_of(stats)
    solved = solution is not None and is_solution(solution)
    table = {
        **({"solver": "gptq"} if solved else {}),
        **(read_toml(file) if file else {}),
        **{key: value for key, value in options.items() if value is not None},
    }
    if "scheme" not in table:
        raise RecipeError("no scheme given; use --scheme (for example int4-g32) or --recipe")
    return recipe_from_table(table, str(file or "options"))


def plan_quantize(
    source: SourceLike,
    out: SourceLike,
    *,
    recipe: Recipe,
    stats: PathLike | None = None,
    adapter: SourceLike | None = None,
    tokenizer: PathLike | None = None,
    workers: int | None = None,
    max_memory: Size = None,
) -> PlannedConversion:
    """What `quantize` would do, from headers alone; writes nothing.

    Raises what opening the source, planning and reading `stats` raise.
    """
    merged, words = adapter_of(adapter), path_of(tokenizer)
    with open_source(
        source_of(source), headers_only=True, adapter=merged, tokenizer=words
    ) as checkpoint:
        _, digest = load_calibrated(checkpoint, path_of(stats), recipe)
        plan = make_plan(checkpoint, recipe, digest)
        warn_of_growth(plan)
        warn_of_lost_words(plan)
        return PlannedConversion(
            source=checkpoint.label,
            output=str(destination_of(out)),
            scheme=recipe.scheme,
            format=recipe.format,
            engines=recipe.layout.engines,
            shards=len(plan.shards),
            units=sum(len(s.units) for s in plan.shards),
            tensors=sum(len(s.outputs) for s in plan.shards),
            dropped=len(plan.dropped),
            bytes_in=plan.bytes_in,
            bytes_out=plan.bytes_out,
            workers=fit_workers(plan, workers or os.cpu_count() or 1, size_of(max_memory)),
        )


def quantize(
    source: SourceLike,
    out: SourceLike,
    *,
    scheme: str | None = None,
    format: str | None = None,
    engine: str | None = None,
    recipe: Recipe | PathLike | None = None,
    stats: PathLike | None = None,
    adapter: SourceLike | None = None,
    tokenizer: PathLike | None = None,
    solver: str | None = None,
    draft: str | None = None,
    on_inexact: str | None = None,
    unknown: str | None = None,
    dense: str | None = None,
    engram: str | None = None,
    split_size: str | None = None,
    workers: int | None = None,
    max_memory: Size = None,
    device: str = "cpu",
    disk_cap: Size = None,
    scratch: PathLike | None = None,
    public: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> JobResult:
    """Convert checkpoint `source` into `out`, a folder or `hf://owner/name`.

    The same call again resumes. overwrite: put the result in the place of an earlier one that
    v4quant made, which stays until this one is whole. stats: what `calibrate` wrote. adapter: a
    LoRA adapter's folder or repository, merged while converting. tokenizer: a tokenizer.json, or
    its folder, that goes with `out` in place of the source's, with what lies beside it. workers:
    threads (all). disk_cap, scratch: bytes and folder for shards coming from or going to a
    repository. Under torchrun the ranks share the work, and each returns the result.

    Raises V4QuantError: RecipeError and UnsupportedPair for what cannot be asked, FormatError for
    sources that cannot be read, OutputError for folders that cannot be written, HubError.
    """
    chosen = make_recipe(
        scheme=scheme, format=format, engine=engine, recipe=recipe, stats=stats, solver=solver,
        draft=draft, on_inexact=on_inexact, unknown=unknown, dense=dense, engram=engram,
        split_size=split_size,
    )  # fmt: skip
    where, target, disk = source_of(source), destination_of(out), size_of(disk_cap)
    merged = adapter_of(adapter)
    with current_ranks() as ranks, ExitStack() as stack:
        shown = default_progress(progress) if ranks.is_first else SilentProgress()
        place = target
        if overwrite:
            if not isinstance(target, Path):
                raise OptionError(
                    "--overwrite is for folders; a repository's checkpoint is replaced by "
                    "`v4quant push --replace`"
                )
            reads = [path_of(stats), path_of(tokenizer), path_of(scratch)]
            asked = (str(where), chosen, str(merged), *map(str, reads[:-1]))
            reads += [merged] if isinstance(merged, Path) else []
            source_folder = where if isinstance(where, Path) else None
            place = stack.enter_context(
                replacing(target, True, [source_folder, *reads], ranks.is_first, asked)
            )
        places = ranks.first_then_others(
            lambda: find_folders(where, place, path_of(scratch), ranks.rank)
        )
        checkpoint = stack.enter_context(
            open_shared(where, places.scratch, disk, merged, path_of(tokenizer), ranks)
        )
        refuse_inputs((), [checkpoint], (), [places.out])
        evidence, digest = load_calibrated(checkpoint, path_of(stats), chosen)
        plan = make_plan(checkpoint, chosen, digest)
        if overwrite and isinstance(target, Path):
            # What is there may be this conversion, finished or begun: that is no other's.
            own = holds_own(plan, target) if ranks.is_first else False
            if ranks.agree("own", ("y" if own else "n") if ranks.is_first else None) == "y":
                places = replace(places, out=target)
        plan = as_begun(plan, places.out)
        plan = replace(plan, device=find_device(device))
        threads = fit_workers(plan, workers or os.cpu_count() or 1, size_of(max_memory))
        work = places.out if places.repo is not None else None
        share = share_cap(plan, disk, work, ranks.on_machine)
        if places.repo is None:
            result = run_job(plan, places.out, evidence, threads, shown, ranks)
            return replace(result, output=str(target))
        repo, request = places.repo, CardRequest(places.repo)
        delivery = ranks.first_then_others(
            lambda: open_delivery(repo, places.out, plan, share, not public, request, ranks)
        )
        result = run_job(plan, places.out, evidence, threads, shown, ranks, delivery)
        if ranks.is_first:
            places.leave()
        return replace(result, output=str(target))
