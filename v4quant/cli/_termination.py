"""Signals end the process within seconds, whatever it is in.

The orderly way needs the main thread to come back to Python, threads that send or fetch a shard to
end, and the interpreter to put everything away. A tokenizer that explodes may take minutes, a busy
machine many seconds. Every command survives being killed, so after a short grace, and at the second
Ctrl-C at once, the process simply ends.

While torch's libraries are loaded no thread of Python can run at all, for half a minute where they
come from a busy disk. Until they are there signals mean what they mean to any program: its end.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn

from v4quant.cli import _exit

GRACE_SECONDS = 2.0
_SLOW_TO_LOAD = "torch"
_state = {"watched": False}


def watch_signals(terminated: str, interrupted: str) -> None:
    """Begin to watch, from the main thread; to be called once. Last words for either signal."""
    seen, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(seen, told, terminated, interrupted), name="termination", daemon=True
    )
    watcher.start()
    sys.meta_path.insert(0, _SlowLoading())
    _state["watched"] = True


def is_watched() -> bool:
    """Whether this process is one that a signal may end: a command, not somebody's program."""
    return _state["watched"]


def end(code: int) -> NoReturn:
    """End here and now; what was printed is seen."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # closed, or nobody listens any more
            continue
    os._exit(code)


def _watch(seen: socket.socket, told: socket.socket, terminated: str, interrupted: str) -> None:
    """told: kept open as long as signals are written to it."""
    interrupts = 0
    while True:
        number = seen.recv(1)[0]
        interrupts += number == signal.SIGINT
        if number == signal.SIGTERM:
            time.sleep(GRACE_SECONDS)
            _say_and_end(terminated, _exit.TERMINATED)
        elif interrupts > 1:
            _say_and_end(interrupted, _exit.INTERRUPTED)


def _say_and_end(last_words: str, code: int) -> NoReturn:
    if sys.__stderr__ is not None:
        os.write(sys.__stderr__.fileno(), f"{last_words}\n".encode())
    os._exit(code)


class _SlowLoading(MetaPathFinder):
    """Finds what is slow to load as others do, and gives signals back to the system meanwhile."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own, with a loader that does so; None for every other module."""
        if name != _SLOW_TO_LOAD or threading.current_thread() is not threading.main_thread():
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if callable(signal.getsignal(n))]
            before = {n: signal.signal(n, signal.SIG_DFL) for n in numbers}
            try:
                load(module)
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        setattr(spec.loader, "exec_module", exec_module)  # noqa: B010  (of this loader alone)
        return spec
