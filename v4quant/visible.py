"""Text from somebody's file, made fit to be shown: nothing in it moves a cursor or hides."""

from __future__ import annotations

import unicodedata

_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
_LAYOUT = "\n\t"


def visible(value: str) -> str:
    r"""Replace characters that do not show (controls, direction marks, surrogates) by `\uXXXX`."""
    return _replaced(value, "")


def printable(value: str) -> str:
    r"""The same for whole pages: line breaks and tabs stay.

    Inside a JSON string the replacement means the same character, so JSON stays what it was.
    """
    return _replaced(value, _LAYOUT)


def _replaced(value: str, kept: str) -> str:
    if value.isascii() and value.isprintable():
        return value
    return "".join(
        _escape(c) if c not in kept and unicodedata.category(c) in _INVISIBLE else c for c in value
    )


def _escape(character: str) -> str:
    number = ord(character)
    if number < 0x10000:
        return f"\\u{number:04x}"
    number -= 0x10000  # as JSON and the hub's front matter write it: a pair of surrogates
    return f"\\u{0xD800 + (number >> 10):04x}\\u{0xDC00 + (number & 0x3FF):04x}"
