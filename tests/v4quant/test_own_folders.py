"""What v4quant removes is what it made, whoever put what at the same place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from v4quant.own_folders import (
    FOLDER,
    RECORD_NAME,
    forget_home,
    is_made_home,
    is_own_folder,
    make_home,
    own_folder,
    remove_own_folder,
)
from v4quant_formats.errors import OutputError

NAME = "source"


def test_made_found_again_and_removed(tmp_path: Path) -> None:
    path = own_folder(tmp_path, NAME)
    (path / "shards").mkdir()
    (path / "shards" / "a").write_bytes(b"1")
    assert own_folder(tmp_path, NAME) == path and (path / "shards" / "a").exists()
    other = own_folder(tmp_path, "candidate")
    remove_own_folder(tmp_path, NAME)
    assert not path.exists() and other.exists()
    remove_own_folder(tmp_path, "candidate")
    assert not list(tmp_path.iterdir())


def _users(home: Path) -> None:
    """A folder that a user put there."""
    (home / FOLDER / NAME).mkdir(parents=True)


def _users_beside_ours(home: Path) -> None:
    """A user's folder where the record says that another of ours was made."""
    own_folder(home, "candidate")
    (home / FOLDER / NAME).mkdir()


def _replaced(home: Path) -> None:
    """Ours was moved away, another came into its place."""
    own_folder(home, NAME).rename(home / "moved")
    (home / FOLDER / NAME).mkdir()


def _foreign_token(home: Path) -> None:
    """A folder that v4quant made for other results."""
    own_folder(home, NAME)
    made = own_folder(home / "elsewhere", NAME)
    shutil.rmtree(home / FOLDER / NAME)
    shutil.move(made, home / FOLDER / NAME)


def _link(home: Path) -> None:
    """A link to a folder that even holds the right token."""
    path = own_folder(home, NAME)
    path.rename(home / "moved")
    path.symlink_to(home / "moved")


@pytest.mark.parametrize("make", [_users, _users_beside_ours, _replaced, _foreign_token, _link])
def test_what_others_put_there_stays(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path)
    path = tmp_path / FOLDER / NAME
    (path / "model.safetensors").write_bytes(b"precious")
    assert not is_own_folder(tmp_path, NAME)
    remove_own_folder(tmp_path, NAME)
    assert (path / "model.safetensors").read_bytes() == b"precious"
    with pytest.raises(OutputError, match="v4quant did not make it"):
        own_folder(tmp_path, NAME)
    assert [p.name for p in path.iterdir()].count("model.safetensors") == 1


def test_a_linked_work_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users").mkdir()
    (tmp_path / FOLDER).symlink_to(tmp_path / "users")
    with pytest.raises(OutputError, match="symbolic link"):
        own_folder(tmp_path, NAME)
    remove_own_folder(tmp_path, NAME)
    assert (tmp_path / FOLDER).is_symlink() and not list((tmp_path / "users").iterdir())


def test_killed_between_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = own_folder(tmp_path, NAME)
    for left in path.iterdir():
        left.unlink()  # the folder is made, its token not yet written
    assert own_folder(tmp_path, NAME) == path and is_own_folder(tmp_path, NAME)
    shutil.rmtree(path)  # recorded, not yet made
    assert own_folder(tmp_path, NAME) == path and is_own_folder(tmp_path, NAME)


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"source": 1}', b"[" * 100_000, b"\xff"])
def test_a_damaged_record_owns_nothing(content: bytes, tmp_path: Path) -> None:
    path = own_folder(tmp_path, NAME)
    (tmp_path / FOLDER / RECORD_NAME).write_bytes(content)
    remove_own_folder(tmp_path, NAME)
    assert path.exists()


def test_homes_are_remembered(tmp_path: Path) -> None:
    make_home(tmp_path / "new")
    assert is_made_home(tmp_path / "new")
    own_folder(tmp_path, NAME)
    assert not is_made_home(tmp_path)


def test_a_record_half_written_by_a_killed_process_goes_too(tmp_path: Path) -> None:
    inside = tmp_path / ".v4quant"
    inside.mkdir()
    (inside / "made.json").write_text("{}")
    (inside / "made.json.eec2c8a6.part").write_bytes(b"")
    forget_home(tmp_path)
    assert not inside.exists()
