"""Memory: the peak this process reached, and workers that fit a cap."""

from __future__ import annotations

import ctypes
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Limits:
    """The most bytes of the host's memory, and of a GPU's where one does the arithmetic."""

    host: int | None = None
    device: int | None = None

    @staticmethod
    def of(cap: int | None, device_memory: int | None) -> Limits:
        """A cap for either memory, and the GPU's own size."""
        if cap is None or device_memory is None:
            return Limits(cap, device_memory)
        return Limits(cap, min(cap, device_memory))
