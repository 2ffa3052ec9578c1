"""Run a conversion in one line, and read a folder as bytes for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from v4quant.conversion.job import JobResult, run_job
from v4quant.conversion.plan import make_plan
from v4quant.recipe import Recipe
from v4quant_calibration.statistics.stats import Stats
from v4quant_formats.opening import open_checkpoint

TINY = Path(__file__).parents[1] / "data" / "tiny-a"
SCHEMES = (
    "mxfp4",
    "fp8",
    "bf16",
    "nvfp4",
    "int8-g32",
    "int8-g128",
    "int4-g32",
    "int4-g64",
    "int4-g128",
    "int3-g64",
    "int3-g128",
    "int2-g64",
    "int2-g128",
    "mxfp4/compressed-tensors",
    "mxfp8",
)
"""Every scheme and format, engine-neutral, as `recipe_of` reads them."""
VARIANTS = (
    "int4-g32@vllm",
    "int3-g128@vllm",
    "mxfp4/compressed-tensors@vllm",
    "mxfp8@vllm",
    "int4-g32@sglang",
    "int8-g32@sglang",
    "nvfp4@sglang",
)


def recipe_of(case: str) -> Recipe:
    """`scheme[/format][@engine]` as a Recipe."""
    rest, _, engine = case.partition("@")
    scheme, _, layout = rest.partition("/")
    return Recipe(scheme, format=layout, engine=engine or "neutral")


def convert(
    source: Path,
    out: Path,
    recipe: Recipe | str,
    workers: int = 2,
    stats: Stats | None = None,
    **more: Any,
) -> JobResult:
    """Plan and run; `recipe` may be a text for `recipe_of`."""
    with open_checkpoint(source) as checkpoint:
        chosen = recipe_of(recipe) if isinstance(recipe, str) else recipe
        plan = make_plan(checkpoint, chosen, "with stats" if stats else "")
        return run_job(plan, out, stats, workers, **more)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included."""
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
