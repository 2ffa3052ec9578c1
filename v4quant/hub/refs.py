"""hf://owner/name[@revision]: what the user writes for a repository on the hub."""

from __future__ import annotations

import re
from dataclasses import dataclass

from v4quant_kernels.errors import V4QuantError

SCHEME = "hf://"
# What the hub allows in names; a leading dot or dash would make paths and options of them.
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REVISION = r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,254}"


class HubReferenceError(V4QuantError):
    """A text that does not name a repository."""


@dataclass(frozen=True)
class HubRef:
    """A repository and, when given, a branch, tag or commit of it."""

    repo: str
    revision: str | None = None

    @property
    def name(self) -> str:
        """The repository's name without its owner."""
        return self.repo.partition("/")[2]

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}" + (f"@{self.revision}" if self.revision else "")


def is_hub(text: str) -> bool:
    """Whether a SOURCE or OUT argument means the hub."""
    return text.startswith(SCHEME)


def could_be_repository(text: str) -> bool:
    """Whether a text without `hf://` is spelled like a repository's name."""
    return re.fullmatch(f"{_NAME}/{_NAME}", text) is not None


def parse_hub(text: str) -> HubRef:
    """Take `hf://owner/name[@revision]` apart. Raises HubReferenceError."""
    found = re.fullmatch(rf"{SCHEME}({_NAME}/{_NAME})(?:@({_REVISION}))?", text)
    if found is None or ".." in text or "--" in found[1]:
        raise HubReferenceError(
            f"'{text[:200]}' does not name a repository; write hf://owner/name or "
            "hf://owner/name@revision"
        )
    return HubRef(found[1], found[2])
