"""How much longer a tokenizer may make a text before it cuts it, told from tokenizer.json.

A normalizer is a program from a stranger: thirty replacements that each double the text fill any
memory, in code that hears no signal. Its steps are few and known, so their growth is bounded before
the first text, and where the bound is not small enough for a text, pieces of that are tried first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

MAX_NORMALIZER_GROWTH, MAX_SPLITTER_GROWTH = 256.0, 16.0
"""Bounds above which a tokenizer is refused; those of real ones are below 100 and below 7."""
_MAX_PREPENDED = 4096
_CAREFREE_BYTES = 2**26  # a text that cannot grow beyond this needs no trial
_TRIAL_BYTES = 2**16
_MAX_TRIED = 16.0
_STEPS = {
    "NFC": 3.0, "NFD": 4.0, "NFKC": 18.0, "NFKD": 18.0, "Lowercase": 2.0, "BertNormalizer": 4.0,
    "Precompiled": 18.0, "ByteLevel": 2.0, "Metaspace": 3.0,
}  # fmt: skip
"""Bytes out for bytes in, at most; steps not named here add nothing."""


def growth(step: Any) -> float:
    """A bound on bytes out for bytes in of a normalizer or pre-tokenizer as JSON has it."""
    pending, bound = [step], 1.0
    while pending:
        step = pending.pop()
        if not isinstance(step, dict):
            continue
        for key in ("normalizers", "pretokenizers"):
            if isinstance(inner := step.get(key), list):
                pending += inner
        bound *= _of_one(step)
    return bound


def _of_one(step: dict[str, Any]) -> float:
    kind = step.get("type")
    if kind == "Prepend":
        return 1.0 if len(str(step.get("prepend", "")).encode()) <= _MAX_PREPENDED else float("inf")
    if kind == "Replace":
        pattern, content = step.get("pattern"), len(str(step.get("content", "")).encode())
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(1.0, content / len(literal.encode()))
        return 1.0 + content  # a regular expression may match nothing, everywhere
    return _STEPS.get(str(kind), 1.0)


def grows_too_much(text: str, bound: float, normalize: Callable[[str], str]) -> bool:
    """Whether a normalizer of this bound makes a text far longer, tried on pieces if it could."""
    if bound * len(text.encode()) <= _CAREFREE_BYTES:
        return False
    for start in range(0, len(text), _TRIAL_BYTES):
        piece = text[start : start + _TRIAL_BYTES]
        if len(normalize(piece)) > _MAX_TRIED * len(piece) + _MAX_PREPENDED:
            return True
    return False
