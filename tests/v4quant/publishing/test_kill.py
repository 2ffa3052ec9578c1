"""A conversion between repositories, killed again and again at any moment, loses nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.conversion import convert, folder_bytes
from tests.support.fake_hub import TOKEN, USER, FakeHub

ROOT = Path(__file__).parents[3]
SOURCE, TARGET = "maker/V4-Tiny", f"{USER}/V4-Tiny-INT8"

# Imports once, forks a child for every line it reads: a conversion that takes a while.
NURSERY = """
import os, sys, time
import huggingface_hub, httpx2
from v4quant.cli import cli
real = os.pwrite
for line in sys.stdin:
    source, out, scratch, delay = line.rstrip().split("|")
    child = os.fork()
    if not child:
        os.pwrite = lambda *a: (time.sleep(float(delay)), real(*a))[1]
        options = ["--scheme", "int8-g32", "--workers", "2", "--scratch", scratch]
        try:
            cli.main(["quantize", source, out, *options], standalone_mode=False)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    print(child, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_moment(
    plain_hub: FakeHub, model_files: dict[str, bytes], model_folder: Path, tmp_path: Path
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    plain_hub.add_repo(SOURCE, model_files, license="mit")
    environment = {
        **os.environ, "HF_ENDPOINT": plain_hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    nursery = subprocess.Popen(
        [sys.executable, "-c", NURSERY], cwd=ROOT, text=True, env=environment,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with nursery:
        assert nursery.stdin is not None and nursery.stdout is not None

        def run(delay: float, kill_after: int | None) -> int:
            line = f"hf://{SOURCE}|hf://{TARGET}|{tmp_path / 's'}|{delay}\n"
            nursery.stdin.write(line)  # type: ignore[union-attr]
            nursery.stdin.flush()  # type: ignore[union-attr]
            child = int(nursery.stdout.readline())  # type: ignore[union-attr]
            if kill_after is not None:
                deadline = time.monotonic() + 30
                while len(plain_hub.repos[TARGET].commits) <= kill_after:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                time.sleep(rng.random() * 0.2)
                with suppress(ProcessLookupError):  # it was faster than we
                    os.kill(child, signal.SIGKILL)
            while not (said := nursery.stdout.readline()).startswith("status"):  # type: ignore[union-attr]
                assert said, "the nursery died"
            return int(said.split()[1])

        plain_hub.add_repo(TARGET, {".gitattributes": b""})
        codes = [run(0.004, len(plain_hub.repos[TARGET].commits) + n - 1) for n in (0, 1, 1)]
        assert -signal.SIGKILL in codes
        assert run(0, None) == 0
        nursery.stdin.close()
    convert(model_folder, tmp_path / "expected", "int8-g32")
    expected, found = folder_bytes(tmp_path / "expected"), plain_hub.files(TARGET)
    for name in expected.keys() - {"v4quant.json"}:
        assert found[name] == expected[name], name
    assert not (tmp_path / "s").exists()
