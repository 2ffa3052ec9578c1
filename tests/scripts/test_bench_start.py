"""scripts/bench_start.py: every start it measures does what its row says."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.support.scripts import SCRIPTS, load_script

COMMANDS = load_script("bench_start").COMMANDS


@pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("python -c pass", 0, ""),
        ("v4quant --version", 0, "0."),
        ("v4quant --help", 0, "quantize"),
        ("v4quant quantize --help", 0, "--scheme"),
        ("v4quant --nope", 2, "No such option"),
        ("completion of --scheme", 0, "int4-g128"),
    ],
)
def test_commands(name: str, code: int, text: str) -> None:
    command, variables = COMMANDS[name]
    done = subprocess.run(
        command, env=os.environ | variables, check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == code
    assert text in done.stdout + done.stderr


def test_the_table() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "bench_start.py"), "--rounds", "1"],
        check=True, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert len(done.stdout.splitlines()) == len(COMMANDS)
