"""bench threads: real processes timed, busy neighbours that are gone afterwards."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress

import pytest

from v4quant.bench import threads as bench
from v4quant.bench.threads import BenchError, Run, ThreadTiming, busy_processes, timed_run
from v4quant.cli.bench import threads_text
from v4quant_kernels.progress import SilentProgress


def python(script: str) -> list[str]:
    return [sys.executable, "-S", "-c", script]


def test_a_run_is_timed_with_its_settings_and_stopped_at_the_limit() -> None:
    burn = "import time, os\nassert os.environ['X'] == '1'\nwhile time.process_time() < 0.3: pass"
    run = timed_run(python(burn), {"X": "1"}, 60)
    assert run.finished and run.wall >= 0.3 and 0.29 <= run.core <= 3
    stopped = timed_run(python("import time; time.sleep(60)"), {}, 0.2)
    assert not stopped.finished and 0.2 <= stopped.wall < 30
    with pytest.raises(BenchError, match="no such thing"):
        timed_run(python("raise SystemExit('no such thing')"), {}, 60)


def test_busy_processes_are_busy_and_end() -> None:
    before = os.times()
    with suppress(ZeroDivisionError), busy_processes(2):
        time.sleep(0.5)
        1 / 0  # noqa: B018
    used = sum(os.times()[2:4]) - sum(before[2:4])
    assert used > 0.05, "their time counts once they have ended"


def test_every_setting_is_run_quiet_and_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns and the environment, with a command of a moment instead of a forward pass."""
    monkeypatch.setattr(bench, "evaluate_command", lambda tokens: python(f"assert {tokens} == 64"))
    monkeypatch.setattr(bench, "BUSY_PER_CORE", 1)
    found = bench.bench_threads(64, 2, 60, list(bench.SETTINGS), SilentProgress())
    assert [timing.setting for timing in found] == list(bench.SETTINGS)
    assert all(len(t.quiet) == len(t.busy) == 2 for t in found)


def test_the_measured_command_is_one_that_runs() -> None:
    """As the bench starts it, with fewer tokens."""
    assert timed_run(bench.evaluate_command(64), {"OMP_NUM_THREADS": "1"}, 120).finished


def test_the_worst_run_counts() -> None:
    runs = (Run(2.0, 4.0), Run(1.0, 2.0), Run(3.0, 6.0))
    timing = ThreadTiming("as set", runs, (Run(5.0, 4.0), Run(9.0, 5.0, finished=False)))
    assert timing.worst_ratio == 4.5
    assert "over 9.0" in threads_text([timing]) and "over 4.5" in threads_text([timing])
