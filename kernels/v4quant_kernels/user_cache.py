"""Where v4quant keeps what it may find again on this machine: below the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path

_DIGITS = 32  # of a digest, in a name


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/v4quant`, by default `~/.cache/v4quant`; it need not exist.

    Everything in it can be found anew: deleting the folder costs time and nothing else.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    if home:
        return Path(home) / "v4quant"
    try:
        return Path.home() / ".cache" / "v4quant"
    except RuntimeError:  # an unknown user: nothing can be kept, as in a folder that is read-only
        return Path(os.devnull) / "v4quant"


def record_name(prefix: str, digest: str) -> str:
    """What a record of something is called in the cache, by the digest of what decides it."""
    return f"{prefix}{digest[:_DIGITS]}.json"


def keep_newest(folder: Path, prefix: str, count: int) -> None:
    """Remove all but the newest records of a prefix; other names are somebody else's.

    Raises OSError.
    """
    named = folder.glob(f"{prefix}{'[0-9a-f]' * _DIGITS}.json")
    records = [file for file in named if file.is_file()]
    for old in sorted(records, key=lambda file: file.stat().st_mtime)[:-count]:
        old.unlink()
