"""evidence: what calibration left, opened for one conversion and checked against its recipe.

`--stats` takes what `calibrate` writes, statistics or the folder of a solution, and importance
matrices as `llama-imatrix` writes them. Only the solver `gptq` packs a solution's codes, and only
for the scheme they were solved for. Types of so few bits that a search without a text puts them
where they do not count are refused without one.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from v4quant.recipe import Recipe, RecipeError
from v4quant_calibration.defaults import MIN_TOKENS
from v4quant_calibration.solve.solution import Evidence, Solution, is_solution, load_solution
from v4quant_calibration.statistics.imatrix import load_imatrix
from v4quant_calibration.statistics.stats import Stats, StatsError, load_stats
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import expert_module, trunk_stages
from v4quant_formats.errors import FormatError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.gguf.imatrix import looks_like_imatrix
from v4quant_formats.model_config import parse_model_config
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scheme import SCHEMES, Scheme

_LOG = logging.getLogger(__name__)


def load_calibrated(
    checkpoint: Checkpoint, path: Path | None, recipe: Recipe
) -> tuple[Evidence | None, str]:
    """Statistics or solution at `path` and its digest; (None, "") without a path.

    Raises StatsError, and RecipeError when recipe and evidence do not belong together, or a type
    needs evidence that is not there.
    """
    if path is None or not is_solution(path):
        if recipe.solver == "gptq":
            raise RecipeError(
                "solver = 'gptq' needs a solution: run `v4quant calibrate SOURCE --solve "
                f"{recipe.scheme} --out solved` and give --stats solved"
            )
        if path is None:
            _check_text(recipe)
            return None, ""
        stats, digest = read_stats(checkpoint, path)
        if not stats.dense:
            _check_dense(path, recipe)
        _check_layers(checkpoint, path, stats, recipe)
        return stats, digest
    solution = load_solution(path, checkpoint.digest())
    if recipe.solver == "gptq":
        _check_recipe(path, solution, recipe)
    if recipe.solver != "gptq" or not solution.recipe or not solution.recipe["dense"]:
        _check_dense(path, recipe)
    return solution, solution.digest


def _check_text(recipe: Recipe) -> None:
    """Refuse types that need a text, and warn of those that want one, where there is none."""
    remedy = (
        "run `v4quant calibrate SOURCE --out stats.v4q` and give --stats stats.v4q (in a run file, "
        "a [calibrate] table), or an importance matrix of llama.cpp's"
    )
    for name in recipe.asking_text("needed"):
        raise RecipeError(f"{name} has too few bits to spend them without a text: {remedy}")
    for name in recipe.asking_text("wanted"):
        _LOG.warning("%s loses more than twice as much without a text: %s", name, remedy)


def _check_dense(path: Path, recipe: Recipe) -> None:
    """Refuse such types for dense matrices, whose inputs the file at `path` does not know."""
    solved = recipe.solver == "gptq"  # lines of [schemes] were solved with the experts
    places = {name for (_, group), name in recipe.places.items() if group == "dense"}
    for name in sorted({recipe.dense} if solved else {recipe.dense, *places}):
        if name in SCHEMES and SCHEMES[name].text == "needed":
            raise RecipeError(
                f"{path}: knows the inputs of experts only, and {name} for dense matrices needs "
                "theirs: `v4quant calibrate SOURCE --imatrix FILE.gguf` writes them for --stats, "
                "or solve them too (`v4quant calibrate SOURCE --recipe FILE --out solved`)"
            )


def _check_layers(checkpoint: Checkpoint, path: Path, stats: Stats, recipe: Recipe) -> None:
    """Refuse types that need a text for layers of which the file knows nothing; warn of others."""
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    unknown = [
        (stage, projection)
        for stage in trunk_stages(config)
        for projection in ("w1", "w2")
        if stats.importance(expert_module(stage, 0, projection)) is None
    ]
    if not unknown:
        return
    known = config.num_hidden_layers - len({stage for stage, _ in unknown})
    told = f"{path}: knows the inputs of {known} of {config.num_hidden_layers} layers' experts"
    for stage, projection in unknown:
        scheme = recipe.scheme_for(stage, projection)
        if scheme.text == "needed":
            raise RecipeError(
                f"{told}, and {scheme.name} for {stage} needs them: calibrate on a longer text, or "
                "give statistics of all layers"
            )
    _LOG.warning("%s; the others, from %s on, are searched without a text", told, unknown[0][0])


def read_stats(checkpoint: Checkpoint, path: Path) -> tuple[Stats, str]:
    """Statistics or an importance matrix, and what the file hashes to. Raises StatsError."""
    if path.is_dir():
        raise StatsError(f"{path}: is a folder without a solution; give a file in it")
    if not looks_like_imatrix(path):
        return load_stats(path, checkpoint.digest()), hash_file(path)
    config = parse_model_config(dict(checkpoint.config), str(checkpoint.path / "config.json"))
    try:
        stats = load_imatrix(path, config, checkpoint.digest(), MIN_TOKENS)
    except FormatError as error:
        raise StatsError(str(error)) from None
    return replace(stats, file=path), hash_file(path)


def _check_recipe(path: Path, solution: Solution, recipe: Recipe) -> None:
    if solution.scheme != recipe.scheme:
        raise RecipeError(
            f"{path}: was solved for {solution.scheme}, not for {recipe.scheme}; calibrate with "
            f"--solve {recipe.scheme}"
        )
    if solution.recipe is None:
        return
    wanted = solved_part(recipe)
    if not solution.recipe["dense"]:
        wanted["dense"] = ""  # dense matrices were left alone, and any type may be had unsolved
    if solution.recipe != wanted:
        raise RecipeError(
            f"{path}: was solved for other dense types or [schemes] than the recipe's; calibrate "
            "with --recipe and the same file, or --solve and the same --dense"
        )


def stats_of(checkpoint: Checkpoint, path: Path) -> Stats:
    """The statistics that a file, an importance matrix or a solution's folder holds.

    Raises StatsError or SolutionError.
    """
    if not is_solution(path):
        return read_stats(checkpoint, path)[0]
    with closing(load_solution(path, checkpoint.digest())) as solution:
        return solution.stats


def solved_part(recipe: Recipe) -> dict[str, object]:
    """What of a recipe decides how matrices are solved, as a solution states it."""
    whole = recipe.as_dict()
    return {key: whole[key] for key in ("scheme", "format", "dense", "schemes")}


def solved_codes(
    recipe: Recipe, evidence: Evidence | None, module: str, scheme: Scheme, shape: tuple[int, int]
) -> QTensor | None:
    """The solution's codes of a matrix, where the recipe packs one that has them.

    None otherwise: such a matrix is for the plain solver (a draft stage that calibration cannot
    run, a matrix that was not solved). Raises SolutionError for codes of another scheme or shape.
    """
    if recipe.solver != "gptq":
        return None
    assert isinstance(evidence, Solution), "checked when the solution was read"
    return evidence.solved(module, scheme, shape)
