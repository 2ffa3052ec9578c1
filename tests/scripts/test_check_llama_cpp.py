"""The script that asks llama.cpp itself: run where its package is, else it says what is missing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.scripts import SCRIPTS

SCRIPT = SCRIPTS / "check_llama_cpp.py"
DRAFT = SCRIPTS / "check_llama_draft.py"


def run(
    *arguments: str, script: Path = SCRIPT, **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, **environment},
    )  # fmt: skip


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_agrees() -> None:
    done = run("--schemes", "mxfp4", "--windows", "1", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["passed"] is True


@pytest.mark.skipif(find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed")
def test_llama_cpp_accepts_the_draft_as_often() -> None:
    done = run("--windows", "2", "--json", script=DRAFT)
    found = json.loads(done.stdout)
    assert done.returncode in (0, 3), done.stdout + done.stderr  # 3: it died in its own context
    assert 0 < found["ours"] < 1 and ("agreement" in found or found["died"] < 0)


@pytest.mark.parametrize("script", [SCRIPT, DRAFT], ids=lambda p: p.stem)
def test_without_the_package_it_says_so(script: Path, tmp_path: Path) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('not here')\n")
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = run(script=script, PYTHONPATH=paths)
    assert done.returncode == 2
    assert "pip install llama-cpp-python" in done.stdout
