"""The examples of docs/python.md run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.scripts import load_script

GENERATOR = load_script("gen_python_docs")


def test_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, one after the other, in one program and an empty folder."""
    own = GENERATOR.PAGE.read_text(encoding="utf-8").partition(GENERATOR.MARKER)[0]
    examples = re.findall(r"```python\n(.*?)```", own, re.DOTALL)
    assert len(examples) >= 4
    monkeypatch.chdir(tmp_path)
    program: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(GENERATOR.PAGE), "exec"), program)
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "out2" / "v4quant.json").is_file()
