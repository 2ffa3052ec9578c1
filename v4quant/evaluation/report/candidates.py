"""Several conversions of one source, side by side: what each costs in bytes and in quality.

The page tells the first candidate in full; here all stand in one table and one plot, size against
mean KL. On the lower left is the better bargain; a candidate with another both below it and to its
left has no reason to exist. The noise floor is drawn as a line, since differences below it are not
worth bytes. Without further candidates there is neither table nor plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report import svg
from v4quant.evaluation.report.decision import decisions, distinct_names, recommendations
from v4quant.evaluation.report.tables import Table, build_table, metric, multiple_of_floor
from v4quant.evaluation.report.text import (
    change,
    count,
    plain,
    size,
    text,
)
from v4quant_calibration.evaluation.verdict import CLEAR, SMALL

WIDTH, LEFT, RIGHT = 960.0, 76.0, 944.0
TOP, BOTTOM = 44.0, 330.0
_LABEL_HEIGHT = 14.0


def candidates(result: Figures) -> list[Figures]:
    """All candidates of the run, smallest first; empty when there is only one."""
    others = result.others
    if not others:
        return []
    return sorted([result, *others], key=lambda c: c.candidate.bytes or 0.0)


def candidates_table(result: Figures) -> Table | None:
    """One row a candidate, smallest first: size, quality, and whether another one is better."""
    if not candidates(result):
        return None
    floor = result.noise_floor
    by_name = _by_name(result)
    rows = []
    for one in decisions(result):
        part = by_name[one.name]
        facts = part.candidate
        before, after = part.reference_perplexity, part.perplexity
        rows.append(
            (
                one.name,
                text(facts.scheme),
                one.grade,
                size(facts.bytes),
                plain(facts.expert_bits_per_weight),
                metric(part, "kl_mean"),
                multiple_of_floor(part, floor, "kl_mean"),
                change(before, after),
                metric(part, "top1_agreement"),
                one.dominated_by,
                count(one.defects) if part.findings is not None else "",
            )
        )
    columns = (
        "Candidate",
        "Scheme",
        "Verdict",
        "Size",
        "Bits",
        "KL mean (nats)",
        "KL / floor",
        "Perplexity",
        "Same top-1",
        "Dominated by",
        "Defects",
    )
    notes = (
        "Dominated: another candidate is no larger and no worse.",
        *recommendations(decisions(result)),
    )
    return build_table("Candidates", columns, rows, notes, text_columns=3)


def _by_name(result: Figures) -> dict[str, Figures]:
    parts = [result, *result.others]
    names = distinct_names([text(p.candidate.path) for p in parts])
    return dict(zip(names, parts, strict=True))


def size_quality_plot(result: Figures) -> str:
    """Size against mean KL of every candidate, with the noise floor; empty without candidates."""
    if not candidates(result):
        return ""
    points = [
        (x, y, name)
        for name, part in _by_name(result).items()
        if (x := part.candidate.bytes) is not None
        and (y := part.kl_mean) is not None
        and math.isfinite(x)
    ]
    floor = result.noise_floor.kl_mean or 0.0
    positive = [y for _, y, _ in points if math.isfinite(y) and y > 0]
    if len(points) < 2 or not positive:
        return ""
    drawn = [*positive, floor] if math.isfinite(floor) and floor > 0 else positive
    axis = svg.log_axis(drawn, BOTTOM - 30, TOP)
    ticks = _span_ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))

    def place(x: float) -> float:
        return LEFT + 40 + (x - ticks[0]) / (ticks[-1] - ticks[0]) * (RIGHT - LEFT - 200)

    parts = _grid(axis, ticks, place)
    if drawn is not positive:
        parts.append(svg.polyline([(LEFT, axis(floor)), (RIGHT, axis(floor))], "floor"))
        parts.append(svg.label(RIGHT, axis(floor) - 5, "noise floor", "legend", "end"))
    parts += _anchors(axis)
    front = [d for d in decisions(result) if not d.dominated_by and not d.defects]
    line = [
        (place(d.size), axis(d.kl) if d.kl > 0 else BOTTOM - 10)
        for d in front
        if math.isfinite(d.size) and math.isfinite(d.kl)
    ]
    if len(line) > 1:
        parts.append(svg.polyline(line, "front"))
    parts += _marks(points, axis, place)
    return svg.figure(WIDTH, BOTTOM + 52, "Size against mean KL of every candidate", parts)


def _anchors(axis: svg.LogAxis) -> list[str]:
    """The limits of the grades, where they fall inside the axis."""
    parts = []
    for value, told in ((SMALL, "a good 4-bit file"), (CLEAR, "a good 2-bit file")):
        if 10.0**axis.low < value < 10.0**axis.high:
            parts.append(svg.line(LEFT, axis(value), RIGHT, axis(value), "anchor"))
            parts.append(svg.label(RIGHT, axis(value) - 5, told, "legend", "end"))
    return parts


def _marks(points: Sequence[tuple[float, float, str]], axis: svg.LogAxis, place: Any) -> list[str]:
    """Dots with their names, from above.

    A name that would touch a higher one moves down, or up at the foot of the plot.
    """

    def height_of(y: float) -> float:
        return TOP - 8 if not math.isfinite(y) else axis(y) if y > 0 else BOTTOM - 10

    parts, taken = [], list[tuple[float, float]]()
    for x, y, whole in sorted(points, key=lambda point: height_of(point[1])):
        at, height = place(x), height_of(y)
        name = svg.shorten(whole, 20)
        tip = f"{whole}: {size(x)}, mean KL {plain(y, 3)} nats"
        parts.append(svg.circle(at, height, 5, "local", tip))
        line = height + 4
        while any(abs(at - a) < 150 and abs(line - b) < _LABEL_HEIGHT for a, b in taken):
            line += _LABEL_HEIGHT if height < BOTTOM - 4 * _LABEL_HEIGHT else -_LABEL_HEIGHT
        taken.append((at, line))
        parts.append(svg.label(at + 10, max(line, 10), name, "legend", "start"))
    return parts


def _grid(axis: svg.LogAxis, ticks: Sequence[float], place: Any) -> list[str]:
    parts = [svg.label(4, 22, "mean KL (nats)", "axis", anchor="start")]
    for value, shown in axis.ticks():
        parts.append(svg.line(LEFT, axis(value), RIGHT, axis(value), "grid"))
        parts.append(svg.label(LEFT - 8, axis(value) + 4, shown, anchor="end"))
    parts.append(svg.line(LEFT, BOTTOM - 20, RIGHT, BOTTOM - 20, "break"))
    parts.append(svg.label(LEFT - 8, BOTTOM - 6, "0 exact", anchor="end"))
    parts.append(svg.line(LEFT, BOTTOM, RIGHT, BOTTOM, "frame"))
    for tick in ticks:
        parts.append(svg.line(place(tick), BOTTOM, place(tick), BOTTOM + 5, "frame"))
        parts.append(svg.label(place(tick), BOTTOM + 20, size(tick)))
    parts.append(svg.label((LEFT + RIGHT) / 2, BOTTOM + 42, "size", "axis"))
    return parts


def _span_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low .. high (two at least)."""
    width = max(high - low, abs(high) * 0.05, 1.0)
    power = 10.0 ** math.floor(math.log10(width / wanted))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * wanted >= width)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * i for i in range(first, last + 1)]
