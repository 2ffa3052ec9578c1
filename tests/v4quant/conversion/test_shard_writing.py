"""Several shards are hashed at once, and the bytes and digests stay what they are."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes
from v4quant_formats import file_hash
from v4quant_formats.shard_files import LocalShards


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


@pytest.mark.parametrize("scheme", ["nvfp4", "q4_k"])
def test_what_is_spent_was_read_before_and_is_not_read_again(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor that is converted is given up once, by its last reader."""
    seen: list[tuple[str, int, int]] = []
    spent: list[tuple[str, int, int]] = []
    read = LocalShards.read_into

    def reading(self: LocalShards, file: str, view: memoryview, offset: int, what: str) -> None:
        seen.append((file, offset, offset + len(view)))
        early = [s for s in spent if s[0] == file and s[1] < offset + len(view) and offset < s[2]]
        assert not early or what.endswith("norm.weight"), (what, early)
        read(self, file, view, offset, what)

    monkeypatch.setattr(LocalShards, "read_into", reading)
    monkeypatch.setattr(
        LocalShards, "spent", lambda self, file, at, count: spent.append((file, at, at + count))
    )
    convert(TINY, tmp_path / "out", scheme)
    assert len(set(spent)) == len(spent) > 100
    assert {file for file, _, _ in spent} == {p.name for p in TINY.glob("*.safetensors")}
    assert {s[:2] for s in spent} <= {r[:2] for r in seen}
