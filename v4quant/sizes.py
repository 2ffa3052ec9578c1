"""Sizes as people write them, `6GB`, `1500M`, and as they read them, `20.7 MB`."""

from __future__ import annotations

import re

from v4quant_kernels.errors import V4QuantError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


_SURELY_BYTES = 10**6  # a bare number below is rather GB whose unit was forgotten


class SizeError(V4QuantError):
    """A size that cannot be read, or a cap that is too low."""


def parse_size(text: str) -> int:
    """`6GB` -> 6e9, `6GiB` -> 6 * 2^30, `1500M`, `123B`, or bytes alone from a million.

    Raises SizeError.
    """
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise SizeError(f"'{text[:40]}' is not a size; write it like 6GB, 6GiB or 1500MB")
    unit = match[2].upper()
    if text.strip() == match[1] and 0 < float(match[1]) < _SURELY_BYTES:
        raise SizeError(f"'{text}' has no unit; write it like {match[1]}GB, or {match[1]}MB")
    base = 1024 ** ("KMGT".index(unit) + 1) if match[3] and unit else _UNITS[unit]
    return int(float(match[1]) * base)


def human_bytes(count: float) -> str:
    """`20.7 MB`: powers of 1000, as disks and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
