"""Temporary folders: what killed processes left goes, and nothing else."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from v4quant.temporary_folders import TemporaryFolder, remove_abandoned

KILLED = """
import os, pathlib, signal, sys
from v4quant.temporary_folders import TemporaryFolder
folder = TemporaryFolder(*map(pathlib.Path, sys.argv[1:]))
(folder.path / "shards").mkdir()
(folder.path / "shards" / "a.safetensors").write_bytes(b"1")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("named", [False, True])
def test_what_a_killed_process_left_goes(named: bool, place: Path) -> None:
    inside = place
    if named:
        (inside := place / "large-disk").mkdir()
    given = [inside] if named else []
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, given)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = inside.iterdir()
    assert (left / "shards" / "a.safetensors").exists()
    with TemporaryFolder(*given) as mine:
        assert [p.name for p in inside.iterdir()] == [mine.name]
    assert not list(inside.iterdir())


def test_a_folder_given_by_a_relative_name_goes_from_anywhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a folder of that name elsewhere does not."""
    for name in ("a/work", "b/work"):
        (place / name).mkdir(parents=True)
    monkeypatch.chdir(place / "a")
    made = TemporaryFolder(Path("work"))
    assert made.path.is_absolute()
    other = place / "b" / "work" / made.path.name
    other.mkdir()
    monkeypatch.chdir(place / "b")
    made.remove()
    assert not list((place / "a" / "work").iterdir()) and other.is_dir()


def test_folders_in_use_and_those_of_others_stay(place: Path, tmp_path: Path) -> None:
    with TemporaryFolder() as mine:
        (mine / "a").write_bytes(b"1")
        shutil.copytree(mine, place / "v4quant-copy")
        (place / "v4quant-of-a-user").mkdir()
        (place / "v4quant-file").write_bytes(b"")
        (place / "v4quant-link").symlink_to(mine)
        (place / "v4quant-odd").mkdir()
        (place / "v4quant-odd" / ".made-by-v4quant").mkdir()
        before = sorted(p.name for p in place.iterdir())
        remove_abandoned(place)
        assert sorted(p.name for p in place.iterdir()) == before
        assert (mine / "a").exists()


def test_links_inside_are_not_followed(
    place: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    precious = tmp_path_factory.mktemp("precious")
    (precious / "thesis.tex").write_text("x")
    with TemporaryFolder() as mine:
        (mine / "link").symlink_to(precious)
    assert (precious / "thesis.tex").exists() and not mine.exists()
