"""A conversion, a kill and a resume where none of POSIX's calls are there: the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from tests.support.conversion import TINY, convert, folder_bytes
from v4quant.conversion.journal import FOLDER

ROOT = Path(__file__).parents[3]
# What Windows has not, taken away before anything is imported; writes are slow enough to be killed.
PORTABLE = """
import os, sys, time, warnings
from pathlib import Path
import torch, numba, psutil  # what these do themselves is theirs
import subprocess, tempfile
for name in ("pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "posix_fallocate",
             "O_NOFOLLOW", "O_NONBLOCK", "getuid", "mkfifo"):
    delattr(os, name)
sys.modules["fcntl"] = sys.modules["resource"] = None
real = os.write
warnings.simplefilter("ignore")
from tests.support.conversion import convert
os.write = lambda *a: (time.sleep(float(sys.argv[3])), real(*a))[1]
convert(Path(sys.argv[1]), Path(sys.argv[2]), "int4-g64")
"""


def _start(out: Path, delay: float) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", PORTABLE, str(TINY), str(out), str(delay)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_converted_killed_and_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with _start(out, 0.02) as process:
        deadline = time.monotonic() + 120
        while not list(out.glob("*.part")) or not list((out / FOLDER).glob("journal*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.3)
        process.kill()
    assert list(out.glob("*.part"))
    with _start(out, 0.0) as process:
        assert process.wait(120) == 0
    convert(TINY, tmp_path / "expected", "int4-g64")
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")
