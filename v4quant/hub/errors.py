"""What can go wrong with a hub, as callers tell it apart."""

from __future__ import annotations

from v4quant_kernels.errors import V4QuantError


class HubError(V4QuantError):
    """The hub did not do what it was asked; the message says what helps."""


class HubAccessError(HubError):
    """No token, an expired one, or one that may not do this."""


class HubNotFound(HubError):
    """No such repository, revision or file (or none that this token may see)."""


class HubOffline(HubError):
    """HF_HUB_OFFLINE is set and the local cache does not hold what is asked."""


class PassingFailure(Exception):
    """A failure that another try may not meet; `wait` is what the server asked for."""

    def __init__(self, text: str, wait: float | None = None) -> None:
        """wait: seconds."""
        super().__init__(text)
        self.wait = wait
