"""The budgets people have, dry-run on releases of full size: a table of docs/allocation.md.

    scripts/release_sizes.py            all rows, into docs/allocation.md
    scripts/release_sizes.py --check    the same, compared with the page instead

For each budget a recipe is written by hand, as `allocate` would without data: all experts in the
largest type that fits, and as many of the first layers as still fit in the next larger. The planner
says how many bytes that is, from a few experts a layer. Then the whole release, true headers over
sparse files (69,187 tensors of Flash, 145,116 of Pro), goes through `quantize --dry-run` with that
recipe; it must accept it, and its size may differ by the files' own headers only. One-bit types
need an importance matrix of all layers to be accepted: one of ones.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

import v4quant
from v4quant.planner.footprint import Outline, footprint, outline_release
from v4quant.recipe import Recipe
from v4quant.synthetic.configs import make_config
from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_formats.gguf.imatrix import Inputs, write_imatrix
from v4quant_formats.layouts.gguf import GGUF
from v4quant_kernels.ggml_types import get_type

PAGE = Path(__file__).resolve().parents[1] / "docs" / "allocation.md"
BUDGETS = {
    "flash": {128: "q6_k", 110: "q6_k", 96: "q6_k", 80: "q6_k", 70: "q6_k", 60: "q3_k"},
    "pro": {640: "q6_k", 500: "q6_k", 440: "q6_k", 380: "q6_k"},
}
"""Gigabytes, and the type of dense matrices that leaves room for them."""
HEADERS = 64 * 10**6
"""More than metadata, tensor tables and alignment of any of these files take."""

Row = tuple[str, int, str, str, int, str, int]


@dataclass(frozen=True)
class Choice:
    """A recipe for a budget: `layers` first layers in `upper`, the others in `lower`.

    planned: bytes of all tensors, by the planner.
    """

    lower: str
    upper: str
    layers: int
    recipe: Recipe
    planned: int


def choose(outline: Outline, budget: int, dense: str) -> Choice:
    """The fullest such recipe that fits, headers included."""
    files = []
    for scheme in GGUF.schemes:
        recipe = Recipe(scheme, "gguf", dense=dense, draft="drop")
        files.append((footprint(outline, recipe), recipe))
    room = budget - HEADERS
    files.sort(key=lambda f: (f[0].trunk, -get_type(f[1].scheme).bits_per_weight))
    lower, recipe = [f for f in files if f[0].trunk <= room][-1]
    upper, larger = next(f for f in files if f[0].trunk > room)
    planned, layers = lower.trunk, 0
    for small, large in zip(lower.layers, upper.layers, strict=True):
        if planned + large.experts - small.experts > room:
            break
        planned, layers = planned + large.experts - small.experts, layers + 1
    chosen = mixed(recipe.scheme, larger.scheme, layers, dense)
    assert footprint(outline, chosen).trunk == planned, (chosen, planned)
    return Choice(recipe.scheme, larger.scheme, layers, chosen, planned)


def mixed(lower: str, upper: str, layers: int, dense: str) -> Recipe:
    """All experts in `lower`, those of the first layers in `upper`."""
    places = ((f"layers.0-{layers - 1}.experts", upper),) if layers else ()
    return Recipe(lower, "gguf", dense=dense, draft="drop", schemes=places)


def dry_run(source: Path, recipe: Recipe, text: Path) -> int:
    """Bytes of all files that `quantize --dry-run` says."""
    found = v4quant.plan_quantize(source, source.parent / "out", recipe=recipe, stats=text)
    return found.bytes_out


def make_source(folder: Path, release: str, experts: int | None = None) -> tuple[Path, Path]:
    """A release's headers over sparse files, and an importance matrix for it."""
    few = (("n_routed_experts", experts),) if experts else ()
    source, text = folder / release, folder / f"{release}-imatrix.gguf"
    write_checkpoint(source, Request(release, False, few, headers_only=True))
    dims = make_config(release, False, dict(few))
    count, hidden = dims["n_routed_experts"], dims["hidden_size"]
    widths = {"gate": hidden, "up": hidden, "down": dims["moe_intermediate_size"]}
    alike = {
        name: Inputs(torch.ones(count, width), torch.ones(count)) for name, width in widths.items()
    }
    ones = {
        f"blk.{layer}.ffn_{name}_exps.weight": inputs
        for layer in range(dims["num_hidden_layers"])
        for name, inputs in alike.items()
    }
    write_imatrix(text, ones, ["ones"], 1, 1)
    return source, text


def rows() -> Iterator[Row]:
    """Every row of the page's table, measured."""
    for release, budgets in BUDGETS.items():
        outline = outline_release(release)
        with tempfile.TemporaryDirectory(prefix="v4quant-sizes-") as scratch:
            source, text = make_source(Path(scratch), release)
            for budget, dense in budgets.items():
                found = choose(outline, budget * 10**9, dense)
                size = dry_run(source, found.recipe, text)
                assert 0 < size - found.planned < HEADERS, (found, size)
                assert size <= budget * 10**9, (found, size)
                yield (
                    release, budget, found.lower, found.upper, found.layers, dense, size,
                )  # fmt: skip


def line(row: Row) -> str:
    """A row as the page has it."""
    release, budget, lower, upper, layers, dense, size = row
    return (
        f"| {release.capitalize()} | {budget}GB | `{lower}` | `{upper}` | {layers} | "
        f"`{dense}` | {size:,} |"
    )


TABLE = re.compile(r"(?<=\|---:\|---\|---:\|\n)(?:\| (?:Flash|Pro) \|.*\|\n)+")


def main() -> int:
    """Measure, and write the page or compare with it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--check", action="store_true", help="compare with the page")
    options = parser.parse_args()
    lines = []
    for row in rows():
        lines.append(line(row))
        print(lines[-1], flush=True)
    text, table = PAGE.read_text(encoding="utf-8"), "\n".join(lines) + "\n"
    if options.check:
        return 0 if table in text else 1
    PAGE.write_text(TABLE.sub(lambda _: table, text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
