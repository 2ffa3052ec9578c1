"""Where v4quant keeps what it may find again on this machine: below the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/v4quant`, by default `~/.cache/v4quant`; it need not exist.

    Everything in it can be found anew: deleting the folder costs time and nothing else.
    """
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "v4quant"
