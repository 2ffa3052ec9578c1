"""Which files pass the page cache by: large ones, on a disk that gives them back fast."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from v4quant_formats import disk_speed
from v4quant_formats.disk_speed import FAST, SLOW, SMALL, open_past_cache, reads_back_fast
from v4quant_formats.system import open_uncached


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_speed, "_answers", {})


@pytest.mark.parametrize(
    ("speeds", "pays"),
    [((2 * FAST, 2 * FAST), True), ((2 * FAST, FAST / 2), False), ((0.0, 0.0), False)],
)
def test_a_slow_disk_keeps_the_page_cache(
    speeds: tuple[float, float], pays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    monkeypatch.setattr(disk_speed, "_speeds", lambda folder: asked.append(folder) or speeds)
    path = tmp_path / "f"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    probe = open_uncached(handle)
    for size in (SMALL - 1, SMALL, 9 * SMALL):
        direct = open_past_cache(handle, tmp_path, size)
        assert (direct is not None) == (pays and probe is not None and size >= SMALL)
        if direct is not None:
            os.close(direct)
    assert asked == [tmp_path], "once a disk, and not for a small file"
    if probe is not None:
        os.close(probe)
    os.close(handle)


def test_the_disk_itself_is_asked(tmp_path: Path) -> None:
    handle = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    known = open_uncached(handle)
    os.close(handle)
    speeds = disk_speed._speeds(tmp_path)
    if known is None:
        assert speeds == (0.0, 0.0)
    else:
        os.close(known)
        assert min(speeds) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["f"], "it leaves nothing"


def test_a_folder_that_is_gone_is_no_fast_disk(tmp_path: Path) -> None:
    assert not reads_back_fast(tmp_path / "absent")


def test_a_disk_that_turns_out_slow_keeps_the_page_cache_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_speed, "_speeds", lambda folder: (2 * FAST, 2 * FAST))
    assert reads_back_fast(tmp_path)
    disk_speed.took(tmp_path, 2**28, 2**28 / SLOW * 0.9)
    disk_speed.took(tmp_path, 2**20, 60.0)  # too little to judge by
    assert reads_back_fast(tmp_path)
    disk_speed.took(tmp_path, 2**28, 2**28 / SLOW * 1.1)
    assert not reads_back_fast(tmp_path)
