"""SOURCE arguments: a checkpoint folder, `hf://owner/name[@revision]`, or `builtin:tiny-v4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from v4quant.hub.refs import HubRef, is_hub, parse_hub
from v4quant.source import Source, resolve_source


class SourceType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """Turns the text of a SOURCE argument into a folder path or a repository's name."""

    name = "source"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Source:
        """What is converted stays. Raises BuiltinError or HubReferenceError."""
        return value if isinstance(value, Path | HubRef) else resolve_source(str(value))


class OutType(click.ParamType):  # type: ignore[type-arg]
    """Turns the text of an OUT argument into a folder path or a repository's name."""

    name = "out"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Path | HubRef:
        """What is converted stays. Raises HubReferenceError."""
        if isinstance(value, Path | HubRef):
            return value
        return parse_hub(str(value)) if is_hub(str(value)) else Path(str(value))


SOURCE = SourceType()
OUT = OutType()
