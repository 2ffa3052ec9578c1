"""The client tries nothing again by itself: what fails comes to whoever has patience for it.

huggingface_hub repeats some of its calls, without a word and for as long as a server says. Below
it, here, a failure that may pass becomes one of ours, which it lets through. Only a part of a file
is sent again where it is, for the parts before it are with the server already.
"""

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, Any

from v4quant.hub.errors import PassingFailure
from v4quant.hub.failures import broken, passing
from v4quant.hub.patience import Patience, current_patience
from v4quant_formats.system import forget_cached

if TYPE_CHECKING:
    import httpx2

UPLOAD_PIECE = 2**20
_FORGOTTEN = 8 * 2**20  # bytes sent that leave the page cache at a time


def leave_retries_to_us(client: httpx2.Client) -> None:
    """Make what fails below a client pass it by."""
    client._transport = _Transport(client._transport)  # type: ignore[assignment]
    mounts: dict[Any, Any] = client._mounts
    for pattern, transport in mounts.items():
        mounts[pattern] = transport and _Transport(transport)


class _Transport:
    """Stands before the client's own."""

    def __init__(self, transport: httpx2.BaseTransport) -> None:
        self._transport = transport

    def __enter__(self) -> _Transport:
        self._transport.__enter__()
        return self

    def __exit__(self, *told: Any) -> None:
        self._transport.__exit__(*told)

    def close(self) -> None:
        self._transport.close()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        file = _file_of(request)
        if file is None:
            return self._once(request)
        within = current_patience()
        what = within.what if within else f"{request.method} {address(request)}"
        patience = Patience(f"{what} (to {request.url.host})")
        while True:
            try:
                with patience.governs():
                    return self._once(request)
            except PassingFailure as failure:
                patience.wait(failure)
            file.rewind()

    def _once(self, request: httpx2.Request) -> httpx2.Response:
        import httpx2

        try:
            response = self._transport.handle_request(request)
        except httpx2.TransportError as error:
            raise broken(address(request), error) from None
        if failure := passing(response):
            response.close()
            raise failure
        if patience := current_patience():
            patience.answered()
        return response


def address(request: httpx2.Request) -> str:
    """Where a request goes, without what signs it."""
    return re.sub(r"\?.*", "", str(request.url))[:200]


class _Sent:
    """A file that is sent; what is gone of it leaves the page cache, so that what is fetched
    meanwhile takes memory that is warm."""

    def __init__(self, stream: Any, file: io.BufferedReader) -> None:
        """`stream`: the file, or a slice of it; `file`: what is open below."""
        self._stream, self._file = stream, file
        self._begin, self._start = stream.tell(), file.tell()

    def read(self, count: int) -> bytes:
        end = self._file.tell()
        if end - self._start >= _FORGOTTEN:
            forget_cached(self._file.fileno(), self._start, end - self._start)
            self._start = end
        data: bytes = self._stream.read(count)
        return data

    def rewind(self) -> None:
        self._stream.seek(self._begin)
        self._start = self._file.tell()


def send_in_large_pieces(request: httpx2.Request) -> None:
    """For a file that is sent: the client's own pieces are so small that they cost more than the
    bytes."""
    stream: Any = request.stream
    if isinstance(getattr(stream, "CHUNK_SIZE", None), int):
        stream.CHUNK_SIZE = UPLOAD_PIECE
        file = getattr(stream._stream, "fileobj", stream._stream)
        if isinstance(file, io.BufferedReader):
            stream._stream = _Sent(stream._stream, file)


def _file_of(request: httpx2.Request) -> _Sent | None:
    file = getattr(request.stream, "_stream", None)
    return file if isinstance(file, _Sent) else None
