"""One process at a time in a folder: a lock file in it, held as long as the work goes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from v4quant_formats.errors import OutputError
from v4quant_formats.shards import output_error
from v4quant_formats.system import LockHeld, hold_lock

LOCK_NAME = "lock"


@contextmanager
def locked_folder(folder: Path, taken: str, name: str = LOCK_NAME) -> Iterator[None]:
    """Make the folder if need be and hold its lock.

    taken: what to tell the user when another process has it. Raises OutputError.
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
        yield
