"""Temporary folders: gone with the command that made them, or when the next one starts.

A command that is killed cannot remove its folder, so every new folder looks for those of processes
that are gone. One is removed only if it is what this module made: it holds a note with its own
name, device and inode, which no copy and no folder of somebody else has, it belongs to this user,
and nobody holds the lock in it. Removing never follows symbolic links.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from contextlib import ExitStack, suppress
from pathlib import Path

from v4quant_formats.errors import FormatError
from v4quant_formats.shards import output_error
from v4quant_formats.small_files import read_small
from v4quant_formats.system import LockHeld, hold_lock

_PREFIX = "v4quant-"
_NOTE, _LOCK = ".made-by-v4quant", ".lock"
_MAX_NOTE = 4096
_made: list[weakref.finalize[..., TemporaryFolder]] = []


class TemporaryFolder:
    """A folder that this process holds. Use as a context manager, or `remove` it."""

    def __init__(self, inside: Path | None = None) -> None:
        """Remove what killed processes left, and make a new one, in TMPDIR where nothing else is
        said. Raises OutputError."""
        # Absolute, for it is removed at the end, wherever the process is then.
        inside = (inside or Path(tempfile.gettempdir())).absolute()
        remove_abandoned(inside)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=inside))
            held = ExitStack()
            held.enter_context(hold_lock(self.path / _LOCK))
            (self.path / _NOTE).write_bytes(_note(self.path).encode())
        except OSError as error:
            raise output_error(inside, error) from None
        self._end = weakref.finalize(self, _remove, self.path, held)
        _made[:] = [*(end for end in _made if end.alive), self._end]

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder and what is in it; again does nothing."""
        self._end()


def remove_all() -> None:
    """Remove what this process made and still has: it ends without the interpreter's help."""
    for remove in _made:
        remove()


def remove_abandoned(inside: Path) -> None:
    """Remove the temporary folders of processes that are gone."""
    with suppress(OSError):
        for path in inside.glob(f"{_PREFIX}*"):
            with suppress(OSError, FormatError, LockHeld):
                if _is_ours(path):
                    with hold_lock(path / _LOCK):
                        shutil.rmtree(path, ignore_errors=True)


def _is_ours(path: Path) -> bool:
    if path.is_symlink() or (path / _LOCK).is_symlink() or not path.is_dir():
        return False
    if hasattr(os, "getuid") and path.stat().st_uid != os.getuid():
        return False
    return read_small(path / _NOTE, _MAX_NOTE) == _note(path).encode()


def _note(path: Path) -> str:
    stat = path.stat()
    return f"{path.name} {stat.st_dev} {stat.st_ino}\n"


def _remove(path: Path, held: ExitStack) -> None:
    """The lock goes last, so that nobody else begins to remove; on Windows it must go first."""
    if os.name == "nt":
        held.close()
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        held.close()
