"""Values: every module of a source beside what conversions made of it.

Both sides are decoded by the second decoder, a few hundred rows at a time. The source's rows are
read and decoded once, for however many conversions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from v4quant.checks.independent_decoder import decode_rows
from v4quant.conversion.records import TensorRecord
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import parse_name, split_part
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import StoredWeight, find_weight
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.progress import Progress
from v4quant_kernels.scheme import SCHEMES

_ROWS = 512  # compared at a time; a multiple of every tile height
# Both sides add the same float64 numbers, perhaps in another order. One changed code of 8 million
# moves an error by 6e-8 of it.
_SAME_SUM = 1e-9


@dataclass(frozen=True)
class Written:
    """A conversion: its checkpoint, and what its manifest says of modules and dropped tensors."""

    output: Checkpoint
    records: Mapping[str, TensorRecord]
    dropped: AbstractSet[str]


@dataclass
class Values:
    """What a comparison found: modules compared, those declared exact that are, and problems, by
    module."""

    compared: int = 0
    exact: int = 0
    problems: list[tuple[str, str]] = field(default_factory=list)


def recorded_as(name: str) -> str:
    """What a manifest calls the module of a tensor; one that no release has, by its own name."""
    return split_part(name)[0] if parse_name(name) is not None else name


def compare_values(
    original: Checkpoint, conversions: Sequence[Written], progress: Progress
) -> list[Values]:
    """Compare every module that a conversion did not drop, with all conversions at once."""
    modules: dict[str, list[TensorSpec]] = {}
    for spec in original:
        modules.setdefault(recorded_as(spec.name), []).append(spec)
    amounts = [
        {
            module: sum(spec.nbytes for spec in specs if spec.name not in one.dropped)
            for module, specs in modules.items()
            if any(spec.name not in one.dropped for spec in specs)
        }
        for one in conversions
    ]
    progress.start("Comparing", sum(sum(each.values()) for each in amounts), "B")
    found = [Values(compared=len(each)) for each in amounts]
    for module in modules:
        pairs = []
        for one, values, amount in zip(conversions, found, amounts, strict=True):
            if module not in amount:
                continue
            record = one.records.get(module)
            if record is None:
                what = "is in the source, but nothing says what became of it"
                values.problems.append((module, what))
                continue
            pairs.append((values, _Comparison(original, one.output, record)))
        _compare([comparison for _, comparison in pairs], original)
        for values, comparison in pairs:
            if comparison.problem is not None:
                values.problems.append((module, comparison.problem))
            else:
                values.exact += comparison.record.exact
        progress.advance(sum(amount.get(module, 0) for amount in amounts))
    progress.finish()
    return found


class _Comparison:
    """One module of a conversion beside the source's. problem: in words, None while there is none.

    source: set while rows are to be compared.
    """

    def __init__(self, original: Checkpoint, output: Checkpoint, record: TensorRecord) -> None:
        self.record, self.problem = record, None
        self.source: StoredWeight | None = None
        self._output = output
        self._altered, self._squared, self._norm, self._largest = 0, 0.0, 0.0, 0.0
        target = SCHEMES.get(record.target)  # none: plain numbers, which keep their signs
        self._signed = target is None or target.keeps_negative_zero
        try:
            self.problem = self._begin(original)
        except V4QuantError as error:
            self.fail(str(error))

    def _begin(self, original: Checkpoint) -> str | None:
        record, a = self.record, find_weight(original, self.record.module)
        b = find_weight(self._output, record.module)
        if a.coding != record.source:
            return f"is {a.coding} in the source, the manifest says {record.source[:40]!r}"
        said = record.target.partition(" ")[0]  # behind it, how the scales are stored
        if b.coding != said and not b.coding.startswith(f"{said}-"):  # or in other tiles
            return f"is {b.coding}, the manifest says {record.target[:40]!r}"
        if math.prod(a.shape) != record.elements:
            return f"has {math.prod(a.shape)} elements, the manifest says {record.elements}"
        if a.scheme is None and b.scheme is None and record.disposition == "copied":
            return _compare_bytes(original, self._output, a.parts, b.parts)
        if a.shape != b.shape:
            return f"shape {list(b.shape)} differs from the source's {list(a.shape)}"
        self.source, self._written = a, b
        return None

    def fail(self, problem: str) -> None:
        """End with a problem."""
        self.problem, self.source = problem, None

    def add(self, x: Any, start: int, stop: int) -> None:
        """Compare rows start to stop with `x`, the source's."""
        try:
            y = decode_rows(self._output, self._written, start, stop)
        except V4QuantError as error:
            self.fail(str(error))
            return
        signs = self._signed & (np.signbit(x) != np.signbit(y)) & self.record.exact
        self._altered += int(((x != y) | signs).sum())
        moved = y - x
        self._squared += float((moved * moved).sum())
        self._norm += float((x * x).sum())
        self._largest = max(self._largest, float(np.abs(moved).max()))

    def finish(self) -> None:
        """All rows were added."""
        self.problem = self._verdict()

    def _verdict(self) -> str | None:
        record, altered, largest = self.record, self._altered, self._largest
        if record.exact and altered:
            return f"declared exact, but {altered} elements differ (largest by {largest:.3g})"
        if not record.exact:
            rms = (self._squared / self._norm) ** 0.5 if self._norm else 0.0
            told = f"the manifest says {record.relative_rms:.12g}"
            if abs(rms - record.relative_rms) > _SAME_SUM * rms:
                return f"relative RMS error is {rms:.12g}, {told}"
            told = f"the manifest says {record.max_error:.12g}"
            if abs(largest - record.max_error) > _SAME_SUM * largest:
                return f"largest error is {largest:.12g}, {told}"
            if record.disposition == "cast" and altered != record.altered:
                return f"{altered} elements differ, the manifest says {record.altered}"
        return None


def _compare(each: Sequence[_Comparison], original: Checkpoint) -> None:
    """Compare one module's rows with every conversion that is to be compared so."""
    todo = [one for one in each if one.source is not None]
    source = next((one.source for one in todo if one.source is not None), None)
    if source is None:
        return
    for start in range(0, source.shape[0], _ROWS):
        stop = min(start + _ROWS, source.shape[0])
        try:
            x = decode_rows(original, source, start, stop)
        except V4QuantError as error:
            for one in todo:
                one.fail(str(error))
            return
        for one in todo:
            if one.source is not None:
                one.add(x, start, stop)
    for one in todo:
        if one.source is not None:
            one.finish()


def _compare_bytes(
    original: Checkpoint, output: Checkpoint, a: dict[str, Any], b: dict[str, Any]
) -> str | None:
    for part, spec in a.items():
        other = b.get(part)
        if other is None or (other.dtype, other.shape) != (spec.dtype, spec.shape):
            return f"'{spec.name}' was to be copied, but dtype or shape differ"
        pieces = zip(original.read_chunks(spec.name), output.read_chunks(other.name), strict=True)
        for (at, x), (_, y) in pieces:
            if not torch.equal(x.view(torch.uint8), y.view(torch.uint8)):
                return f"'{spec.name}' was to be copied, but bytes differ after byte {at}"
    return None
