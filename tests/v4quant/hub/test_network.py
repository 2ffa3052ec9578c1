"""Networks that are not there or set wrongly: told in one clear line, soon, with retries seen."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import v4quant.hub.patience
from tests.support.fake_hub import FakeHub
from v4quant.hub.errors import HubError
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import open_remote

REF = HubRef("maker/V4-Tiny")
CERTIFICATE = Path(__file__).parents[2] / "data" / "self-signed.pem"


@pytest.fixture
def nothing_answered(
    plain_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str], None]]:
    """A process that no server has answered yet; call it with the hub's address."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setitem(v4quant.hub.patience._state, "answered", False)

    def point(url: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        close_session()

    yield point
    close_session()


class Refusing(BaseHTTPRequestHandler):
    """A proxy that wants a name and a password."""

    def do_CONNECT(self) -> None:
        self.send_error(407)

    do_GET = do_CONNECT

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def test_a_hub_that_is_not_there_is_told_soon_and_retries_are_seen(
    nothing_answered: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nothing_answered(f"http://127.0.0.1:{free.getsockname()[1]}")
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, "v4quant"), pytest.raises(HubError, match="3 times"):
        open_remote(REF)
    assert time.monotonic() - began < 15
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2 and all("retrying in" in line for line in said)
    assert "(1 of 2)" in said[0] and "hf://maker/V4-Tiny" in said[0]


def test_no_try_begins_late_where_nothing_has_answered(
    nothing_answered: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name server that does not answer takes many seconds for every try."""
    tries = []

    def slow(*_: object, **__: object) -> None:
        tries.append(1)
        began = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: began + 10)
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    nothing_answered("http://a-name.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with pytest.raises(HubError, match=r"failed once.*name resolution"):
        open_remote(REF)
    assert len(tries) == 1


def test_the_first_connection_may_not_take_long(nothing_answered: Callable[[str], None]) -> None:
    """A listener whose queue is full: packets to it are dropped, as those to no host are."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        address = deaf.getsockname()
        with socket.create_connection(address), socket.socket() as second:
            second.setblocking(False)
            second.connect_ex(address)
            nothing_answered(f"http://127.0.0.1:{address[1]}")
            began = time.monotonic()
            with pytest.raises(HubError):
                open_remote(REF)
            assert time.monotonic() - began < 15


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_refuses(
    scheme: str,
    nothing_answered: Callable[[str], None],
    server: HTTPServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{server.server_port}")
    nothing_answered(f"{scheme}://a-hub.invalid")
    with pytest.raises(HubError, match=r"the proxy of HTTPS_PROXY, .* refuses .*407") as caught:
        open_remote(REF)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"), [("HTTPS_PROXY", "gopher://x"), ("SSL_CERT_FILE", "/no/such/file.pem")]
)
def test_settings_that_cannot_be_used(
    name: str,
    value: str,
    nothing_answered: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(name, value)
    nothing_answered("https://a-hub.invalid")
    with pytest.raises(HubError, match=r"network settings cannot be used .*HTTPS_PROXY"):
        open_remote(REF)


def test_a_certificate_nobody_trusts(
    nothing_answered: Callable[[str], None], server: HTTPServer
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    nothing_answered(f"https://127.0.0.1:{server.server_port}")
    with pytest.raises(HubError, match=r"certificate is not trusted here .* SSL_CERT_FILE"):
        open_remote(REF)
