"""Where v4quant keeps what it may find again on this machine: below the user's cache folder."""

from __future__ import annotations

import os
from pathlib import Path


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
