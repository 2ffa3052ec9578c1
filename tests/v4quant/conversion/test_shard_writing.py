"""Several shards are hashed at once, and the bytes and digests stay what they are."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes
from v4quant.conversion.board import RankLost
from v4quant.conversion.job import run_job
from v4quant.conversion.plan import make_plan
from v4quant.conversion.ranks import Ranks
from v4quant.recipe import Recipe
from v4quant_formats import file_hash
from v4quant_formats.opening import open_checkpoint
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


class _Gone:
    """A board on which another rank is lost while this one converts, and waits for nobody."""

    def __init__(self) -> None:
        self.looks = 0

    def meet(self, check: Callable[[], None]) -> None:
        """All are there."""

    def check(self) -> None:
        self.looks += 1
        if self.looks > 20:
            raise RankLost("process 1 of this run gave no sign")


def test_who_converts_notices_that_another_rank_is_lost(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ranks = Ranks(board=_Gone())  # type: ignore[arg-type]
    with open_checkpoint(model_folder) as checkpoint, pytest.raises(RankLost):
        run_job(make_plan(checkpoint, Recipe("int4-g64")), out, workers=1, ranks=ranks)
    assert not list(out.glob("*.part"))
    convert(model_folder, out, "int4-g64")
    convert(model_folder, tmp_path / "expected", "int4-g64")
    assert folder_bytes(out) == folder_bytes(tmp_path / "expected")
