"""bench convert: how fast each scheme converts, against copying the same bytes in the same run.

Disks differ by a factor of 50, so a number in MB/s says little; the ratio to a plain copy (read,
written, fsynced) on the same folder says how far the converter is from the best anybody could do.
One machine's own speed drifts too, by the state of its disk and memory and by what else runs, so
every conversion is set against the copy made just before it, and the median of several rounds is
what counts. Every conversion runs in a process of its own, as a user runs it, so its peak memory is
its own.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.synthetic.writing import Request, write_checkpoint
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress

_CHUNK = 16 * 2**20
# One layer without draft; the vocabulary cut, so that experts make up the bytes as released.
_ONE_LAYER = {"num_hidden_layers": 1, "num_nextn_predict_layers": 0, "vocab_size": 1024}
# Bytes of experts in the whole release, to extrapolate (tensor data of trunk and draft).
RELEASE_BYTES = {"flash": 159_609_485_896, "pro": 864_704_792_696}


class BenchError(V4QuantError):
    """A conversion under measurement failed."""


@dataclass(frozen=True)
class ConvertTiming:
    """One scheme's figures, medians over the rounds.

    bytes_in_per_second: source bytes over wall time of the conversion itself. ratio_in: the copy's
    seconds over the conversion's. ratio_moved: the same by bytes read and written. peak_rss_bytes:
    the largest seen. release_minutes: what the whole release would take at this rate.
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
    """The whole bench: the copies and every scheme.

    copy_seconds: the median; fastest_copy, slowest_copy: how far the machine itself drifted.
    """

    width: str
    experts: int | None
    bytes: int
    rounds: int
    copy_seconds: float
    fastest_copy: float
    slowest_copy: float
    copy_bytes_per_second: float
    workers: int
    timings: list[ConvertTiming]

    @property
    def steady(self) -> bool:
        """Whether all copies took about the same; ratios of a run that drifted are rough."""
        return self.slowest_copy <= 1.5 * self.fastest_copy


@dataclass(frozen=True)
class _Measured:
    """One conversion: seconds of the copy before it, and what `quantize --json` said."""

    copy: float
    result: dict[str, Any]


def bench_convert(
    folder: Path,
    width: str,
    experts: int | None,
    schemes: Sequence[str],
    workers: int,
    rounds: int,
    progress: Progress,
) -> ConvertBench:
    """Make a layer in `folder`; copy it and convert it, scheme by scheme, in every round.

    Removes what it wrote. Raises BenchError.
    """
    source = folder / "bench-source"
    progress.start("Bench", len(schemes) * rounds + 1, "step")
    measured: dict[str, list[_Measured]] = {scheme: [] for scheme in schemes}
    try:
        sizes = dict(_ONE_LAYER)
        if experts is not None:
            sizes["n_routed_experts"] = experts
        written = write_checkpoint(
            source, Request(width, tiny=False, overrides=tuple(sizes.items()))
        )
        progress.advance(1)
        for _ in range(rounds):
            for scheme in schemes:
                copy = _copy(source, folder / "bench-copy")
                result = _convert(source, folder / "bench-out", scheme, workers)
                measured[scheme].append(_Measured(copy, result))
                progress.advance(1)
    finally:
        for name in ("bench-source", "bench-copy", "bench-out"):
            shutil.rmtree(folder / name, ignore_errors=True)
        progress.finish()
    copies = [m.copy for runs in measured.values() for m in runs]
    typical = statistics.median(copies)
    return ConvertBench(
        width,
        experts,
        written.bytes,
        rounds,
        typical,
        min(copies),
        max(copies),
        written.bytes / typical,
        workers,
        [_timing(runs, RELEASE_BYTES[width]) for runs in measured.values()],
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


def _convert(source: Path, out: Path, scheme: str, workers: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "v4quant", "quantize", str(source), str(out)]
    command += ["--scheme", scheme, "--workers", str(workers), "--json"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode != 0:
        raise BenchError(f"converting to {scheme} failed: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def _timing(runs: Sequence[_Measured], release: int) -> ConvertTiming:
    first = runs[0].result
    bytes_in, bytes_out = int(first["bytes_in"]), int(first["bytes_out"])
    seconds = statistics.median(float(m.result["seconds"]) for m in runs)
    ratio = statistics.median(m.copy / float(m.result["seconds"]) for m in runs)
    return ConvertTiming(
        scheme=str(first["scheme"]),
        seconds=seconds,
        bytes_in=bytes_in,
        bytes_out=bytes_out,
        bytes_in_per_second=bytes_in / seconds,
        ratio_in=ratio,
        ratio_moved=ratio * (bytes_in + bytes_out) / (2 * bytes_in),
        peak_rss_bytes=max(int(m.result["peak_rss_bytes"]) for m in runs),
        release_minutes=release / bytes_in * seconds / 60,
    )
