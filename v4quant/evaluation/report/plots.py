"""The three plots of an evaluation report, as inline SVG.

Layer errors answer "where does it hurt": the local error is a layer's own doing (both versions get
the same input), the stream error is what has piled up by then. The KL histogram answers "how many
tokens, how badly" against the noise floor. The coverage strips answer "was every expert seen":
a quantized expert that no token reached has not been evaluated at all.

Error and KL axes are logarithmic, since both range over decades. An exact zero has no place on such
an axis and gets a row of its own; a value that is not finite becomes a cross at the upper edge.
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from v4quant.evaluation.figures import Figures, LayerFigures
from v4quant.evaluation.report import svg
from v4quant.evaluation.report.svg import WIDE, Frame
from v4quant.evaluation.report.text import (
    ReportError,
    count,
    percent,
    plain,
    text,
)

SERIES = (
    ("stream_relative_error", "stream", "stream relative error (accumulated so far)"),
    ("local_relative_error", "local", "local relative error (this layer alone)"),
)
KINDS = (("swa", "sliding window"), ("csa", "CSA"), ("hca", "HCA"), ("mtp", "MTP"))
STRIP_STEPS = (1, 2, 4, 8, 16, 32)


def layer_error_plot(result: Figures, frame: Frame = WIDE) -> str:
    """Local and stream relative error of every layer on a log axis; empty without data."""
    layers = result.layers
    series = {key: [getattr(layer, key) for layer in layers] for key, _, _ in SERIES}
    values = [v for column in series.values() for v in column if v is not None]
    positive = [v for v in values if math.isfinite(v) and v > 0]
    if not positive:
        return ""
    parts, extra = _error_legend(series, frame)
    top, bottom = 60.0 + extra, 330.0 + extra
    has_zero = any(v == 0 for v in values)
    axis = svg.log_axis(positive, bottom - (30 if has_zero else 0), top)
    slot = (frame.right - frame.left) / len(layers)
    parts += _error_grid(axis, has_zero, top, bottom, frame)
    for key, css, meaning in SERIES:
        points = [
            (frame.left + slot * (i + 0.5), _place(axis, v, top, bottom), v, text(layer.name))
            for i, (layer, v) in enumerate(zip(layers, series[key], strict=True))
            if v is not None
        ]
        if points:
            parts += _error_series(points, css, meaning)
    names, below = _layer_labels(layers, slot, bottom, frame)
    parts += [*names, svg.label(frame.middle, bottom + 52, "layer", "axis")]
    described = f"Relative error of {len(layers)} layers, logarithmic axis"
    return svg.figure(frame.width, bottom + 86 + below, described, parts)


def kl_histogram_plot(result: Figures, frame: Frame = WIDE) -> str:
    """Share of tokens per bin of log10 KL, with the noise floor's outline; empty without data."""
    histogram = result.kl_histogram
    edges, counts = histogram.log10_edges, histogram.counts
    floor = histogram.floor_counts
    if not counts or sum(counts) <= 0:
        return ""
    _check_histogram(edges, counts, floor)
    shares = [c / sum(counts) for c in counts]
    floor_shares = [c / sum(floor) for c in floor] if sum(floor) > 0 else []
    top, bottom = 62.0, 338.0
    ticks = svg.even_ticks(100 * max(shares + floor_shares))
    scale = (bottom - top) / ticks[-1]

    def x(edge: float) -> float:
        span = frame.right - frame.left
        return frame.left + (edge - edges[0]) / (edges[-1] - edges[0]) * span

    parts = _share_grid(ticks, scale, bottom, frame)
    for i, share in enumerate(shares):
        span = f"KL {plain(10 ** edges[i], 2)} to {plain(10 ** edges[i + 1], 2)} nats"
        height = 100 * share * scale
        tip = f"{span}: {count(counts[i])} tokens ({percent(share)})"
        width = max(0.0, x(edges[i + 1]) - x(edges[i]) - 1)
        parts.append(svg.rect(x(edges[i]), bottom - height, width, height, "bar", tip))
    if floor_shares:
        outline = [(x(edges[0]), bottom)]
        for i, share in enumerate(floor_shares):
            y = bottom - 100 * share * scale
            outline += [(x(edges[i]), y), (x(edges[i + 1]), y)]
        parts.append(svg.polyline([*outline, (x(edges[-1]), bottom)], "floor"))
    parts += _power_ticks(edges, x, bottom, frame)
    parts += _kl_markers(result, edges, x, bottom, frame)
    parts += _kl_legend(bool(floor_shares), frame)
    told = "KL divergence of one token (nats)"
    parts.append(svg.label(frame.middle, bottom + 42, told, "axis"))
    return svg.figure(frame.width, bottom + 54, "Histogram of the per-token KL divergence", parts)


def coverage_plot(result: Figures, frame: Frame = WIDE) -> str:
    """One strip a layer: its experts from most to least used, coloured by the tokens they saw."""
    coverage = result.coverage
    layers = [(text(r.name), r.tokens_per_expert) for r in coverage.layers]
    ranked = [(name, sorted(found, reverse=True)) for name, found in layers if found]
    if not ranked:
        return ""
    for name, found in ranked:
        if not all(math.isfinite(v) and v >= 0 for v in found):
            raise ReportError(f"coverage of '{name}' holds a count that is not a number >= 0")
    floor = coverage.floor or 0.0
    bands = _coverage_bands(floor, max(found[0] for _, found in ranked))
    parts, extra = _band_legend(bands, floor, frame)
    step, top = 16.0, 52.0 + extra
    right = frame.width - (80 if frame.is_narrow else 190)
    for row, (name, found) in enumerate(ranked):
        y = top + row * step
        label = svg.shorten(_layer_label(name), 7 if frame.is_narrow else 10)
        parts.append(svg.label(frame.left - 8, y + 11, label, anchor="end"))
        parts += _strip(name, found, bands, y, frame.left, right)
        starved = sum(v < floor for v in found)
        told = f"min {count(found[-1])}"
        if not frame.is_narrow:
            told += f", median {count(statistics.median_low(found))}"
        parts.append(svg.label(right + 8, y + 11, told, anchor="start"))
        if starved and not frame.is_narrow:
            shown = svg.label(frame.width - 4, y + 11, count(starved), "tick alarm", anchor="end")
            parts.append(shown)
    end = top + len(ranked) * step
    experts = max(len(found) for _, found in ranked)
    axis = "experts, from most to least used"
    if not frame.is_narrow:
        axis = f"experts of a layer, from most to least used (up to {experts:,})"
    parts.append(svg.label((frame.left + right) / 2, end + 18, axis, "axis"))
    parts.append(svg.label(4, top - 6, "layer", "axis", anchor="start"))
    each = "tokens" if frame.is_narrow else "tokens per expert"
    parts.append(svg.label(right + 8, top - 6, each, "axis", anchor="start"))
    if floor > 0 and not frame.is_narrow:
        parts.append(svg.label(frame.width - 4, top - 6, "starved", "axis", anchor="end"))
    return svg.figure(frame.width, end + 30, "Tokens seen per expert, one strip per layer", parts)


def _place(axis: svg.LogAxis, value: float, top: float, bottom: float) -> float:
    if not math.isfinite(value):
        return top - 8
    return axis(value) if value > 0 else bottom - 10


def _error_grid(
    axis: svg.LogAxis, has_zero: bool, top: float, bottom: float, frame: Frame
) -> list[str]:
    left, right = frame.left, frame.right
    parts = [svg.label(4, top - 16, "relative error (no unit)", "axis", anchor="start")]
    for value, shown in axis.ticks():
        y = axis(value)
        parts.append(svg.line(left, y, right, y, "grid"))
        parts.append(svg.label(left - 8, y + 4, shown, anchor="end"))
    if has_zero:
        parts.append(svg.line(left, bottom - 20, right, bottom - 20, "break"))
        parts.append(svg.label(left - 8, bottom - 6, _exact(frame), anchor="end"))
    parts.append(svg.line(left, bottom, right, bottom, "frame"))
    return parts


def _exact(frame: Frame) -> str:
    return "0" if frame.is_narrow else "0 exact"


def _error_series(
    points: list[tuple[float, float, float, str]], css: str, meaning: str
) -> list[str]:
    drawn = [(x, y) for x, y, v, _ in points if math.isfinite(v)]
    parts = [svg.polyline(drawn, f"{css}-line")] if len(drawn) > 1 else []
    for x, y, value, name in points:
        tip = f"{name}: {meaning} {plain(value, 3)}"
        if not math.isfinite(value):
            parts += [
                svg.line(x - 4, y - 4, x + 4, y + 4, "cross"),
                svg.line(x - 4, y + 4, x + 4, y - 4, "cross"),
                svg.circle(x, y, 5, "invisible", tip),
            ]
        else:
            parts.append(_mark(x, y, css, tip))
    return parts


def _mark(x: float, y: float, css: str, tip: str = "") -> str:
    if css == "local":
        return svg.circle(x, y, 4, css, tip)
    return svg.polygon([(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)], css, tip)


def _error_legend(
    series: Mapping[str, list[float | None]], frame: Frame
) -> tuple[list[str], float]:
    """The legend, and by how much it is higher than one row."""
    entries: list[tuple[Callable[[float, float], str], str]] = [
        (lambda x, y, css=css: _mark(x + 6, y - 4, css), meaning)  # type: ignore[misc]
        for key, css, meaning in reversed(SERIES)
        if any(v is not None for v in series[key])
    ]
    parts, extra = svg.legend(entries, frame, 18, 4 if frame.is_narrow else None)
    if any(v is not None and not math.isfinite(v) for column in series.values() for v in column):
        y = 44 + extra
        parts.append(svg.label(frame.right, y, "× not finite", "legend alarm", "end"))
    return parts, extra


def _layer_labels(
    layers: Sequence[LayerFigures], slot: float, bottom: float, frame: Frame
) -> tuple[list[str], float]:
    """Layer names below the axis, as many as fit, above a strip that tells the attention kind; and
    by how much the legend of kinds is higher than one row."""
    names = [_layer_label(text(layer.name)) for layer in layers]
    longest = min(12, max(len(name) for name in names))
    every = math.ceil((longest * svg.CHARACTER_WIDTH + 4) / slot)
    known = dict(KINDS)
    parts = list[str]()
    for i, (name, layer) in enumerate(zip(names, layers, strict=True)):
        center, kind = frame.left + slot * (i + 0.5), text(layer.kind)
        if i % every == 0 and center + longest * svg.CHARACTER_WIDTH / 2 < frame.width:
            parts.append(svg.label(center, bottom + 32, svg.shorten(name, 12)))
        if kind in known:
            tip = f"{text(layer.name)}: {known[kind]}"
            parts.append(svg.rect(center - slot / 2, bottom + 6, slot - 1, 8, f"kind-{kind}", tip))
    present = {text(layer.kind) for layer in layers}
    entries = [(_square(f"kind-{kind}"), meaning) for kind, meaning in KINDS if kind in present]
    told, extra = svg.legend(entries, frame, bottom + 78, 4 if frame.is_narrow else None)
    return parts + told, extra


def _square(css: str) -> Callable[[float, float], str]:
    """What draws a legend's square of a colour."""
    return lambda x, y: svg.rect(x, y - 10, 14, 12, css)


def _layer_label(name: str) -> str:
    numbered = re.fullmatch(r"layers\.(\d+)", name)
    return numbered.group(1) if numbered else name


def _check_histogram(
    edges: Sequence[float], counts: Sequence[float], floor: Sequence[float]
) -> None:
    if len(edges) != len(counts) + 1 or (floor and len(floor) != len(counts)):
        raise ReportError("kl_histogram needs n + 1 log10_edges for n counts and floor_counts")
    rising = all(math.isfinite(b) and a < b for a, b in itertools.pairwise(edges))
    if not rising or not math.isfinite(edges[0]):
        raise ReportError("kl_histogram.log10_edges must be finite and rising")
    if not all(math.isfinite(c) and c >= 0 for c in [*counts, *floor]):
        raise ReportError("kl_histogram counts must be finite and not negative")


def _share_grid(ticks: list[float], scale: float, bottom: float, frame: Frame) -> list[str]:
    parts = [svg.label(4, 44, "share of tokens (%)", "axis", anchor="start")]
    for tick in ticks:
        y = bottom - tick * scale
        parts.append(svg.line(frame.left, y, frame.right, y, "grid" if tick else "frame"))
        parts.append(svg.label(frame.left - 8, y + 4, f"{tick:g}", anchor="end"))
    return parts


def _power_ticks(edges: Sequence[float], x: Any, bottom: float, frame: Frame) -> list[str]:
    powers = range(math.ceil(edges[0]), math.floor(edges[-1]) + 1)
    every = max(1, math.ceil(len(powers) / (5 if frame.is_narrow else 12)))
    parts = []
    for power in powers[::every]:
        parts.append(svg.line(x(power), bottom, x(power), bottom + 5, "frame"))
        shown = f"1e{power}" if power else "1"
        parts.append(svg.label(min(x(power), frame.width - 16), bottom + 20, shown))
    return parts


def _kl_markers(
    result: Figures, edges: Sequence[float], x: Any, bottom: float, frame: Frame
) -> list[str]:
    """Dashed lines at the candidate's median and 99th percentile; their labels never meet."""
    parts, room = [], 90.0
    for key, name, anchor in (("kl_median", "median", "end"), ("kl_p99", "p99", "start")):
        value = getattr(result, key)
        if value is None or not value > 0 or not edges[0] <= math.log10(value) <= edges[-1]:
            continue
        place, y = x(math.log10(value)), 58 if key == "kl_median" else 72
        fits = frame.left + room < place < frame.right - room
        side = anchor if fits else ("start", "end")[place > frame.middle]
        parts.append(svg.line(place, 48, place, bottom, "marker"))
        shift = 5 if side == "start" else -5
        parts.append(svg.label(place + shift, y, f"{name} {plain(value, 2)}", "legend", side))
    return parts


def _kl_legend(with_floor: bool, frame: Frame) -> list[str]:
    entries = [(_square("bar"), "candidate")]
    if with_floor:
        told = "noise floor" if frame.is_narrow else "noise floor (same weights)"
        entries.append((lambda x, y: svg.polyline([(x, y - 5), (x + 16, y - 5)], "floor"), told))
    return svg.legend(entries, frame, 18, 4 if frame.is_narrow else None)[0]


def _coverage_bands(floor: float, most: float) -> list[tuple[float, str]]:
    """(lowest count, CSS class) from few tokens to many; the first band starts at 0."""
    unit = floor if floor > 0 else max(1.0, most / STRIP_STEPS[-1] / 2)
    lowest = (0.0, "starved" if floor > 0 else "heat0")
    return [lowest, *((unit * step, f"heat{i + 1}") for i, step in enumerate(STRIP_STEPS))]


def _strip(
    name: str,
    found: Sequence[float],
    bands: list[tuple[float, str]],
    y: float,
    left: float,
    right: float,
) -> list[str]:
    """Equal-coloured neighbours share one rectangle, so 256 experts cost at most eight."""
    width = (right - left) / len(found)
    parts, start = [], 0
    for css, run in itertools.groupby(
        found, key=lambda v: [css for low, css in bands if v >= low][-1]
    ):
        seen = list(run)
        spread = f"{count(seen[-1])} to {count(seen[0])} tokens each"
        tip = f"{name}: {len(seen)} experts with {spread}"
        parts.append(svg.rect(left + start * width, y, len(seen) * width, 14, css, tip))
        start += len(seen)
    return parts


def _band_legend(
    bands: list[tuple[float, str]], floor: float, frame: Frame
) -> tuple[list[str], float]:
    """The legend, and by how much it is higher than one row."""
    below = f"under {count(bands[1][0])}" + (" (starved)" if floor > 0 else "")
    entries = [(bands[0][1], below), *((css, f"{count(low)}+") for low, css in bands[1:])]
    marks = [(_square(css), shown) for css, shown in entries]
    start = 4.0 if frame.is_narrow else frame.left
    told, extra = svg.legend(marks, frame, 18, start + 56)
    return [svg.label(start, 18, "tokens:", "legend", "start"), *told], extra
