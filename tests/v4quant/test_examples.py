"""The examples and the tutorial work as they stand, one after the other in an empty folder."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from v4quant.cli import cli
from v4quant.pipeline.recipe_file import load_pipeline

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.name)
def test_scripts(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    assert len(capsys.readouterr().out.splitlines()) >= 3


@pytest.mark.usefixtures("_elsewhere")
def test_the_notebook() -> None:
    cells = json.loads((EXAMPLES / "convert.ipynb").read_bytes())["cells"]
    program: dict[str, object] = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), program)
    assert program["cost"]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.toml")), ids=lambda p: p.name)
def test_run_files_are_understood(file: Path) -> None:
    assert load_pipeline(str(file)).recipe.scheme


def test_the_list_of_examples_is_complete() -> None:
    listed = set(
        re.findall(r"`([\w.-]+\.(?:py|toml|ipynb))`", (EXAMPLES / "README.md").read_text())
    )
    assert listed == {p.name for p in EXAMPLES.iterdir() if p.suffix in (".py", ".toml", ".ipynb")}


@pytest.mark.usefixtures("_elsewhere")
def test_the_tutorial() -> None:
    page = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
             for line in block.splitlines()]  # fmt: skip
    assert len(lines) >= 8
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "v4quant"
        ran = CliRunner().invoke(cli, arguments, catch_exceptions=False)
        assert ran.exit_code == 0, (line, ran.output)
