"""The HTTP session that huggingface_hub makes its requests with, and what we demand of it.

Every request of the process to a hub goes through it, those of huggingface_hub included, so this is
where three promises are kept. The token goes to the hub's own host and nowhere else, wherever a
link, a redirect or an upload's address leads. An answer that is not a file is read up to a limit of
bytes and seconds. Nothing is accepted compressed: a small answer could then fill the memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from v4quant.hub.errors import HubError
from v4quant.hub.failures import broken
from v4quant.hub.lines import watch_lines
from v4quant.hub.patience import allowed, has_answered, note_answer
from v4quant.hub.persistent import address, leave_retries_to_us, send_in_large_pieces

if TYPE_CHECKING:
    import httpx2

MAX_ANSWER_BYTES = 64 * 2**20
MAX_ANSWER_SECONDS = 45.0
CONNECT_SECONDS = 4.0
"""How long a server may take to accept the first connection; until then it may not be there."""
LONGEST_SILENCE = {"GET": 20.0, "HEAD": 20.0}
LONGEST_WORK = 60.0
"""Seconds a server may let a request wait for the next byte of its answer, where whoever made the
request sets no limit, and those of others, which may be work (a commit, the end of an upload)."""
_SECRETS = ("authorization", "cookie")
_guarded = threading.Lock()
_guard = {"on": False}


def guard_session() -> None:
    """Make every session that huggingface_hub opens from now on keep the promises above."""
    from huggingface_hub.utils import _http, close_session, set_client_factory

    with _guarded:
        if _guard["on"]:
            return
        before: Callable[[], httpx2.Client] = getattr(
            _http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory
        )

        def guarded() -> httpx2.Client:
            try:
                client = before()
            except (ValueError, ImportError, OSError) as error:
                raise HubError(
                    f"the network settings cannot be used ({error}); look at HTTPS_PROXY, "
                    "HTTP_PROXY, ALL_PROXY and SSL_CERT_FILE"
                ) from None
            watch_lines(client)
            leave_retries_to_us(client)
            hooks = client.event_hooks
            client.event_hooks = {
                "request": [*hooks.get("request", ()), _before],
                "response": [*hooks.get("response", ()), _after],
            }
            return client

        set_client_factory(guarded)
        close_session()
        _guard["on"] = True


def origin(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port. Raises HubError for what is not a URL."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise HubError(f"the hub names {url[:200]!r}, which is not an address") from None
    return parts.scheme, host, port or {"http": 80, "https": 443}.get(parts.scheme)


def _before(request: httpx2.Request) -> None:
    from huggingface_hub import constants

    if origin(str(request.url)) != origin(constants.ENDPOINT):
        for name in _SECRETS:
            request.headers.pop(name, None)
    request.headers["accept-encoding"] = "identity"
    limits = request.extensions.get("timeout")
    if isinstance(limits, dict):
        longest = LONGEST_SILENCE.get(request.method, LONGEST_WORK)
        for kind in ("read", "write", "connect"):
            limits[kind] = limits.get(kind) or longest
        if not has_answered():
            limits["connect"] = min(limits["connect"], CONNECT_SECONDS)
    send_in_large_pieces(request)


def _after(response: httpx2.Response) -> None:
    import httpx2

    note_answer()
    what = address(response.request)
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise HubError(f"{what}: answers compressed, which was not asked for; refused")
    if "range" in response.request.headers:  # a file; its reader knows how long it is
        return

    class Limited(httpx2.SyncByteStream):
        """An answer's bytes, to a limit."""

        def __init__(self, stream: Any) -> None:
            self._stream = stream

        def __iter__(self) -> Iterator[bytes]:
            seconds = allowed(MAX_ANSWER_SECONDS) or 0.0
            count, end = 0, time.monotonic() + seconds
            try:
                for piece in self._stream:
                    count += len(piece)
                    if count > MAX_ANSWER_BYTES:
                        raise HubError(f"{what}: answers with more than {MAX_ANSWER_BYTES:,} bytes")
                    if time.monotonic() > end:
                        raise HubError(
                            f"{what}: has not answered in full after {seconds:.0f} s; try again "
                            "later"
                        )
                    yield piece
            except httpx2.TransportError as error:
                raise broken(what, error) from None

        def close(self) -> None:
            self._stream.close()

    response.stream = Limited(response.stream)
