"""hf://owner/name[@revision][:QUANT]: what the user writes for a repository on the hub.

QUANT chooses among the GGUF models of a repository; see `v4quant_formats.gguf.quants`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from v4quant_kernels.errors import V4QuantError

SCHEME = "hf://"
# What the hub allows in names; a leading dot or dash would make paths and options of them.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}"
_QUANT = r"[A-Za-z0-9_][A-Za-z0-9._/+-]{0,254}"


class HubReferenceError(V4QuantError):
    """A text that does not name a repository."""


@dataclass(frozen=True)
class HubRef:
    """A repository and, when given, a branch, tag or commit of it, and which of its GGUF models."""

    repo: str
    revision: str | None = None
    quant: str = ""

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return f"{SCHEME}{self.repo}{at}" + (f":{self.quant}" if self.quant else "")


def is_hub(text: str) -> bool:
    """Whether a SOURCE or OUT argument means the hub."""
    return text.startswith(SCHEME)


def could_be_repository(text: str) -> bool:
    """Whether a text without `hf://` is spelled like a repository's name."""
    return re.fullmatch(f"{_NAME}/{_NAME}", text) is not None


def parse_hub(text: str) -> HubRef:
    """Take `hf://owner/name[@revision][:QUANT]` apart. Raises HubReferenceError."""
    form = rf"{SCHEME}({_NAME}/{_NAME})(?:@({_REVISION}))?(?::({_QUANT}))?"
    found = re.fullmatch(form, text)
    if found is None or ".." in text or "--" in found[1]:
        raise HubReferenceError(
            f"'{text[:200]}' does not name a repository; write hf://owner/name or "
            "hf://owner/name@revision, and :QUANT behind it to choose among GGUF files"
        )
    return HubRef(found[1], found[2], found[3] or "")
