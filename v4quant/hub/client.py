"""The client: huggingface_hub's, its errors turned into ours, and how long we keep trying.

The hub client retries some of its calls a few times; long conversions meet worse. So every call
goes through `persistently`, which tries again after what passes (5xx, 429 with its Retry-After,
broken connections) and gives up at once after what does not (a refused token, a missing
repository). Nothing that could hold a secret leaves this file: tokens and the query strings of
signed links are struck from every message.
"""

from __future__ import annotations

import json
import logging
import re
import time
import traceback
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.request import getproxies

from v4quant import __version__
from v4quant.hub.errors import (
    HubAccessError,
    HubError,
    HubNotFound,
    HubOffline,
    PassingFailure,
)
from v4quant.hub.session import guard_session, has_answered
from v4quant.hub.stopping import is_stopped, pause
from v4quant_kernels.errors import V4QuantError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
TRIES = 10  # without any progress in between
FIRST_TRIES = 3  # while no server has answered at all
FIRST_SECONDS = 7.0  # and no new try begins later than this
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 0.5, 30.0, 600.0
_LONGEST_MESSAGE = 600

_PROXY_NAMES = "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY"
_PROXY_REFUSES = f"the proxy of {_PROXY_NAMES} refuses"
_PROXY_REMEDY = "correct its address, name and password there, or name the hub's host in NO_PROXY"
_LOG = logging.getLogger(__name__)

Result = TypeVar("Result")


def client() -> HfApi:
    """The hub client for HF_ENDPOINT, with the user's stored token. Raises HubOffline."""
    from huggingface_hub import HfApi, constants, is_offline_mode
    from huggingface_hub.utils import disable_progress_bars, logging

    if is_offline_mode():
        raise HubOffline(
            "HF_HUB_OFFLINE is set, so no hub is asked; unset it, or give a local folder"
        )
    guard_session()
    if not constants.HF_DEBUG:
        # Its warnings name signed links, its bars would draw over ours.
        logging.set_verbosity_error()
        disable_progress_bars()
    return HfApi(library_name="v4quant", library_version=__version__)


def is_offline() -> bool:
    """Whether the user forbade the network."""
    from huggingface_hub import is_offline_mode

    return bool(is_offline_mode())


def scrub(text: str) -> str:
    """A message without tokens and signed links, in one line of bounded length."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"hf_[A-Za-z0-9]{6,}|Bearer\s+\S+", "***", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]+", r"\1?***", text)
    return " ".join(text.split())[:_LONGEST_MESSAGE]


class Patience:
    """Counts tries of one piece of work and sleeps between them."""

    def __init__(self, what: str, stopped: Callable[[], bool] = is_stopped) -> None:
        """`what` is being done, for messages; `stopped` cuts waiting short."""
        self._what, self._stopped = what, stopped
        self._tries, self._began = 0, time.monotonic()

    def progressed(self) -> None:
        """Something worked: start counting anew."""
        self._tries = 0

    def wait(self, failure: PassingFailure) -> None:
        """Sleep before the next try. Raises HubError when there were enough."""
        self._tries += failure.weight
        most = TRIES if has_answered() else FIRST_TRIES
        late = not has_answered() and time.monotonic() - self._began > FIRST_SECONDS
        if self._tries >= most or late:
            tried = min(self._tries, most)
            times = f"{-(-tried // failure.weight)} times in a row" if tried > 1 else "once"
            raise HubError(
                f"{self._what} failed {times}: {scrub(str(failure))}; the same command resumes "
                "where this one stopped"
            ) from None
        if failure.wait is not None and failure.wait > LONGEST_RETRY_AFTER:
            raise HubError(
                f"{self._what}: the hub asks to wait {failure.wait / 3600:,.1f} hours; the same "
                "command, run then, resumes where this one stopped"
            ) from None
        seconds = min(FIRST_WAIT * 2 ** (self._tries - 1), LONGEST_WAIT)
        if failure.wait is not None:
            seconds = max(seconds, failure.wait)
        _LOG.warning(
            "%s: %s; retrying in %.1f s (%d of %d)",
            self._what, scrub(str(failure)), seconds, -(-self._tries // failure.weight),
            -(-most // failure.weight) - 1,
        )  # fmt: skip
        pause(seconds, self._stopped)


def persistently(
    what: str, action: Callable[[], Result], stopped: Callable[[], bool] = is_stopped
) -> Result:
    """Run a call of the hub client until it works or cannot. Raises HubError."""
    patience = Patience(what, stopped)
    while True:
        try:
            return action()
        except V4QuantError:
            raise
        except PassingFailure as error:
            failure = error
        except Exception as error:  # noqa: BLE001  (the client wraps causes in its own ways)
            if stopped():
                raise HubError(f"{what}: stopped") from None
            failure = _judge(what, error)
        patience.wait(failure)
        if stopped():
            raise HubError(f"{what}: stopped")


def _judge(what: str, error: Exception) -> PassingFailure:
    """A passing failure to try again after. Raises ours, or the error itself if it is a bug."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    cause: BaseException | None = error
    while cause is not None and not isinstance(
        cause,
        HfHubHTTPError | httpx2.HTTPError | OfflineModeIsEnabled | OSError | PassingFailure,
    ):
        cause = cause.__cause__
    if isinstance(cause, PassingFailure):
        return cause
    if isinstance(cause, OfflineModeIsEnabled):
        raise HubOffline(f"{what}: HF_HUB_OFFLINE is set") from None
    response: Any = getattr(cause, "response", None)
    if response is not None:
        if failure := passing(response):
            return failure
        raise refusal(what, response.status_code, str(cause)) from None
    if isinstance(error, json.JSONDecodeError):
        return PassingFailure("the answer was cut short")
    if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
        return broken(what, cause)
    if isinstance(error, RuntimeError) and "closed" in str(error):
        return PassingFailure(str(error))  # another thread's failure closed the shared client
    if isinstance(cause, OSError):
        raise HubError(f"{what}: {scrub(str(cause))}") from None
    if isinstance(error, httpx2.HTTPError | httpx2.InvalidURL) or _is_theirs(error):
        raise HubError(f"{what}: the hub's answer makes no sense: {scrub(str(error))}") from None
    raise error


def _is_theirs(error: BaseException) -> bool:
    """Whether it arose in the client's own code, which takes the hub's answers as they are."""
    frames = list(traceback.walk_tb(error.__traceback__))
    innermost = frames[-1][0].f_globals.get("__name__", "") if frames else ""
    ours = innermost.partition(".")[0] == __name__.partition(".")[0]
    return not ours and not isinstance(error, MemoryError)


def broken(what: str, error: Exception) -> PassingFailure:
    """What a broken connection means: a failure that may pass. Raises HubError for one that will
    not, such as a certificate that is not trusted or a proxy that wants a name."""
    import httpx2

    text = scrub(str(error))
    if "CERTIFICATE_VERIFY_FAILED" in text:
        raise HubError(
            f"{what}: the hub's certificate is not trusted here ({text}); if a proxy of your "
            "network signs it, set SSL_CERT_FILE to a file with that proxy's certificate"
        ) from None
    if isinstance(error, httpx2.ProxyError):
        raise HubError(f"{what}: {_PROXY_REFUSES} ({text}); {_PROXY_REMEDY}") from None
    through = f" through the proxy of {_PROXY_NAMES}" if getproxies() else ""
    return PassingFailure(f"{type(error).__name__}{through}: {text}")


def passing(response: Any) -> PassingFailure | None:
    """A failure worth another try, if an HTTP response is one."""
    if response.status_code not in PASSING:
        return None
    told = str(response.headers.get("Retry-After", ""))
    return PassingFailure(f"HTTP {response.status_code}", _seconds(told))


def _seconds(told: str) -> float | None:
    """What `Retry-After` asks for: seconds, or a date."""
    if re.fullmatch(r"\d+", told):
        return float(told[:9])
    try:
        return max(0.0, parsedate_to_datetime(told).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def refusal(what: str, status: int, text: str) -> HubError:
    """The error for an HTTP status that another try will not change."""
    if status == 401:
        return HubAccessError(
            f"{what}: the hub does not accept the token (none, expired, or the repository does not "
            "exist); run `hf auth login` or set HF_TOKEN, then run the same command again"
        )
    if status == 403:
        return HubAccessError(
            f"{what}: this token may not do that; use one with write access to the repository, or "
            "accept the repository's terms on its page"
        )
    if status == 407:
        return HubError(f"{what}: {_PROXY_REFUSES} (HTTP 407); {_PROXY_REMEDY}")
    if status == 404:
        return HubNotFound(f"{what}: no such repository, revision or file on the hub")
    return HubError(f"{what}: HTTP {status}: {scrub(text)}")
