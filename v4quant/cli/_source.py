"""SOURCE arguments: a checkpoint folder, `hf://owner/name[@revision]`, or `builtin:tiny-v4`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from v4quant.hub.refs import HubRef
from v4quant.source import Source, resolve_source


class SourceType(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3
    """Turns the text of a SOURCE argument into a folder path or a repository's name."""

    name = "source"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Source:
        """What is converted stays. Raises BuiltinError or HubReferenceError."""
        return value if isinstance(value, Path | HubRef) else resolve_source(str(value))


SOURCE = SourceType()
