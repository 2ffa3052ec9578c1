"""Memory: the peak this process reached, and workers that fit a cap."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

from v4quant.conversion.plan import Plan
from v4quant.sizes import SizeError

# Interpreter, torch and its libraries, measured; thread pools and buffers included.
_BASE_BYTES = 450 * 2**20
_THREAD_BYTES = 100 * 2**20
_TEMPORARY_BYTES = 200 * 2**20
# mallopt's number for "blocks from this size on are mapped, and unmapped when freed".
_M_MMAP_THRESHOLD = -3
_RETURNED_BYTES = 2**21


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def current_rss_bytes() -> int:
    """Resident set of this process now (its peak where the system does not tell)."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def return_freed_memory() -> None:
    """Ask the C library to give large freed blocks back at once, where it is glibc.

    It learns to keep them, and small blocks that live on between them then leave holes that count
    as this process's memory. A cap on memory needs them gone; it costs some speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _RETURNED_BYTES)


def worker_bytes(plan: Plan) -> int:
    """Memory one worker needs for the largest unit of a plan.

    A worker holds the three matrices of an expert as stored, one of them as coded and as written,
    and chunk temporaries; those and dense pieces are bounded by a constant.
    """
    growth = max(s.bits_per_weight for s in plan.recipe.expert_schemes) / 4.25
    largest = max(
        (
            u.bytes_in + 2 * growth * max(s.nbytes for s in u.sources)
            for u in plan.units
            if u.action == "experts"
        ),
        default=0,
    )
    return int(largest) + _TEMPORARY_BYTES


def fit_workers(plan: Plan, wanted: int, cap: int | None) -> int:
    """The number of workers that fits `cap` bytes, at most `wanted`. Raises SizeError.

    What the process already holds is counted as it is: a plan of Pro's 145,116 tensors alone takes
    200 MB.
    """
    if cap is None:
        return wanted
    base = max(_BASE_BYTES, current_rss_bytes() + _THREAD_BYTES)
    fitting = (cap - base) // worker_bytes(plan)
    if fitting < 1:
        least = base + worker_bytes(plan)
        raise SizeError(
            f"--max-memory {cap / 1e9:.2f} GB is too little: one worker of this conversion needs "
            f"{least / 1e9:.2f} GB"
        )
    return min(wanted, fitting)
