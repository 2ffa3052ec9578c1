"""The table of GGUF types: its page and its plot say what was measured, and no more."""

from __future__ import annotations

import json
from copy import deepcopy
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.support.scripts import load_script
from v4quant.recipe import recipe_from_table
from v4quant_kernels.ggml_types import GGML_TYPES
from v4quant_kernels.ref import ggml_blocks

# The solved types' KL over that of llama.cpp's encoder with the same importance.
BARS = {
    "iq2_xxs": 0.50, "iq2_xs": 0.48, "iq2_s": 0.45, "iq3_xxs": 0.47, "iq3_s": 0.35, "iq1_m": 0.55,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("quality_types")


def rows() -> dict[str, dict[str, Any]]:
    def scored(kl: float, tokens: int = 8192) -> dict[str, Any]:
        return {"kl": kl, "kl_stderr": kl / 10, "tokens": [32768, tokens]}

    return {
        "iq3_xxs": {"bits": 3.0625, "solved": scored(0.004), "llama.cpp": scored(0.008)},
        "iq2_xxs": {
            "bits": 2.0625, "searched": scored(0.027), "solved": scored(0.012),
            "llama.cpp": scored(0.03),
        },
        "q2_0": {"bits": 2.25, "solved": scored(0.018)},
        "q2_k": {"bits": 2.625, "searched": scored(0.02, 16384)},
    }  # fmt: skip


def test_the_page_is_ordered_by_bits_and_leaves_gaps(script: ModuleType) -> None:
    lines = [line for line in script.page(rows()).splitlines() if line.startswith("| `")]
    assert [line.split("`")[1] for line in lines] == ["iq2_xxs", "q2_0", "q2_k", "iq3_xxs"]
    first, second, searched, third = lines
    assert searched.endswith("| 2.6250 |  | 0.02000 ± 0.00200 |  |  |")
    assert first.endswith("| 0.03000 ± 0.00300 | 0.02700 ± 0.00270 | 0.01200 ± 0.00120 | 0.40 |")
    assert second.endswith("| 2.2500 |  |  | 0.01800 ± 0.00180 |  |")
    assert third.endswith("| 0.00800 ± 0.00080 |  | 0.00400 ± 0.00040 | 0.50 |")
    assert "8,192 tokens (`q2_k`: 16,384) of prose" in script.page(rows())


def test_the_plot_has_a_point_for_each_figure(script: ModuleType) -> None:
    drawn = ElementTree.fromstring(script.plot(rows()))
    tips = [t.text or "" for t in drawn.iter("{http://www.w3.org/2000/svg}title")]
    points = [t for t in tips if " at " in t]
    assert len(points) == 7
    assert "iq2_xxs, searched: 0.02700 at 2.0625" in points
    told = [t.text for t in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"bits per weight", "mean KL divergence, nats per token"} <= set(told)
    assert [told.count(name) for name in ("iq2_xxs", "q2_0", "iq3_xxs", "q2_k")] == [1] * 4


def test_types_that_nobody_solves_are_no_choice(script: ModuleType) -> None:
    assert "mxfp4" not in script.TYPES and {"iq1_s", "q2_0", "q8_0"} <= set(script.TYPES)
    with pytest.raises(SystemExit):
        script.main(["f16"])


def test_stored_types_are_below_their_bars(script: ModuleType) -> None:
    stored = json.loads(script.STORED.read_text())["types"]
    assert stored and script.PAGE.read_text() == script.page(stored)
    for name, row in stored.items():
        assert row["bits"] == GGML_TYPES[name].bits_per_weight
        theirs = row["llama.cpp"]["kl"]
        bars = {"searched": 1.0, "solved": BARS.get(name, 1.0)}
        tokens = {tuple(row[way]["tokens"]) for way in row.keys() & set(script.WAYS)}
        assert len(tokens) == 1, "figures of one type are of one text"
        ours = row.keys() & bars.keys()  # the page leaves a gap where nothing was measured
        assert ours and all(row[way]["kl"] <= bars[way] * theirs for way in ours), name
    assert "solved" in stored["iq2_xxs"]
    integers = json.loads(script.QUALITY.read_text())["full"]["rows"]
    like = next(r for r in integers if r["scheme"] == "int2-g64" and r["solver"] == "propagated")
    assert stored["q2_0"]["solved"]["kl"] <= like["kl"] + like["kl_stderr"] / 2


def test_drift_of_the_reduced_row_is_told(script: ModuleType) -> None:
    """What `.ci/run` compares: a type with vectors of eight and one with vectors of four."""
    reduced = json.loads(script.STORED.read_text())["reduced"]
    assert reduced.keys() == {"searched", "solved"}
    assert reduced["solved"]["kl"] < 0.7 * reduced["searched"]["kl"]
    assert script.drift(reduced, deepcopy(reduced)) == []
    found = deepcopy(reduced)
    found["searched"]["kl"] *= 1.2
    (line,) = script.drift(reduced, found)
    assert line.startswith("searched: mean KL")
    recipe = recipe_from_table(script.REDUCED, "reduced")
    shapes = [ggml_blocks.SHAPES[s].codebook for s in set(recipe.places.values())]
    assert sorted(c.vector for c in shapes if c is not None) == [4, 8]
