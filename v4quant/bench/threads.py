"""bench threads: what a forward pass costs alone, and beside more busy processes than cores.

Threads that wait awake for each other are quick while every core is theirs and ruinous while not,
so both are measured: `v4quant evaluate` of the built-in model, quiet and beside two busy processes
per core, as the program sets OpenMP, as OpenMP comes, and with one thread. Every run is a process
of its own, since OpenMP reads its settings once. A fair share of the busy machine is a third, so
the wall time of the quiet run times three is the best to hope for.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from v4quant.builtin import TINY_V4
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress

SETTINGS: dict[str, Mapping[str, str]] = {
    "as set": {},
    "as OpenMP comes": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
"""What each setting adds to the environment; the second holds the libraries' own defaults."""
BUSY_PER_CORE = 2
_BUSY = "while True: pass"


class BenchError(V4QuantError):
    """A run under measurement failed."""


@dataclass(frozen=True)
class Run:
    """One run: wall time and processor time of all its threads, seconds. finished: not stopped for
    taking longer than the limit, in which case both are what it had taken by then."""

    wall: float
    core: float
    finished: bool = True


@dataclass(frozen=True)
class ThreadTiming:
    """One setting's runs, quiet and busy, a round each."""

    setting: str
    quiet: tuple[Run, ...]
    busy: tuple[Run, ...]

    @property
    def worst_ratio(self) -> float:
        """The longest busy run over the median quiet one, by the wall."""
        return max(run.wall for run in self.busy) / statistics.median(r.wall for r in self.quiet)


def bench_threads(
    tokens: int, rounds: int, limit: float, settings: Sequence[str], progress: Progress
) -> list[ThreadTiming]:
    """Time each of `settings` (keys of SETTINGS), turn by turn, quiet first.

    tokens: how many the pass takes. limit: seconds after which a run is stopped. Raises BenchError
    when a run fails.
    """
    cores = os.cpu_count() or 1
    found: dict[tuple[str, bool], list[Run]] = {(s, b): [] for s in settings for b in (False, True)}
    progress.start("Bench", len(found) * rounds, "run")
    try:
        for busy in (False, True):
            with busy_processes(BUSY_PER_CORE * cores if busy else 0):
                for _ in range(rounds):
                    for setting in settings:
                        run = timed_run(evaluate_command(tokens), SETTINGS[setting], limit)
                        found[setting, busy].append(run)
                        progress.advance(1)
    finally:
        progress.finish()
    return [ThreadTiming(s, tuple(found[s, False]), tuple(found[s, True])) for s in settings]


def evaluate_command(tokens: int) -> list[str]:
    """The command under measurement."""
    command = [sys.executable, "-m", "v4quant", "evaluate", TINY_V4]
    return [*command, "--tokens", str(tokens), "--json"]


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    """Keep `count` processes busy; they are gone afterwards."""
    processes = []
    try:
        for _ in range(count):
            processes.append(subprocess.Popen([sys.executable, "-S", "-c", _BUSY]))
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def timed_run(command: Sequence[str], settings: Mapping[str, str], limit: float) -> Run:
    """Run a command with `settings` added to the environment, stopped after `limit` seconds.

    Raises BenchError when it fails.
    """
    before = os.times()
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            env=os.environ | settings,
            timeout=limit,
            check=False,
            capture_output=True,
            text=True,
        )
    except subprocess.TimeoutExpired:
        done = None
    wall, after = time.perf_counter() - start, os.times()
    if done is not None and done.returncode != 0:
        raise BenchError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
    core = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
    return Run(wall, core, done is not None)
