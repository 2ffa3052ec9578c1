"""Patience: how long a piece of work on the network may bring nothing before it is given up.

One clock for whatever goes wrong. It runs while nothing comes: through silence, through tries that
fail, through the waits between them, also those that a server asks for. It stands still while bytes
flow, and begins anew when the work has got somewhere. So a command ends within a minute on a hub
that hangs, drips, or answers 503 for ever, and a line that is merely slow, or a server that is busy
for half a minute, does no harm. V4QUANT_PATIENCE sets another time, for a hub under maintenance.

The connections (lines.py) ask the clock of the work that uses them how long they may still wait,
and tell it what they brought.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta

from v4quant.hub.errors import HubError, PassingFailure
from v4quant.hub.failures import scrub
from v4quant.hub.stopping import is_stopped, pause

VARIABLE = "V4QUANT_PATIENCE"
DEFAULT_SECONDS = 45.0  # and a command takes some to start, and to end
ENOUGH_BYTES = 20_000
"""Fewer are neither a flow nor progress, unless no more was asked for."""
_SHARE = 4  # of what was asked for, one part is progress
FIRST_WAIT, LONGEST_WAIT, SHORTEST_TRY = 0.5, 16.0, 1.0
FIRST_TRIES = 3  # while no server has answered at all
FIRST_SECONDS = 7.0  # and no new try begins later than this
_LONGEST_TOLD = 3e9  # seconds, so that the date is one
_UNITS = {"": 1.0, "s": 1.0, "min": 60.0, "h": 3600.0}
_LOG = logging.getLogger(__name__)

_here = threading.local()
_state = {"answered": False}


def has_answered() -> bool:
    """Whether any server has answered this process; until then a hub may not be there at all."""
    return _state["answered"]


def note_answer() -> None:
    """A server has answered this process."""
    _state["answered"] = True


def patience_seconds() -> float:
    """How long work may bring nothing. Raises HubError for a value that is no time."""
    told = os.environ.get(VARIABLE, "")
    if not told:
        return DEFAULT_SECONDS
    found = re.fullmatch(r"(\d{1,7})(|s|min|h)", told.strip())
    if found is None or not int(found[1]):
        raise HubError(f"{VARIABLE}={told[:40]!r}: is no time; write 90s, 10min or 2h")
    return int(found[1]) * _UNITS[found[2]]


class Patience:
    """The clock of one piece of work; used by one thread."""

    def __init__(
        self,
        what: str,
        stopped: Callable[[], bool] = is_stopped,
        nbytes: int = 0,
        seconds: float | None = None,
    ) -> None:
        """`what` is being done, for messages; `stopped` cuts waiting short.

        nbytes: what is to be brought, if less than `ENOUGH_BYTES` may be progress. seconds: default
        `patience_seconds()`, or what the work has left that this is a part of. Raises HubError.
        """
        within = current_patience()
        if seconds is None:
            seconds = patience_seconds() if within is None else within.left()
        self._seconds = seconds
        self.what, self._stopped = what, stopped
        self._enough = min(ENOUGH_BYTES, nbytes // _SHARE + 1) if nbytes else ENOUGH_BYTES
        self._began = self._quiet_since = time.monotonic()
        self._lost, self._tries, self._flow, self._gain = 0.0, 0, 0, 0

    def left(self) -> float:
        """Seconds until it is over, if nothing comes."""
        return self._seconds - self._lost - (time.monotonic() - self._quiet_since)

    def flowed(self, count: int) -> None:
        """A connection brought, or took, so many bytes: nothing is silent."""
        self._flow += count
        if self._flow >= self._enough:
            self.answered()

    def nothing(self) -> PassingFailure:
        """The failure of what comes too slowly, or not at all, until the time is over."""
        return PassingFailure(f"fewer than {self._enough:,} bytes came")

    def answered(self) -> None:
        """A server has answered as it should: nothing is silent."""
        self._flow, self._quiet_since = 0, time.monotonic()

    def gained(self, count: int) -> None:
        """So many bytes need not be brought again, whatever happens: begin anew when enough did."""
        self._gain += count
        if self._gain >= self._enough:
            self._lost, self._tries, self._gain = 0.0, 0, 0

    @contextmanager
    def governs(self) -> Iterator[None]:
        """What this thread does on the network inside the block is this work."""
        before, _here.patience = current_patience(), self
        try:
            yield
            if before is not None:
                before.answered()
        finally:
            _here.patience = before

    @contextmanager
    def stands_still(self) -> Iterator[None]:
        """Time inside the block is spent by whoever uses what was brought."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._quiet_since += time.monotonic() - began

    def wait(self, failure: PassingFailure) -> None:
        """Sleep before the next try. Raises HubError when none is left."""
        now = time.monotonic()
        self._lost += now - self._quiet_since
        self._quiet_since = now
        self._tries += 1
        left = self._seconds - self._lost
        if not has_answered():
            late = now - self._began > FIRST_SECONDS
            left = 0.0 if late or self._tries >= FIRST_TRIES else left
        if left <= SHORTEST_TRY:
            raise self._over(failure) from None
        seconds = min(FIRST_WAIT * 2 ** (self._tries - 1), LONGEST_WAIT, left / 2)
        if failure.wait is not None:
            if failure.wait > left - SHORTEST_TRY:
                raise self._too_long(failure) from None
            seconds = max(seconds, failure.wait)
        so_far = f"no progress for {self._lost:.0f} of {self._seconds:.0f} s"
        if not has_answered():
            so_far = f"{self._tries} of {FIRST_TRIES - 1}"
        _LOG.warning(
            "%s: %s; retrying in %.1f s (%s)", self.what, scrub(str(failure)), seconds, so_far
        )
        pause(seconds, self._stopped)
        self._lost += seconds
        self._quiet_since = time.monotonic()

    def _too_long(self, failure: PassingFailure) -> HubError:
        wait = failure.wait or 0.0
        back = datetime.now().astimezone() + timedelta(seconds=min(wait, _LONGEST_TOLD))
        patience = math.ceil((self._seconds - self.left() + wait + 2 * SHORTEST_TRY) / 60)
        return HubError(
            f"{self.what}: {scrub(str(failure))}; the hub asks to wait {_told(wait)}, until "
            f"{back:%d %B, %H:%M:%S}; the same command, run then, resumes where this one stopped "
            f"(with {VARIABLE}={patience}min it waits by itself)"
        )

    def _over(self, failure: PassingFailure) -> HubError:
        times = f"{self._tries} times in a row" if self._tries > 1 else "once"
        longer = f" ({VARIABLE} waits longer)" if has_answered() else ""
        return HubError(
            f"{self.what} failed {times}, without progress in {self._lost:.0f} s: "
            f"{scrub(str(failure))}; the same command resumes where this one stopped{longer}"
        )


def current_patience() -> Patience | None:
    """The clock of what this thread does."""
    found: Patience | None = getattr(_here, "patience", None)
    return found


def allowed(timeout: float | None) -> float | None:
    """A timeout, or less where patience ends before. Raises PassingFailure when it has ended."""
    patience = current_patience()
    if patience is None:
        return timeout
    left = patience.left()
    if left <= 0:
        raise patience.nothing()
    return left if timeout is None else min(timeout, left)


def _told(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds:.0f} seconds"
