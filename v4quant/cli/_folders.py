"""Folders that vanish under a command: named, with what to do, instead of a bare errno.

A command whose working folder was deleted must not even begin: libraries that load their parts
later would end the process in their own ways.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from v4quant_kernels.errors import V4QuantError

_GONE = "the folder that this command runs in has been deleted; change into one that exists, then"


class WorkingFolderGone(V4QuantError):
    """The working folder was deleted."""


def require_working_folder() -> None:
    """Raise WorkingFolderGone where relative names mean nothing."""
    try:
        Path.cwd()
    except OSError:
        raise WorkingFolderGone(f"{_GONE} run it again") from None


def explained(error: OSError) -> str:
    """What the system could not do, and what helps where something vanished."""
    text = str(error)
    if error.errno not in (errno.ENOENT, errno.ESTALE):
        return text
    try:
        Path.cwd()
    except OSError:
        return f"{_GONE} run it again ({text})"
    named = error.filename2 or error.filename
    if not isinstance(named, str | os.PathLike):
        return f"{text}; something was deleted or moved while the command ran: run it again"
    gone = Path(named)
    while not gone.parent.is_dir():
        gone = gone.parent
    return f"{gone}: was deleted or moved while the command ran; run the same command again"
