"""Several conversions of one source, side by side: what each costs in bytes and in quality.

The page tells the first candidate in full; here all stand in one table and one plot, size against
mean KL. On the lower left is the better bargain; a candidate with another both below it and to its
left has no reason to exist. The noise floor is drawn as a line, since differences below it are not
worth bytes. Without further candidates there is neither table nor plot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from v4quant.evaluation.figures import Figures
from v4quant.evaluation.report import svg
from v4quant.evaluation.report.decision import decisions, distinct_names, recommendations
from v4quant.evaluation.report.svg import WIDE, Frame
from v4quant.evaluation.report.tables import Table, build_table, metric, multiple_of_floor
from v4quant.evaluation.report.text import (
    change,
    count,
    plain,
    size,
    text,
)
from v4quant_calibration.evaluation.verdict import CLEAR, SMALL

TOP, BOTTOM = 44.0, 330.0
_LABEL_HEIGHT = 14.0
_MOST_STEPS = 24  # lines that a name may move


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


@dataclass(frozen=True)
class SizePoint:
    """One conversion in the plot: its name, bytes, and mean KL in nats."""

    name: str
    nbytes: float
    kl: float


def size_quality_plot(result: Figures, frame: Frame = WIDE) -> str:
    """Size against mean KL of every candidate, with the noise floor; empty without candidates."""
    if not candidates(result):
        return ""
    points = [
        SizePoint(name, part.candidate.bytes, part.kl_mean)
        for name, part in _by_name(result).items()
        if part.candidate.bytes is not None and part.kl_mean is not None
    ]
    whole = {d.name for d in decisions(result) if not d.dominated_by and not d.defects}
    return sizes_plot(points, result.noise_floor.kl_mean or 0.0, whole, frame)


def sizes_plot(
    given: Sequence[SizePoint], floor: float, front: Collection[str] = (), frame: Frame = WIDE
) -> str:
    """Points with names, and a line through those of the front; empty for fewer than two.

    floor: the noise floor, in nats, 0 where unknown. front: names of those that nobody dominates.
    """
    points = [(p.nbytes, p.kl, p.name) for p in given if math.isfinite(p.nbytes)]
    positive = [y for _, y, _ in points if math.isfinite(y) and y > 0]
    if len(points) < 2 or not positive:
        return ""
    drawn = [*positive, floor] if math.isfinite(floor) and floor > 0 else positive
    axis = svg.log_axis(drawn, BOTTOM - 30, TOP)
    ticks = _span_ticks(min(x for x, _, _ in points), max(x for x, _, _ in points))

    margin = 12 if frame.is_narrow else 40

    def place(x: float) -> float:
        share = (x - ticks[0]) / (ticks[-1] - ticks[0])
        return frame.left + margin + share * (frame.right - frame.left - 2 * margin)

    parts = _grid(axis, ticks, place, frame)
    if drawn is not positive:
        parts.append(svg.polyline([(frame.left, axis(floor)), (frame.right, axis(floor))], "floor"))
    told = [(floor, "noise floor")] if drawn is not positive else []
    limits = [
        (value, meaning)
        for value, meaning in ((SMALL, "a good 4-bit file"), (CLEAR, "a good 2-bit file"))
        if 10.0**axis.low < value < 10.0**axis.high
    ]
    for value, _ in limits:
        parts.append(svg.line(frame.left, axis(value), frame.right, axis(value), "anchor"))
    words, taken = [], []
    for value, meaning in (*told, *limits):
        y = axis(value) - 5
        words.append(svg.label(frame.right, y, meaning, "legend", "end"))
        taken.append((frame.right - len(meaning) * svg.CHARACTER_WIDTH, frame.right, y))
    line = [
        (place(x), axis(y) if y > 0 else BOTTOM - 10)
        for x, y, name in sorted(points)
        if name in front and math.isfinite(y)
    ]
    if len(line) > 1:
        parts.append(svg.polyline(line, "front"))
    parts += words + _marks(points, axis, place, frame, taken)
    return svg.figure(frame.width, BOTTOM + 52, "Size against mean KL of every candidate", parts)


def _marks(
    points: Sequence[tuple[float, float, str]],
    axis: svg.LogAxis,
    place: Any,
    frame: Frame,
    taken: list[tuple[float, float, float]],
) -> list[str]:
    """Dots with their names, from above: on the right of a dot, in the right half on its left.

    A name that would touch another, a dot, or what is `taken` (x from, to, baseline), goes to the
    nearest free place on either side.
    """

    def height_of(y: float) -> float:
        return TOP - 8 if not math.isfinite(y) else axis(y) if y > 0 else BOTTOM - 10

    parts = []
    taken += [(place(x) - 6, place(x) + 6, height_of(y) + 4) for x, y, _ in points]
    for x, y, whole in sorted(points, key=lambda point: height_of(point[1])):
        at, height = place(x), height_of(y)
        name = svg.shorten(whole, 16 if frame.is_narrow else 20)
        tip = f"{whole}: {size(x)}, mean KL {plain(y, 3)} nats"
        parts.append(svg.circle(at, height, 5, "local", tip))
        side, line = _free_place(at, height, len(name) * svg.CHARACTER_WIDTH, frame, taken)
        anchor = "start" if side > 0 else "end"
        parts.append(svg.label(at + 10 * side, line, name, "legend", anchor))
    return parts


def _free_place(
    at: float, height: float, width: float, frame: Frame, taken: list[tuple[float, float, float]]
) -> tuple[int, float]:
    """(side, baseline) of a name of `width` beside a dot, which is then `taken`."""
    usual = -1 if at > frame.middle else 1
    steps = sorted(range(-_MOST_STEPS, _MOST_STEPS + 1), key=lambda step: (abs(step), -step))
    for step, side in ((step, side) for step in steps for side in (usual, -usual)):
        line = height + 4 + step * _LABEL_HEIGHT
        first, last = sorted((at + 8 * side, at + side * (10 + width)))
        inside = frame.left <= first and last <= frame.right and 10 <= line <= BOTTOM
        if inside and not any(
            first < b and a < last and abs(line - h) < _LABEL_HEIGHT for a, b, h in taken
        ):
            break
    taken.append((first, last, line))
    return side, line


def _grid(axis: svg.LogAxis, ticks: Sequence[float], place: Any, frame: Frame) -> list[str]:
    left, right = frame.left, frame.right
    parts = [svg.label(4, 22, "mean KL (nats)", "axis", anchor="start")]
    for value, shown in axis.ticks():
        parts.append(svg.line(left, axis(value), right, axis(value), "grid"))
        parts.append(svg.label(left - 8, axis(value) + 4, shown, anchor="end"))
    parts.append(svg.line(left, BOTTOM - 20, right, BOTTOM - 20, "break"))
    parts.append(
        svg.label(left - 8, BOTTOM - 6, "0" if frame.is_narrow else "0 exact", anchor="end")
    )
    parts.append(svg.line(left, BOTTOM, right, BOTTOM, "frame"))
    every = 2 if frame.is_narrow and len(ticks) > 4 else 1
    for number, tick in enumerate(ticks):
        parts.append(svg.line(place(tick), BOTTOM, place(tick), BOTTOM + 5, "frame"))
        if number % every == 0:
            shown = size(tick)
            edge = frame.width - len(shown) * svg.CHARACTER_WIDTH / 2
            parts.append(svg.label(min(place(tick), edge), BOTTOM + 20, shown))
    parts.append(svg.label(frame.middle, BOTTOM + 42, "size", "axis"))
    return parts


def _span_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that enclose low .. high (two at least)."""
    width = max(high - low, abs(high) * 0.05, 1.0)
    power = 10.0 ** math.floor(math.log10(width / wanted))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * wanted >= width)
    first = math.floor(low / step)
    last = max(math.ceil(high / step), first + 1)
    return [step * i for i in range(first, last + 1)]
