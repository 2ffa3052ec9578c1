"""Kernels compile for every architecture: no spills, within limits, on the right tensor cores.

Nothing runs here; it shows what can be shown without a GPU. `kernels/bench/compile_grid.py`
compiles a sample of the grid in a process without Triton's interpreter; V4QUANT_FULL_GRID=1
compiles all of it. The instructions a kernel spends per weight are compared with the stored
baseline, which holds for one minor version of Triton.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
GRID = ROOT / "kernels" / "bench" / "compile_grid.py"
KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
MORE = 1.10  # a kernel may spend this much more than its baseline
FULL = os.environ.get("V4QUANT_FULL_GRID") == "1"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), *sys.path])
    command = [sys.executable, str(GRID), *(["--full"] if FULL else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    for record in found:
        sys.stdout.write(f"{record}\n")
    assert not [r for r in found if "error" in r]
    return found


def expected_mma(record: dict[str, Any]) -> str:
    """How the machine code's matrix instruction begins."""
    arch, variant, kernel = record["arch"], record["variant"].split(), record["kernel"]
    if kernel == "native_gemm_kernel":
        return "UTCQMMA" if arch == 100 else "QMMA.SF"
    if "gemm" not in kernel:  # the indexer's scores
        of_operand = {
            "bf16": {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA"),
            "fp8": "QGMMA" if arch == 90 else "QMMA",
            "native": "UTCOMMA" if arch == 100 else "OMMA.SF",
        }
        return of_operand[variant[0]]
    if variant[1] == "e4m3":
        return {89: "QMMA", 90: "QGMMA"}.get(arch, "UTCQMMA" if arch == 100 else "QMMA")
    wide = {90: "HGMMA", 100: "UTCHMMA"}.get(arch, "HMMA")
    # 16 rows are too few for the wide instructions, unless weights are on the left.
    return wide if variant[2] != "16" or record["swap"] else "HMMA"


def test_every_kernel_on_every_architecture(records: list[dict[str, Any]]) -> None:
    compiled = {(r["kernel"], r["arch"]) for r in records}
    wanted = {("gemm_kernel", a) for a in SHARED_LIMIT}
    wanted |= {("native_gemm_kernel", 100), ("native_gemm_kernel", 120)}
    wanted |= {("shared_kernel", a) for a in SHARED_LIMIT} | {("own_kernel", a) for a in (80, 90)}
    assert wanted <= compiled
    layouts = {f"{code}/field" for code in ("t16", "e16")} | {"t16/ue5m3", "i4/bf16", "i8/bf16"}
    layouts |= {"t8/relative", "b8/e8m0", "n4/e8m0", "t8/e8m0"}
    assert layouts <= {r["layout"] for r in records}
    small = {
        "expand_kernel",
        "count_kernel",
        "place_kernel",
        "combine_kernel",
        "quantize_kernel",
        "activate_kernel",
        "best_scale_kernel",
        "round_group_kernel",
        "code_steps_kernel",
    }
    assert small < {r["kernel"] for r in records}


def test_nothing_spills_and_everything_fits(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["spilled_bytes"] == 0, record
        assert record["registers"] <= 255, record
        assert record["shared_bytes"] <= SHARED_LIMIT[record["arch"]], record


def test_the_right_tensor_cores_are_used(records: list[dict[str, Any]]) -> None:
    for record in records:
        if record["per_weight"] is not None:
            assert record["mma"], record
            assert all(m.startswith(expected_mma(record)) for m in record["mma"]), record
        else:
            assert record["mma"] == [], record


def test_subnormals_are_kept_and_no_atomics(records: list[dict[str, Any]]) -> None:
    """Decoding multiplies float32 subnormals; a flushing multiply would lose them."""
    for record in records:
        assert not record["flushing"], record
        assert not record["atomics"], record


def test_instructions_per_weight(records: list[dict[str, Any]]) -> None:
    import triton

    baseline = json.loads(GRID.with_name("instructions.json").read_text())
    here = ".".join(triton.__version__.split(".")[:2])
    if ".".join(baseline["triton"].split(".")[:2]) != here:
        pytest.skip(f"the baseline is of Triton {baseline['triton']}, this is {here}")
    counted = [r for r in records if r["per_weight"] is not None]
    assert counted
    for record in counted:
        stored = baseline["kernels"][record["name"]]["per_weight"]
        assert record["per_weight"] <= MORE * stored, (record, stored)
