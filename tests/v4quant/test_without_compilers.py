"""Without numba, Triton and onnx: the same bytes, the same figures, and a message that says what is
missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.support.conversion import TINY

HIDE = """
import importlib.util, runpy, sys

HIDDEN = {"numba", "llvmlite", "triton", "onnx"}
found = importlib.util.find_spec


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def find_spec(name, package=None):
    return None if name.partition(".")[0] in HIDDEN else found(name, package)


importlib.util.find_spec = find_spec
sys.meta_path.insert(0, Absent())
runpy.run_module("v4quant", run_name="__main__", alter_sys=True)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HIDE, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_same_bytes(converted: Callable[[str], Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("quantize", str(TINY), str(out), "--scheme", "int4-g32")
    assert done.returncode == 0, done.stderr
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert shards
    for name in shards:
        assert (out / name).read_bytes() == (converted("int4-g32") / name).read_bytes(), name


def test_a_forward_pass() -> None:
    done = run("evaluate", "builtin:tiny-v4", "--tokens", "32", "--products", "kernels", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["perplexity"] > 1


def test_what_cannot_be_done_names_the_package(tmp_path: Path) -> None:
    arguments = ("export-onnx", str(TINY), str(tmp_path / "o"), "--scheme", "int4-g32")
    done = run(*arguments)
    assert done.returncode == 1 and "pip install onnx" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
