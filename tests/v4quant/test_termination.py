"""SIGTERM ends a command within seconds, also one whose threads do not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEAF = """
import sys, threading, time
import v4quant.cli as program

def deaf(*_, **__):
    threading.Thread(target=time.sleep, args=(60,)).start()  # an upload that goes on
    print("busy", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            if sys.argv[1] == "orderly":
                raise

program.cli.main = deaf
program.main()
"""


@pytest.mark.parametrize("main_thread", ["orderly", "deaf"])
def test_terminated_within_seconds(main_thread: str) -> None:
    command = [sys.executable, "-c", DEAF, main_thread]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ),
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "busy\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 143
        assert time.monotonic() - started < 10  # 2.5 s on a machine with nothing else to do
        assert "Terminated; the same command resumes." in process.stderr.read()
