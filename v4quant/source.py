"""Source: what a SOURCE argument may be, and how it becomes a Checkpoint.

A folder, `builtin:tiny-v4`, or a repository on the hub (`hf://owner/name[@revision]`); of several
GGUF quants in a folder or repository, `:QUANT` behind the name chooses one.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

from v4quant.builtin import CHECKPOINTS
from v4quant.builtin import resolve_source as resolve_builtin
from v4quant.hub.adapter_source import fetch_adapter
from v4quant.hub.refs import HubRef, could_be_repository, is_hub, parse_hub
from v4quant.hub.source import open_hub
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.adapter import with_adapter
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.gguf.quants import split_quant
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.sidecars import TOKENIZER
from v4quant_kernels.errors import V4QuantError
from v4quant_kernels.near_names import did_you_mean

Source = Path | HubRef


class SourceError(V4QuantError):
    """A source that does not exist as it is written."""


def resolve_source(text: str) -> Source:
    """What a SOURCE argument means. Raises BuiltinError or HubReferenceError."""
    return parse_hub(text) if is_hub(text) else resolve_builtin(text)


def _check_there(path: Path) -> None:
    """A folder that does not exist, but whose name means something. Raises SourceError."""
    text = str(path)
    if split_quant(path)[0].exists():
        return
    if not path.is_absolute() and could_be_repository(text):
        raise SourceError(
            f"{text}: no such folder; for the repository on the hub, write hf://{text}"
        )
    if meant := did_you_mean(text, CHECKPOINTS):
        raise SourceError(
            f"{text}: no such folder; {meant}otherwise give the folder that holds config.json"
        )


def _tokenizer(given: Path | None) -> Path | None:
    """The tokenizer.json that is meant. Raises SourceError."""
    if given is None:
        return None
    path = given / TOKENIZER if given.is_dir() else given
    if not path.is_file():
        raise SourceError(f"{path}: no such file; give a tokenizer.json, or a folder with one")
    return path


def open_source(
    source: Source,
    scratch: Path | None = None,
    cap: int | None = None,
    headers_only: bool = False,
    adapter: Source | None = None,
    tokenizer: Path | None = None,
) -> Checkpoint:
    """Open a source. adapter: the folder or repository of a LoRA adapter that is merged while it is
    read.
    tokenizer: a tokenizer.json, or its folder, in place of the source's own. The other
    arguments are `open_hub`'s and concern repositories only.

    Raises SourceError and what `open_checkpoint`, `open_hub` and `with_adapter` raise.
    """
    if isinstance(source, HubRef):
        opened = open_hub(source, scratch, cap, headers_only)
    else:
        _check_there(source)
        opened = open_checkpoint(source)
    opened = replace(opened, tokenizer=_tokenizer(tokenizer))
    return opened if adapter is None else _merged(opened, adapter)


def _merged(checkpoint: Checkpoint, adapter: Source) -> Checkpoint:
    if isinstance(adapter, Path):
        return with_adapter(checkpoint, adapter)
    temporary = TemporaryFolder()
    try:
        merged = with_adapter(checkpoint, *fetch_adapter(adapter, temporary.path))
    except BaseException:
        temporary.remove()
        raise
    weakref.finalize(merged.deltas, temporary.remove)
    return merged
