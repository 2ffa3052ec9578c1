"""Memory: what a command may take of the host's and of a GPU's."""

from __future__ import annotations

from dataclasses import dataclass


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
