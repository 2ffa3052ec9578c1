"""`--overwrite`: a new result in place of an earlier one, which stays until the new one is whole.

Only what v4quant made is replaced: every file in the folder must be one that a manifest there lists
with its size, that the journal of an unfinished conversion lists, or that belongs to a solution.
Anything else, and anything that is being read or written, is refused before work begins. The new
result is made in a folder beside (`OUT.v4quant-new`, which the same command goes on in after a
kill, also where there is nothing yet to replace); then two renames exchange them, and of the old
folder the listed files are removed. (`v4quant.existing` is about single files.)
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from v4quant.conversion.journal import journal_files, refuse_writers
from v4quant.own_folders import FOLDER, RECORD_NAME, is_own_folder
from v4quant_calibration.solve.solution import SOLUTION_NAME, is_own_solution, is_solution_file
from v4quant_formats.checkpoint import INDEX_NAME
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.folder_lock import LOCK_NAME, lock_beside
from v4quant_formats.manifest import MANIFEST_NAME, ONNX_MANIFEST, read_manifest
from v4quant_formats.shards import all_leftovers, output_error, write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_formats.system import real_path, sync_folder

_NEW, _OLD = ".v4quant-new", ".v4quant-old"
_LISTS = (MANIFEST_NAME, ONNX_MANIFEST)
_LAST = (*_LISTS, SOLUTION_NAME)
_MAX_JOURNAL = 2**30
_REQUEST = "request"
_WORK = re.compile(
    rf"({LOCK_NAME}(-\d+)?(\.holder)?|journal-\d+\.jsonl|{RECORD_NAME}|{_REQUEST})"
    r"(\.[0-9a-f]{8}\.part)?"
)
_SMALL = 2**26


@contextmanager
def replacing(
    out: Path,
    wanted: bool,
    reads: Iterable[Path | None] = (),
    first: bool = True,
    request: object = None,
) -> Iterator[Path]:
    """Where to make what is to lie in `out`: there, or beside it until it is whole.

    wanted: whether an earlier result may be replaced. reads: files and folders that the work reads.
    first: whether this is the process that exchanges the folders. request: whose repr says what is
    made, so that what another request left unfinished is not gone on with. Raises OutputError where
    `out` holds what v4quant did not make, is read, or is being written.
    """
    if not wanted:
        yield out
        return
    if first:
        tidy(out)
        refuse_others(out, reads)
        _begin(new_place(out), hashlib.sha256(repr(request).encode()).hexdigest())
    yield new_place(out)
    if first and _is_made(new_place(out)):
        exchange(out)
    elif first:  # what lies in `out` is what was asked for
        clear(new_place(out))


def new_place(out: Path) -> Path:
    """The folder in which a new result for `out` is made."""
    return out.with_name(out.name + _NEW)


def tidy(out: Path) -> None:
    """Finish what a process that was killed while it exchanged folders had begun.

    Raises OutputError for anything else where the old result goes meanwhile.
    """
    new, old = new_place(out), out.with_name(out.name + _OLD)
    if old.is_dir() and new.is_dir() and not out.exists():
        _rename(old, out)  # killed between the two renames
    if old.is_dir() and out.exists():
        _remove(old, what_we_made(old))  # killed behind them
    if old.is_symlink() or old.exists():
        raise OutputError(f"{old}: is where the old result goes meanwhile; move it away")


def refuse_others(out: Path, reads: Iterable[Path | None] = ()) -> None:
    """Raise OutputError unless `out` is free, or holds only what v4quant made and nobody uses."""
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder; --overwrite replaces folders here")
    if real_path(out) in (here := real_path(Path.cwd()), *here.parents):
        raise OutputError(f"{out}: --overwrite does not replace the folder you are in; leave it")
    if os.path.ismount(out):
        raise OutputError(
            f"{out}: is where a file system is mounted, so no other folder can take its place; "
            "choose a folder in it"
        )
    for path in reads:
        if path is not None and path.exists() and real_path(path).is_relative_to(real_path(out)):
            raise OutputError(f"{out}: holds {path}, which is read; choose another folder")
    what_we_made(out)
    refuse_writers(out, lock_beside(out))  # of a calibration


def exchange(out: Path) -> None:
    """Put the new result, which is whole, in the place of `out`, and remove that."""
    # A way there that leads through the folder itself ends when that gives up its name.
    out = Path(os.path.realpath(out.parent), out.name)
    new, old = new_place(out), out.with_name(out.name + _OLD)
    _forget_request(new)
    if not out.exists() and not out.is_symlink():
        _rename(new, out)
        return
    refuse_writers(out)
    made = what_we_made(out)  # as it is now
    _rename(out, old)
    _rename(new, out)
    _remove(old, made)


def clear(folder: Path) -> None:
    """Remove what v4quant made in a folder. Raises OutputError if it holds anything else."""
    if folder.is_dir():
        _remove(folder, what_we_made(folder))


def _is_made(new: Path) -> bool:
    return new.is_dir() and any(path.name != FOLDER for path in new.iterdir())


def _begin(new: Path, request: str) -> None:
    """Go on in a folder that was begun for the same request; what another one left is removed."""
    file = new / FOLDER / _REQUEST
    if new.is_dir() and any(new.iterdir()):
        if file.is_file() and read_small(file, _MAX_JOURNAL) == request.encode():
            return
        clear(new)
    write_file_atomically(file, request.encode())


def _forget_request(new: Path) -> None:
    with suppress(OSError):
        (new / FOLDER / _REQUEST).unlink(missing_ok=True)
        (new / FOLDER).rmdir()


def what_we_made(out: Path) -> list[str]:
    """The names of all files of an earlier result. Raises OutputError for any other file there."""
    if out.is_symlink():
        raise OutputError(f"{out}: is a symbolic link; --overwrite replaces folders only")
    if not out.is_dir():
        raise OutputError(f"{out}: is not a folder; --overwrite replaces folders here")
    listed, made = _listed(out), list[str]()
    solved = is_own_solution(out)
    torn = set(all_leftovers(out)) if solved or journal_files(out) else set()
    for path in sorted(p for p in out.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(out).as_posix()
        ours = _is_work(out, name) or (solved and is_solution_file(name)) or path in torn
        if path.is_symlink() or not (ours or (name in listed and _is_as_made(path, listed[name]))):
            raise OutputError(
                f"{out}: --overwrite replaces only what v4quant made, and '{name}' is not that or "
                "was changed since; move it away or choose another folder"
            )
        made.append(name)
    return made


def _is_work(out: Path, name: str) -> bool:
    """Whether a file is what unfinished work keeps in a folder."""
    inside = PurePosixPath(name).parts
    if inside[0] != FOLDER:
        return False
    return is_own_folder(out, inside[1]) if len(inside) > 2 else bool(_WORK.fullmatch(inside[1]))


def _is_as_made(path: Path, told: tuple[int, str] | None) -> bool:
    """Whether a file still has the bytes, and if it is small the digest, that a manifest told.

    None: anything will do. A shard of another digest is told by `verify`; to read a whole model
    before it is replaced would take as long as to make it.
    """
    if told is None:
        return True
    size, digest = told
    return path.stat().st_size == size and (size > _SMALL or hash_file(path) == digest)


def _listed(out: Path) -> dict[str, tuple[int, str] | None]:
    """Files by name with their bytes and digest, None where all are right."""
    found: dict[str, tuple[int, str] | None] = {}
    if journals := journal_files(out):
        for journal in journals:
            for line in read_small(journal, _MAX_JOURNAL).split(b"\n"):
                with suppress(ValueError, KeyError, TypeError, RecursionError):
                    found[str(json.loads(line)["file"]["name"])] = None
        # Written after the last shard, before the journal goes.
        found |= dict.fromkeys(("config.json", MANIFEST_NAME, INDEX_NAME))
    for name in _LISTS:
        if (out / name).is_file():
            with suppress(FormatError):
                files = read_manifest(out, name)["files"]
                found |= {file["name"]: (file["bytes"], file["sha256"]) for file in files}
                found[name] = None
    return found


def _rename(path: Path, name: Path) -> None:
    try:
        path.rename(name)
        sync_folder(name.parent)
    except OSError as error:
        raise output_error(name, error) from None


def _remove(old: Path, made: Iterable[str]) -> None:
    """Remove the files that v4quant made and the folders that are empty then, and nothing else.

    What lists the files goes last: after a kill in between they are still known to be ours, and so
    are those that could not be removed.
    """
    stays = False
    for name in sorted(made, key=lambda name: (name in _LAST, name.startswith(f"{FOLDER}/"))):
        if stays and (name in _LAST or name.startswith(f"{FOLDER}/")):
            break
        try:
            (old / name).unlink(missing_ok=True)
        except OSError:
            stays = True
    for folder in sorted((p for p in old.rglob("*") if p.is_dir()), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        old.rmdir()
