"""Small files past the page cache, as large ones on a fast disk are written and read."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from v4quant_formats import block_reader, block_writer, disk_speed, file_hash
from v4quant_formats.system import open_uncached


def pass_page_cache_by(
    monkeypatch: pytest.MonkeyPatch, folder: Path, block: int = 4 * block_reader.PAGE
) -> None:
    """Whatever is written from now on goes in blocks of this size; skips where none can."""
    path = folder / "probe"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    other = open_uncached(handle)
    os.close(handle)
    path.unlink()
    if other is None:
        pytest.skip("this file system knows the page cache only")
    os.close(other)
    monkeypatch.setattr(block_writer, "BLOCK", block)
    monkeypatch.setattr(file_hash, "BLOCK", block)
    monkeypatch.setattr(block_reader, "_LARGE", 2 * block_reader.PAGE)
    monkeypatch.setattr(disk_speed, "SMALL", 0)
    monkeypatch.setattr(disk_speed, "reads_back_fast", lambda folder: True)
