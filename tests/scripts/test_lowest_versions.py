"""The lowest versions are those of pyproject.toml, and a dependency without one is refused."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from tests.support.scripts import load_script

ROOT = Path(__file__).parents[2]


def test_every_dependency_has_a_lowest_version(capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("lowest_versions")
    assert script.main() == 0
    told = capsys.readouterr().out.split("\n")
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = table["project"]["dependencies"]
    assert len([line for line in told if "==" in line]) == len(wanted) - 1
    assert any(line.startswith("gguf==0.19") for line in told)


def test_bounds_and_markers(capsys: pytest.CaptureFixture[str]) -> None:
    lowest = load_script("lowest_versions").lowest
    told = lowest(["torch>=2.11", "a-b>=1.2,<2", "c>=3; platform_system == 'Linux'"])
    assert told == ["a-b==1.2", "c==3; platform_system == 'Linux'"]
    for wrong in ("numpy", "numpy<2", "numpy~=1.26", "numpy @ https://example.org/numpy.whl"):
        with pytest.raises(ValueError, match="has no lowest version"):
            lowest([wrong])
