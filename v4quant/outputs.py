"""Outputs that a user names: they may replace an older result, but never what is being read.

A new file may lie beside the files of a checkpoint that is read, unless its name would make it one
of them; a new folder may not lie in the checkpoint's folder, which stays as it is. (Beside a lone
.gguf file, whose folder holds anything, it may.) What counts is where a path leads: links, `..` and
letters of another case on a disk that does not tell them apart make no difference.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import OutputError
from v4quant_formats.sidecars import ALLOWED_FILES
from v4quant_formats.system import real_path

_CONFIG = "config.json"
_PARTS = (".safetensors", ".safetensors.index.json", ".gguf", ".bin")


def refuse_inputs(
    outputs: Iterable[Path | None],
    checkpoints: Iterable[Checkpoint | None],
    files: Iterable[Path | None] = (),
    folders: Iterable[Path] = (),
) -> None:
    """Raise OutputError when writing one of `outputs` would replace a file that is read, or make
    part of a checkpoint that is read, or one of the output `folders` lies in such a checkpoint.

    Files of a checkpoint's folder count whatever they are: shards, index, tokenizer. None stands
    for an option that was not given.
    """
    read: dict[tuple[int, int] | None, Path] = {}
    sources = [c.path for c in checkpoints if c is not None]
    for path in [*(p for folder in sources for p in _files(folder)), *files]:
        if path is not None and (identity := _identity(path)) is not None:
            read[identity] = path
    inside = {_identity(path): path for path in sources if path.is_dir()}
    for out in (path for path in outputs if path is not None):
        if (found := read.get(_identity(out))) is not None:
            raise OutputError(f"{out}: would replace {found}, which is read; choose another name")
        within = inside.get(_identity(real_path(out).parent))
        if within is not None and _is_part(out.name):
            raise OutputError(
                f"{out}: would become part of {within}, which is read; choose another name"
            )
    whole = {identity: path for identity, path in inside.items() if (path / _CONFIG).is_file()}
    for folder in folders:
        real = real_path(folder)
        for above in (real, *real.parents):
            if (found := whole.get(_identity(above))) is not None:
                raise OutputError(
                    f"{folder}: lies in {found}, which is read and stays as it is; choose a folder "
                    "outside it"
                )


def _is_part(name: str) -> bool:
    """Whether readers of a checkpoint would take a file for part of it."""
    lower = name.lower()
    return lower.endswith(_PARTS) or lower in {n.lower() for n in (*ALLOWED_FILES, _CONFIG)}


def _files(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        yield from (Path(parent) / name for name in names)


def _identity(path: Path) -> tuple[int, int] | None:
    with suppress(OSError, ValueError):
        stat = path.stat()
        return stat.st_dev, stat.st_ino
    return None
