"""Checkpoint: what is on disk. Opens a folder of safetensors shards and reads slices on demand.

Opening reads headers only. File names from the index are hostile until shown to be plain names
inside the folder. Bytes come through `shard_files`, into fresh memory rather than a memory map: a
map would die with a signal when a file shrinks underneath, and would hide memory from any cap.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from v4quant_formats.block_reader import memory_for
from v4quant_formats.errors import (
    DuplicateTensor,
    InvalidIndex,
    MissingShard,
    MissingTensor,
    SourceChanged,
    UnexpectedTensor,
    UnknownDtype,
    UnsafePath,
)
from v4quant_formats.json_object import read_json_object
from v4quant_formats.model_config import ConfigError, Dimensions, parse_dimensions
from v4quant_formats.shard_files import (
    FileState,
    HeadersOnly,
    Origin,
    ShardFiles,
)
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_formats.system import real_path
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

INDEX_NAME = "model.safetensors.index.json"
PACK_CONFIG_NAME = "quantize_config.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 256 * 2**20
_SERIES = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_DIGEST_SLICES = 64
_DIGEST_BYTES = 4096


class Deltas(Protocol):
    """What is added to some matrices when they are read: an adapter."""

    @property
    def name(self) -> str:
        """What it is called."""

    @property
    def digest(self) -> str:
        """Which adapter this is."""

    def __contains__(self, module: object) -> bool: ...

    def delta(self, module: str, rows: slice | Tensor) -> Tensor:
        """float64: rows (by number int64 [n]) of [out, in], of a module that is contained."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder of shards: its tensors by name, in shard order, and its config.json.

    Names and config are the release's; `renamed` gives the name in the files of tensors that other
    tools call otherwise, `written_config` the config.json as it stands, where that differs.
    `deltas` is an adapter that is merged while matrices are read. `carried` makes the small files
    (tokenizer.json, ...) that a GGUF file holds as metadata, each when it is called. `beside` are
    .safetensors and .gguf files that lie there too and belong to no part of it. `container` holds
    the headers, by file, of a container that describes itself (GGUF), `remarks` what its opener saw
    contradicted there.
    `tokenizer` is a tokenizer.json from elsewhere, in place of its own.
    """

    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorSpec]
    files: Mapping[str, FileState]
    shards: ShardFiles = field(repr=False, compare=False)
    origin: Origin | None = None
    renamed: Mapping[str, str] = field(default_factory=dict, repr=False)
    written_config: Mapping[str, Any] | None = field(default=None, repr=False)
    deltas: Deltas | None = field(default=None, repr=False, compare=False)
    carried: Mapping[str, Callable[[], bytes]] = field(
        default_factory=dict, repr=False, compare=False
    )
    beside: tuple[str, ...] = ()
    container: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    remarks: tuple[str, ...] = ()
    tokenizer: Path | None = None

    @property
    def has_data(self) -> bool:
        """Whether tensors can be read; of some checkpoints only the headers are known."""
        return not isinstance(self.shards, HeadersOnly)

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[TensorSpec]:
        return iter(self.tensors.values())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def label(self) -> str:
        """What to call it: its folder, or its repository and commit."""
        return f"hf://{self.origin.repo}@{self.origin.revision}" if self.origin else str(self.path)

    @cached_property
    def dimensions(self) -> Dimensions | None:
        """What config.json says of names and shapes; None where it does not say enough."""
        try:
            return parse_dimensions(dict(self.config), str(self.path / "config.json"))
        except ConfigError:
            return None

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(s.nbytes for s in self)

    @property
    def file_bytes(self) -> int:
        """Bytes of all shards, headers included: what the checkpoint takes on a disk."""
        return sum(f.size for f in self.files.values())

    def spec(self, name: str) -> TensorSpec:
        """The facts of one tensor. Raises MissingTensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise MissingTensor(f"{self.path}: tensor '{name}' is missing") from None

    def read(self, name: str) -> Tensor:
        """Read one whole tensor into fresh memory, in its stored dtype and shape."""
        spec = self.spec(name)
        return self._read_span(spec, 0, spec.nbytes).view(_torch_dtype(spec)).reshape(spec.shape)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows `start:stop` of the first dimension of a tensor (at least 1-D)."""
        spec = self.spec(name)
        if not spec.shape or not 0 <= start <= stop <= spec.shape[0]:
            raise IndexError(f"rows {start}:{stop} of {spec}")
        row = spec.nbytes // max(spec.shape[0], 1)
        data = self._read_span(spec, start * row, (stop - start) * row)
        return data.view(_torch_dtype(spec)).reshape(stop - start, *spec.shape[1:])

    def read_rows_at(self, name: str, rows: Sequence[int]) -> Tensor:
        """Read the rows of these numbers of a tensor (at least 1-D), each by itself."""
        spec = self.spec(name)
        if not spec.shape or (rows and not 0 <= min(rows) <= max(rows) < spec.shape[0]):
            raise IndexError(f"rows {min(rows)} to {max(rows)} of {spec}")
        shape = (len(rows), *spec.shape[1:])
        if not rows:
            return torch.empty(shape, dtype=_torch_dtype(spec))
        step = spec.stride or spec.row_bytes
        offsets = [spec.offset + row * step for row in rows]
        data = bytearray(b"".join(self.shards.slices(spec.file, offsets, spec.row_bytes)))
        if len(data) != len(rows) * spec.row_bytes:
            raise SourceChanged(f"{self.path / spec.file}: ends inside tensor '{name}'")
        return torch.frombuffer(data, dtype=torch.uint8).view(_torch_dtype(spec)).view(shape)

    def read_chunks(self, name: str, limit: int = 32 * 2**20) -> Iterator[tuple[int, Tensor]]:
        """Read a tensor in flat pieces of at most `limit` bytes: (first byte, 1-D piece) pairs."""
        spec = self.spec(name)
        size = torch.empty((), dtype=_torch_dtype(spec)).element_size()
        step = limit - limit % size
        for start in range(0, spec.nbytes, step):
            count = min(step, spec.nbytes - start)
            piece = self._read_span(spec, start, count)
            yield start, piece.view(_torch_dtype(spec))

    def digest(self) -> str:
        """SHA-256 that identifies this checkpoint without reading 160 GB.

        Covers config, every tensor's name, dtype, shape and place, file sizes, and 64 evenly spaced
        slices of 4 KiB from each file, so that a fine-tune of equal shapes differs. It says which
        checkpoint this is, not that every byte is intact; `verify` compares bytes. Read once.
        """
        return self._digest

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        if self.deltas is not None:
            sha.update(self.deltas.digest.encode())
        for spec in sorted(self, key=lambda s: s.name):
            sha.update(f"{spec}|{spec.file}|{spec.offset}\n".encode())
        for name in sorted(self.files):
            size = self.files[name].size
            sha.update(f"{name}|{size}\n".encode())
            offsets = [size * i // _DIGEST_SLICES for i in range(_DIGEST_SLICES)]
            for piece in self.shards.slices(name, offsets, _DIGEST_BYTES):
                sha.update(piece)
        return sha.hexdigest()

    def close(self) -> None:
        """Close the files; the checkpoint can still be read afterwards (they reopen)."""
        self.shards.close()

    def _read_span(self, spec: TensorSpec, start: int, count: int) -> Tensor:
        """Bytes `start:start + count` of a tensor, whose rows may lie apart in the file."""
        if not spec.stride or not count:
            return self._read_bytes(spec, spec.offset + start, count)
        row = spec.row_bytes
        first, last = start // row, (start + count - 1) // row
        span = torch.zeros((last - first + 1) * spec.stride, dtype=torch.uint8)
        held = (last - first) * spec.stride + row
        span[:held] = self._read_bytes(spec, spec.offset + first * spec.stride, held)
        rows = span.view(-1, spec.stride)[:, :row].reshape(-1)
        return rows[start - first * row :][:count].clone()

    def _read_bytes(self, spec: TensorSpec, offset: int, count: int) -> Tensor:
        data = memory_for(count, offset)
        if count:
            buffer: Any = data.numpy()
            self.shards.read_into(spec.file, memoryview(buffer), offset, spec.name)
        return data


def read_structure(
    folder: Path, header_of: Callable[[str], dict[str, TensorSpec]], names: Collection[str]
) -> tuple[Mapping[str, Any], Mapping[str, TensorSpec]]:
    """config.json and all tensors by name, index and headers in agreement.

    header_of(name) reads one shard's header; names: of all .safetensors files there are. Without
    an index they are one model where they are one file, or all parts of one series.
    Raises what `open_checkpoint` raises.
    """
    check_link(folder, "config.json")
    check_link(folder, INDEX_NAME)
    config = _with_pack_config(folder, read_json_object(folder / "config.json"))
    weight_map = _weight_map(folder)
    tensors: dict[str, TensorSpec] = {}
    for name, promised in _tensors_by_file(folder, weight_map, names).items():
        _check_file_name(folder, name)
        header = header_of(name)
        for tensor in header:
            if tensor in tensors:
                raise DuplicateTensor(
                    f"{folder}: tensor '{tensor}' is in {tensors[tensor].file} and in {name}"
                )
        if weight_map is not None:
            _check_against_index(folder, name, header, promised)
        tensors.update(header)
    return MappingProxyType(config), MappingProxyType(tensors)


def _with_pack_config(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """config.json with what AutoGPTQ keeps in a file of its own, where it says nothing itself."""
    check_link(folder, PACK_CONFIG_NAME)
    declared = config.get("quantization_config", {"quant_method": "gptq"})
    if not (folder / PACK_CONFIG_NAME).is_file() or not isinstance(declared, dict):
        return config
    told = read_json_object(folder / PACK_CONFIG_NAME).get("checkpoint_format")
    if told is None or declared.get("quant_method") != "gptq" or "checkpoint_format" in declared:
        return config
    return {**config, "quantization_config": {**declared, "checkpoint_format": told}}


def _weight_map(folder: Path) -> dict[str, str] | None:
    index_path = folder / INDEX_NAME
    if not index_path.exists():
        return None
    try:
        index = read_json_object(index_path, limit=MAX_INDEX_BYTES)
    except ConfigError as error:
        raise InvalidIndex(str(error)) from None
    weight_map = index.get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(v, str) for v in weight_map.values())
    ):
        raise InvalidIndex(f"{index_path}: 'weight_map' must map tensor names to file names")
    return weight_map


def files_without_index(folder: Path, names: Collection[str]) -> list[str]:
    """The shards of a checkpoint that has no index. Raises MissingShard where that is not clear."""
    if SINGLE_NAME in names:
        return [SINGLE_NAME]
    series = {(m[1], int(m[3])) for n in names if (m := _SERIES.fullmatch(n))}
    if len(series) == 1:
        ((stem, count),) = series
        parts = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
        if missing := [p for p in parts if p not in names]:
            raise MissingShard(f"{folder / missing[0]}: missing; all {count} parts are needed")
        return parts
    if len(names) == 1:
        return list(names)
    raise MissingShard(
        f"{folder}: holds neither {INDEX_NAME} nor {SINGLE_NAME}, nor the parts of one model alone"
    )


def _check_file_name(folder: Path, name: str) -> None:
    """A shard name must be a plain file name whose target stays with the checkpoint."""
    plain = (
        name not in ("", ".", "..")
        and not any(c in name for c in "/\\:\0")
        and name.isprintable()
        and len(name) <= 255
    )
    if not plain:
        raise UnsafePath(f"{folder}: index names {name[:200]!r}, which is not a plain file name")
    if not name.endswith(".safetensors"):
        raise UnsafePath(f"{folder}: index names '{name}', which is not a .safetensors file")


def check_link(folder: Path, name: str) -> None:
    """Refuse a file whose link leaves the folder. Raises UnsafePath."""
    target = real_path(folder / name)
    if not target.is_relative_to(link_root(folder)):
        raise UnsafePath(f"{folder / name}: is a link that leaves the folder ({target})")


def link_root(folder: Path) -> Path:
    """Where links may lead: the folder, or for a hub cache snapshot its repository's cache.

    The hub cache keeps snapshots/<revision>/<file> as links to ../../blobs/<digest>.
    """
    real = real_path(folder)
    return real.parent.parent if real.parent.name == "snapshots" else real


def _tensors_by_file(
    folder: Path, weight_map: Mapping[str, str] | None, names: Collection[str]
) -> dict[str, set[str]]:
    if weight_map is None:
        return {name: set() for name in files_without_index(folder, names)}
    promised: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        promised.setdefault(file, set()).add(tensor)
    return dict(sorted(promised.items()))


def _check_against_index(
    folder: Path, file: str, header: Mapping[str, TensorSpec], promised: set[str]
) -> None:
    for tensor in sorted(promised - header.keys())[:1]:
        raise MissingTensor(f"{folder / file}: lacks tensor '{tensor}' that the index promises")
    for tensor in sorted(header.keys() - promised)[:1]:
        raise UnexpectedTensor(f"{folder / file}: holds tensor '{tensor}' not in the index")


def _torch_dtype(spec: TensorSpec) -> torch.dtype:
    try:
        return torch_dtype(spec.dtype)
    except KeyError:
        raise UnknownDtype(
            f"{spec.file}: tensor '{spec}' has a dtype torch cannot hold; convert it first"
        ) from None
