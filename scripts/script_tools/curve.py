"""Curves of KL divergence, on a logarithmic axis, for the pages of docs/."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from v4quant.evaluation.report import svg

_LEFT, _RIGHT, _TOP, _BOTTOM = 80.0, 670.0, 30.0, 380.0
_STYLE = "text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.axis{font-size:13px}"
_BELOW = 19.0  # a label's baseline from its dot


@dataclass(frozen=True)
class Dot:
    """A figure: x in the axis' unit, KL in nats; the tooltip, and what stands at it, if anything:
    below, or slanting upwards, which leaves room for neighbours."""

    x: float
    kl: float
    tip: str
    label: str = ""
    slanting: bool = False


@dataclass(frozen=True)
class Curve:
    """Dots of one kind, joined in the order of x. colour: as CSS has it."""

    name: str
    colour: str
    dots: Sequence[Dot]


def draw(curves: Sequence[Curve], x_title: str, description: str) -> str:
    """A whole SVG file. At least one curve has a dot."""
    dots = [dot for curve in curves for dot in curve.dots]
    axis = svg.log_axis([dot.kl for dot in dots], _BOTTOM, _TOP)
    xs = [dot.x for dot in dots]
    step = _step(max(xs) - min(xs))
    low = step * math.floor(min(xs) / step - 0.2)
    high = step * math.ceil(max(xs) / step + 0.2)

    def across(value: float) -> float:
        return _LEFT + (value - low) / (high - low) * (_RIGHT - _LEFT)

    style = _STYLE
    for index, curve in enumerate(curves):
        style += f".w{index}{{fill:{curve.colour}}}.l{index}{{fill:none;stroke:{curve.colour}}}"
    parts = [f"<style>{style}</style>"]
    for value, told in axis.ticks():
        parts.append(svg.line(_LEFT, axis(value), _RIGHT, axis(value), "grid"))
        parts.append(svg.label(_LEFT - 8, axis(value) + 4, told, "tick", "end"))
    for index, curve in enumerate(curves):
        ordered = sorted(curve.dots, key=lambda dot: dot.x)
        spots = [(across(dot.x), axis(dot.kl)) for dot in ordered]
        if len(spots) > 1:
            parts.append(svg.polyline(spots, f"l{index}"))
        for (x, y), dot in zip(spots, ordered, strict=True):
            parts.append(svg.circle(x, y, 4, f"w{index}", dot.tip))
            if dot.label:
                parts.append(
                    _turned(x + 6, y - 6, dot.label, "tick", "start", -40)
                    if dot.slanting
                    else svg.label(x, y + _BELOW, dot.label)
                )
        parts.append(svg.circle(_RIGHT - 130, _TOP + 8 + 18 * index, 4, f"w{index}"))
        parts.append(svg.label(_RIGHT - 118, _TOP + 12 + 18 * index, curve.name, "tick", "start"))
    ticks = [low + step * i for i in range(round((high - low) / step) + 1)]
    parts += [svg.label(across(t), _BOTTOM + 18, f"{t:g}") for t in ticks]
    parts.append(svg.label((_LEFT + _RIGHT) / 2, _BOTTOM + 40, x_title, "axis"))
    middle = (_TOP + _BOTTOM) / 2
    parts.append(_turned(20, middle, "mean KL divergence, nats per token", "axis", "middle", -90))
    drawn = svg.figure(700, 440, description, parts)
    return drawn.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _step(width: float) -> float:
    """Between ticks of an axis this wide: 1, 2 or 5 times a power of ten, six ticks or so."""
    power = 10.0 ** math.floor(math.log10(width / 5)) if width else 1.0
    return next(f * power for f in (1, 2, 5, 10) if f * power * 6 >= width)


def _turned(x: float, y: float, content: str, css: str, anchor: str, degrees: int) -> str:
    """A label turned about its anchor."""
    turn = f'<text transform="rotate({degrees} {x:.1f} {y:.1f})" '
    return svg.label(x, y, content, css, anchor).replace("<text ", turn, 1)
