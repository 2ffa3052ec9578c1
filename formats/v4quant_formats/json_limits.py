"""How much JSON from a stranger may ask of us.

A hundred megabytes of `[],[],[]` become three gigabytes of Python objects, and a deep nesting that
could be read may exhaust the stack when it is written again. Both are known before they hurt:
values by counting separators in the raw bytes, depth by walking level after level.
"""

from __future__ import annotations

from typing import Any

MAX_JSON_DEPTH = 64
# The largest release as a single file (145,116 tensors) has 1.2 million.
MAX_JSON_VALUES = 4_000_000


def has_too_many_values(text: bytes) -> bool:
    """Whether raw JSON may hold more than MAX_JSON_VALUES values (in under 0.1 s for 100 MB)."""
    return sum(text.count(c) for c in (b",", b"[", b"{")) > MAX_JSON_VALUES


def is_too_deep(value: Any) -> bool:
    """Whether a JSON value nests deeper than MAX_JSON_DEPTH."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below += item.values()
            elif isinstance(item, list):
                below += item
        if not below:
            return False
        level = below
    return True
