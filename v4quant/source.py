"""Source: what a SOURCE argument may be, and how it becomes a Checkpoint.

A folder, `builtin:tiny-v4`, or a repository on the hub (`hf://owner/name[@revision]`).
"""

from __future__ import annotations

from pathlib import Path

from v4quant.builtin import resolve_source as resolve_builtin
from v4quant.hub.refs import HubRef, is_hub, parse_hub
from v4quant.hub.source import open_hub
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.opening import open_checkpoint

Source = Path | HubRef


def resolve_source(text: str) -> Source:
    """What a SOURCE argument means. Raises BuiltinError or HubReferenceError."""
    return parse_hub(text) if is_hub(text) else resolve_builtin(text)


def open_source(
    source: Source,
    scratch: Path | None = None,
    cap: int | None = None,
    headers_only: bool = False,
) -> Checkpoint:
    """Open a source. The other arguments are `open_hub`'s and concern repositories only.

    Raises what `open_checkpoint` and `open_hub` raise.
    """
    if isinstance(source, HubRef):
        return open_hub(source, scratch, cap, headers_only)
    return open_checkpoint(source)
