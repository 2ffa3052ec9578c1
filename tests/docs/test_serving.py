"""The table of docs/serving.md is what preflight says of our own outputs."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page
from tests.support.conversion import SCHEMES, VARIANTS, recipe_of
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.preflight import preflight

ENGINES = ("vllm", "sglang", "transformers", "tensorrt-llm")


def table() -> list[list[str]]:
    lines = Page(ROOT / "docs" / "serving.md").text.splitlines()
    cells = [[c.strip().replace("`", "") for c in x.split("|")[1:-1]] for x in lines if "|" in x]
    return [row for row in cells if len(row) == 7 and row[1] in FORMATS]


FORMATS = ("deepseek", "modelopt", "compressed-tensors")


@pytest.mark.parametrize("case", [*SCHEMES, *VARIANTS])
def test_serving_table(case: str, converted: Callable[[str], Path]) -> None:
    recipe = recipe_of(case)
    engine = "" if recipe.engine == "neutral" else recipe.engine
    rows = [
        row
        for row in table()
        if (row[1], row[2]) == (recipe.format, engine)
        and any(fnmatchcase(recipe.scheme, s) for s in row[0].split(", "))
    ]
    if not rows and case in ("mxfp4/compressed-tensors@vllm", "mxfp8@vllm"):
        return  # the neutral row speaks for them
    assert len(rows) == 1, case
    with open_checkpoint(converted(case)) as checkpoint:
        for name, said in zip(ENGINES, rows[0][3:], strict=True):
            assert preflight(checkpoint, name).loads == (said == "yes"), (case, name)
