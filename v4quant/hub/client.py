"""The client: huggingface_hub's, its errors turned into ours, and its calls tried again.

Every call goes through `persistently`, which tries again after what passes (5xx, 429 with its
Retry-After, broken connections) until its patience ends, and gives up at once after what does not
(a refused token, a missing repository).
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from v4quant import __version__
from v4quant.hub.errors import HubError, HubOffline, PassingFailure
from v4quant.hub.failures import broken, refusal, scrub
from v4quant.hub.patience import Patience
from v4quant.hub.session import guard_session
from v4quant.hub.stopping import is_stopped
from v4quant_kernels.errors import V4QuantError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

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


def persistently(
    what: str,
    action: Callable[[], Result],
    stopped: Callable[[], bool] = is_stopped,
    seconds: float | None = None,
) -> Result:
    """Run a call of the hub client until it works or cannot.

    seconds: as of `Patience`. Raises HubError.
    """
    patience = Patience(what, stopped, seconds=seconds)
    while True:
        try:
            with patience.governs():
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
        HfHubHTTPError
        | httpx2.HTTPError
        | OfflineModeIsEnabled
        | OSError
        | PassingFailure
        | V4QuantError,
    ):
        cause = cause.__cause__
    if isinstance(cause, PassingFailure):
        return cause
    if isinstance(cause, V4QuantError):
        raise cause from None
    if isinstance(cause, OfflineModeIsEnabled):
        raise HubOffline(f"{what}: HF_HUB_OFFLINE is set") from None
    response: Any = getattr(cause, "response", None)
    if response is not None:
        raise refusal(what, response.status_code, str(cause)) from None
    if isinstance(error, json.JSONDecodeError):
        return PassingFailure("the answer was cut short")
    if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
        return broken(what, cause)
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
