"""A short fuzz run: every outcome is success or a V4QuantError, within time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import v4quant
from tests.support.scripts import load_script

FUZZ = Path(__file__).parents[2] / "scripts" / "fuzz.py"


def test_a_few_rounds_of_fuzzing() -> None:
    words = ["--rounds", "20", "--seconds", "60", "--round-seconds", "60"]
    done = subprocess.run(
        [sys.executable, str(FUZZ), *words], check=False, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert 3 < int(done.stdout.splitlines()[-1].split()[0]) <= 20
    assert "refused (input)" in done.stdout


def test_seeds_are_good_files(tmp_path: Path) -> None:
    """A seed that nobody can read would test its first check, whatever is done to it."""
    for number, reader in enumerate(load_script("fuzz").READERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader.read(reader.make(folder))


@pytest.mark.parametrize("seed", load_script("fuzz").CHECKPOINT_SEEDS, ids=lambda s: s.name)
def test_checkpoint_seeds_are_good(seed: Any, tmp_path: Path) -> None:
    """Each opens without a defect, and plans; what it holds is tested where packs are read."""
    folder = tmp_path / "good"
    seed.make(load_script("fuzz").DEFAULT_SOURCE, folder)
    assert not v4quant.inspect(folder, deep=True).defects
    adapter = seed.adapter(tmp_path / "adapter") if seed.adapter else None
    recipe = v4quant.make_recipe(scheme="int8-g32")
    assert v4quant.plan_quantize(folder, "out", recipe=recipe, adapter=adapter).bytes_out
