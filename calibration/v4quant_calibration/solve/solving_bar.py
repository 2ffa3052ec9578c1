"""The progress of a solving run that may have been begun before.

Streams pass layers that an earlier run solved many times faster than others are solved, so one bar
for both would foretell nonsense. The layers that are only passed have a bar of their own, and that
of solving begins at the first layer there is something to solve in.
"""

from __future__ import annotations

from v4quant_kernels.progress import Progress


class SolvingBar:
    """Tells of layers that are passed, then of experts that are solved."""

    def __init__(self, progress: Progress, passed: int, experts: int) -> None:
        """passed: layers, of all targets, that are solved already. experts: of the others."""
        self._progress, self._experts, self._solving = progress, experts, not passed
        if passed:
            progress.start("Layers solved before", passed, "layer")
        else:
            progress.start("Solving", experts, "expert")

    def passed(self) -> None:
        """Streams have reached a layer that is solved."""
        if not self._solving:
            self._progress.advance(1)

    def begin(self) -> None:
        """A layer is about to be solved."""
        if not self._solving:
            self._solving = True
            self._progress.finish()
            self._progress.start("Solving", self._experts, "expert")

    def solved(self, experts: int) -> None:
        """So many experts are done."""
        self._progress.advance(experts)
