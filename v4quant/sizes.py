"""Sizes as people write them: `6GB`, `1500M`."""

from __future__ import annotations

import re

from v4quant_kernels.errors import V4QuantError

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


class SizeError(V4QuantError):
    """A size that cannot be read, or a cap that is too low."""


def parse_size(text: str) -> int:
    """`6GB` -> 6e9, `6GiB` -> 6 * 2^30, `1500M`, `123`. Raises SizeError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None:
        raise SizeError(f"'{text}' is not a size; write it like 6GB, 6GiB or 1500MB")
    unit = match[2].upper()
    base = 1024 ** ("KMGT".index(unit) + 1) if match[3] and unit else _UNITS[unit]
    return int(float(match[1]) * base)
