"""What a command costs before it does anything: CPU seconds beside those of `python -c pass`.

    scripts/bench_start.py               medians of eleven runs each
    scripts/bench_start.py --rounds 3    quicker

Every round runs all of them, so a busy machine slows the reference as well.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from statistics import median

PASS = "python -c pass"
COMMANDS = {
    PASS: ([sys.executable, "-c", "pass"], {}),
    "v4quant --version": ([sys.executable, "-m", "v4quant", "--version"], {}),
    "v4quant --help": ([sys.executable, "-m", "v4quant", "--help"], {}),
    "v4quant quantize --help": ([sys.executable, "-m", "v4quant", "quantize", "--help"], {}),
    "v4quant --nope": ([sys.executable, "-m", "v4quant", "--nope"], {}),
    "completion of --scheme": (
        [sys.executable, "-m", "v4quant"],
        {
            "_V4QUANT_COMPLETE": "bash_complete",
            "COMP_WORDS": "v4quant quantize a b --scheme int4",
            "COMP_CWORD": "5",
        },
    ),
}


def cpu_seconds(command: list[str], variables: dict[str, str]) -> float:
    """User and system time of one run, in seconds."""
    before = os.times()
    subprocess.run(
        command, env=os.environ | variables, check=False, capture_output=True, timeout=120
    )
    after = os.times()
    return (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )


def main() -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11, help="runs of each command (11)")
    rounds = parser.parse_args().rounds
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, (command, variables) in COMMANDS.items():
            found[name].append(cpu_seconds(command, variables))
    floor = median(found[PASS])
    for name, seconds in found.items():
        middle = median(seconds)
        print(f"{name:26} {middle:6.2f} s  {middle - floor:+6.2f} s over {PASS}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
