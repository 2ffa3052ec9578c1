"""The quality table: what its stored figures must say, and how drift is told."""

from __future__ import annotations

import json
from copy import deepcopy
from types import ModuleType
from typing import Any

import pytest

from tests.support.scripts import load_script


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script("quality_table")


@pytest.fixture
def stored(script: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(script.STORED.read_text())["reduced"]
    return found


def test_solving_pays_in_the_stored_rows(script: ModuleType, stored: dict[str, Any]) -> None:
    """At two bits solving halves the loss; on a tenth of the text it takes off a quarter."""
    plain, solved = stored["rows"]
    assert (plain["solver"], solved["solver"]) == ("optimal", "propagated")
    assert stored["floor_kl"] < solved["kl"] < 0.8 * plain["kl"]
    full = script.by_name(json.loads(script.STORED.read_text())["full"])
    assert full["int2-g64 propagated"]["kl"] < 0.5 * full["int2-g64 optimal"]["kl"]
    for part, kl in solved["parts"].items():
        assert kl < plain["parts"][part]


def test_calibration_loses_on_no_part_of_the_text(script: ModuleType) -> None:
    """Beyond the error bar of the uncalibrated row, in the stored full table."""
    rows = json.loads(script.STORED.read_text())["full"]["rows"]
    by = {(row["scheme"], row["solver"]): row for row in rows}
    for scheme in script.SCHEMES:
        plain = by[scheme, "optimal"]
        for solver in ("gptq", "refined", "propagated"):
            for part, kl in by[scheme, solver]["parts"].items():
                assert kl <= plain["parts"][part] + plain["kl_stderr"], (scheme, solver, part)


def test_drift_is_told_by_row(script: ModuleType, stored: dict[str, Any]) -> None:
    found = deepcopy(stored)
    found["rows"][1]["kl"] *= 1.3
    (line,) = script.drift(script.by_name(stored), script.by_name(found))
    assert "int2-g64 propagated: mean KL" in line


def test_page_has_every_row(script: ModuleType) -> None:
    rows = [
        {"scheme": scheme, "solver": solver, "bits": 3.125, "kl": 0.001 * i, "kl_stderr": 1e-4,
         "perplexity": 40.0 + i, "parts": {"heldout-code": 0.1}}
        for i, (scheme, solver) in enumerate(
            (scheme, solver) for scheme in script.SCHEMES for solver in script.SOLVERS
        )
    ]  # fmt: skip
    text = script.page(
        {"calibration_tokens": 1, "heldout_tokens": 2, "floor_kl": 1e-4,
         "reference_perplexity": 39.0, "rows": rows}
    )  # fmt: skip
    for row in rows:
        assert f"{row['kl']:.5f}" in text and f"{row['perplexity']:.3f}" in text
