"""The counts that docs/kernels.md shows are those of the stored baseline."""

from __future__ import annotations

import json
import re

import pytest

from tests.docs.pages import ROOT

BASELINE = json.loads((ROOT / "kernels" / "bench" / "instructions.json").read_text())["kernels"]
ARCHITECTURES = (80, 89, 90, 100, 120)
LIMIT = 3.8
CELL = re.compile(r"(\d+\.\d) \((\d+)\)")


def rows() -> list[tuple[str, str, list[str]]]:
    """(heading above the table, first cell, other cells) of every row of counts."""
    found, tiles = [], ""
    for line in (ROOT / "docs" / "kernels.md").read_text().splitlines():
        if line.startswith(("Tiles of", "The indexer, per")):
            tiles = line
        cells = [c.strip() for c in line.split("|")[1:-1]]
        if len(cells) == 6 and any(CELL.match(c) for c in cells):
            found.append((tiles, cells[0], cells[1:]))
    return found


def baseline(tiles: str, title: str, arch: int) -> dict[str, float] | None:
    if tiles.startswith("The indexer"):
        kernel = "shared_kernel" if title == "prefill" else "own_kernel"
        operand = {80: "bf16", 89: "fp8", 90: "fp8"}.get(arch, "native")
        return BASELINE[f"{kernel} {operand} {title} sm_{arch}"]
    scheme, _, activations = title.partition(", ")
    scheme = scheme.lower().replace(" 128x128", "").replace(" ", "-")
    tile = "16 sums" if "16 slots" in tiles else "128 swiglu"
    name = f"{scheme} {activations.split(' ')[0].lower() or 'bf16'} {tile} sm_{arch}"
    return BASELINE.get(f"gemm_kernel {name}") or BASELINE.get(f"native_gemm_kernel {name}")


def test_the_page_has_its_tables() -> None:
    assert len(rows()) == 12 + 12 + 2


@pytest.mark.parametrize(("tiles", "title", "cells"), rows())
def test_counts(tiles: str, title: str, cells: list[str]) -> None:
    for arch, cell in zip(ARCHITECTURES, cells, strict=True):
        stored = baseline(tiles, title, arch)
        if stored is None:
            assert cell == "-"
        else:
            assert cell == f"{stored['per_weight']:.1f} ({stored['registers']})"


def affordable() -> list[tuple[str, list[str]]]:
    """Rows of the table of counts at most 3.8, in prefill for 64 slots."""
    lines = (ROOT / "docs" / "kernels.md").read_text().splitlines()
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in lines]
    return [(c[0], c[1:]) for c in cells if len(c) == 6 and set(c[1:]) & {"both", "decode"}]


def test_what_the_issue_slots_afford() -> None:
    assert len(affordable()) == 12
    for title, cells in affordable():
        for arch, cell in zip(ARCHITECTURES, cells, strict=True):
            decode, prefill = (
                baseline(f"Tiles of {tiles}", title, arch) for tiles in ("16 slots", "up to 128")
            )
            if decode is None or prefill is None:
                assert cell == "-"
                continue
            shared = prefill["slots"] / 64  # so often the 64 slots are in a tile
            fits = decode["per_weight"] <= LIMIT, prefill["per_weight"] <= LIMIT * shared
            names = {(True, True): "both", (True, False): "decode", (False, True): "prefill"}
            assert cell == names.get(fits, "neither"), (title, arch)
