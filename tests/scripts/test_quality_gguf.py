"""The GGUF table: what its stored figures must say, and how drift is told."""

from __future__ import annotations

import json
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import load_script
from v4quant.conversion.plan import make_plan
from v4quant.recipe import recipe_from_table
from v4quant.sizes import parse_size
from v4quant_formats.opening import open_checkpoint


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("quality_gguf")


@pytest.fixture
def stored(script: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(script.STORED.read_text())
    return found


# Of llama.cpp's KL; with an importance matrix it is a better one, and so is what is asked of us.
BARS = {False: 0.6, True: 0.35}


def test_solved_files_are_smaller_and_much_closer(
    script: ModuleType, stored: dict[str, Any]
) -> None:
    """At no more bytes a fraction of llama.cpp's KL, in every part of the text too."""
    without = {name for name, rival in script.RIVALS.items() if not rival.imatrix}
    assert without <= stored["rows"].keys() <= script.RIVALS.keys()
    with open_checkpoint(script.TINY) as source:
        for name, row in stored["rows"].items():
            rival = script.RIVALS[name]
            plan = make_plan(source, recipe_from_table(row["recipe"], name))
            # Texts in the header (the chat template) have grown since the rows were measured.
            assert 0 <= plan.bytes_out - row["bytes"] < 1024
            assert row["bytes"] <= parse_size(rival.size)
            assert row["bytes"] <= row["llama.cpp"]["bytes"]
            bar = BARS[rival.imatrix]
            assert row["solved"]["kl"] <= bar * row["llama.cpp"]["kl"], name
            for part, kl in row["solved"]["parts"].items():
                assert kl <= 1.1 * bar * row["llama.cpp"]["parts"][part]
                if "searched" in row:
                    slack = 2 * row["searched"]["kl_stderr"]
                    assert kl <= row["searched"]["parts"][part] + slack, (name, part)


def test_drift_is_told(script: ModuleType, stored: dict[str, Any]) -> None:
    reduced = stored["reduced"]
    assert reduced["solved"]["kl"] < 0.7 * reduced["searched"]["kl"]
    assert script.drift(reduced, deepcopy(reduced)) == []
    found = deepcopy(reduced)
    found["solved"]["kl"] *= 1.3
    (line,) = script.drift(reduced, found)
    assert line.startswith("solved: mean KL")
    found["solved again"] = found.pop("solved")
    gone, new = script.drift(reduced, found)
    assert gone == "solved: stored, but not measured now" and "not stored" in new


def test_page_is_of_the_stored_rows(script: ModuleType, stored: dict[str, Any]) -> None:
    text = script.page(stored["rows"])
    assert text == script.PAGE.read_text()
    for row in stored["rows"].values():
        for name in row.keys() & set(script.WAYS):
            assert f"{row[name]['kl']:.5f}" in text


def test_the_plot_has_a_dot_for_each_figure(script: ModuleType, stored: dict[str, Any]) -> None:
    drawn = script.plot(stored["rows"])
    assert drawn + "\n" == script.PLOT.read_text()
    for name, row in stored["rows"].items():
        for way in row.keys() & set(script.WAYS):
            assert f"{name}, {way}: {row[way]['kl']:.5f} at " in drawn
        assert f">{name}</text>" in drawn
    assert ">mean KL divergence, nats per token</text>" in drawn
