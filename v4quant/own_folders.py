"""Own folders: what a command makes for itself beside its results, and may remove afterwards.

A folder is removed only when two records agree that v4quant made it: a file in `.v4quant` of the
folder with the results names it with a random token, and the folder itself holds that token. A
folder that a user put at the same place, or a copy of one of ours, has no token or another one, and
is left alone. Removing never follows symbolic links.
"""

from __future__ import annotations

import json
import secrets
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath

from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.shards import output_error, remove_leftovers, write_file_atomically
from v4quant_formats.small_files import read_small

FOLDER = ".v4quant"
RECORD_NAME = "made.json"
_HOME = "."  # the record's entry for the folder that `.v4quant` lies in
_TOKEN_NAME = ".made-by-v4quant"
_MAX_BYTES = 2**16


class SameFolder:
    """A folder that work goes on in for hours: when another one, or a link to one, has taken its
    place, nothing more is written there."""

    def __init__(self, path: Path) -> None:
        """Looks at nothing yet."""
        self._path = path
        self._known: tuple[int, int] | None = None

    def require(self) -> None:
        """Make the folder at the first call, if need be; later ones find that very folder.

        Raises OutputError.
        """
        try:
            if self._known is None:
                self._path.mkdir(parents=True, exist_ok=True)
            found = self._path.stat()
        except OSError as error:
            raise output_error(self._path, error) from None
        self._known = self._known or (found.st_dev, found.st_ino)
        if self._known != (found.st_dev, found.st_ino):
            raise OutputError(
                f"{self._path}: another folder has taken its place while the command ran; nothing "
                "more was written there; put it back, or choose another, and run the command again"
            )


def refuse_links(folder: Path, name: str) -> None:
    """Raise OutputError when a file's way from `folder` on leads through a symbolic link.

    name: relative, with /. Such folders are ours, and no command makes links in them.
    """
    for above in PurePosixPath(name).parents:
        if above.name and (folder / above).is_symlink():
            raise OutputError(
                f"{folder / above}: is a symbolic link; nothing was written through it; remove it "
                "and run the same command again"
            )


def make_home(home: Path) -> None:
    """Make a folder for results, and record that it was not there before. Raises OutputError."""
    try:
        home.mkdir(parents=True)
    except OSError as error:
        raise OutputError(f"{home}: cannot be created ({error.strerror})") from None
    _write_record(home, {**_record(home), _HOME: secrets.token_hex(16)})


def is_made_home(home: Path) -> bool:
    """Whether the record says that `make_home` made this folder."""
    return _HOME in _record(home)


def own_folder(home: Path, name: str) -> Path:
    """Make the folder `.v4quant/<name>` in `home`, or find the one that an earlier run made.

    Raises OutputError when there is one that v4quant did not make, or when it cannot be made.
    """
    path = home / FOLDER / name
    if is_own_folder(home, name):
        return path
    try:
        recorded = _record(home)
        killed_before = name in recorded and _is_empty(path)  # between the steps below
        recorded[name] = secrets.token_hex(16)
        _write_record(home, recorded)
        path.mkdir(exist_ok=killed_before)
        write_file_atomically(path / _TOKEN_NAME, recorded[name].encode())
    except FileExistsError:
        raise OutputError(
            f"{path}: exists, and v4quant did not make it; move it away or choose another folder"
        ) from None
    except OSError as error:
        raise output_error(path, error) from None
    return path


def is_own_folder(home: Path, name: str) -> bool:
    """Whether `.v4quant/<name>` is a folder that `own_folder` made there."""
    token = _record(home).get(name)
    path = home / FOLDER / name
    if token is None or path.is_symlink():
        return False
    try:
        return read_small(path / _TOKEN_NAME, _MAX_BYTES) == token.encode(errors="replace")
    except FormatError:
        return False


def remove_own_folder(home: Path, name: str) -> None:
    """Remove `.v4quant/<name>` if `own_folder` made it, and `.v4quant` if nothing else is in it."""
    inside = home / FOLDER
    if inside.is_symlink():
        return
    if is_own_folder(home, name):
        shutil.rmtree(inside / name, ignore_errors=True)
    recorded = _record(home)
    if name in recorded and not (inside / name).exists():
        del recorded[name]
        _write_record(home, recorded)
    if not recorded:
        forget_home(home)


def forget_home(home: Path) -> None:
    """Remove the record, and `.v4quant` if nothing else is in it: nothing is left to remove."""
    inside = home / FOLDER
    if not inside.is_symlink():
        with suppress(OSError):  # somebody's folder of that name
            remove_leftovers(inside, [RECORD_NAME])  # of a process killed while it wrote it
            (inside / RECORD_NAME).unlink()
        remove_if_empty(inside)


def remove_if_empty(folder: Path) -> None:
    """Remove a folder in which nothing is left."""
    try:
        folder.rmdir()
    except OSError:
        return


def _record(home: Path) -> dict[str, str]:
    """Name -> token of the folders made in `home`; nothing when the record cannot be read."""
    try:
        found = json.loads(read_small(home / FOLDER / RECORD_NAME, _MAX_BYTES))
    except (FormatError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {k: v for k, v in found.items() if isinstance(v, str)}


def _write_record(home: Path, recorded: dict[str, str]) -> None:
    inside = home / FOLDER
    if inside.is_symlink():
        raise OutputError(f"{inside}: is a symbolic link; remove it or choose another folder")
    write_file_atomically(inside / RECORD_NAME, json.dumps(recorded).encode() + b"\n")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())
