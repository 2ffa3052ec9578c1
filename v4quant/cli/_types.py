"""Types of arguments: checkpoints (a folder, `hf://owner/name`, a built-in name), schemes, formats.

They stay texts here; the library says what they mean. What they add is shell completion.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

import v4quant
from v4quant.builtin import TINY_V4
from v4quant_formats.layouts.choices import LAYOUT_NAMES, WRITABLE
from v4quant_kernels.near_names import not_one_of

_PRESETS = Path(v4quant.__file__).parent / "pipeline" / "presets"


class TextType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """A text for the library. Completion offers `words`, and what the shell knows of `paths`."""

    def __init__(self, name: str, words: tuple[str, ...], paths: str = "") -> None:
        """paths: "dir" or "file" for arguments that may name one."""
        self.name = name
        self._words = words
        self._paths = paths

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The text, unchanged."""
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """The words that begin so; paths are the shell's business."""
        items = [CompletionItem(word) for word in self._words if word.startswith(incomplete)]
        return [*items, CompletionItem(incomplete, type=self._paths)] if self._paths else items


class Choice(click.Choice):  # type: ignore[type-arg]  # generic since click 8.2
    """One of some words; whoever spells it otherwise is told what they probably meant."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The word. Fails like click's own, naming the nearest."""
        try:
            return super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(not_one_of(str(value), map(str, self.choices)), param, ctx)


class FiniteRange(click.FloatRange):
    """Click's own lets what is no number, and infinity, through."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number. Fails for nan and inf."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


SOURCE = TextType("source", (TINY_V4, "hf://"), "dir")
OUT = TextType("out", ("hf://",), "dir")
ADAPTER = TextType("adapter", ("hf://",), "dir")
SCHEME = TextType("scheme", WRITABLE)
FORMAT = TextType("format", LAYOUT_NAMES)
RUN_FILE = TextType("recipe", tuple(sorted(p.stem for p in _PRESETS.glob("*.toml"))), "file")
