"""Pace: a bar that counts the source's bytes and moves as time does.

A byte that is copied takes a thousandth of the time of one whose weights are searched in a
codebook, and a model begins with what is copied. So every unit moves the bar by its part of the
work in all, told in bytes: what is left then foretells how long it takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from v4quant.conversion.plan import Plan
from v4quant.conversion.units import Unit
from v4quant_kernels.ggml_types import block_type, has_codebook

# Core-seconds, measured (docs/costs.md): a byte of source that is read, recoded and written; a
# weight beside it that is searched in a codebook, in GGUF's other blocks, and in integers.
_BYTE = 4e-9
_CODEBOOK_WEIGHT, _BLOCK_WEIGHT, _INTEGER_WEIGHT = 1.8e-6, 6e-8, 4e-9


class Pace:
    """For one thread."""

    def __init__(self, units: Iterable[tuple[Plan, Unit]]) -> None:
        """units: all that will be done."""
        self._work, self.total = 0.0, 0
        for plan, unit in units:
            self._work += _work_of(plan, unit)
            self.total += unit.bytes_in
        self._done, self._told = 0.0, 0

    def done(self, plan: Plan, unit: Unit) -> int:
        """Bytes by which the bar moves now that a unit is done; all of them add up to `total`."""
        self._done += _work_of(plan, unit)
        reached = round(self.total * min(1.0, self._done / self._work)) if self._work else 0
        moved, self._told = reached - self._told, reached
        return moved


def _work_of(plan: Plan, unit: Unit) -> float:
    """Core-seconds of a unit, roughly."""
    seconds = unit.bytes_in * _BYTE
    solved = plan.recipe.solver == "gptq"  # codes are there already
    if unit.action in ("experts", "blocks") and not solved:
        weights = sum(math.prod(stored.shape) for stored in unit.sources)
        seconds += weights * _weight_seconds(plan, unit)
    return seconds


def _weight_seconds(plan: Plan, unit: Unit) -> float:
    kinds = [kind for spec in unit.outputs if (kind := block_type(spec.dtype)) is not None]
    if any(has_codebook(kind.name) for kind in kinds):
        return _CODEBOOK_WEIGHT
    if any(kind.coder for kind in kinds):
        return _BLOCK_WEIGHT
    return _INTEGER_WEIGHT if plan.scheme.coder and not kinds else 0.0
