"""What a matrix loses, summed over pieces of its rows; of V4.1's tables also as text uses them."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord, make_record, refuse_inexact
from v4quant_calibration.solve.solution import Evidence
from v4quant_calibration.statistics.table_use import RowUse
from v4quant_formats.weights import StoredWeight


class Loss:
    """Sums of what a cast loses, over pieces of a matrix's rows."""

    def __init__(self) -> None:
        self.altered, self.squared, self.norm, self.largest = 0, 0.0, 0.0, 0.0

    def add(self, values: Tensor, result: Tensor) -> None:
        """Count a piece: float32 `values` became `result`."""
        self.norm += float(values.double().square().sum())
        error = result.float() - values
        if changed := int(error.count_nonzero()):
            self.altered += changed
            self.squared += float(error.double().square().sum())
            self.largest = max(self.largest, float(error.abs().max()))

    def record(self, plan: Plan, stored: StoredWeight, target: str) -> TensorRecord:
        """The record of a cast; raises InexactCast where the recipe wants none that loses."""
        refuse_inexact(plan, stored, self.altered, target)
        record = make_record(stored, "cast", target, self.altered)
        if not self.altered:
            return record
        rms = math.sqrt(self.squared / self.norm)
        return replace(record, relative_rms=rms, max_error=self.largest)


class UseLoss:
    """The error of a table's rows, each weighted by how often the calibration text used it.

    A row has scales of its own in every type a table may have, so use decides no scale: it says
    what the error amounts to.
    """

    def __init__(self, use: RowUse) -> None:
        self.use = use
        self.squared, self.norm = 0.0, 0.0

    @classmethod
    def of(cls, stats: Evidence | None, module: str) -> UseLoss | None:
        """For a table whose use is known; None for other matrices."""
        use = stats.tables.get(module) if stats is not None else None
        return None if use is None else cls(use)

    def add(self, start: int, values: Tensor, result: Tensor) -> None:
        """Count a piece that begins with row `start`: `values` became `result`."""
        rows, counts = self.use.between(start, start + len(values))
        x, y = values[rows].double(), result[rows].double()
        self.squared += float(((y - x).square().sum(1) * counts).sum())
        self.norm += float((x.square().sum(1) * counts).sum())

    @property
    def relative_rms(self) -> float:
        """Relative RMS error over all look-ups."""
        return math.sqrt(self.squared / self.norm) if self.norm else 0.0
