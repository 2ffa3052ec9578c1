"""A ladder that is killed or interrupted at any moment ends in the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tests.support.conversion import TINY, folder_bytes

ROOT = Path(__file__).parents[3]
LADDER = """
source = "SOURCE"
[[quantize]]
scheme = "nvfp4"
[[quantize]]
scheme = "q8_0"
draft = "drop"
"""
# Imports once, forks a child for every line it reads, which behaves as the command does.
NURSERY = """
import os, sys
import torch
import v4quant.pipeline.run
from v4quant.cli import main
torch.set_num_threads(1)
for line in sys.stdin:
    child = os.fork()
    if not child:
        sys.argv = ["v4quant", *line.rstrip().split("|")]
        main()
    print(child, flush=True)
    print("status", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    (tmp_path / "ladder.toml").write_text(LADDER.replace("SOURCE", str(TINY)))
    out, errors = tmp_path / "out", tmp_path / "errors.txt"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with (
        errors.open("w") as told,
        subprocess.Popen(
            [sys.executable, "-c", NURSERY], cwd=ROOT, text=True, stderr=told,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as nursery,
    ):  # fmt: skip
        assert nursery.stdin is not None and nursery.stdout is not None

        def run(folder: Path, after: float | None = None, number: int = 0) -> int:
            line = f"run|{tmp_path / 'ladder.toml'}|--out|{folder}|--workers|2|--json\n"
            nursery.stdin.write(line)  # type: ignore[union-attr]
            nursery.stdin.flush()  # type: ignore[union-attr]
            child = int(nursery.stdout.readline())  # type: ignore[union-attr]
            if after is not None:
                time.sleep(after)
                with suppress(ProcessLookupError):  # it was faster than we
                    os.kill(child, number)
            while not (said := nursery.stdout.readline()).startswith("status"):  # type: ignore[union-attr]
                assert said, "the nursery died"
            return int(said.split()[1])

        began = time.monotonic()
        assert run(tmp_path / "whole") == 0, errors.read_text()
        took = time.monotonic() - began
        for number in rng.sample([signal.SIGKILL, signal.SIGINT, signal.SIGKILL], 3):
            moment = rng.uniform(0, took)
            code = run(out, moment, number)
            print(f"{number.name} after {moment:.2f} of {took:.2f} s: {code}")
            assert code in ((0, -signal.SIGKILL) if number == signal.SIGKILL else (0, 130, -2))
        assert run(out) == 0, errors.read_text()
        nursery.stdin.close()
    said = errors.read_text()
    assert "Traceback" not in said and "Error" not in said
    whole = folder_bytes(tmp_path / "whole")
    assert folder_bytes(out) == {**whole, "mine.txt": b"mine"}
