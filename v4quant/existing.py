"""Files that a command writes by the name a user gave: new ones, or earlier ones of ours replaced.

A file that is there already is refused before any work begins. With `--overwrite` it is replaced,
in one step and when the new one is whole, but only if v4quant wrote it: it has the form of what the
command writes, and where it is text, a last line with the digest of all above it, so that a file
that somebody changed is nobody's to replace.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.gguf.imatrix import is_own_imatrix
from v4quant_formats.safetensors_header import read_header
from v4quant_formats.shards import leftovers, output_error, write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_formats.system import sync_folder, take_place

_MAX_TEXT = 2**27
_COMMENTS = {".html": ("<!-- ", " -->"), ".md": ("<!-- ", " -->"), ".toml": ("# ", "")}
_LAST = re.compile(rb"\n(?:<!-- |# )written by v4quant: sha256 ([0-9a-f]{64})(?: -->)?\n\Z")
_LOGITS = {"input_ids", "v4quant"}


@dataclass(frozen=True)
class NewFile:
    """A file to be written. what: it holds, for messages. is_ours: whether v4quant wrote the one
    that is there."""

    path: Path
    what: str
    is_ours: Callable[[Path], bool]


class NewFiles:
    """The files of one command: checked before its work, and put in place after it.

    Several files cannot appear in one step. So while they do, a note beside the first says of which
    request they are, and the same command, after it was killed there, may replace what it finds.
    """

    def __init__(self, files: Iterable[NewFile | None], overwrite: bool, request: str = "") -> None:
        """files: None stands for an option that was not given. request: its key. Raises OutputError
        for a file that is there, unless it is ours and may be replaced.
        """
        self._files = [file for file in files if file is not None]
        self._request = request.encode()
        refuse_existing(self._files, overwrite or self._was_finishing())

    @contextmanager
    def finishing(self, then: Callable[[], None] = lambda: None) -> Iterator[None]:
        """To be held while the files are put in place, and what was kept for them is removed.

        then: called when they are there."""
        if not self._files:
            yield
            return
        write_file_atomically(self._note, self._request)
        yield
        then()
        with suppress(OSError):
            self._note.unlink()

    @property
    def _note(self) -> Path:
        first = self._files[0].path
        return first.with_name(f"{first.name}.v4quant-finishing")

    def _was_finishing(self) -> bool:
        with suppress(FormatError):
            return bool(self._files) and read_small(self._note, 1024) == self._request
        return False


def refuse_existing(files: Iterable[NewFile], overwrite: bool) -> None:
    """Raise OutputError for a file that is there, unless it is ours and may be replaced."""
    for file in files:
        _remove_unnamed(file)
        if not (file.path.exists() or file.path.is_symlink()):
            _refuse_unwritable(file.path)
            continue
        if file.path.is_dir():
            raise OutputError(f"{file.path}: is a folder; name a file for {file.what}")
        if not file.is_ours(file.path):
            raise OutputError(
                f"{file.path}: exists, and is not {file.what} that v4quant wrote, or was changed "
                "since; move it away or choose another name"
            )
        if not overwrite:
            raise OutputError(
                f"{file.path}: exists already ({file.what}); choose another name, or replace it "
                "with --overwrite"
            )
        _refuse_unwritable(file.path)


def _refuse_unwritable(path: Path) -> None:
    """Raise OutputError where no file can be made: hours of work would be lost."""
    above = path.absolute().parent
    while not os.path.lexists(above):
        above = above.parent
    if not above.is_dir():
        raise OutputError(f"{path}: cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK):
        raise OutputError(
            f"{path}: cannot be written: {above} is read-only for you; choose another folder"
        )


def _remove_unnamed(file: NewFile) -> None:
    """Remove whole files that a process killed between their last two steps left beside this one:
    under a temporary name of ours, and of the kind that it would have replaced."""
    with suppress(OSError):
        for path in leftovers(file.path.parent, [file.path.name]):
            if not path.is_symlink() and path.is_file() and file.is_ours(path):
                path.unlink()


def statistics_file(path: Path) -> NewFile:
    """What `calibrate` writes."""
    from v4quant_calibration.statistics.stats import is_stats  # torch, which plans do without

    return NewFile(path, "statistics", is_stats)


def imatrix_file(path: Path | None) -> NewFile | None:
    """What `calibrate --imatrix` writes."""
    return None if path is None else NewFile(path, "an importance matrix", is_own_imatrix)


def recipe_file(path: Path) -> NewFile:
    """What `allocate` writes."""
    return NewFile(path, "a recipe", is_signed)


def run_file(path: Path) -> NewFile:
    """What `plan --write` writes."""
    return NewFile(path, "a run file", is_signed)


def report_file(path: Path | None) -> NewFile | None:
    """What `evaluate --report` writes."""
    if path is None:
        return None
    return NewFile(path, "a report", _is_evaluation if path.suffix == ".json" else is_signed)


def logits_file(path: Path | None) -> NewFile | None:
    """What `evaluate --save-logits` writes. Of llama.cpp's form none is known to be ours."""
    return None if path is None else NewFile(path, "logits", _is_logits)


def signed(text: str, suffix: str) -> str:
    """A text with a last line, a comment of files of this suffix, by which `is_signed` knows it."""
    begin, end = _COMMENTS.get(suffix, _COMMENTS[".html"])
    whole = text if text.endswith("\n") else text + "\n"
    digest = hashlib.sha256(whole.encode()).hexdigest()
    return f"{whole}{begin}written by v4quant: sha256 {digest}{end}\n"


def is_signed(path: Path) -> bool:
    """Whether a file is as `signed` made it."""
    with suppress(FormatError):
        data = read_small(path, _MAX_TEXT)
        if (last := _LAST.search(data)) is not None:
            return hashlib.sha256(data[: last.start() + 1]).hexdigest().encode() == last[1]
    return False


def place_beside(path: Path) -> Path:
    """Where to write a file that must not have its name before all else is done."""
    return path.with_name(f"{path.stem}.v4quant-new{path.suffix}")


def put_in_place(path: Path) -> None:
    """Give a file that was written to `place_beside(path)` its name. Raises OutputError."""
    try:
        take_place(place_beside(path), path)
        sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from None


def _is_evaluation(path: Path) -> bool:
    with suppress(FormatError, ValueError, RecursionError):
        found = json.loads(read_small(path, _MAX_TEXT))
        return isinstance(found, dict) and {"tool", "candidate", "perplexity"} <= found.keys()
    return False


def _is_logits(path: Path) -> bool:
    with suppress(FormatError):
        return read_header(path).keys() >= _LOGITS
    return False
