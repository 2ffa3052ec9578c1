"""Outputs that a user names: they may replace an older result, but never what is being read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import OutputError


def refuse_inputs(
    outputs: Iterable[Path | None],
    checkpoints: Iterable[Checkpoint | None],
    files: Iterable[Path | None] = (),
) -> None:
    """Raise OutputError when writing one of `outputs` would replace a file that is read.

    Files of a checkpoint's folder count whatever they are: shards, index, tokenizer. None stands
    for an option that was not given. Names do not matter, also not those of links.
    """
    read: dict[tuple[int, int] | None, Path] = {}
    folders = [c.path for c in checkpoints if c is not None]
    for path in [*(p for folder in folders for p in _files(folder)), *files]:
        if path is not None and (identity := _identity(path)) is not None:
            read[identity] = path
    for out in outputs:
        if out is not None and (found := read.get(_identity(out))) is not None:
            raise OutputError(f"{out}: would replace {found}, which is read; choose another name")


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None
