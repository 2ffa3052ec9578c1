"""bench convert: how fast each scheme converts, against copying the same bytes in the same run.

Disks differ by a factor of 50, so a number in MB/s says little; the ratio to a plain copy (read,
written, fsynced) on the same folder says how far the converter is from the best anybody could do.
Every conversion runs in a process of its own, as a user runs it, so its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress

WIDTHS = ("flash", "pro")
_CHUNK = 16 * 2**20
# One layer without draft; the vocabulary cut, so that experts make up the bytes as released.
_ONE_LAYER = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": 1024}
# Bytes of experts in the whole release, to extrapolate (tensor data of trunk and draft).
RELEASE_BYTES = {"flash": 159_609_485_896, "pro": 864_704_792_696}


class BenchError(V4QuantError):
    """A conversion under measurement failed."""


@dataclass(frozen=True)
class ConvertTiming:
    """One scheme's figures.

    bytes_in_per_second: source bytes over wall time of the conversion itself. ratio_in: that over
    the copy's. ratio_moved: bytes read and written per second, over the copy's. release_minutes:
    what the whole release would take at this rate.
    """

    scheme: str
    seconds: float
    bytes_in: int
    bytes_out: int
    bytes_in_per_second: float
    ratio_in: float
    ratio_moved: float
    peak_rss_bytes: int
    release_minutes: float


@dataclass(frozen=True)
class ConvertBench:
    """The whole bench: the copy and every scheme."""

    width: str
    experts: int | None
    bytes: int
    copy_seconds: float
    copy_bytes_per_second: float
    workers: int
    timings: list[ConvertTiming]


def bench_convert(
    folder: Path,
    width: str,
    experts: int | None,
    schemes: Sequence[str],
    workers: int,
    progress: Progress,
) -> ConvertBench:
    """Make a layer in `folder`, copy it, convert it to every scheme; removes what it wrote.

    The copy is the median of three, spread over the run, because shared disks drift.
    """
    source = folder / "bench-source"
    progress.start("Bench", len(schemes) + 3, "step")
    try:
        sizes = dict(_ONE_LAYER)
        if experts is not None:
            sizes["n_routed_experts"] = experts
        written = write_checkpoint(
            source, Request(width, tiny=False, overrides=tuple(sizes.items()))
        )
        progress.advance(1)
        copies = [_copy(source, folder / "bench-copy")]
        measured = []
        for i, scheme in enumerate(schemes):
            measured.append(_convert(source, folder / "bench-out", scheme, workers))
            progress.advance(1)
            if i == len(schemes) // 2:
                copies.append(_copy(source, folder / "bench-copy"))
                progress.advance(1)
        copies.append(_copy(source, folder / "bench-copy"))
        progress.advance(1)
    finally:
        for name in ("bench-source", "bench-copy", "bench-out"):
            shutil.rmtree(folder / name, ignore_errors=True)
        progress.finish()
    copy = sorted(copies)[len(copies) // 2]
    return ConvertBench(
        width,
        experts,
        written.bytes,
        copy,
        written.bytes / copy,
        workers,
        [_timing(m, copy, RELEASE_BYTES[width]) for m in measured],
    )


def _copy(source: Path, target: Path) -> float:
    """Seconds to copy a folder's files through user space and flush them to disk."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    buffer = bytearray(_CHUNK)
    started = time.monotonic()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as a, (target / path.name).open("wb", buffering=0) as b:
            while count := a.readinto(buffer):
                b.write(memoryview(buffer)[:count])
            os.fsync(b.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def _convert(source: Path, out: Path, scheme: str, workers: int) -> dict[str, float | int | str]:
    command = [sys.executable, "-m", "v4quant", "quantize", str(source), str(out)]
    command += ["--scheme", scheme, "--workers", str(workers), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        raise BenchError(f"converting to {scheme} failed: {done.stderr.strip()[-500:]}")
    result: dict[str, float | int | str] = json.loads(done.stdout)
    return result


def _timing(result: dict[str, float | int | str], copy: float, release: int) -> ConvertTiming:
    seconds = float(result["seconds"])
    bytes_in, bytes_out = int(result["bytes_in"]), int(result["bytes_out"])
    return ConvertTiming(
        scheme=str(result["scheme"]),
        seconds=seconds,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        bytes_in_per_second=bytes_in / seconds,
        ratio_in=copy / seconds,
        ratio_moved=(bytes_in + bytes_out) / (2 * bytes_in) * copy / seconds,
        peak_rss_bytes=int(result["peak_rss_bytes"]),
        release_minutes=release / bytes_in * seconds / 60,
    )
