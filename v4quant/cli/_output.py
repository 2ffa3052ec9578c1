"""The only place that prints. Data goes to stdout, everything else to stderr.

Names and messages come from files that others wrote, so what would not show on a terminal but be
obeyed by it (escapes, direction marks) is printed as its number.

With `--json` stdout carries one JSON value and nothing else. Progress bars appear only on a
terminal; elsewhere each stretch of work leaves a line when it begins, and one a minute. `--quiet`
leaves errors, `--verbose` adds what helps to understand a run, and `--log-file` keeps all of it.
"""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

import click

from v4quant.sizes import human_bytes
from v4quant.visible import printable

LINE_SECONDS = 60.0
"""How often progress is told where no bar can be drawn."""


@dataclass
class _Manner:
    """How much is told, and where to: what the options that every command has say."""

    quiet: bool = False
    verbose: bool = False
    json: bool = False
    log: TextIO | None = None
    stopped: bool = False


manner = _Manner()


def reset() -> None:
    """Tell as a command without options does."""
    if manner.log is not None:
        manner.log.close()
    manner.__dict__.update(_Manner().__dict__)


def speak_utf8() -> None:
    """Write UTF-8 to files and pipes whatever the locale; a terminal of another kind gets what it
    can show, and the rest as numbers."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            encoding = stream.encoding if stream.isatty() else "utf-8"
            stream.reconfigure(encoding=encoding, errors="backslashreplace")


def stop_bars() -> None:
    """Draw no bar any more: the work is being interrupted."""
    manner.stopped = True


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
    _log(text)
    if not manner.quiet:
        click.echo(printable(text), err=True)


def detail(text: str) -> None:
    """What only somebody who looks for a cause wants to know."""
    _log(text)
    if manner.verbose:
        click.echo(printable(text), err=True)


def last_words(text: str, kind: str, code: int) -> None:
    """Why a command ends: on stderr however quiet, and as the JSON value where that was asked."""
    _log(text)
    with suppress(OSError):  # perhaps the very reason: nobody can be told
        click.echo(printable(text), err=True)
        if manner.json:
            message = text.removeprefix("Error: ")
            emit({"error": {"kind": kind, "message": message, "exit_code": code}})


class _Warnings(logging.Handler):
    """Tells what the library warns of, and what it wants known."""

    def emit(self, record: logging.LogRecord) -> None:
        warns = record.levelno >= logging.WARNING
        note(f"Warning: {record.getMessage()}" if warns else record.getMessage())


def tell_warnings() -> None:
    """From now on tell what the library warns of; to be called any number of times."""
    for name in ("v4quant", "v4quant_calibration", "v4quant_formats", "v4quant_kernels"):
        logger = logging.getLogger(name)
        if not any(isinstance(handler, _Warnings) for handler in logger.handlers):
            logger.addHandler(_Warnings(logging.INFO))
            logger.setLevel(logging.INFO)


def _log(text: str) -> None:
    if manner.log is None:
        return
    now = datetime.now(UTC).isoformat(timespec="seconds")
    try:
        manner.log.write(f"{now} {printable(text.strip())}\n")
        manner.log.flush()
    except OSError as error:  # the work goes on without it
        log, manner.log = manner.log, None
        with suppress(OSError):
            log.close()
        note(f"Warning: {log.name}: cannot be written any more ({error.strerror or error})")


def heading(text: str) -> None:
    """A step of a longer run, on stderr."""
    _log(f"== {text}")
    if manner.quiet:
        return
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


class TerminalProgress:
    """Progress bars on a terminal; elsewhere a line when a stretch begins, and one a minute."""

    def __init__(self) -> None:
        """Bars start with `start`."""
        self._bar: Any = None
        self._lock = threading.Lock()
        self._label, self._total, self._unit = "", 0, ""
        self._done, self._began, self._told = 0, 0.0, 0.0

    def start(self, label: str, total: int, unit: str) -> None:
        """Begin a bar."""
        self.finish()
        self._label, self._total, self._unit, self._done = label, total, unit, 0
        self._began = self._told = time.monotonic()
        begun = f"{label} ({self._amount(total)}) ..."
        if manner.quiet or manner.stopped or not sys.stderr.isatty():
            note(begun)
            return
        from tqdm import tqdm  # which a command without progress can do without

        _log(begun)
        # The mean speed since the start foretells better than that of the last pieces, which may be
        # small or large ones.
        self._bar = tqdm(
            total=total,
            desc=printable(label),
            unit=unit,
            unit_scale=unit == "B",
            file=sys.stderr,
            dynamic_ncols=True,
            smoothing=0,
        )

    def advance(self, amount: int) -> None:
        """Move the bar; called from worker threads too."""
        with self._lock:
            self._done += amount
            if self._bar is not None:
                if manner.stopped:
                    self._abandon()
                else:
                    self._bar.update(amount)
            if self._label and time.monotonic() - self._told >= LINE_SECONDS:
                self._tell()

    def finish(self) -> None:
        """Close the bar."""
        with self._lock:
            if self._label and not manner.stopped:
                _log(f"{self._label}: took {_duration(time.monotonic() - self._began)}")
            self._label = ""
            if self._bar is not None:
                if manner.stopped:
                    self._abandon()
                else:
                    self._bar.close()
                    self._bar = None

    def _abandon(self) -> None:
        """Leave what is drawn as it is; tqdm would draw it once more when it is closed."""
        self._bar.disable = True
        self._bar = None
        click.echo("", err=True)

    def _tell(self) -> None:
        """How far the work is, and how long it will still take at the mean speed so far."""
        self._told = now = time.monotonic()
        text = f"{self._label}: {self._amount(self._done)} of {self._amount(self._total)}"
        if 0 < self._done <= self._total:
            left = (now - self._began) * (self._total - self._done) / self._done
            text += f" ({self._done / self._total:.0%}), about {_duration(left)} left"
        if self._bar is not None:
            _log(text)
        elif not manner.stopped:
            note(text)

    def _amount(self, count: int) -> str:
        return human_bytes(count) if self._unit == "B" else f"{count:,} {self._unit}"


def _duration(seconds: float) -> str:
    """`40 s`, `7 min`, `3 h 20 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
