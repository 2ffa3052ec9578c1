"""A repository on the hub, opened as a Checkpoint.

What is small (config, index, and for conversions the sidecars) is copied into a skeleton folder;
the shards' headers are read by ranges; the shards themselves stay where they are until the
`ShardCache` fetches them. Whoever holds the Checkpoint need not know. What the local hub cache
holds of this commit is used in place of the network.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import weakref
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from v4quant.hub.client import is_offline
from v4quant.hub.download import download
from v4quant.hub.errors import HubError, HubOffline
from v4quant.hub.gguf_source import open_cached_gguf, open_remote_gguf, pick_gguf, takes_gguf
from v4quant.hub.refs import SCHEME, HubRef, HubReferenceError, parse_hub
from v4quant.hub.remote import Remote, open_remote, require
from v4quant.hub.shard_cache import ShardCache, remove_shards
from v4quant.own_folders import refuse_links
from v4quant.temporary_folders import TemporaryFolder
from v4quant_formats.checkpoint import (
    INDEX_NAME,
    MAX_INDEX_BYTES,
    PACK_CONFIG_NAME,
    SINGLE_NAME,
    Checkpoint,
    files_without_index,
    link_root,
    read_structure,
)
from v4quant_formats.errors import FormatError, MissingShard, OutputError
from v4quant_formats.folder_lock import locked_folder
from v4quant_formats.gguf.quants import files_below
from v4quant_formats.naming import understood
from v4quant_formats.opening import open_checkpoint
from v4quant_formats.safetensors_header import parse_header
from v4quant_formats.shard_files import FileState, Origin
from v4quant_formats.shards import write_file_atomically
from v4quant_formats.sidecars import ALLOWED_FILES, ALLOWED_FOLDERS, MAX_SIDECAR_BYTES
from v4quant_formats.small_files import read_small
from v4quant_formats.spec import TensorSpec
from v4quant_formats.system import open_regular, real_path

PIN_NAME = "pin.json"
SHARDS = "shards"
"""The folder, in a repository's folder, that its shards are fetched into."""
_MAX_PIN_BYTES = 4096
_HEADER_GUESS = 60 * 2**10  # most of a layer's header; the rest is asked for when it is longer
_AT_ONCE = 8
_MAX_CONFIG_BYTES = 2**24


def open_hub(
    ref: HubRef,
    scratch: Path | None = None,
    cap: int | None = None,
    headers_only: bool = False,
) -> Checkpoint:
    """Open a repository at the commit its revision means now.

    scratch: folder for what is fetched, which also remembers the commit, so that the next run goes
        on with it; without one, a temporary folder. cap: bytes of shards held there at one time
        (default: three of the largest). headers_only: leave the sidecars where they are.
    Raises HubError and its kinds, DiskCapError, UnsafePath and what `open_checkpoint` raises.
    """
    if is_offline():
        return _from_cache(ref)
    if scratch is not None:
        lock = _lock(scratch)
        try:
            return _open_in(ref, scratch, cap, headers_only, keep=True, lock=lock)
        except BaseException:
            lock.close()
            raise
    temporary = TemporaryFolder()
    try:
        checkpoint = _open_in(ref, temporary.path, cap, headers_only, keep=False)
    except BaseException:
        temporary.remove()
        raise
    weakref.finalize(checkpoint.shards, temporary.remove)
    return checkpoint


def open_published(repo: str, folder: Path) -> Checkpoint:
    """A checkpoint whose config and index lie in `folder` and whose shards `main` already has."""
    remote = open_remote(HubRef(repo))
    return _open_skeleton(remote, folder, folder / "unused", None, keep=False, lock=None)


def forget_fetched(scratch: Path) -> None:
    """Remove the shards that an earlier run left in a scratch folder; nothing else of it.

    Raises OutputError when another process has it, or when it is a symbolic link.
    """
    if scratch.is_symlink():
        raise OutputError(f"{scratch}: is a symbolic link; remove it or choose another folder")
    told = _read_pin(scratch)
    if told is not None:
        with _lock(scratch):
            remove_shards(scratch / _skeleton_name(told.repo, told.commit) / SHARDS)


def _open_in(
    ref: HubRef,
    folder: Path,
    cap: int | None,
    headers_only: bool,
    keep: bool,
    lock: ExitStack | None = None,
) -> Checkpoint:
    told = _read_pin(folder)
    if told is None and os.path.lexists(folder / PIN_NAME):
        raise OutputError(
            f"{folder / PIN_NAME}: is not what v4quant writes there; remove it or choose another "
            "folder"
        )
    known = told is not None and (told.repo, told.revision) == (ref.repo, ref.revision)
    remote = open_remote(ref, told.commit if told is not None and known else None)
    skeleton = folder / _skeleton_name(ref.repo, remote.commit)
    if skeleton.is_symlink():
        raise OutputError(f"{skeleton}: is a symbolic link; remove it or choose another folder")
    if keep:
        if told is not None and not known:
            remove_shards(folder / _skeleton_name(told.repo, told.commit) / SHARDS)
        _pin(folder, _Pin(ref.repo, ref.revision, remote.commit))
    if takes_gguf(ref, remote):
        picked, chosen = pick_gguf(ref, remote)
        _fetch_small(remote, [] if headers_only else _sidecars(remote), skeleton)
        cached = _all_cached(picked, chosen)
        return open_remote_gguf(
            picked, chosen, skeleton, skeleton / SHARDS, cap, cached, keep, lock
        )
    _fetch_small(remote, _small_files(remote, headers_only), skeleton)
    return _open_skeleton(remote, skeleton, skeleton / SHARDS, cap, keep, lock)


def _fetch_small(remote: Remote, names: Sequence[str], skeleton: Path) -> None:
    for name in names:
        refuse_links(skeleton, name)
        cached = _cached(remote, name)
        if cached is not None:
            write_file_atomically(skeleton / name, cached.read_bytes())
        else:
            download(remote, remote.files[name], skeleton / name)


def _skeleton_name(repo: str, commit: str) -> str:
    return f"{repo.replace('/', '--')}@{commit[:12]}"


def _open_skeleton(
    remote: Remote,
    skeleton: Path,
    folder: Path,
    cap: int | None,
    keep: bool,
    lock: ExitStack | None,
) -> Checkpoint:
    names = _shards_of(remote)
    cached = _all_cached(remote, names)
    headers = _Headers(remote, skeleton, cached)
    written, stored = read_structure(skeleton, headers, names)
    config, tensors, renamed = understood(f"{remote}: config.json", written, stored)
    used = sorted(headers.read)
    files = {n: FileState(remote.files[n].size) for n in used}
    cache = ShardCache(remote, used, folder, cap, cached, keep, lock)
    origin = Origin(remote.repo, remote.commit, remote.license)
    beside = tuple(sorted(set(names) - headers.read))
    return Checkpoint(
        skeleton, config, tensors, files, cache, origin, renamed, written, beside=beside
    )


def _shards_of(remote: Remote) -> list[str]:
    return [n for n in remote.files if n.endswith(".safetensors") and "/" not in n]


class _Headers:
    """Reads headers by ranges, those of the index's files all at once."""

    def __init__(self, remote: Remote, skeleton: Path, cached: Mapping[str, Path]) -> None:
        self._remote, self._skeleton, self._cached = remote, skeleton, cached
        self._first: dict[str, bytes] = {}
        self.read: set[str] = set()

    def __call__(self, name: str) -> dict[str, TensorSpec]:
        if not self._first:
            self._read_all()
        if name not in self._first:
            raise MissingShard(f"{self._remote}: the index names {name}, which is not there")
        self.read.add(name)
        first = self._first[name]

        def read(start: int, count: int) -> bytes:
            if start + count <= len(first):
                return first[start : start + count]
            return first[start:] + self._bytes(name, len(first), start + count - len(first))

        size = self._remote.files[name].size
        return parse_header(self._skeleton / name, size, read)

    def _read_all(self) -> None:
        index = self._skeleton / INDEX_NAME
        if not index.exists():
            names = files_without_index(self._skeleton, _shards_of(self._remote))
        else:  # already found to be of the right form
            named = set(json.loads(index.read_bytes())["weight_map"].values())
            names = sorted(named)
        names = [n for n in names if n in self._remote.files]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            pieces = pool.map(lambda n: self._bytes(n, 0, _HEADER_GUESS), names)
            self._first = dict(zip(names, pieces, strict=True))

    def _bytes(self, name: str, start: int, count: int) -> bytes:
        if name in self._cached:
            with open_regular(self._cached[name]) as file:
                file.seek(start)
                return file.read(count)
        return self._remote.read(name, start, count)


def _small_files(remote: Remote, headers_only: bool) -> list[str]:
    """config.json, the index and the sidecars of the allow-list, sizes checked."""
    limits = {"config.json": _MAX_CONFIG_BYTES}
    require(remote, "config.json")
    if INDEX_NAME in remote.files:
        limits[INDEX_NAME] = MAX_INDEX_BYTES
    elif not _shards_of(remote):
        raise MissingShard(f"{remote}: holds neither {INDEX_NAME} nor {SINGLE_NAME}")
    if PACK_CONFIG_NAME in remote.files:
        limits[PACK_CONFIG_NAME] = _MAX_CONFIG_BYTES
    for name, limit in limits.items():
        if remote.files[name].size > limit:
            raise HubError(
                f"{remote}: {name} has {remote.files[name].size:,} bytes, more than {limit:,}; "
                "no model needs that"
            )
    if headers_only:
        return list(limits)
    return [*limits, *_sidecars(remote)]


def _sidecars(remote: Remote) -> list[str]:
    return [f.name for f in remote.files.values() if _is_sidecar(f.name, f.size)]


def _is_sidecar(name: str, size: int) -> bool:
    if size > MAX_SIDECAR_BYTES:
        return False
    path = PurePosixPath(name)
    return name in ALLOWED_FILES or path.suffix in ALLOWED_FOLDERS.get(path.parts[0], ())


def _all_cached(remote: Remote, names: Iterable[str] | None = None) -> dict[str, Path]:
    """Those of the commit's files (None: of all) that the local hub cache holds whole."""
    wanted = remote.files if names is None else names
    return {n: path for n in wanted if (path := _cached(remote, n)) is not None}


def _cached(remote: Remote, name: str) -> Path | None:
    """A file of this commit in the local hub cache, if it is whole."""
    from huggingface_hub import try_to_load_from_cache

    place = remote.path_of(name)
    found = try_to_load_from_cache(remote.repo, place, revision=remote.commit)
    if not isinstance(found, str):
        return None
    path = Path(found)
    snapshot = path
    for _ in PurePosixPath(place).parts:
        snapshot = snapshot.parent
    whole = path.is_file() and path.stat().st_size == remote.files[name].size
    return path if whole and real_path(path).is_relative_to(link_root(snapshot)) else None


def _from_cache(ref: HubRef) -> Checkpoint:
    """The commit the local hub cache knows, when all of it is there. Raises HubOffline."""
    snapshot = _snapshot(ref)
    missing = "nothing of it"
    if snapshot is not None:
        try:
            shards = (snapshot / "config.json").exists() and any(snapshot.glob("*.safetensors"))
            if ref.quant or (not shards and files_below(snapshot)):
                cached = open_cached_gguf(ref, snapshot)
                return replace(cached, origin=Origin(ref.repo, snapshot.name))
            return replace(open_checkpoint(snapshot), origin=Origin(ref.repo, snapshot.name))
        except MissingShard as error:
            missing = f"not all of it ({error})"
    raise HubOffline(
        f"{ref}: HF_HUB_OFFLINE is set and the local cache holds {missing}; unset it, or download "
        "the repository first"
    )


def _snapshot(ref: HubRef) -> Path | None:
    """The folder of a commit in the local hub cache."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(ref.repo, "config.json", revision=ref.revision or "main")
    if isinstance(found, str):
        return Path(found).parent
    # A cached repository of GGUF files need not have a config.json.
    home = Path(constants.HF_HUB_CACHE) / f"models--{ref.repo.replace('/', '--')}"
    revision = ref.revision or "main"
    named = home / "refs" / revision
    commit = read_small(named, _MAX_PIN_BYTES).decode().strip() if named.is_file() else revision
    plain = re.fullmatch(r"[0-9a-f]{40,64}", commit) is not None
    return home / "snapshots" / commit if plain and (home / "snapshots" / commit).is_dir() else None


def _lock(folder: Path) -> ExitStack:
    """Hold a scratch folder for this process. Raises OutputError when another one has it."""
    held = ExitStack()
    held.enter_context(
        locked_folder(
            folder,
            f"{folder}: another v4quant process fetches into this folder; wait for it or choose "
            "another one",
        )
    )
    return held


@dataclass(frozen=True)
class _Pin:
    """The commit that a scratch folder began with."""

    repo: str
    revision: str | None
    commit: str


def _read_pin(folder: Path) -> _Pin | None:
    """What an earlier run in this scratch folder wrote; None for anything else."""
    wrong = (FormatError, HubReferenceError, ValueError, RecursionError, TypeError)
    with contextlib.suppress(*wrong):
        pin = _Pin(**json.loads(read_small(folder / PIN_NAME, _MAX_PIN_BYTES)))
        parse_hub(f"{SCHEME}{pin.repo}")
        right = pin.revision is None or isinstance(pin.revision, str)
        return pin if right and re.fullmatch(r"[0-9a-f]{40,64}", pin.commit) else None
    return None


def _pin(folder: Path, pin: _Pin) -> None:
    write_file_atomically(folder / PIN_NAME, json.dumps(vars(pin)).encode() + b"\n")
