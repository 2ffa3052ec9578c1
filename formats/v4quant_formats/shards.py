"""ShardWriter: one file being written, safe against being killed at any moment.

A `FilePlan` says what the file will be: its header, and each tensor's place. The header is written
first, then each tensor goes to its own place by positioned writes, in any order and from any
thread. A thread of its own follows from the front, hashes what is complete and sends it to the disk
(following.py). `close` refuses unless every planned tensor arrived, flushes to disk and renames the
file into place; until then the bytes live under a temporary name that nothing takes for a shard,
and that the next run in this folder removes. A file among other people's has no name at all until
it is whole, where the system knows such files: what is killed then leaves nothing there.

`plan_shard` plans a safetensors file. Its tensors lie in the order they are given (an expert's
matrices and scales together), so writing and hashing run front to back. The format allows no gaps
and readers want every tensor aligned to its element, so tensors that are not a multiple of 8 bytes
come last, by falling element size. GGUF files are planned in gguf_file.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from v4quant_formats.block_writer import BlockWriter
from v4quant_formats.errors import OutputError
from v4quant_formats.file_hash import IncrementalHash
from v4quant_formats.spec import DTYPE_BITS, TensorSpec, stored_dtype, torch_dtype
from v4quant_formats.system import (
    create_nameless,
    create_new,
    give_name,
    sync_folder,
    take_place,
    write_at,
)
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

TEMPORARY_SUFFIX = ".part"
# Part of every temporary name, so that two processes never write one file whatever locks say.
_RUN = secrets.token_hex(4)
_TEMPORARY = re.compile(r"(.+)\.[0-9a-f]{8}" + re.escape(TEMPORARY_SUFFIX))


@dataclass(frozen=True)
class WrittenFile:
    """A finished file: its name, size and SHA-256."""

    name: str
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class FilePlan:
    """A file before it is written: header, placed tensors by rising offset, size in all.

    Bytes that no tensor covers are zero.
    """

    header: bytes
    specs: tuple[TensorSpec, ...]
    nbytes: int


def temporary_path(path: Path) -> Path:
    """Where a file lives while this process writes it."""
    return path.with_name(f"{path.name}.{_RUN}{TEMPORARY_SUFFIX}")


def all_leftovers(folder: Path, is_ours: Callable[[str], bool] = lambda name: True) -> list[Path]:
    """What processes that were killed left in a folder of files whose names are ours."""
    found = ((path, _TEMPORARY.fullmatch(path.name)) for path in folder.iterdir())
    return [path for path, match in found if match and is_ours(match[1])]


def leftovers(folder: Path, names: Iterable[str]) -> list[Path]:
    """What processes that were killed left of these files (relative names, with /)."""
    wanted: dict[Path, set[str]] = {}
    for name in names:
        wanted.setdefault((folder / name).parent, set()).add(PurePosixPath(name).name)
    found = []
    for parent, files in wanted.items():
        for path in parent.iterdir() if parent.is_dir() else ():
            match = _TEMPORARY.fullmatch(path.name)
            if match and match[1] in files:
                found.append(path)
    return found


def remove_leftovers(folder: Path, names: Iterable[str]) -> None:
    """Remove what processes that were killed left of these files. Call it under the lock."""
    for path in leftovers(folder, names):
        path.unlink(missing_ok=True)


def shard_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Tensors in file order: as given, but odd sizes last, by falling element size."""
    specs = list(specs)
    even = [s for s in specs if s.nbytes % 8 == 0]
    odd = [s for s in specs if s.nbytes % 8]
    return even + sorted(odd, key=lambda s: -DTYPE_BITS[s.dtype])


def shard_header(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length-prefixed header of a shard holding `specs` in `shard_order`.

    metadata: words for readers, beside the usual one. Padded with spaces to a multiple of 8, so
    that the data starts aligned.
    """
    table: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for spec in shard_order(specs):
        table[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def plan_shard(specs: Iterable[TensorSpec], metadata: Mapping[str, str] | None = None) -> FilePlan:
    """A safetensors file holding `specs`, with `metadata` in its header."""
    ordered = shard_order(specs)
    header = shard_header(ordered, metadata)
    placed, position = [], len(header)
    for spec in ordered:
        placed.append(replace(spec, offset=position, stride=0))
        position += spec.nbytes
    return FilePlan(header, tuple(placed), position)


class ShardWriter:
    """Writes one file of planned tensors. Use `add` for each, then `close` (or `abort`)."""

    def __init__(
        self, path: Path, plan: FilePlan, cached: bool = False, nameless: bool = False
    ) -> None:
        """Create the temporary file with its header. Raises OutputError.

        cached: the file stays in the page cache, for somebody who reads it soon. nameless: it lies
        among other people's files, and nobody would remove what a killed process leaves.
        """
        self.path = path
        self.nbytes = plan.nbytes
        self._ordered = plan.specs
        self._specs = {s.name: s for s in plan.specs}
        self._missing = {s.name: s.nbytes for s in plan.specs}
        self._complete = 0  # tensors complete from the front
        self._lock = threading.Lock()
        self._temporary = temporary_path(path)
        try:
            self._handle, self._is_named = _create(self._temporary, nameless)
        except OSError as error:
            raise output_error(self._temporary, error) from None
        largest = max((s.nbytes for s in plan.specs), default=0)
        self._blocks = BlockWriter(
            self._handle, path.parent, self.nbytes, gaps=_gaps(plan), is_read=True
        )
        self._hash = IncrementalHash(self._handle, self.nbytes, largest, cached, self._blocks)
        try:
            os.ftruncate(self._handle, plan.nbytes)
            self._blocks.write(plan.header, 0)
        except BaseException as error:
            self.abort()
            if isinstance(error, OSError):
                raise output_error(self._temporary, error) from None
            raise
        with self._lock:
            self._follow()

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one whole tensor at its place. Thread-safe; each planned name exactly once."""
        spec = self._specs[name]
        assert tuple(tensor.shape) == spec.shape, (spec, tensor.shape)
        self.add_piece(name, 0, tensor)

    def add_piece(self, name: str, first_byte: int, tensor: Tensor) -> None:
        """Write a contiguous piece of a tensor, `first_byte` bytes into it. Thread-safe."""
        spec = self._specs[name]
        assert tensor.dtype == torch_dtype(spec.dtype), (spec, tensor.dtype)
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        try:
            _write_placed(self._blocks, data.numpy(), spec, first_byte)
        except OSError as error:
            raise output_error(self._temporary, error) from None
        with self._lock:
            self._missing[name] -= data.numel()
            assert self._missing[name] >= 0, f"{spec} written twice"
            self._follow()
        self._hash.keep_up()

    def _follow(self) -> None:
        """Let the hash run up to the first tensor that is not complete. Holds the lock."""
        ordered = self._ordered
        while self._complete < len(ordered) and not self._missing[ordered[self._complete].name]:
            self._complete += 1
        whole = self._complete == len(ordered)
        self._hash.allow(self.nbytes if whole else ordered[self._complete].offset)

    def close(self) -> WrittenFile:
        """Flush, hash and rename into place; the directory entry is on disk when this returns."""
        missing = [name for name, count in self._missing.items() if count]
        assert not missing, f"planned but never written: {missing[:3]}"
        try:
            self._blocks.flush()
            os.fsync(self._handle)
            digest = self._hash.digest()
            if not self._is_named:
                _publish(self._handle, self._temporary, self.path)
            written = os.fstat(self._handle)
            os.close(self._handle)
            if self._is_named:
                take_place(self._temporary, self.path)
            require_same(self.path, written)
            sync_folder(self.path.parent)
        except OSError as error:
            raise output_error(self.path, error) from None
        return WrittenFile(self.path.name, self.nbytes, digest)

    def abort(self) -> None:
        """Give up: close and remove the temporary file."""
        self._hash.stop()
        self._blocks.stop()
        os.close(self._handle)
        self._temporary.unlink(missing_ok=True)


def require_same(path: Path, written: os.stat_result) -> None:
    """Raise OutputError unless a name belongs to the file that was written, and hashed: somebody
    may have put another one, or a link, in its place meanwhile. Raises OSError."""
    found = path.lstat()
    if (found.st_dev, found.st_ino) != (written.st_dev, written.st_ino):
        raise OutputError(
            f"{path}: another file was put in its place while it was written; run the same command "
            "again"
        )


def _create(temporary: Path, nameless: bool) -> tuple[int, bool]:
    """A handle on a new file, and whether it has its name yet. Raises OSError."""
    handle = create_nameless(temporary.parent) if nameless else None
    return (create_new(temporary), True) if handle is None else (handle, False)


def _publish(handle: int, temporary: Path, path: Path) -> None:
    """Give a file that has no name its own. Raises OSError."""
    try:
        give_name(handle, path)
    except FileExistsError:  # only a file with a name can take the place of another
        give_name(handle, temporary)
        take_place(temporary, path)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write tensors that are at hand as a safetensors file, whole or not at all.

    Raises OutputError.
    """
    specs = [TensorSpec(k, stored_dtype(v.dtype), tuple(v.shape)) for k, v in tensors.items()]
    writer = ShardWriter(path, plan_shard(specs, metadata), nameless=True)
    try:
        for name, value in tensors.items():
            writer.add(name, value)
    except BaseException:
        writer.abort()
        raise
    return writer.close()


def write_file_atomically(path: Path, data: bytes) -> WrittenFile:
    """Write a small file so that it is either absent, old or whole. Raises OutputError."""
    return write_pieces_atomically(path, (data,))


def write_pieces_atomically(path: Path, pieces: Iterable[bytes]) -> WrittenFile:
    """As `write_file_atomically`, piece by piece. Raises OutputError, and what `pieces` raise."""
    temporary, sha, size = temporary_path(path), hashlib.sha256(), 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, is_named = _create(temporary, nameless=True)
        try:
            try:
                for data in pieces:
                    write_at(handle, data, size)
                    sha.update(data)
                    size += len(data)
                os.fsync(handle)
                if not is_named:
                    _publish(handle, temporary, path)
            finally:
                os.close(handle)
            if is_named:
                take_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        raise output_error(path, error) from None
    return WrittenFile(path.name, size, sha.hexdigest())


def output_error(path: Path, error: OSError) -> OutputError:
    """The one-line error for a failed write."""
    remedies = {
        errno.ENOSPC: "the disk is full; free space (with the hub, a lower --disk-cap helps too) "
        "and run the same command again, it resumes",
        errno.EROFS: "the file system is read-only; choose another output folder",
        errno.EACCES: "permission denied; choose a folder you may write to",
        errno.EPERM: "permission denied; choose a folder you may write to",
        errno.ENOENT: "its folder was deleted or moved meanwhile; run the same command again",
    }
    why = remedies.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"{path}: cannot be written: {why}")


def _write_placed(blocks: BlockWriter, data: Any, spec: TensorSpec, first_byte: int) -> None:
    """Write bytes from `first_byte` of a tensor on, row by row where its rows lie apart."""
    if not spec.stride:
        blocks.write(data, spec.offset + first_byte)
        return
    done = 0
    while done < len(data):
        row, within = divmod(first_byte + done, spec.row_bytes)
        count = min(spec.row_bytes - within, len(data) - done)
        blocks.write(data[done : done + count], spec.offset + row * spec.stride + within)
        done += count


def _gaps(plan: FilePlan) -> Iterator[tuple[int, int]]:
    """What no tensor of a file covers. Rows that lie apart have other tensors' between them."""
    end = len(plan.header)
    for spec in plan.specs:
        if end < spec.offset:
            yield end, spec.offset
        last = (spec.shape[0] - 1) * spec.stride + spec.row_bytes if spec.stride else spec.nbytes
        end = max(end, spec.offset + last)
    if end < plan.nbytes:
        yield end, plan.nbytes
