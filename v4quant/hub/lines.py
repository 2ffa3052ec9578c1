"""Lines: the connections under the HTTP session, watched where no other limit looks.

A timeout counts from the last byte, so a server that sends a byte of a header now and then is never
late: `_Line` gives up an answer that has begun and then brings next to nothing while we wait for
it. And it takes what has arrived in large pieces, which costs a fraction of the processor time.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx2

SLOW_SECONDS, SLOW_BYTES = 20.0, 20_000
"""An answer that brings fewer bytes while it is waited for so long, from its first byte on, is
given up."""
_PIECE = 2**18


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
        return _Line(self._backend.connect_tcp(*args, **named))

    def connect_unix_socket(self, *args: Any, **named: Any) -> _Line:
        return _Line(self._backend.connect_unix_socket(*args, **named))

    def sleep(self, seconds: float) -> None:
        self._backend.sleep(seconds)


class _Line:
    """One connection. What is written begins a new exchange."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._begun, self._waited, self._count = False, 0.0, 0

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        import httpx2

        started = time.monotonic()
        data: bytes = self._stream.read(max(max_bytes, _PIECE), timeout)
        if self._begun:  # a server may think before it answers; the timeout bounds that
            self._waited += time.monotonic() - started
        self._begun = True
        self._count += len(data)
        if self._waited > SLOW_SECONDS:
            if self._count < SLOW_BYTES and data:
                raise httpx2.ReadTimeout(f"fewer than {SLOW_BYTES:,} bytes in {SLOW_SECONDS:.0f} s")
            self._waited, self._count = 0.0, 0
        return data

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._begun, self._waited, self._count = False, 0.0, 0
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(self, *args: Any, **named: Any) -> _Line:
        return _Line(self._stream.start_tls(*args, **named))

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)
