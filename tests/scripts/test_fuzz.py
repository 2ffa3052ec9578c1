"""A short fuzz run: every outcome is success or a V4QuantError, within time and memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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
