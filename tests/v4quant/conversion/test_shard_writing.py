"""Several shards are hashed at once, and the bytes and digests stay what they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support.conversion import convert, folder_bytes
from v4quant_formats import file_hash


def test_slow_hashes_run_side_by_side(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a hash that takes longer than all conversions, three shards are hashed at a time."""
    convert(model_folder, tmp_path / "expected", "int4-g64")
    busy: set[int] = set()
    most: list[int] = []
    changed = threading.Condition()
    real = file_hash._hash_range

    def slow(sha: object, handle: int, *rest: object) -> None:
        with changed:
            busy.add(handle)
            most.append(len(busy))
            changed.notify_all()
            # Nobody ends alone: the hash of a shard waits for others to come, or a while.
            changed.wait_for(lambda: max(most) >= 3, 2.0)
        real(sha, handle, *rest)  # type: ignore[arg-type]
        with changed:
            busy.discard(handle)

    monkeypatch.setattr(file_hash, "_hash_range", slow)
    convert(model_folder, tmp_path / "out", "int4-g64")
    assert max(most) >= 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "expected")
