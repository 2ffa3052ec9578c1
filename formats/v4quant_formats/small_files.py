"""Small files that a user names: read whole, but never from a device, and never without end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from v4quant_formats.errors import FormatError
from v4quant_formats.system import open_at_once


class UnreadableFile(FormatError):
    """A file that is not a regular one, is larger than its kind can be, or cannot be read."""


def read_small(path: Path, limit: int) -> bytes:
    """The bytes of a regular file that has at most `limit`. Raises UnreadableFile.

    Devices, pipes and folders are refused without waiting for them, and a file that grows while it
    is read is read to the limit and refused.
    """
    data = read_begin(path, limit + 1)
    if len(data) > limit:
        raise UnreadableFile(f"{path}: has more than {limit:,} bytes; no such file needs that")
    return data


def read_begin(path: Path, count: int) -> bytes:
    """At most `count` bytes of a regular file. Raises UnreadableFile, as above."""
    try:
        handle = open_at_once(path)
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UnreadableFile(f"{path}: is not a regular file; copy it to one and name that")
            return file.read(count)
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror or error})") from None
    except ValueError:
        raise UnreadableFile(f"{str(path)!r}: is not a file name") from None
