"""Where a script's files lie."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def work_folder(kept: Path | None, *parts: str) -> Iterator[Path]:
    """A folder that is kept, `parts` below it, or without one a temporary folder."""
    if kept is None:
        with tempfile.TemporaryDirectory() as work:
            yield Path(work)
    else:
        folder = kept.joinpath(*parts)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
