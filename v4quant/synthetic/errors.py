"""What a request for a synthetic checkpoint can be refused with."""

from __future__ import annotations

from v4quant_kernels.errors import V4QuantError


class RequestError(V4QuantError):
    """A request that no checkpoint fits."""
