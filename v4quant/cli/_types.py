"""Types of arguments: checkpoints (a folder, `hf://owner/name`, a built-in name) and schemes.

They stay texts here; the library says what they mean. What they add is shell completion.
"""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem

from v4quant.builtin import TINY_V4
from v4quant_formats.layouts.choices import WRITABLE


class PlaceType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A checkpoint's place, as text. Completion offers folders, and `names`."""

    def __init__(self, name: str, names: tuple[str, ...] = ()) -> None:
        """names: what else it may be."""
        self.name = name
        self._names = names

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Built-in names and `hf://`; the shell itself completes folders."""
        words = [name for name in self._names if name.startswith(incomplete)]
        return [*map(CompletionItem, words), CompletionItem(incomplete, type="dir")]


SOURCE = PlaceType("source", (TINY_V4, "hf://"))
OUT = PlaceType("out", ("hf://",))


class SchemeType(click.ParamType):  # type: ignore[type-arg]
    """A scheme's name; completion offers those that can be written."""

    name = "scheme"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged: the library says what is wrong with it, and what is near."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Schemes that begin so."""
        return [CompletionItem(name) for name in WRITABLE if name.startswith(incomplete)]


SCHEME = SchemeType()
