"""A short fuzz run: every outcome is success or a V4QuantError, within time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.scripts import load_script

FUZZ = Path(__file__).parents[2] / "scripts" / "fuzz.py"


def test_a_few_seconds_of_fuzzing() -> None:
    done = subprocess.run(
        [sys.executable, str(FUZZ), "--seconds", "6"], check=False, capture_output=True, text=True
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    rounds = int(done.stdout.splitlines()[-1].split()[0])
    assert rounds > 10
    assert "refused (input)" in done.stdout


def test_seeds_are_good_files(tmp_path: Path) -> None:
    """A seed that nobody can read would test its first check, whatever is done to it."""
    for number, reader in enumerate(load_script("fuzz").READERS):
        folder = tmp_path / str(number)
        folder.mkdir()
        reader.read(reader.make(folder))
