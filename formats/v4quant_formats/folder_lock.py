"""One process at a time in a folder: a lock file in it, held as long as the work goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from v4quant_formats.errors import OutputError
from v4quant_formats.shards import output_error
from v4quant_formats.system import LockHeld, hold_lock

LOCK_NAME = "lock"


@contextmanager
def locked_folder(
    folder: Path, taken: str, name: str = LOCK_NAME, stays: bool = True
) -> Iterator[None]:
    """Make the folder if need be and hold its lock.

    taken: what to tell the user when another process has it. stays: whether the lock's file is left
    behind. Raises OutputError.
    """
    lock = folder / name
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(lock))
        except OSError as error:
            raise output_error(lock, error) from None
        except LockHeld:
            raise OutputError(taken) from None
        try:
            yield
        finally:
            if not stays:
                # Where an open file cannot be removed it stays; it locks nobody out.
                with suppress(PermissionError):
                    lock.unlink(missing_ok=True)
