"""The page's sizes of Flash and Pro as GGUF are those of their tensors.

Sizes are summed over the releases' own lists of tensors (no data is needed), draft stages left out,
with the types that the planner gives rows: the file's header, some megabytes, is not in them.
"""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from tests.support.scripts import load_script
from v4quant.planner.footprint import Outline, footprint, outline_checkpoint, outline_release
from v4quant.synthetic.configs import make_config
from v4quant.synthetic.inventory import shards_of
from v4quant_formats.deepseek_v4 import parse_name
from v4quant_formats.layouts.gguf import GGUF
from v4quant_formats.opening import open_checkpoint
from v4quant_kernels.ggml_types import fitting_type, get_type

PAGE = Path(__file__).parents[3] / "docs" / "allocation.md"
DENSE = "q6_k"
ROW = re.compile(r"^\| `([a-z0-9_]+)` \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


@cache
def shapes(release: str) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]], int]:
    """Expert matrices, other matrices that take a dense type (by shape), bytes of all else."""
    experts: Counter[tuple[int, int]] = Counter()
    dense: Counter[tuple[int, int]] = Counter()
    rest = 0
    for shard in shards_of(release, make_config(release, False, {})):
        for spec in shard:
            name = parse_name(spec.name)
            if name is None or name.is_draft or not spec.name.endswith("weight"):
                rest += 0 if name is None or name.is_draft or name.is_linear else spec.nbytes
                continue
            if name.expert is not None:
                experts[spec.shape[0], spec.shape[1] * (2 if spec.dtype == "I8" else 1)] += 1
            elif name.is_linear:
                dense[spec.shape[0], spec.shape[1]] += 1
            else:
                rest += spec.nbytes
    return experts, dense, rest


def gigabytes(release: str, scheme: str, dense_type: str = DENSE) -> float:
    """Of a file with all experts in one type and dense matrices in another."""
    experts, dense, total = shapes(release)
    for found, wanted in ((experts, scheme), (dense, dense_type)):
        for (rows, columns), count in found.items():
            kind = get_type(fitting_type(wanted, columns))
            total += count * rows * kind.row_bytes(columns)
    return total / 1e9


BUDGET = re.compile(
    r"^\| (Flash|Pro) \| (\d+)GB \| `(\w+)` \| `(\w+)` \| (\d+) \| `(\w+)` \| ([\d,]+) \|$",
    re.MULTILINE,
)


def listed() -> dict[str, tuple[float, float]]:
    return {m[1]: (float(m[2]), float(m[3])) for m in ROW.finditer(PAGE.read_text())}


def test_every_type_is_on_the_page() -> None:
    assert listed().keys() == set(GGUF.schemes)


@pytest.mark.parametrize("column", [0, 1], ids=["flash", "pro"])
def test_sizes_are_those_of_the_tensors(column: int) -> None:
    release = ("flash", "pro")[column]
    for scheme, sizes in listed().items():
        assert sizes[column] == pytest.approx(gigabytes(release, scheme), abs=0.06), scheme


def test_budgets_lie_between_two_types() -> None:
    rows = BUDGET.findall(PAGE.read_text())
    assert [int(b) for model, b, *_ in rows if model == "Flash"] == [128, 110, 96, 80, 70, 60]
    assert min(int(b) for model, b, *_ in rows if model == "Pro") == 380
    for model, budget, lower, upper, _, dense, _ in rows:
        release = model.lower()
        sizes = sorted((gigabytes(release, s, dense), s) for s in GGUF.schemes)
        fitting = [(size, s) for size, s in sizes if size <= float(budget)]
        larger = [(size, s) for size, s in sizes if size > float(budget)]
        at_most = {s for size, s in fitting if size == pytest.approx(fitting[-1][0], rel=1e-9)}
        at_least = {s for size, s in larger if size == pytest.approx(larger[0][0], rel=1e-9)}
        assert lower in at_most and upper in at_least, (model, budget)


SIZES = load_script("release_sizes")


def test_the_dry_runs_of_the_page_are_what_the_planner_says() -> None:
    """A whole release takes a minute to plan; the planner asks for a few experts a layer."""
    rows = BUDGET.findall(PAGE.read_text())
    told = {(model.lower(), int(budget)): dense for model, budget, *_, dense, _ in rows}
    assert told == {(r, b): d for r, budgets in SIZES.BUDGETS.items() for b, d in budgets.items()}
    for model, budget, lower, upper, layers, dense, size in rows:
        recipe = SIZES.mixed(lower, upper, int(layers), dense)
        planned = footprint(_outline(model.lower()), recipe).trunk
        headers = int(size.replace(",", "")) - planned
        assert 0 < headers < SIZES.HEADERS, (model, budget, headers)
        assert planned + headers <= int(budget) * 10**9, (model, budget)


@cache
def _outline(release: str) -> Outline:
    return outline_release(release)


def test_a_dry_run_accepts_such_a_recipe_and_says_the_planners_size(tmp_path: Path) -> None:
    """With eight experts a layer; sizes and layers are the release's."""
    source, text = SIZES.make_source(tmp_path, "flash", experts=8)
    with open_checkpoint(source) as checkpoint:
        outline = outline_checkpoint(checkpoint)
    recipe = SIZES.mixed("iq1_m", "iq2_xxs", 20, "q6_k")
    planned = footprint(outline, recipe).trunk
    assert 0 < SIZES.dry_run(source, recipe, text) - planned < 10**6
    more = SIZES.mixed("iq1_m", "iq2_xxs", 21, "q6_k")
    matrices = 3 * 8 * 2048 * 4096
    grown = matrices * (get_type("iq2_xxs").block_bytes - get_type("iq1_m").block_bytes) // 256
    assert footprint(outline, more).trunk - planned == grown


def test_the_smallest_flash() -> None:
    """Experts, dense matrices, embedding and head in the smallest type."""
    dims = make_config("flash", False, {})
    stored = 2 * dims["vocab_size"] * dims["hidden_size"]
    saved = stored * (2 - get_type("iq1_s").bits_per_weight / 8) / 1e9
    least = gigabytes("flash", "iq1_s", "iq1_s") - saved
    (told,) = re.findall(r"\(([\d.]+) GB at least\)", PAGE.read_text())
    assert float(told) == pytest.approx(least, abs=0.06)
