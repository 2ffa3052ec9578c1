"""Requests that ended well: the same one again is answered, not refused and not done again.

A request is known by the digest of all that decides its result: this program, the options that
change figures, the bytes of the files it reads, and the digests of checkpoints. `run` notes its
steps by such keys in its folder, a conversion has its plan's in the manifest. A command that writes
single files leaves a record in the user's cache folder, with the hashes of those files: while they
are as it left them, the same request finds its result there. The newest records stay; without one
the files are somebody's work that is not written over, as ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from v4quant.own_code import own_code
from v4quant_formats.errors import FormatError, OutputError
from v4quant_formats.file_hash import hash_file
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.small_files import read_small
from v4quant_kernels.user_cache import cache_folder, keep_newest, record_name

_LOGGER = logging.getLogger(__name__)
_PREFIX = "finished-"
_MAX_BYTES = 2**26
_MOST_HASHED = 2**34
KEPT = 64
"""Records in the cache folder; a large evaluation's has some 100 KB."""


def request_key(asked: object, files: Iterable[Path | None], *digests: str) -> str:
    """Identity of a request. asked: whose repr says what is wanted. files: what is read, by bytes.

    A file that is not there counts as such; whoever reads it says so properly.
    """
    facts = [own_code(), repr(asked), [_hash(file) for file in files], digests]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclass(frozen=True)
class Request:
    """A command's request, and the files it writes."""

    key: str
    writes: tuple[Path, ...]

    def answer(self) -> Mapping[str, Any] | None:
        """What the same request found, whose files are still as it left them; says so."""
        record: Any = None
        with suppress(FormatError, ValueError, RecursionError):
            record = json.loads(read_small(self._place, _MAX_BYTES))
        if not isinstance(record, dict) or not isinstance(record.get("found"), dict):
            return None
        if not self.writes or record.get("files") != self._files():
            return None
        names = ", ".join(map(str, self.writes))
        _LOGGER.info("%s: done already, by the same request", names)
        found: dict[str, Any] = record["found"]
        return found

    def remember(self, found: Mapping[str, Any]) -> None:
        """The files are written; `found` is what the answer will be. Cannot fail."""
        if not self.writes:
            return
        folder = self._place.parent
        record = {"files": self._files(), "found": found}
        with suppress(OSError, OutputError):
            folder.mkdir(parents=True, exist_ok=True)
            write_file_atomically(self._place, json.dumps(record).encode())
            keep_newest(folder, _PREFIX, KEPT)

    @property
    def _place(self) -> Path:
        where = "\0".join(str(path.absolute()) for path in self.writes)
        name = hashlib.sha256(f"{self.key}\0{where}".encode()).hexdigest()
        return cache_folder() / record_name(_PREFIX, name)

    def _files(self) -> list[str]:
        return [_hash(path) for path in self.writes]


def request_of(
    asked: Mapping[str, object],
    reads: Sequence[Path | None],
    digests: Sequence[str],
    writes: Sequence[Path | None],
) -> Request:
    """asked: a command's name and options. None stands for a file that was not named."""
    key = request_key(sorted(asked.items()), reads, *digests)
    return Request(key, tuple(path for path in writes if path is not None))


def _hash(file: Path | None) -> str:
    """A file's digest; of one that would take minutes to read, what changes when it is written."""
    with suppress(OSError):
        if file is not None and file.is_file():
            found = file.stat()
            if found.st_size > _MOST_HASHED:
                return f"{found.st_dev} {found.st_ino} {found.st_size} {found.st_ctime_ns}"
            return hash_file(file)
    return "absent"
