"""Every kernel compiles for every architecture: no spills, within limits, on tensor cores.

Nothing runs here; it shows what can be shown without a GPU. The matrix is compiled once, in a
process without Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, str(Path(__file__).with_name("compile_matrix.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for record in found:
        sys.stdout.write(f"{record}\n")
    return found


def expected_mma(record: dict[str, Any]) -> list[str]:
    if record["kernel"] not in {"gate_up_kernel", "down_kernel", "indexer_kernel"}:
        return []
    if record["variant"].endswith(" 1"):
        return ["mma.sync"]  # 16 rows are too few for the wide instructions
    return [{90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(record["arch"], "mma.sync")]


def test_every_kernel_on_every_architecture(records: list[dict[str, Any]]) -> None:
    gemms = ("gate_up_kernel", "down_kernel", "indexer_kernel")
    compiled = {(r["kernel"], r["arch"]) for r in records}
    assert {(k, a) for k in gemms for a in SHARED_LIMIT} <= compiled
    assert {r["kernel"] for r in records} > {"count_kernel", "place_kernel", "combine_kernel"}


def test_nothing_spills_and_everything_fits(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["spilled_bytes"] == 0, record
        assert record["registers"] <= 255, record
        assert record["shared_bytes"] <= SHARED_LIMIT[record["arch"]], record


def test_tensor_cores_are_used(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["mma"] == expected_mma(record), record


def test_subnormals_are_kept_and_no_atomics(records: list[dict[str, Any]]) -> None:
    """Decoding multiplies float32 subnormals; a flushing multiply would lose them."""
    for record in records:
        assert not record["flushing"], record
        assert not record["atomics"], record
