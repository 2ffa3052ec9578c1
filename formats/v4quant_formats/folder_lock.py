"""One process at a time in a folder: a lock file in it, held as long as the work goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from v4quant_formats.errors import OutputError
from v4quant_formats.shards import output_error
from v4quant_formats.system import LockHeld, hold_lock

LOCK_NAME = "lock"


def lock_beside(path: Path) -> Path:
    """The lock of a result that lies among other people's files, whose locks are theirs."""
    return path.with_name(f"{path.name}.v4quant-lock")


@contextmanager
def locked_folder(
    folder: Path,
    taken: str,
    name: str = LOCK_NAME,
    stays: bool = True,
    look: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Make the folder if need be and hold its lock.

    taken: what to tell the user when another process has it. stays: whether the lock's file is left
    behind. look() is called as soon as the lock is held: where it raises, because the folder is
    none to work in after all, what was made for the lock goes again. Raises OutputError.
    """
    lock = folder / name
    made = [path for path in (lock, folder) if not os.path.lexists(path)]
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(lock))
        except OSError as error:
            raise output_error(lock, error) from None
        except LockHeld:
            raise OutputError(taken) from None
        try:
            look()
        except BaseException:
            _remove(made)
            raise
        try:
            yield
        finally:
            if not stays:
                _remove([lock])


def _remove(paths: Iterable[Path]) -> None:
    """Where an open file cannot be removed it stays; it locks nobody out."""
    for path in paths:
        with suppress(OSError):
            path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
