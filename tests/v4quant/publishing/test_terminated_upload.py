"""SIGTERM ends a command whose upload hangs on the line, and the same command resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from tests.support.conversion import TINY, convert
from tests.support.fake_hub import TOKEN, USER, FakeHub

ROOT = Path(__file__).parents[3]


def test_terminated_while_the_hub_takes_nothing(plain_hub: FakeHub, tmp_path: Path) -> None:
    convert(TINY, tmp_path / "out", "int4-g32")
    environment = {
        **os.environ, "HF_ENDPOINT": plain_hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "v4quant", "push", str(tmp_path / "out"), f"{USER}/out",
    ]  # fmt: skip
    uploading, enough = threading.Event(), threading.Event()

    def hang(route: str) -> float:
        uploading.set()
        enough.wait(60)
        return 0.0

    plain_hub.slow = hang
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    ) as process:
        try:
            assert uploading.wait(60)
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 143
            assert time.monotonic() - started < 10  # 3 s on a machine with nothing else to do
        finally:
            enough.set()
            process.kill()
    plain_hub.slow = lambda route: 0.0
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert "v4quant.json" in plain_hub.files(f"{USER}/out")
