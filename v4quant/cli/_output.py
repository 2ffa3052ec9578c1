"""The only place that prints. Data goes to stdout, everything else to stderr.

Names and messages come from files that others wrote, so what would not show on a terminal but be
obeyed by it (escapes, direction marks) is printed as its number.

With `--json` stdout carries one JSON value and nothing else. Progress bars appear only on a
terminal; elsewhere each stretch of work leaves one line.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, is_dataclass
from typing import Any

import click

from v4quant.visible import printable


def emit(value: object) -> None:
    """Print one JSON value on stdout (dataclasses become objects)."""
    plain = asdict(value) if is_dataclass(value) and not isinstance(value, type) else value
    click.echo(printable(json.dumps(plain, indent=2, ensure_ascii=False)))


def data(text: str) -> None:
    """Print text the user asked for, on stdout."""
    click.echo(printable(text))


def exact(text: str) -> None:
    """Print text whose every byte counts: UTF-8 whatever the locale, nothing after it.

    To a terminal, which might obey it, goes what can be shown.
    """
    click.echo((printable(text) if sys.stdout.isatty() else text).encode(), nl=False)


def note(text: str) -> None:
    """Tell the user something, on stderr."""
    click.echo(printable(text), err=True)


def heading(text: str) -> None:
    """A step of a longer run, on stderr."""
    text = printable(text)
    color = not os.environ.get("NO_COLOR") and sys.stderr.isatty()
    click.echo(click.style(f"\n== {text}", bold=True) if color else f"\n== {text}", err=True)


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Align columns: the first to the left, the others to the right when they look like numbers."""
    every = [list(header), *map(list, rows)] if header else [list(r) for r in rows]
    widths = [max(len(row[i]) for row in every) for i in range(len(every[0]))]
    right = [
        i > 0 and all(row[i][:1].isdigit() or row[i] in ("", "-") for row in rows)
        for i in range(len(widths))
    ]
    lines = []
    for number, row in enumerate(every):
        cells = [
            c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
        if header and number == 0:
            lines.append("  ".join("-" * w for w in widths))
    return "\n".join(lines)


def human_bytes(count: float) -> str:
    """`20.7 MB`: powers of 1000, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


class TerminalProgress:
    """Progress bars on a terminal, one closing line per stretch elsewhere."""

    def __init__(self) -> None:
        """Bars start with `start`."""
        self._bar: Any = None
        self._lock = threading.Lock()

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a bar."""
        from tqdm import tqdm  # which a command without progress can do without

        show = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            desc=printable(label),
            unit=unit,
            unit_scale=unit == "B",
            disable=not show,
            file=sys.stderr,
            dynamic_ncols=True,
        )
        if not show:
            note(f"{label} ({human_bytes(total) if unit == 'B' else f'{total:,} {unit}'}) ...")

    def advance(self, amount: int) -> None:
        """Move the bar; called from worker threads too."""
        with self._lock:
            if self._bar is not None:
                self._bar.update(amount)

    def finish(self) -> None:
        """Close the bar."""
        with self._lock:
            if self._bar is not None:
                self._bar.close()
                self._bar = None
