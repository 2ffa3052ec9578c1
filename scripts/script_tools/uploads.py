"""An uploaded shard as it passes by: hashed, counted, a few modules cut out, the rest dropped."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Uploaded:
    """What is kept of an uploaded object: its size, its header (and that with its length, as
    bytes), and some tensors by name."""

    size: int
    front: bytes = b""
    header: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, bytes] = field(default_factory=dict)


class UploadStream:
    """An uploaded shard passing by: hashed, counted, samples cut out."""

    def __init__(self, seed: int, samples: int) -> None:
        """Keeps `samples` modules, chosen by `seed`."""
        self._seed, self._samples = seed, samples
        self.sha, self.kept = hashlib.sha256(), Uploaded(0)
        self._front = b""
        self._cuts: list[tuple[int, int, str]] = []
        self._parts: dict[str, bytearray] = {}

    def add(self, data: bytes) -> None:
        """The next bytes."""
        self.sha.update(data)
        start, self.kept.size = self.kept.size, self.kept.size + len(data)
        if not self.kept.header:
            self._front += data
            if len(self._front) < 8 or len(self._front) < 8 + self._length():
                return
            length = self._length()
            self.kept.front = self._front[: 8 + length]
            self.kept.header = json.loads(self.kept.front[8:])
            for name in self._wanted(self.kept.header):
                first, last = self.kept.header[name]["data_offsets"]
                self._cuts.append((8 + length + first, 8 + length + last, name))
                self._parts[name] = bytearray()
            start, data, self._front = 0, self._front, b""
        for first, last, name in self._cuts:
            if first < start + len(data) and last > start:
                self._parts[name] += data[max(0, first - start) : last - start]

    def _length(self) -> int:
        length: int = struct.unpack("<Q", self._front[:8])[0]
        return length

    def end(self) -> Uploaded:
        """What is kept."""
        self.kept.tensors = {name: bytes(part) for name, part in self._parts.items()}
        return self.kept

    def _wanted(self, header: dict[str, Any]) -> set[str]:
        """Tensors of a shard's header that are kept: whole modules, by the seed."""
        modules = sorted({n.rpartition(".")[0] for n in header if n != "__metadata__"})
        rng = random.Random(f"{self._seed}|{modules[:1]}|{len(modules)}")
        chosen = set(rng.sample(modules, min(self._samples, len(modules))))
        return {n for n in header if n.rpartition(".")[0] in chosen and n != "__metadata__"}
