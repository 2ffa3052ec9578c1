"""Progress: how a library tells whoever called it that long work advances, without printing."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A sink for progress; the command line shows bars, everybody else passes `silent`."""

    def start(self, label: str, total: int, unit: str) -> None:
        """A new stretch of work of `total` units ("B" for bytes, "tok", "layer") begins."""

    def advance(self, amount: int) -> None:
        """`amount` further units are done; thread-safe."""

    def finish(self) -> None:
        """The stretch is done."""


class SilentProgress:
    """Progress nobody watches."""

    def start(self, label: str, total: int, unit: str) -> None:
        """Ignore."""

    def advance(self, amount: int) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
