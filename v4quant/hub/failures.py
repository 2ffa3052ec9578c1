"""What a failure on the network means: may it pass, or is it an answer?

A status like 503 or a broken connection may be gone at the next try; a refused token, a missing
repository, a certificate that is not trusted will not. Nothing that could hold a secret gets into a
message: tokens and the query strings of signed links are struck out.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.request import getproxies

from v4quant.hub.errors import HubAccessError, HubError, HubNotFound, PassingFailure

PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_TOO_MANY = 429
_LONGEST_MESSAGE = 600
_LONGEST_HEADER = 2000
_LIMIT = re.compile(r"(?:^|[;,\s])(r|t|reset)\s*=\s*(\d{1,9})(?![\w.])")

_PROXY_NAMES = "HTTPS_PROXY, HTTP_PROXY or ALL_PROXY"
_PROXY_REFUSES = f"the proxy of {_PROXY_NAMES} refuses"
_PROXY_REMEDY = "correct its address, name and password there, or name the hub's host in NO_PROXY"


def scrub(text: str) -> str:
    """A message without tokens and signed links, in one line of bounded length."""
    from huggingface_hub import get_token

    token = get_token()
    if token:
        text = text.replace(token, "***")
    text = re.sub(r"hf_[A-Za-z0-9]{6,}|Bearer\s+\S+", "***", text)
    text = re.sub(r"(https?://[^\s'\"?]+)\?[^\s'\"]+", r"\1?***", text)
    return " ".join(text.split())[:_LONGEST_MESSAGE]


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
    wait = _seconds(str(response.headers.get("Retry-After", "")))
    if wait is None and response.status_code == _TOO_MANY:
        wait = _until_reset(response.headers)
    return PassingFailure(f"HTTP {response.status_code}", wait)


def _until_reset(headers: Mapping[str, str]) -> float | None:
    """Seconds until requests are allowed again, as `RateLimit` of the IETF's drafts tells them.

    Today `"policy";r=LEFT;t=SECONDS`, a policy after the other, of which those count that have
    nothing left; before, `limit=100, remaining=0, reset=SECONDS`, or `RateLimit-Reset: SECONDS`.
    """
    told = str(headers.get("RateLimit", ""))[:_LONGEST_HEADER]
    items = [dict(_LIMIT.findall(item)) for item in told.split(",")]
    waits = [_seconds(item["t"]) for item in items if "t" in item and int(item.get("r", 0)) == 0]
    older = dict(_LIMIT.findall(told)).get("reset", str(headers.get("RateLimit-Reset", "")))
    return max((wait for wait in [*waits, _seconds(older)] if wait is not None), default=None)


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
