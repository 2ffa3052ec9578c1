"""The documents' tables of schemes and layouts are those of the code."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from tests.docs.pages import ROOT, Page
from v4quant_formats.layouts.table import LAYOUTS
from v4quant_formats.manifest import read_manifest
from v4quant_formats.spec import DTYPE_BITS
from v4quant_kernels.scheme import SCHEMES


def rows(name: str) -> list[list[str]]:
    """Cells of all table rows of a page, without code marks."""
    lines = Page(ROOT / name).prose.splitlines()
    return [
        [cell.strip().replace("`", "") for cell in line.split("|")[1:-1]]
        for line in lines
        if line.startswith("|")
    ]


def stored_bits(layout: str, scheme: str) -> float:
    """Bits per weight of one large expert matrix as the layout writes it."""
    shape = (2048, 4096)
    parts = LAYOUTS[layout].expert_parts(SCHEMES[scheme], shape)
    bits = 0
    for dtype, size in parts.values():
        count = 1
        for n in size:
            count *= n
        bits += count * DTYPE_BITS.get(dtype, 8)  # GGUF's blocks are counted in bytes
    return bits / (shape[0] * shape[1])


def test_schemes_page_lists_every_pair_once() -> None:
    listed = [(r[0], r[1]) for r in rows("docs/schemes.md") if len(r) == 7 and r[0] in SCHEMES]
    pairs = [(scheme, layout.name) for layout in LAYOUTS.values() for scheme in layout.schemes]
    assert sorted(listed) == sorted(pairs)


def test_schemes_page_bits_are_those_stored() -> None:
    for row in rows("docs/schemes.md"):
        if len(row) == 7 and row[0] in SCHEMES:
            assert abs(float(row[2]) - stored_bits(row[1], row[0])) < 6e-4, row


def test_schemes_page_engines_are_those_of_the_layout() -> None:
    for row in rows("docs/schemes.md"):
        if len(row) == 7 and row[0] in SCHEMES:
            for engine in re.split(r", ", row[6]):
                assert engine in LAYOUTS[row[1]].engines, row


def test_formats_page_lists_every_scheme_with_its_bits() -> None:
    listed: dict[str, float] = {}
    for row in rows("docs/formats.md"):
        if len(row) == 6 and row[0].split(", ")[0] in SCHEMES:
            bits = [float(b) for b in row[4].split(", ")]
            listed |= dict(zip(row[0].split(", "), bits, strict=True))
    assert listed.keys() == SCHEMES.keys()
    for name, bits in listed.items():
        assert abs(bits - SCHEMES[name].bits_per_weight) < 5e-5, name


def test_formats_page_lists_every_tensor_of_a_layout() -> None:
    text = Page(ROOT / "docs" / "formats.md").text
    for layout in LAYOUTS.values():
        assert f"### `{layout.name}`" in text
        for scheme in layout.schemes:
            for suffix in layout.expert_parts(SCHEMES[scheme], (128, 256)):
                assert f"P`.{suffix}`" in text, (layout.name, suffix)


def test_schemes_without_a_layout_are_named() -> None:
    written = {scheme for layout in LAYOUTS.values() for scheme in layout.schemes}
    line = re.search(
        r"^(.*)exist as number formats only", Page(ROOT / "docs/formats.md").text, re.M
    )
    named = re.findall(r"`([\w-]+)`", line[1]) if line else []
    missing = SCHEMES.keys() - written
    assert {name.partition("-")[0] for name in missing} == set(named)


FIGURES = ("divergence.py", "evaluate.py", "verdict.py")


def test_evaluation_page_names_keys_that_exist() -> None:
    folder = ROOT / "calibration" / "v4quant_calibration" / "evaluation"
    source = "".join((folder / name).read_text() for name in FIGURES)
    keys = {k for row in rows("docs/evaluation.md") if len(row) == 3 for k in row[1].split(", ")}
    keys = {key for key in keys if re.fullmatch(r"[a-z0-9_]+", key)}
    assert len(keys) > 15
    assert not {key for key in keys if f'"{key}"' not in source}


def test_manifest_fields_are_those_written(converted: Callable[[str], Path]) -> None:
    manifest = read_manifest(converted("int4-g32"))
    text = Page(ROOT / "docs" / "formats.md").text
    listed = [r[0] for r in rows("docs/formats.md") if len(r) == 2 and r[0] in manifest]
    assert listed == list(manifest)
    records = {key for row in manifest["tensors"] for key in row}
    for key in records | {key for row in manifest["files"] for key in row}:
        assert f"`{key}`" in text, key
