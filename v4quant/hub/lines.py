"""Lines: the connections under the HTTP session, watched where no other limit looks.

A timeout counts from the last byte, so a server that sends a byte of a header now and then, or
takes one of an upload, is never late: `_Line` gives up an exchange that brings next to nothing
while we wait for it. That is an error of ours, for after those of a connection the client tries
again by itself, and would wait as long each time. Whoever ends the work that uses a line hangs up
(stopping.py). And it takes what has arrived in large pieces, which costs a fraction of the
processor time: `read_body` reads a large body from the line itself, where the client would copy
every byte five times.
"""

from __future__ import annotations

import mmap
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from v4quant.hub.errors import PassingFailure
from v4quant.hub.patience import ENOUGH_BYTES, allowed, current_patience
from v4quant.hub.stopping import Stop, current, refuse_stopped, register

if TYPE_CHECKING:
    import httpx2

SLOW_SECONDS = 20.0
"""An answer that brings fewer than `ENOUGH_BYTES` while it is waited for so long, from its first
byte on, is given up; so is a server that takes no more."""
_PAUSES = 4  # that count as a slow line, however short
_SENT = 2**16  # bytes given to an encrypted line at a time
_PIECE = 2**18
_DIRECT, _BUFFER = 2**22, 2**20  # bytes of a body that is read directly, and of its pieces
_LONGEST_PIECE = 0.25  # seconds until a piece is handed on that has not become whole


def watch_lines(client: httpx2.Client) -> None:
    """Make every connection that a client opens a watched one."""
    transports: list[Any] = [client._transport, *client._mounts.values()]
    for transport in transports:
        pool = getattr(transport, "_pool", None)  # another kind of transport is a user's own
        if pool is not None and hasattr(pool, "_network_backend"):
            pool._network_backend = _Backend(pool._network_backend)


class _Backend:
    """Opens watched connections."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend

    def connect_tcp(self, *args: Any, **named: Any) -> _Line:
        refuse_stopped()
        return _Line(self._backend.connect_tcp(*args, **named))

    def connect_unix_socket(self, *args: Any, **named: Any) -> _Line:
        return _Line(self._backend.connect_unix_socket(*args, **named))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Line:
    """One connection. What is written begins a new exchange."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.user: Stop | None = current()
        register(self)
        self._begun, self._waited, self._count = False, 0.0, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        started, timeout = time.monotonic(), allowed(timeout)
        with _given_up("has not answered", timeout):
            data: bytes = self._stream.read(max(max_bytes, _PIECE), timeout)
        self._watch(started, len(data))
        return data

    @property
    def is_direct(self) -> bool:
        """Whether the socket gives the very bytes that `read` does."""
        below = self.get_extra_info("socket")
        plain = self.get_extra_info("ssl_object") is None
        return below is not None and (plain or isinstance(below, ssl.SSLSocket))

    def read_into(self, view: memoryview, timeout: float | None) -> int:
        """As `read`, into memory that is there; bytes read, 0 at the end."""
        import httpx2

        started, timeout = time.monotonic(), allowed(timeout)
        below = self.get_extra_info("socket")
        with _given_up("has sent nothing", timeout):
            try:
                below.settimeout(timeout)
                count: int = below.recv_into(view)
            except TimeoutError:
                raise
            except OSError as error:
                raise httpx2.ReadError(str(error)) from None
        self._watch(started, count)
        return count

    def _watch(self, started: float, count: int) -> None:
        """Count what an exchange has brought, or taken, and how long it was waited for."""
        if self._begun:  # a server may think before it answers; the timeout bounds that
            # And it may pause, as long as the timeout allows: only many waits make a slow line.
            self._waited += min(time.monotonic() - started, SLOW_SECONDS / _PAUSES)
        self._begun = True
        self._count += count
        if patience := current_patience():
            patience.flowed(count)
        if self._waited > SLOW_SECONDS:
            if count and self._count / self._waited < ENOUGH_BYTES / SLOW_SECONDS:
                raise PassingFailure(f"fewer than {ENOUGH_BYTES:,} bytes in {SLOW_SECONDS:.0f} s")
            self._waited, self._count = 0.0, 0

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self.user = current()
        refuse_stopped()
        self._begun, self._waited, self._count = True, 0.0, 0
        view = memoryview(buffer)
        while view:
            started, limit = time.monotonic(), allowed(timeout)
            with _given_up("takes nothing", limit):
                count = self._write_some(view, limit)
            self._watch(started, count)
            view = view[count:]
        self._begun, self._waited, self._count = False, 0.0, 0

    def _write_some(self, view: memoryview, timeout: float | None) -> int:
        """Give the system what it takes now; how many bytes that was."""
        from httpcore2 import WriteError

        below = self.get_extra_info("socket")
        if self.get_extra_info("ssl_object") is not None or not isinstance(below, socket.socket):
            piece = view[:_SENT]  # an encrypted line takes all of it, however long that lasts
            self._stream.write(piece, timeout)
            return len(piece)
        try:
            below.settimeout(timeout)
            return below.send(view)
        except TimeoutError:
            raise
        except OSError as error:
            raise WriteError(str(error)) from None

    def hang_up(self) -> None:
        below = self.get_extra_info("socket")
        if isinstance(below, socket.socket):
            with suppress(OSError):
                # Not an SSLSocket's own, which would pull its state from under who uses it.
                socket.socket.shutdown(below, socket.SHUT_RDWR)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **named: Any) -> _Line:
        return _Line(self._stream.start_tls(*args, **named))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@contextmanager
def _given_up(how: str, timeout: float | None) -> Iterator[None]:
    """Turn what ends an exchange into errors of ours. how: what the server is doing."""
    from httpcore2 import TimeoutException

    try:
        yield
    except (TimeoutException, TimeoutError):
        refuse_stopped()
        if timeout and timeout < 1 and (patience := current_patience()):
            raise patience.nothing() from None
        raise PassingFailure(f"{how} for {timeout or 0:.0f} s") from None
    except Exception:
        refuse_stopped()
        raise
    refuse_stopped()


def read_body(
    response: httpx2.Response, room: Callable[[], memoryview | None] = lambda: None
) -> Iterator[bytes | memoryview]:
    """An answer's body as it was sent, in pieces that are valid until the next one is asked for.

    room: memory that whoever asks has for the next bytes; they may be put into it. Ends early where
    the connection does. Raises httpx2.TransportError.
    """
    pieces = response.iter_raw()
    line = response.extensions.get("network_stream")
    told = response.headers.get("content-length", "")
    direct = (
        isinstance(line, _Line)
        and response.http_version == "HTTP/1.1"
        and "transfer-encoding" not in response.headers
        and told.isdecimal()
        and int(told) >= _DIRECT
        and line.is_direct
    )
    if not direct or not isinstance(line, _Line):
        yield from pieces
        return
    # The client's first piece is all that it has read; it never sees the rest, so that the
    # connection is closed with the answer. `pieces` lives on, for it would close it now.
    first = next(pieces, b"")
    yield first
    left = int(told) - len(first)
    timeout = response.request.extensions.get("timeout", {}).get("read")
    own: memoryview | None = None
    while left:
        if not (buffer := room()):
            buffer = own = own or memoryview(mmap.mmap(-1, _BUFFER))
        buffer = buffer[: min(left, _BUFFER)]
        began, filled = time.monotonic(), 0
        while filled < len(buffer):
            count = line.read_into(buffer[filled:], timeout)
            filled += count
            if not count or time.monotonic() - began > _LONGEST_PIECE:
                break
        if not filled:
            return
        left -= filled
        yield buffer[:filled]
