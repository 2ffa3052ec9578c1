"""SIGTERM ends the process within seconds, whatever it is in.

The orderly way needs the main thread to come back to Python, and threads that send a shard to end.
A tokenizer that explodes or an upload on a slow line may take minutes. Every command survives being
killed, so after a short grace the process simply ends.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

from v4quant.cli import _exit

GRACE_SECONDS = 2.5


def watch_termination(last_words: str) -> None:
    """Begin to watch, from the main thread; to be called once. last_words: told at the end."""
    seen, told = socket.socketpair()
    told.setblocking(False)
    signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    watcher = threading.Thread(
        target=_watch, args=(seen, told, last_words), name="termination", daemon=True
    )
    watcher.start()


def _watch(seen: socket.socket, told: socket.socket, last_words: str) -> None:
    """told: kept open as long as signals are written to it."""
    while signal.SIGTERM not in seen.recv(1):
        continue
    time.sleep(GRACE_SECONDS)
    if sys.__stderr__ is not None:
        os.write(sys.__stderr__.fileno(), f"{last_words}\n".encode())
    os._exit(_exit.TERMINATED)
