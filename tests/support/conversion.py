"""Run a conversion in one line, and read a folder as bytes for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4quant.job import JobResult, run_job
from v4quant.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_calibration.stats import Stats
from v4quant_formats.checkpoint import open_checkpoint

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
SCHEMES = ("mxfp4", "fp8", "nvfp4", "int8-g32", "int8-g128", "int4-g32", "int4-g64", "int4-g128")


def convert(
    source: Path,
    out: Path,
    recipe: Recipe | str,
    workers: int = 2,
    stats: Stats | None = None,
    **more: Any,
) -> JobResult:
    """Plan and run; `recipe` may be just a scheme's name."""
    with open_checkpoint(source) as checkpoint:
        chosen = Recipe(recipe) if isinstance(recipe, str) else recipe
        plan = make_plan(checkpoint, chosen, "with stats" if stats else "")
        return run_job(plan, out, stats, workers, **more)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
