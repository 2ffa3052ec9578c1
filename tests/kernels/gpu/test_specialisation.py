"""What Triton's interpreter does not see: arguments made constants, and addresses beyond 32 bits.

Both are asked of Triton's first intermediate form, in a process without the interpreter.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BENCH = ROOT / "kernels" / "bench"


def run(script: str, *arguments: str) -> list[dict[str, Any]]:
    """What a script of kernels/bench prints."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), *sys.path])
    command = [sys.executable, str(BENCH / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records: list[dict[str, Any]] = json.loads(done.stdout)
    return records


@pytest.fixture(scope="module")
def offsets() -> ModuleType:
    sys.path.insert(0, str(BENCH))  # scripts there import one another
    spec = importlib.util.spec_from_file_location("int32_offsets", BENCH / "int32_offsets.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def kernels_in_the_package() -> set[str]:
    """Names of all functions that are launched: Triton's, and called by no other of Triton's."""
    jitted: dict[str, ast.FunctionDef] = {}
    for file in (ROOT / "kernels" / "v4quant_kernels" / "gpu").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and "triton.jit" in map(
                ast.unparse, (getattr(d, "func", d) for d in node.decorator_list)
            ):
                jitted[node.name] = node
    called = {
        ast.unparse(node.func)
        for function in jitted.values()
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
    }
    return set(jitted) - called - {"_probe"}  # by which `interpreting` finds out


def test_every_kernel_compiles_however_it_is_specialised() -> None:
    """One key, a last piece of one token, sizes that are multiples of 16, odd addresses."""
    records = run("compile_grid.py", "--special")
    assert not [r for r in records if "error" in r]
    assert {r["kernel"] for r in records} == kernels_in_the_package()
    looked_at = {r["name"].rpartition(": ")[2] for r in records}
    assert {"columns=1", "num_slots=1", "rows=1", "k=1", "all integers 1"} < looked_at
    assert {"integers of 16", "addresses not of 16"} < looked_at


def test_what_wrappers_launch_compiles_and_is_what_the_grid_compiles() -> None:
    records = run("launches.py")
    assert not [r for r in records if "error" in r or r["unforeseen"]]
    assert {r["kernel"] for r in records} == kernels_in_the_package()
    assert {r["arch"] for r in records} == {80, 90, 100, 120}


def test_addresses_stay_within_32_bits_at_the_sizes_of_pro() -> None:
    """And at four times these; the proof fails where they do not: at a thousand times."""
    records = run("int32_check.py", "--scale", "1", "4", "1000")
    assert {r["kernel"] for r in records} == kernels_in_the_package()
    at_pro = [r for r in records if r["scale"] == 1]
    assert not [r for r in at_pro if r["problems"]]
    larger = [r for r in records if r["scale"] == 4 and r["problems"]]
    assert {r["kernel"] for r in larger} == {"place_kernel"}
    assert all(r["grid"][0] < 2**31 and max(r["grid"][1:]) < 2**16 for r in at_pro)
    beyond = {r["kernel"] for r in records if r["scale"] == 1000 and r["problems"]}
    assert {"gemm_kernel", "own_kernel", "expand_kernel", "combine_kernel"} <= beyond


FORM = """
module {
  tt.func public @kernel(%x_ptr: !tt.ptr<f32> loc("x"), %n: i32 loc("n")) attributes {a = false} {
    %c7168_i32 = arith.constant 7168 : i32 loc(#loc1)
    %c0_i32 = arith.constant 0 : i32 loc(#loc1)
    %c1_i32 = arith.constant 1 : i32 loc(#loc1)
    %row = tt.get_program_id x : i32 loc(#loc2)
    BODY
    tt.return loc(#loc2)
  } loc(#loc)
} loc(#loc)
"""
STRAIGHT = """
    %start = arith.muli %row, %c7168_i32 : i32 loc(#loc2)
    %at = tt.addptr %x_ptr, %start : !tt.ptr<f32>, i32 loc(#loc2)
    %x = tt.load %at : !tt.ptr<f32> loc(#loc2)
"""
WIDE = """
    %long = arith.extsi %row : i32 to i64 loc(#loc2)
    %k = arith.extsi %c7168_i32 : i32 to i64 loc(#loc2)
    %start = arith.muli %long, %k : i64 loc(#loc2)
    %at = tt.addptr %x_ptr, %start : !tt.ptr<f32>, i64 loc(#loc2)
"""
WHILE = """
    %r:2 = scf.while (%a = %c0_i32, %b = %c0_i32) : (i32, i32) -> (i32, i32) {
      %less = arith.cmpi slt, %a, %n : i32 loc(#loc2)
      scf.condition(%less) %a, %b : i32, i32 loc(#loc2)
    } do {
    ^bb0(%a: i32 loc("a"), %b: i32 loc("b")):
      %at = tt.addptr %x_ptr, %b : !tt.ptr<f32>, i32 loc(#loc2)
      %next = arith.addi %a, %c1_i32 : i32 loc(#loc2)
      %far = arith.addi %b, %c7168_i32 : i32 loc(#loc2)
      scf.yield %next, %far : i32, i32 loc(#loc2)
    } loc(#loc2)
"""
FOR = """
    %r = scf.for %i = %c0_i32 to %n step %c1_i32 iter_args(%b = %c1_i32) -> (i32)  : i32 {
      %at = tt.addptr %x_ptr, %b : !tt.ptr<f32>, i32 loc(#loc2)
      %far = arith.FAR : i32 loc(#loc2)
      scf.yield %far : i32 loc(#loc2)
    } loc(#loc2)
"""
MASK = """
    %start = arith.muli %row, %c7168_i32 : i32 loc(#loc2)
    %less = arith.cmpi slt, %start, %n : i32 loc(#loc2)
    tt.store %x_ptr, %value, %less : !tt.ptr<f32> loc(#loc2)
"""
TRICK = """
    %start = arith.muli %row, %c7168_i32 : i32 loc(#loc2)
    %value = arith.muli %start, %start : i32 loc(#loc2)
    %at = tt.addptr %x_ptr, %row : !tt.ptr<f32>, i32 loc(#loc2)
    tt.store %at, %value : !tt.ptr<f32> loc(#loc2)
"""
LAST = 2**31 // 7168  # the last row that begins within 32 bits


@pytest.mark.parametrize(
    ("body", "rows", "n", "fits"),
    [
        (STRAIGHT, LAST + 1, 1, True),
        (STRAIGHT, LAST + 2, 1, False),
        (WIDE, 2**31, 1, True),
        (WHILE, 1, LAST - 1, True),
        (WHILE, 1, LAST + 2, False),
        (FOR.replace("FAR", "addi %b, %c7168_i32"), 1, LAST - 1, True),
        (FOR.replace("FAR", "addi %b, %c7168_i32"), 1, LAST + 2, False),
        (FOR.replace("FAR", "muli %b, %c7168_i32"), 1, 100, False),
        (MASK.replace("%value", "%c1_i32"), LAST + 1, 1, True),
        (MASK.replace("%value", "%c1_i32"), LAST + 2, 1, False),
        (TRICK, 2**31, 1, True),
    ],
)
def test_the_proof(offsets: ModuleType, body: str, rows: int, n: int, fits: bool) -> None:
    form = FORM.replace("BODY", body)
    found = offsets.wrapped_addresses(form, {"n": n}, (rows, 1, 1), {})
    assert (not found) == fits, found


def test_what_is_not_understood_proves_nothing(offsets: ModuleType) -> None:
    unknown = STRAIGHT.replace("%row, %c", "%odd, %c")
    form = FORM.replace("BODY", "%odd = arith.strange %row, %row : i32 loc(#l)\n" + unknown)
    assert offsets.wrapped_addresses(form, {"n": 1}, (1, 1, 1), {})
    loaded = "%odd = tt.load %x_ptr : !tt.ptr<i32> loc(#l)\n" + unknown
    form = FORM.replace("BODY", loaded).replace("!tt.ptr<f32> loc", "!tt.ptr<i32> loc")
    assert offsets.wrapped_addresses(form, {"n": 1}, (1, 1, 1), {})
    small = {"x_ptr": offsets.Value(0, 100)}
    assert not offsets.wrapped_addresses(form, {"n": 1}, (1, 1, 1), small)
    with pytest.raises(KeyError, match="n"):
        offsets.wrapped_addresses(form, {}, (1, 1, 1), {})
