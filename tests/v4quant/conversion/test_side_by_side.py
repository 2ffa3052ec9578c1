"""Conversions side by side read the source once: the page cache serves all but the first."""

from __future__ import annotations

import random
import shutil
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.conversion import TINY, convert, folder_bytes, recipe_of
from v4quant.conversion.job import Request, run_jobs
from v4quant.conversion.plan import make_plan
from v4quant_formats.errors import OutputError
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.shard_files import LocalShards
from v4quant_formats.shards import ShardWriter, WrittenFile

CASES = ("int4-g128", "q4_k", "nvfp4")
_PAGE = 4096


class PageCache:
    """Counts what a disk would read if memory held `size` bytes of it."""

    def __init__(self, size: int) -> None:
        self._pages: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._room, self._lock = size // _PAGE, threading.Lock()
        self.from_disk = 0

    def read(self, file: str, start: int, stop: int) -> None:
        with self._lock:
            for page in ((file, n) for n in range(start // _PAGE, -(-stop // _PAGE))):
                if page not in self._pages:
                    self.from_disk += _PAGE
                self._pages[page] = None
                self._pages.move_to_end(page)
                while len(self._pages) > self._room:
                    self._pages.popitem(last=False)


@pytest.fixture
def released(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a shard for each layer, as releases have it, and without tokenizer."""
    without = shutil.ignore_patterns("tokenizer*")
    return shutil.copytree(model_folder, tmp_path / "released", ignore=without)


def convert_together(source: Path, out: Path, cases: Sequence[str], workers: int = 2) -> None:
    with open_checkpoint(source) as checkpoint:
        plans = [make_plan(checkpoint, recipe_of(case)) for case in cases]
        run_jobs([Request(p, out / c) for p, c in zip(plans, cases, strict=True)], workers)


def test_a_page_cache_of_two_shards_serves_all_but_the_first(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard holds a layer, as released. GGUF begins with the head, which others have last, and
    its file of draft stages repeats embedding and head; everything else comes once."""
    sizes = [path.stat().st_size for path in released.glob("*.safetensors")]
    with open_checkpoint(released) as checkpoint:
        repeated = sum(checkpoint.spec(f"{name}.weight").nbytes for name in ("embed", "head"))
    caches: list[PageCache] = []
    read = LocalShards.read_into

    def reading(self: LocalShards, file: str, view: memoryview, offset: int, what: str) -> None:
        caches[-1].read(file, offset, offset + len(view))
        read(self, file, view, offset, what)

    monkeypatch.setattr(LocalShards, "read_into", reading)
    caches.append(PageCache(2 * max(sizes)))
    for case in CASES:
        convert(released, tmp_path / "alone" / case, case)
    caches.append(PageCache(2 * max(sizes)))
    convert_together(released, tmp_path / "together", CASES)
    alone, together = (cache.from_disk for cache in caches)
    assert alone > 2.9 * sum(sizes)
    assert together < 1.05 * sum(sizes) + 2 * repeated
    assert folder_bytes(tmp_path / "together") == folder_bytes(tmp_path / "alone")


def test_one_that_fails_leaves_what_the_others_finished(
    released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folders hold no torn file, and the same call ends in the same bytes."""
    close, closed, stop = ShardWriter.close, list[Path](), 0

    def fail(self: ShardWriter) -> WrittenFile:
        closed.append(self.path)
        if len(closed) == stop:
            raise OutputError(f"{self.path}: cannot be written: the disk is full")
        return close(self)

    monkeypatch.setattr(ShardWriter, "close", fail)
    convert_together(released, tmp_path / "whole", CASES)
    stop = random.randint(1, len(closed))
    print("the shard that fails", stop, "of", len(closed))
    closed.clear()
    with pytest.raises(OutputError, match="the disk is full"):
        convert_together(released, tmp_path / "again", CASES)
    assert not list((tmp_path / "again").rglob("*.part"))
    monkeypatch.setattr(ShardWriter, "close", close)
    convert_together(released, tmp_path / "again", CASES)
    assert folder_bytes(tmp_path / "again") == folder_bytes(tmp_path / "whole")


def test_the_disk_must_hold_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone would fit."""
    with open_checkpoint(TINY) as checkpoint:
        plans = [make_plan(checkpoint, recipe_of(case)) for case in CASES]
    free = sum(plan.bytes_out for plan in plans) - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(free, 0, free))
    with pytest.raises(OutputError, match="are free on this disk"):
        convert_together(TINY, tmp_path, CASES)
