"""A repository of GGUF files as a source: which of them, their headers by ranges, bytes as needed.

Such repositories hold many quants of one model; `hf://owner/name:QUANT` chooses, and where there is
one only, nothing need be said. The chosen files are listed under their names without folders.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path, PurePosixPath

from v4quant.hub.errors import HubOffline
from v4quant.hub.refs import HubRef
from v4quant.hub.remote import Remote
from v4quant.hub.shard_cache import ShardCache
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.gguf.checkpoint import assemble_gguf, open_gguf_files
from v4quant_formats.gguf.header import GgufHeader, parse_gguf_header
from v4quant_formats.gguf.quants import SUFFIX, choose, files_below
from v4quant_formats.shard_files import FileState, Origin, ShardFiles
from v4quant_formats.system import open_regular

_AHEAD = 2**20  # a vocabulary and its merges take 5 MB; a later part's header a few kilobytes


def takes_gguf(ref: HubRef, remote: Remote) -> bool:
    """Whether the repository is read as GGUF: by name, or because it holds nothing else."""
    shards = any(n.endswith(".safetensors") and "/" not in n for n in remote.files)
    return bool(ref.quant) or (not shards and any(n.endswith(SUFFIX) for n in remote.files))


def pick_gguf(ref: HubRef, remote: Remote) -> tuple[Remote, list[str]]:
    """The commit as the chosen quant's folder has it, and the names there of the chosen files.

    Raises FormatError that lists what is there, MissingShard or HubError.
    """
    names = [n for n in remote.files if n.endswith(SUFFIX)]
    chosen = choose(names, ref.quant, str(remote))
    return remote.picked(chosen), [PurePosixPath(name).name for name in chosen]


def open_remote_gguf(
    remote: Remote,
    chosen: Sequence[str],
    skeleton: Path,
    folder: Path,
    cap: int | None,
    cached: Mapping[str, Path],
    keep: bool,
    lock: ExitStack | None,
) -> Checkpoint:
    """Open what `pick_gguf` chose. skeleton: where sidecars lie; folder: for what is fetched.

    Raises what `open_gguf` raises, HubError and DiskCapError.
    """
    skeleton.mkdir(parents=True, exist_ok=True)

    def header_of(name: str) -> GgufHeader:
        size = remote.files[name].size
        ranges = _Ranges(size, lambda start, count: _bytes(remote, cached, name, start, count))
        return parse_gguf_header(skeleton / name, io.BufferedReader(ranges, _AHEAD), size)

    def files_of(names: Sequence[str]) -> tuple[dict[str, FileState], ShardFiles]:
        files = {n: FileState(remote.files[n].size) for n in names}
        return files, ShardCache(remote, names, folder, cap, cached, keep, lock)

    opened = assemble_gguf(skeleton, sorted(chosen), header_of, files_of)
    return replace(opened, origin=Origin(remote.repo, remote.commit, remote.license))


def _bytes(remote: Remote, cached: Mapping[str, Path], name: str, start: int, count: int) -> bytes:
    if name not in cached:
        return remote.read(name, start, count)
    with open_regular(cached[name]) as file:
        file.seek(start)
        return file.read(count)


class _Ranges(io.RawIOBase):
    """A file that is read by ranges."""

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self._size, self._read, self._at = size, read, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, into: memoryview) -> int:  # type: ignore[override]
        count = min(len(into), self._size - self._at)
        data = self._read(self._at, count) if count > 0 else b""
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


def open_cached_gguf(ref: HubRef, snapshot: Path) -> Checkpoint:
    """A quant that the local hub cache holds, without asking the hub what else there is.

    Raises HubOffline where draft stages may lie in a file that was not downloaded, and what
    opening raises.
    """
    chosen = choose(files_below(snapshot), ref.quant, str(ref))
    opened = open_gguf_files(snapshot, chosen)
    named = ref.quant in (*chosen, *(Path(name).name for name in chosen))
    if not named and not any(name.startswith("mtp.") for name in opened.tensors):
        raise HubOffline(
            f"{ref}: HF_HUB_OFFLINE is set, and the local cache does not tell whether the "
            "repository has draft stages in a file of their own; unset it, or name the file to go "
            f"without (hf://{ref.repo}:{Path(chosen[0]).name})"
        )
    return opened
