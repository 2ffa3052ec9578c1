"""The documents under test, taken apart: code blocks, code spans and links of every page."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_COMMAND = re.compile(r"(?:^|-m |\$ |Example: )(v4quant [a-z][^`(]*)")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Relative name, for messages."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        """The file as it is."""
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[str]:
        """Contents of fenced code blocks."""
        return _FENCE.findall(self.text)

    @property
    def prose(self) -> str:
        """The text without its code blocks."""
        return _FENCE.sub("", self.text)

    @property
    def spans(self) -> list[str]:
        """Contents of code spans; those that a line break divides are joined."""
        return _SPAN.findall(re.sub(r"\n[ ]*(?=[^\n])", " ", self.prose))

    @property
    def links(self) -> list[str]:
        """Targets of links."""
        return _LINK.findall(self.prose)

    @property
    def command_lines(self) -> list[str]:
        """Every `v4quant ...` line of code blocks (continued lines joined) and code spans.

        In help texts those are the examples; what follows in brackets is a remark.
        """
        lines = [line for b in self.blocks for line in b.replace("\\\n", " ").splitlines()]
        lines += self.spans
        found = (_COMMAND.search(line) for line in lines)
        return [match[1].strip() for match in found if match]


@cache
def pages() -> list[Page]:
    """All documents, in order of name."""
    return [Page(p) for p in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])]
