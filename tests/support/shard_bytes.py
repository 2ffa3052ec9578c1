"""Build safetensors files byte by byte, honest ones and lying ones, without any library."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"


@dataclass
class StoredTensor:
    """One tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def raw_shard(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """Length, header, data. `header` is any JSON value or ready bytes; `length` may lie."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: object, shape: object, begin: object, end: object) -> dict[str, object]:
    """One header entry, unchecked."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def honest_shard(tensors: Mapping[str, StoredTensor]) -> bytes:
    """A correct file."""
    header: dict[str, object] = {}
    data = b""
    for name, tensor in tensors.items():
        end = len(data) + len(tensor.data)
        header[name] = entry(tensor.dtype, list(tensor.shape), len(data), end)
        data += tensor.data
    return raw_shard(header, data)


def split_shard(content: bytes) -> dict[str, StoredTensor]:
    """The tensors of a correct file, to be modified and written again."""
    length = struct.unpack("<Q", content[:8])[0]
    tensors = {}
    for name, fields in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + x for x in fields["data_offsets"])
            shape = tuple(fields["shape"])
            tensors[name] = StoredTensor(fields["dtype"], shape, content[begin:end])
    return tensors


@dataclass
class EditableCheckpoint:
    """A small checkpoint held in memory: change anything, then `write` it with a true index."""

    config: dict[str, Any]
    shards: dict[str, dict[str, StoredTensor]]

    @classmethod
    def read(cls, folder: Path) -> EditableCheckpoint:
        """Load a folder of shards."""
        return cls(
            json.loads((folder / "config.json").read_text()),
            {p.name: split_shard(p.read_bytes()) for p in sorted(folder.glob("*.safetensors"))},
        )

    def shard_of(self, name: str) -> dict[str, StoredTensor]:
        """The shard that holds a tensor."""
        return next(s for s in self.shards.values() if name in s)

    def __getitem__(self, name: str) -> StoredTensor:
        return self.shard_of(name)[name]

    def __setitem__(self, name: str, tensor: StoredTensor) -> None:
        """Replace a tensor, or put one into the last shard."""
        found = [s for s in self.shards.values() if name in s]
        (found[0] if found else self.shards[max(self.shards)])[name] = tensor

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return [n for s in self.shards.values() for n in s]

    def remove(self, name: str) -> None:
        """Take a tensor out."""
        del self.shard_of(name)[name]

    def rename(self, old: str, new: str) -> None:
        """Give a tensor another name."""
        shard = self.shard_of(old)
        shard[new] = shard.pop(old)

    def add(self, name: str, dtype: str, shape: tuple[int, ...], data: bytes) -> None:
        """Put a tensor into the last shard."""
        self.shards[max(self.shards)][name] = StoredTensor(dtype, shape, data)

    def write(self, folder: Path) -> Path:
        """Write config, index and shards; returns the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        weight_map = {n: file for file, tensors in self.shards.items() for n in tensors}
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        for file, tensors in self.shards.items():
            (folder / file).write_bytes(honest_shard(tensors))
        return folder
