"""Intervals of integers, and what TTIR's operations make of them.

What is not known has the interval of its type; what may leave its type is marked as wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Value:
    """An integer's interval; the operation by which it may have wrapped; a pointer's argument."""

    low: int
    high: int
    wrapped: str | None = None
    base: str | None = None

    def joined(self, other: Value) -> Value:
        """Either of two values."""
        return Value(
            min(self.low, other.low),
            max(self.high, other.high),
            self.wrapped or other.wrapped,
            self.base or other.base,
        )


def limits(kind: str) -> Value:
    """The interval of a type; of floats and pointers, which nothing is asked of, a point."""
    bits = re.search(r"(?:^|x|<)i(\d+)>?$", kind)
    if bits is None:
        return Value(0, 0)
    width = int(bits.group(1))
    return Value(0, 1) if width == 1 else Value(-(1 << width - 1), (1 << width - 1) - 1)


def fitted(value: Value, every: Value, text: str) -> Value:
    """The value, or the whole type with a mark where it may leave it."""
    if every.low <= value.low and value.high <= every.high:
        return value
    return replace(every, wrapped=value.wrapped or text)


def _products(a: Value, b: Value, _: Value) -> tuple[int, int]:
    ends = [x * y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


def _quotients(a: Value, b: Value, every: Value) -> tuple[int, int]:
    if b.low <= 0:
        return every.low, every.high
    ends = [(abs(x) // y) * (1 if x >= 0 else -1) for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


def _remainders(a: Value, b: Value, every: Value) -> tuple[int, int]:
    most = max(abs(b.low), abs(b.high)) - 1
    if most < 0:
        return every.low, every.high
    return max(min(a.low, 0), -most), min(max(a.high, 0), most)


def _ands(a: Value, b: Value, every: Value) -> tuple[int, int]:
    """A number and one that is not negative is no larger than that."""
    bounds = [v.high for v in (a, b) if v.low >= 0]
    return (0, min(bounds)) if bounds else (every.low, every.high)


def _ors(a: Value, b: Value, every: Value) -> tuple[int, int]:
    if a.low < 0 or b.low < 0:
        return every.low, every.high
    return 0, (1 << max(a.high.bit_length(), b.high.bit_length())) - 1


def _left(a: Value, b: Value, every: Value) -> tuple[int, int]:
    if not 0 <= b.low <= b.high <= 64:
        return every.low, every.high
    return _products(a, Value(1 << b.low, 1 << b.high), every)


def _right(a: Value, b: Value, every: Value) -> tuple[int, int]:
    if not 0 <= b.low <= b.high <= 64:
        return every.low, every.high
    ends = [x >> y for x in (a.low, a.high) for y in (b.low, b.high)]
    return min(ends), max(ends)


EXACT: dict[str, Callable[[Value, Value, Value], tuple[int, int]]] = {
    "arith.addi": lambda a, b, _: (a.low + b.low, a.high + b.high),
    "arith.subi": lambda a, b, _: (a.low - b.high, a.high - b.low),
    "arith.muli": _products,
    "arith.divsi": _quotients,
    "arith.remsi": _remainders,
    "arith.maxsi": lambda a, b, _: (max(a.low, b.low), max(a.high, b.high)),
    "arith.minsi": lambda a, b, _: (min(a.low, b.low), min(a.high, b.high)),
    "arith.andi": _ands,
    "arith.ori": _ors,
    "arith.xori": _ors,
    "arith.shli": _left,
    "arith.shrsi": _right,
}
