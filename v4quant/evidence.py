"""evidence: what calibration left, opened for one conversion and checked against its recipe.

`--stats` takes either file that `calibrate` writes: statistics, or the folder of a solution. Only
the solver `gptq` packs a solution's codes, and only for the scheme they were solved for.
"""

from __future__ import annotations

from pathlib import Path

from v4quant.recipe import Recipe, RecipeError
from v4quant_calibration.solution import Evidence, is_solution, load_solution
from v4quant_calibration.stats import load_stats, stats_digest
from v4quant_formats.checkpoint import Checkpoint


def read_evidence(
    checkpoint: Checkpoint, path: Path | None, recipe: Recipe
) -> tuple[Evidence | None, str]:
    """Statistics or solution at `path` and its digest; (None, "") without a path.

    Raises StatsError, and RecipeError when recipe and evidence do not belong together.
    """
    if path is None or not is_solution(path):
        if recipe.solver == "gptq":
            raise RecipeError(
                "solver = 'gptq' needs a solution: run `v4quant calibrate SOURCE --solve "
                f"{recipe.scheme} --out solved` and give --stats solved"
            )
        if path is None:
            return None, ""
        return load_stats(path, checkpoint.digest()), stats_digest(path.read_bytes())
    solution = load_solution(path, checkpoint.digest())
    if recipe.solver == "gptq" and solution.scheme != recipe.scheme:
        raise RecipeError(
            f"{path}: was solved for {solution.scheme}, not for {recipe.scheme}; calibrate with "
            f"--solve {recipe.scheme}"
        )
    return solution, solution.digest
