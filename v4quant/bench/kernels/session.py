"""`bench gpu`: everything worth measuring in the minutes one has, most important first.

A GPU may be lent for ten minutes, so this must not need a second try. Every step is a process of
its own: one that crashes the driver's context, or never returns, costs its own share of the time
and nothing of the others'. Rows are in the file as soon as they exist (`cells.py`). Steps are
ordered so that whatever the clock cuts off matters least.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_GRACE = 30.0  # seconds per step may go on behind its time, for the cell it has begun
_LEAST = 15.0  # with less than this left no process is worth starting
PROGRAM = (sys.executable, "-m", "v4quant", "bench")


@dataclass(frozen=True)
class Step:
    """One command of the session. minutes: the most it may take."""

    name: str
    arguments: tuple[str, ...]
    minutes: float


@dataclass(frozen=True)
class StepResult:
    """What became of a step."""

    name: str
    seconds: float
    outcome: str


def _moe(shape: str, schemes: Sequence[str], tokens: Sequence[int], peers: str) -> tuple[str, ...]:
    chosen = [part for s in schemes for part in ("--scheme", s)]
    counts = [part for t in tokens for part in ("--tokens", str(t))]
    return ("moe", "--shape", shape, *chosen, *counts, "--peers", peers)


_BF16_ONLY = ("int4-g32", "nvfp4", "int8-g128", "int4-g128")
"""Formats that BF16 tensor cores multiply, whatever the activations are rounded to."""
STEPS = (
    Step("experts of Flash, MXFP4", _moe("flash", ["mxfp4"], (), "none"), 2.5),
    Step("indexer", ("indexer", "--peers", "none"), 1.5),
    Step(
        "integers and NVFP4",
        (*_moe("flash", _BF16_ONLY, (1, 32, 4096), "none"), "--activations", "bf16"),
        2.0,
    ),
    Step("FP8 formats", _moe("flash", ("fp8", "mxfp8"), (1, 32, 4096), "none"), 1.5),
    Step("others' experts", _moe("flash", ["mxfp4", "fp8"], (8, 128, 4096), "only"), 1.5),
    Step("others' indexers", ("indexer", "--peers", "only"), 1.0),
    Step("experts of Pro, MXFP4", _moe("pro", ["mxfp4"], (), "none"), 2.0),
)


def run_session(
    steps: Sequence[Step],
    append: Path,
    minutes: float,
    tell: Callable[[str], None],
    program: Sequence[str] = PROGRAM,
) -> list[StepResult]:
    """Run the steps, each within its time and the session's; never raises for what a step does.

    append: where they write their rows. program: what the arguments follow.
    """
    end = time.monotonic() + 60 * minutes
    results = []
    for step in steps:
        left = min(60 * step.minutes, end - time.monotonic())
        if left < _LEAST:
            results.append(StepResult(step.name, 0.0, "not begun: the time was up"))
            continue
        tell(step.name)
        command = [*program, *step.arguments, "--append", str(append)]
        command += ["--minutes", f"{left / 60:.3f}"]
        begin = time.monotonic()
        outcome = _run(command, left + _GRACE)
        results.append(StepResult(step.name, time.monotonic() - begin, outcome))
    return results


def _run(command: Sequence[str], limit: float) -> str:
    """Run a command whose output goes where ours goes; what became of it."""
    try:
        done = subprocess.run(command, check=False, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"killed after {limit:.0f} s"
    except OSError as error:
        return f"could not be started: {error}"
    return "done" if done.returncode == 0 else f"failed with exit code {done.returncode}"
