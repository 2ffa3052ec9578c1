"""Turning untrusted values into text: what a report prints, and how it escapes it.

A report is made of two kinds of things that must not be trusted: names (paths, tensor names and
corpus names come from files others wrote) and numbers (a broken checkpoint yields NaN, a lossless
one yields exact zeros). Names are made visible first, so that control characters and
direction marks cannot disguise them, and escaped last, where the target language is known.
Numbers that are missing stay missing (`None`, printed as nothing); numbers that are not finite are
printed as such, because they are the most important finding a report can carry.
"""

from __future__ import annotations

import html
import math
import re

from v4quant.visible import visible
from v4quant_kernels.errors import V4QuantError

_MARKDOWN = re.compile(r"([\\`*_{}\[\]!|~@$]|:(?=\S)|(?<=www)\.)", re.IGNORECASE)


class ReportError(V4QuantError):
    """Figures that contradict each other, so that nothing can be drawn of them."""


def text(value: str) -> str:
    """A name or a sentence of somebody's, visible whatever it holds."""
    return visible(value)


def escape_html(value: str) -> str:
    """Text for an HTML element or a quoted attribute."""
    return html.escape(visible(value), quote=True)


def code_span(value: object, most: int | None = None) -> str:
    """Markdown's code of a value from a file, cut to `most` characters; safe in a table's cell."""
    return "`" + visible(str(value))[:most].replace("`", "").replace("|", "") + "`"


def escape_markdown(value: str) -> str:
    """Text for a Markdown table cell: no markup, no HTML, no automatic links, no line breaks."""
    return html.escape(_MARKDOWN.sub(r"\\\1", visible(value)), quote=False)


def plain(value: float | None, digits: int = 4) -> str:
    """A number with `digits` significant digits, without an exponent between 1e-4 and 1e7."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("infinite" if value > 0 else "-infinite")
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 7:
        return f"{value:,.{max(0, digits - 1 - exponent)}f}"
    mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa}e{int(power)}"


def with_error(value: float | None, stderr: float | None) -> str:
    """`value ± stderr`, both to the second significant digit of the error."""
    if value is None:
        return ""
    if value == stderr == 0:
        return "0"
    if stderr is None or not math.isfinite(stderr) or not math.isfinite(value) or stderr <= 0:
        return plain(value) if stderr is None else f"{plain(value)} ± {plain(stderr, 2)}"
    decimals = 1 - math.floor(math.log10(stderr))
    if -4 <= decimals <= 6:
        shown = max(0, decimals)
        return f"{value:,.{shown}f} ± {stderr:,.{shown}f}"
    power = math.floor(math.log10(max(abs(value), stderr)))
    decimals = max(0, decimals + power)
    unit = 10.0**power
    return f"({value / unit:.{decimals}f} ± {stderr / unit:.{decimals}f})e{power}"


def count(value: float | None) -> str:
    """A whole number with thousands separators."""
    if value is None:
        return ""
    return f"{int(value):,}" if math.isfinite(value) else plain(value)


def percent(share: float | None) -> str:
    """A share between 0 and 1 as a percentage with two decimals."""
    if share is None:
        return ""
    return f"{100 * share:.2f} %" if math.isfinite(share) else plain(share)


def change(before: float | None, after: float | None) -> str:
    """Relative change from `before` to `after` as a signed percentage; empty when undefined."""
    if before is None or after is None or before == 0:
        return ""
    ratio = after / before - 1
    return f"{100 * ratio:+.2f} %" if math.isfinite(ratio) else ""


def size(value: float | None) -> str:
    """Bytes in decimal units."""
    if value is None or not math.isfinite(value):
        return plain(value)
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{int(value):,} bytes"
