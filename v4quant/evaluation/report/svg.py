"""The few SVG elements the report's plots are drawn with, and the axes that place them.

Plots are plain text: every element is a string, coordinates are rounded to a tenth of a unit, and
colours are named by CSS class so that the page's light and dark styles apply to them. Nothing is
drawn with paths or transforms, so a test can read every coordinate back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from v4quant.evaluation.report.text import escape_html, plain

CHARACTER_WIDTH = 6.6  # of the 12-unit label font, on the wide side
LEGEND_HEIGHT = 18.0


@dataclass(frozen=True)
class Frame:
    """The room a plot is drawn in, in units: width, and where its axes begin and end."""

    width: float
    left: float
    right: float

    @property
    def is_narrow(self) -> bool:
        """Whether it is for a telephone's screen, where words must be few."""
        return self.width < 600

    @property
    def middle(self) -> float:
        """Half way between the ends of the axes."""
        return (self.left + self.right) / 2


WIDE = Frame(960.0, 76.0, 944.0)
NARROW = Frame(352.0, 54.0, 346.0)  # drawn one to one on a screen of 390


def rect(x: float, y: float, width: float, height: float, css: str, title: str = "") -> str:
    """A rectangle with an optional tooltip."""
    return _element(
        f'rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" class="{css}"',
        "rect",
        title,
    )


def circle(x: float, y: float, radius: float, css: str, title: str = "") -> str:
    """A filled dot with an optional tooltip."""
    return _element(
        f'circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}" class="{css}"', "circle", title
    )


def polygon(points: Sequence[tuple[float, float]], css: str, title: str = "") -> str:
    """A closed shape with an optional tooltip."""
    return _element(f'polygon points="{_points(points)}" class="{css}"', "polygon", title)


def polyline(points: Sequence[tuple[float, float]], css: str) -> str:
    """A line through points."""
    return f'<polyline points="{_points(points)}" class="{css}"/>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def label(x: float, y: float, content: str, css: str = "tick", anchor: str = "middle") -> str:
    """Escaped text whose baseline is at y; anchor is start, middle or end."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}">'
        f"{escape_html(content)}</text>"
    )


def figure(width: float, height: float, description: str, parts: Sequence[str]) -> str:
    """The whole drawing, described for readers who cannot see it."""
    body = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape_html(description)}">\n{body}\n</svg>'
    )


def standalone(drawing: str, style: str) -> str:
    """A drawing as a file of its own, with its style and background; "" stays "".

    As an image it follows the system's light or dark setting.
    """
    if not drawing:
        return ""
    opening, _, rest = drawing.partition(">")
    named = opening.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1)
    ground = '<rect width="100%" height="100%" style="fill:var(--page)"/>'
    return f"{named}>\n<style>{escape_html(style)}</style>\n{ground}{rest}\n"


def legend(
    entries: Sequence[tuple[Callable[[float, float], str], str]],
    frame: Frame,
    y: float,
    start: float | None = None,
) -> tuple[list[str], float]:
    """Marks with their meanings in rows that fit the frame, and the height of rows after the first.

    entries: what draws a mark of 14 units from (x, y) on, and its text. start: where rows begin.
    """
    first = frame.left if start is None else start
    parts, x, base = [], first, y
    for mark, meaning in entries:
        width = 20 + len(meaning) * CHARACTER_WIDTH
        if x > first and x + width > frame.width:
            x, y = first, y + LEGEND_HEIGHT
        parts += [mark(x, y), label(x + 20, y, meaning, "legend", "start")]
        x += width + 18
    return parts, y - base


def shorten(name: str, characters: int) -> str:
    """`name` cut in the middle so that at most `characters` remain."""
    if len(name) <= characters:
        return name
    head = max(1, (characters - 1) // 2)
    tail = characters - 1 - head
    return name[:head] + "…" + (name[-tail:] if tail else "")


@dataclass(frozen=True)
class LogAxis:
    """Maps positive values to pixels: `10**low` to `start`, `10**high` to `end` (whole decades)."""

    low: int
    high: int
    start: float
    end: float

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Tick values with labels: decades, and 2 and 5 between them where there are few."""
        decades = self.high - self.low
        step = math.ceil(decades / 8)
        powers = range(self.low, self.high + 1, step)
        factors = (1, 2, 5) if decades <= 3 else (1,)
        values = [f * 10.0**p for p in powers for f in factors if f == 1 or p < self.high]
        return [(v, plain(v, 1)) for v in values]


def log_axis(values: Sequence[float], start: float, end: float) -> LogAxis:
    """The whole decades that hold all (positive, finite) values."""
    low = math.floor(math.log10(min(values)))
    high = max(math.ceil(math.log10(max(values))), low + 1)
    return LogAxis(low, high, start, end)


def even_ticks(top: float, wanted: int = 5) -> list[float]:
    """0 and multiples of 1, 2 or 5 times a power of ten that reach at least `top` (> 0)."""
    power = 10.0 ** math.floor(math.log10(top / wanted))
    step = next(f * power for f in (1, 2, 5, 10) if f * power * wanted >= top)
    return [i * step for i in range(math.ceil(top / step - 1e-9) + 1)]


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _element(opening: str, tag: str, title: str) -> str:
    if not title:
        return f"<{opening}/>"
    return f"<{opening}><title>{escape_html(title)}</title></{tag}>"
