"""Board: where the ranks of one run write what the others should know.

Each rank has one entry on the store that started them: a count that goes on as long as it lives,
how many meetings it has come to, and what it has told. A thread of its own writes the entry and
reads the others', so a rank that waits notices when another one is gone, has failed or cannot be
reached any more (the network between machines may die without a word), and never waits for it
longer than `PATIENCE`. Nothing large travels here: results are files in the shared folder.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from v4quant_kernels.errors import V4QuantError

# Seconds without a sign of life. With them, the 30 that torchrun gives a stopped process to end
# and some to spare, a command ends within two minutes.
PATIENCE = 80.0
_BEAT = 1.0
_HURRY = 0.02  # between looks while somebody waits
_GOODBYE = 5.0


class RankLost(V4QuantError):
    """Another process of this run is gone."""


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str, /) -> None:
        """Write a key."""

    def check(self, keys: list[str], /) -> bool:
        """Whether all keys are there."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Values of keys that are there."""


@dataclass
class _Entry:
    beat: int = 0
    meetings: int = 0
    state: str = "working"  # or "done", "failed"
    told: list[tuple[str, str]] = field(default_factory=list)


class Board:
    """This rank's side of it. Use as a context manager: leaving tells the others how it ended."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        """`store` is used by this object's thread alone."""
        self._store, self._rank = store, rank
        self._keys = [f"v4quant/{r}" for r in range(size)]
        self._entries = [_Entry() for _ in range(size)]
        self._seen = [time.monotonic()] * size
        self._looked = time.monotonic()
        self._listeners: list[Callable[[int, str, str], None]] = []
        self._error: BaseException | None = None
        self._waiting = 0
        self._ended = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="board", daemon=True)

    def __enter__(self) -> Board:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Say how this rank ended, and let the others read it before the store may go."""
        with self._changed:
            self._entries[self._rank].state = "failed" if kind else "done"
            others = [r for r in range(len(self._keys)) if r != self._rank]
            if kind is None and self._rank == 0:  # the store may live in this process
                self._waiting += 1
                self._changed.notify_all()
                self._changed.wait_for(
                    lambda: self._error or all(self._entries[r].state != "working" for r in others),
                    _GOODBYE,
                )
            self._ended = True
            self._changed.notify_all()
        self._thread.join(_GOODBYE)

    def tell(self, topic: str, value: str) -> None:
        """Let every other rank know; in order, each once."""
        with self._changed:
            self._entries[self._rank].told.append((topic, value))
            self._changed.notify_all()

    def listen(self, heard: Callable[[int, str, str], None]) -> None:
        """heard(rank, topic, value) is called for all that others tell, on the board's thread."""
        with self._changed:
            told = [(r, *t) for r, e in enumerate(self._entries) for t in e.told if r != self._rank]
            self._listeners.append(heard)
        for what in told:
            heard(*what)

    def meet(self, check: Callable[[], None]) -> None:
        """Wait until every rank has come to this meeting; check() is called meanwhile.

        Raises RankLost, and what check raises.
        """
        with self._changed:
            mine = self._entries[self._rank]
            mine.meetings += 1
            number = mine.meetings
        self._wait(lambda: all(e.meetings >= number for e in self._entries), check)

    def wait_told(self, topic: str) -> str:
        """Wait for what rank 0 tells of a topic. Raises RankLost."""
        found: list[str] = []

        def there() -> bool:
            found[:] = [v for t, v in self._entries[0].told if t == topic]
            return bool(found)

        self._wait(there, lambda: None)
        return found[0]

    def check(self) -> None:
        """Raise RankLost when another rank has failed or cannot be reached."""
        with self._changed:
            self._check()

    def _wait(self, done: Callable[[], bool], check: Callable[[], None]) -> None:
        with self._changed:
            self._waiting += 1
            self._changed.notify_all()
        try:
            while True:
                check()
                with self._changed:
                    if done():
                        return
                    self._check()
                    self._changed.wait(_BEAT)
        finally:
            with self._changed:
                self._waiting -= 1

    def _check(self) -> None:
        """Holds the lock."""
        why = ""
        now = time.monotonic()
        if self._error is not None:
            text = (str(self._error).splitlines() or [type(self._error).__name__])[0]
            why = f"the processes of this run cannot reach each other ({text[:200]})"
        elif now - self._looked > PATIENCE:
            why = f"the processes of this run have not reached each other for {PATIENCE:.0f} s"
        for rank, entry in enumerate(self._entries):
            if entry.state == "failed" and rank != self._rank:
                why = f"process {rank} of this run has failed"
            elif entry.state == "working" and now - self._seen[rank] > PATIENCE:
                why = why or f"process {rank} of this run gave no sign for {PATIENCE:.0f} s"
        if why:
            raise RankLost(f"{why}; the same command, with any number of processes, goes on")

    def _work(self) -> None:
        """The thread: write, look, rest."""
        try:
            while True:
                with self._changed:
                    last = self._ended
                    mine = self._entries[self._rank]
                    mine.beat += 1
                    text = json.dumps(asdict(mine))
                    said = len(mine.told), mine.meetings
                self._store.set(self._keys[self._rank], text)
                if last:
                    return
                if self._store.check(self._keys):
                    self._read(self._store.multi_get(self._keys))
                with self._changed:
                    self._looked = self._seen[self._rank] = time.monotonic()
                    self._changed.notify_all()
                    self._rest(said)
        except Exception as error:  # noqa: BLE001  (a store that is gone has many kinds)
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _rest(self, said: tuple[int, int]) -> None:
        """Until there is something to write, somebody waits, or it is time for a sign of life."""
        mine = self._entries[self._rank]

        def news() -> bool:
            return self._ended or (len(mine.told), mine.meetings) != said

        if self._waiting:
            self._changed.wait_for(news, _HURRY)
        else:
            self._changed.wait_for(lambda: news() or self._waiting > 0, _BEAT)

    def _read(self, values: list[bytes]) -> None:
        heard: list[tuple[int, str, str]] = []
        with self._changed:
            for rank, value in enumerate(values):
                if rank == self._rank:
                    continue
                found: dict[str, Any] = json.loads(value)
                new = _Entry(**{**found, "told": [(t, v) for t, v in found["told"]]})
                old = self._entries[rank]
                heard += [(rank, t, v) for t, v in new.told[len(old.told) :]]
                if new.beat != old.beat:
                    self._seen[rank] = time.monotonic()
                self._entries[rank] = new
            listeners = list(self._listeners)
        for listener in listeners:
            for what in heard:
                listener(*what)
