"""Steps: which results of an earlier `run` still answer what is asked now.

A result is reused when two things hold: its key (`v4quant.finished`), a digest of everything it
depends on, is the one recorded with it, and its file has the recorded hash. Anything else, a record
that cannot be read included, means the step is done again.
"""

from __future__ import annotations

import json
from pathlib import Path

from v4quant_formats.errors import FormatError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small

RECORD_NAME = "steps.json"
_MAX_BYTES = 2**20


class FinishedSteps:
    """The record of finished steps in a run's folder."""

    def __init__(self, folder: Path) -> None:
        """`folder` need not exist yet."""
        self._path = folder / RECORD_NAME
        self._entries: dict[str, list[str]] = {}
        try:
            found = json.loads(read_small(self._path, _MAX_BYTES))
        except (FormatError, ValueError, RecursionError):
            return
        if isinstance(found, dict):
            self._entries = found

    def begin(self) -> None:
        """Make the record, by which a run's folder is known. Raises OutputError."""
        if not self._path.is_file():
            self._write()

    def has(self, key: str, file: Path) -> bool:
        """Whether `file` is the result of the step with this key."""
        return file.is_file() and self._entries.get(self._name(file)) == [key, hash_file(file)]

    def add(self, key: str, file: Path) -> None:
        """Record `file`, which is written, as the result of the step. Raises OutputError."""
        self._entries[self._name(file)] = [key, hash_file(file)]
        self._write()

    def _write(self) -> None:
        write_file_atomically(self._path, (json.dumps(self._entries, indent=1) + "\n").encode())

    def _name(self, file: Path) -> str:
        """The file's place in the run's folder, by which several of one name differ."""
        return file.relative_to(self._path.parent).as_posix()
