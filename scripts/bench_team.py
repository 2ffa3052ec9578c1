"""How much sooner two processes solve than one: `calibrate --solve` of the built-in model.

Each process has one thread. Wall clock tells the speed-up on a quiet machine of at least as many
cores as ranks; on a busy one core-seconds do: what all processes took together, over what one
process took, is the share of work done twice (programs starting, the pooled moments of a layer,
waiting for each other's rows).
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--scheme", default="int2-g64")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args(arguments)
    first: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as work:
        for ranks in options.ranks:
            wall, cores = run(ranks, options.scheme, options.tokens, Path(work) / f"out-{ranks}")
            first = first or (wall, cores)
            print(
                f"{ranks} ranks: {wall:.1f} s, {cores:.1f} core-seconds; "
                f"{first[0] / wall:.2f} times as fast, {cores / first[1]:.2f} times the work"
            )
    return 0


def run(ranks: int, scheme: str, tokens: int, out: Path) -> tuple[float, float]:
    """(seconds, core-seconds) of one solving run by so many processes of one thread."""
    started = [sys.executable, "-m", "v4quant"]
    if ranks > 1:
        port = 20000 + os.getpid() % 20000
        started = [
            sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}",
            "--master-addr=127.0.0.1", f"--master-port={port}", "-m", "v4quant",
        ]  # fmt: skip
    command = [
        *started, "calibrate", "builtin:tiny-v4", "--out", os.fspath(out), "--solve", scheme,
        "--corpus", "builtin:calibration", "--tokens", str(tokens), "--seq-len", "256",
        "--min-tokens", "1",
    ]  # fmt: skip
    threads = dict.fromkeys(("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    subprocess.run(
        command, check=True, env={**os.environ, **threads},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cores = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cores


if __name__ == "__main__":
    raise SystemExit(main())
