"""SOURCE arguments: a checkpoint folder, or `builtin:tiny-v4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from v4quant.builtin import resolve_source


class SourceType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """Turns the text of a SOURCE argument into a folder path."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """A path stays one; `builtin:` names are looked up. Raises BuiltinError."""
        return value if isinstance(value, Path) else resolve_source(str(value))


SOURCE = SourceType()
