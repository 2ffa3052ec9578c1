"""Signals end a command within seconds, also one whose threads do not listen."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEAF = '''
import ctypes, signal, sys, threading, time
import v4quant.cli as program
# Shells start background jobs, perhaps this test run, with SIGINT ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

COMPILER = {"__name__": "llvmlite.binding", "time": time}
exec("""
def notify():
    print("busy", flush=True)
    end = time.monotonic() + 1
    while time.monotonic() < end:
        pass
""", COMPILER)

def called_back(*_, **__):
    ctypes.CFUNCTYPE(None)(COMPILER["notify"])()
    time.sleep(60)

def deaf(*_, **__):
    threading.Thread(target=time.sleep, args=(60,)).start()  # an upload that goes on
    print("busy", flush=True)
    while True:
        try:
            time.sleep(60)
        except BaseException:
            if sys.argv[1] == "orderly":
                raise

program.cli.main = called_back if sys.argv[1] == "called back" else deaf
program.main()
'''
LOADING = """
import sys
import v4quant.cli as program

def load(*_, **__):
    sys.path.insert(0, sys.argv[1])
    import torch

program.cli.main = load
program.main()
"""
# What holds the interpreter's lock and comes back after a minute: a library on a slow disk.
SLOW_TORCH = """
import ctypes
print("loading", flush=True)
ctypes.PyDLL(None).sleep(60)
"""


@pytest.mark.parametrize(
    ("main_thread", "number", "again", "code", "word"),
    [
        ("orderly", signal.SIGTERM, False, 143, "Terminated"),
        ("deaf", signal.SIGTERM, False, 143, "Terminated"),
        ("orderly", signal.SIGINT, False, 130, "Interrupted"),
        ("deaf", signal.SIGINT, True, 130, "Interrupted"),
        ("called back", signal.SIGINT, False, 130, "Interrupted"),
        ("called back", signal.SIGTERM, False, 143, "Terminated"),
    ],
    ids=["orderly", "deaf", "interrupted", "interrupted again", "compiling", "compiling, ended"],
)
def test_ended_within_seconds(
    main_thread: str, number: signal.Signals, again: bool, code: int, word: str
) -> None:
    command = [sys.executable, "-c", DEAF, main_thread]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=dict(os.environ),
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "busy\n"
        started = time.monotonic()
        process.send_signal(number)
        while again and process.poll() is None and time.monotonic() - started < 10:
            time.sleep(0.2)  # two that arrive together are one
            process.send_signal(number)
        assert process.wait(30) == code
        assert time.monotonic() - started < 10  # 2 s on a machine with nothing else to do
        said = process.stderr.read()
        assert f"{word}; the same command resumes." in said and "Traceback" not in said


def test_ended_while_a_library_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(SLOW_TORCH)
    command = [sys.executable, "-c", LOADING, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
        assert time.monotonic() - started < 10


BEGINNING = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
runpy.run_module("v4quant", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot interrupt itself alone")
@pytest.mark.parametrize("module", ["v4quant.cli", "click", "v4quant.cli._termination"])
def test_ended_before_the_command_line_is_there(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING, module], cwd=ROOT, capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGINT and not done.stderr
