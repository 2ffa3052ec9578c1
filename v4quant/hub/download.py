"""One file of a repository onto the disk: resumed, never longer than announced, digest compared.

Bytes go to `NAME.part` and get their name only when size and digest are those of the listing. A
part left by an earlier run is hashed and continued, a whole file hashed before it is taken: its
name and size say nothing. The folder is the caller's alone, by a lock or because it is temporary;
still nothing is written through a link. The disk is asked for room before the first byte.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from v4quant.hub.errors import HubError
from v4quant.hub.remote import Remote, RemoteFile
from v4quant.hub.stopping import is_stopped
from v4quant.sizes import human_bytes
from v4quant_formats.block_writer import BlockWriter
from v4quant_formats.errors import OutputError, SourceChanged
from v4quant_formats.shards import output_error, require_same
from v4quant_formats.system import begin_writing, finish_writing, open_own, take_place

_CHUNK = 8 * 2**20
_BEHIND = 64 * 2**20  # bytes that may be on their way to the disk


class _Digest:
    """SHA-256 for files in large storage, git's blob name for the others."""

    def __init__(self, file: RemoteFile) -> None:
        self._wanted = file.sha256 or file.blob
        self._hash = hashlib.sha256() if file.sha256 else hashlib.sha1(usedforsecurity=False)
        if not file.sha256:
            self._hash.update(b"blob %d\0" % file.size)

    def update(self, data: bytes | memoryview) -> None:
        self._hash.update(data)

    def matches(self) -> bool:
        return self._hash.hexdigest() == self._wanted


def download(
    remote: Remote,
    file: RemoteFile,
    target: Path,
    stopped: Callable[[], bool] = is_stopped,
    advance: Callable[[int], None] = lambda count: None,
) -> None:
    """Bring one file to `target`, whole and checked; the same call resumes.

    advance(count) is told bytes as they are there. Raises HubError, SourceChanged (size or digest
    is not as announced) or OutputError (the disk).
    """
    part = part_path(target)
    try:
        if _is_whole(target, file, stopped, advance):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        resumed = part.exists()
        # A part of an earlier run may have been damaged since; one that fails is fetched anew.
        if not _fetch(remote, file, part, stopped, advance):
            part.unlink()
            if not resumed or not _fetch(remote, file, part, stopped, advance):
                part.unlink(missing_ok=True)
                raise SourceChanged(
                    f"{remote}: {file.name}: the bytes received do not have the digest the "
                    "repository announces; nothing of them was kept, run the same command again"
                )
        take_place(part, target)
    except OSError as error:
        raise output_error(target, error) from None


def _hash_rest(file: BinaryIO, digest: _Digest, name: str, stopped: Callable[[], bool]) -> None:
    while chunk := file.read(_CHUNK):
        if stopped():
            raise HubError(f"{name}: stopped")
        digest.update(chunk)


def part_path(target: Path) -> Path:
    """Where a download lies until it is whole."""
    return target.with_name(f"{target.name}.part")


def _is_whole(
    target: Path, file: RemoteFile, stopped: Callable[[], bool], advance: Callable[[int], None]
) -> bool:
    """Whether an earlier run brought this file; what has other bytes is removed."""
    if target.is_symlink() or not target.is_file():
        return False
    digest = _Digest(file)
    if target.stat().st_size == file.size:
        with target.open("rb") as there:
            _hash_rest(there, digest, file.name, stopped)
        if digest.matches():
            advance(file.size)
            return True
    target.unlink()
    return False


def _fetch(
    remote: Remote,
    file: RemoteFile,
    part: Path,
    stopped: Callable[[], bool],
    advance: Callable[[int], None],
) -> bool:
    """Continue a part to its full size; whether its digest is right."""
    digest = _Digest(file)
    with os.fdopen(open_own(part), "r+b") as out:
        if out.seek(0, os.SEEK_END) > file.size:
            out.truncate(0)
        at = out.seek(0, os.SEEK_END)
        free = shutil.disk_usage(part.parent).free
        if file.size - at > free:
            raise OutputError(
                f"{part}: {file.name} needs {human_bytes(file.size - at)} more, but only "
                f"{human_bytes(free)} are free on this disk; free space or lower --disk-cap"
            )
        out.seek(0)
        _hash_rest(out, digest, file.name, stopped)
        advance(at)
        blocks = BlockWriter(out.fileno(), part.parent, file.size, begin=at)
        try:
            sent = at
            for piece in remote.stream(file.name, at, file.size, stopped, blocks.room):
                if stopped():
                    raise HubError(f"{remote}: {file.name}: stopped")
                digest.update(piece)
                blocks.write(piece, at)
                advance(len(piece))
                at += len(piece)
                sent = _send_to_disk(out.fileno(), sent, at)
        finally:
            blocks.flush()
        os.fsync(out.fileno())
        require_same(part, os.fstat(out.fileno()))
    return digest.matches()


def _send_to_disk(handle: int, sent: int, at: int) -> int:
    """Let the disk work while bytes arrive; where it does not keep up, they wait. How far it is.

    A flush of gigabytes at the end would hold the process so long that no signal could end it.
    """
    while at - sent >= _CHUNK:
        begin_writing(handle, sent, _CHUNK)
        sent += _CHUNK
        if sent >= _BEHIND:
            finish_writing(handle, sent - _BEHIND, _CHUNK)
    return sent
