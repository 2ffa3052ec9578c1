"""The table of GGUF types: what its stored figures must say, its page and its plot."""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.scripts import load_script
from v4quant_kernels.ggml_types import GGML_TYPES

# The solved types' KL over llama.cpp's with the same importance.
BARS = {
    "iq2_xxs": 0.50, "iq2_xs": 0.48, "iq2_s": 0.45, "iq3_xxs": 0.47, "iq3_s": 0.35, "iq1_m": 0.55,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("quality_types")


@pytest.fixture
def rows(script: ModuleType) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(script.STORED.read_text())["types"]
    return found


def test_stored_types_are_below_their_bars(rows: dict[str, dict[str, Any]]) -> None:
    assert rows.keys() <= GGML_TYPES.keys()
    for name, row in rows.items():
        assert row["bits"] == GGML_TYPES[name].bits_per_weight
        if "llama.cpp" in row and "searched" in row:
            slack = row["searched"]["kl_stderr"]
            assert row["searched"]["kl"] <= row["llama.cpp"]["kl"] + slack, name
        if "llama.cpp" in row and "solved" in row and name in BARS:
            assert row["solved"]["kl"] <= BARS[name] * row["llama.cpp"]["kl"], name


def test_page_and_plot_are_what_is_stored(
    script: ModuleType, rows: dict[str, dict[str, Any]]
) -> None:
    page = script.page(rows)
    assert script.PAGE.read_text() == page
    for name, row in rows.items():
        for way in script.WAYS:
            assert (way not in row) or f"{row[way]['kl']:.5f}" in page, (name, way)
    drawn = ElementTree.fromstring(script.PLOT.read_text())
    assert script.PLOT.read_text() == script.plot(rows) + "\n"
    tips = [t.text or "" for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
    measured = sum(way in row for row in rows.values() for way in script.WAYS)
    assert len([t for t in tips if " at " in t]) == measured
