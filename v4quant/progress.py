"""Bars on a terminal or in a notebook, for whoever waits; nothing in a program's log.

A library must not print, but a person in a notebook wants to see that hours of work advance. So a
function that is given no `Progress` shows bars where an interactive session is watching, and is
silent elsewhere.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from v4quant_kernels.progress import Progress, SilentProgress


class BarProgress:
    """tqdm's bars: HTML in a notebook, text on stderr elsewhere."""

    def __init__(self) -> None:
        """Bars start with `start`."""
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a bar."""
        from tqdm.auto import tqdm  # slow to import, and not needed by whoever waits for nothing

        self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=unit == "B")

    def advance(self, amount: int) -> None:
        """Move the bar; called from worker threads too."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(amount)

    def finish(self) -> None:
        """Close the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None


def default_progress(given: Progress | None) -> Progress:
    """`given`; without it bars in an interactive session, silence elsewhere."""
    if given is not None:
        return given
    return BarProgress() if _is_interactive() else SilentProgress()


def _is_interactive() -> bool:
    """Whether a notebook or an interactive Python is running this."""
    return hasattr(sys, "ps1") or "ipykernel" in sys.modules
