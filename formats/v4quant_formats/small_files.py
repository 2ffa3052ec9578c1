"""Small files that a user names: read whole, but never from a device, and never without end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from v4quant_formats.errors import FormatError
from v4quant_formats.system import open_regular


class UnreadableFile(FormatError):
    """A file that is not a regular one, is larger than its kind can be, or cannot be read."""


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that has at most `limit`. Raises UnreadableFile.

    Devices, pipes and folders are refused without waiting for them, and a file that grows while it
    is read is read to the limit and refused.
    """
    with _opened(path) as file:
        if os.fstat(file.fileno()).st_size <= limit:
            data = _read(path, file, limit + 1)
            if len(data) <= limit:
                return data
    raise UnreadableFile(f"{path}: has more than {limit:,} bytes; no such file needs that")


def read_begin(path: Path, count: int) -> bytes:
    """At most `count` bytes of a regular file. Raises UnreadableFile."""
    with _opened(path) as file:
        return _read(path, file, count)


@contextmanager
def _opened(path: Path) -> Iterator[BufferedReader]:
    try:
        with open_regular(path) as file:
            yield file
    except OSError as error:
        if error.errno == errno.EINVAL:
            why = "is not a regular file; copy it to one and name that"
        else:
            why = f"cannot be read ({error.strerror or error})"
        raise UnreadableFile(f"{path}: {why}") from None
    except ValueError:
        raise UnreadableFile(f"{str(path)!r}: is not a file name") from None


def _read(path: Path, file: BufferedReader, count: int) -> bytes:
    data: bytes | None = file.read(count)
    if data is None:  # a file of the system that waits for something
        raise UnreadableFile(f"{path}: has nothing to read; copy it to a file and name that")
    return data
