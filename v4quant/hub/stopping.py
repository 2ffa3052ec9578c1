"""Stopping: how work on the network is told to end, and ends at once.

A thread that waits for a server hears nothing else, for as long as a timeout lasts. So whoever ends
it hangs up: the connections it uses are shut down, its reads and writes fail there and then, and no
new exchange begins. A `Stop` does this for the work of one owner (the downloads of a cache, the
uploads of a delivery), `end_network` for the process, which a signal ends.

What waits for something else looks at the `Stop` itself: it is a function that says whether to end.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol

from v4quant.hub.errors import HubError


class Line(Protocol):
    """A connection that is in use or waits in a pool."""

    user: Stop | None

    def hang_up(self) -> None:
        """Make whoever reads from it or writes to it fail at once; from any thread."""


class Stop:
    """Work of one owner; `stop()` is whether it is to end."""

    def __init__(self) -> None:
        """Nothing is to end yet."""
        self._is_set = False

    def __call__(self) -> bool:
        return self._is_set or _process.is_set

    def set(self) -> None:
        """End it: from here on its connections fail."""
        self._is_set = True
        for line in _open_lines():
            if line.user is self:
                line.hang_up()

    @contextmanager
    def governs(self) -> Iterator[None]:
        """What this thread does on the network inside the block belongs to this work."""
        before, _here.stop = current(), self
        try:
            yield
        finally:
            _here.stop = before


class _Process:
    is_set = False


_process = _Process()
_here = threading.local()
_lines: dict[int, weakref.ref[Line]] = {}  # plain, for a signal's handler may look at any moment
_numbers = itertools.count()


def current() -> Stop | None:
    """Whose work this thread does."""
    found: Stop | None = getattr(_here, "stop", None)
    return found


def is_stopped() -> bool:
    """Whether this thread shall begin nothing more on the network."""
    stop = current()
    return _process.is_set if stop is None else stop()


def refuse_stopped() -> None:
    """Raise HubError when this thread shall do nothing more on the network.

    An error of ours, for the client tries again after those of a connection.
    """
    if is_stopped():
        raise HubError("stopped")


def register(line: Line) -> None:
    """A connection was opened."""
    number = next(_numbers)
    _lines[number] = weakref.ref(line, lambda _: _lines.pop(number, None))


def end_network() -> None:
    """End all work on the network; the process is about to end. May be called by signals."""
    _process.is_set = True
    for line in _open_lines():
        line.hang_up()


def _open_lines() -> list[Line]:
    return [line for ref in list(_lines.values()) if (line := ref()) is not None]


def join_all(threads: Iterable[threading.Thread], seconds: float) -> None:
    """Wait for threads to end, all of them together no longer than this.

    They are daemons that were told to end; one that hangs in the system does no more harm.
    """
    last = time.monotonic() + seconds
    for thread in threads:
        thread.join(max(0.0, last - time.monotonic()))


def pause(seconds: float, stopped: Callable[[], bool]) -> None:
    """Sleep, or less when there is a reason to stop."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stopped():
        time.sleep(min(left, 0.2))
