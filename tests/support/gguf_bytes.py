"""Build GGUF files byte by byte, honest ones and lying ones, without any library."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

Pairs = Sequence[tuple[str | bytes, bytes]]


def text(value: str | bytes, length: int | None = None) -> bytes:
    """A string with its length, which may lie."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw) if length is None else length) + raw


def u32(value: int) -> bytes:
    """A pair's value: type 4 and the number."""
    return struct.pack("<II", 4, value)


def string(value: str | bytes, length: int | None = None) -> bytes:
    """A pair's value: type 8 and a string."""
    return struct.pack("<I", 8) + text(value, length)


def array(element: int, length: int, data: bytes) -> bytes:
    """A pair's value: type 9, element type, announced length, elements."""
    return struct.pack("<IIQ", 9, element, length) + data


@dataclass(frozen=True)
class Line:
    """A line of the tensor table; `dimensions` as written, last first."""

    name: str | bytes = "t"
    dimensions: tuple[int, ...] = (8,)
    type_id: int = 0
    offset: int = 0
    count: int | None = None

    def bytes(self) -> bytes:
        """As it stands in the file; `count` of dimensions may lie."""
        count = len(self.dimensions) if self.count is None else self.count
        sizes = struct.pack(f"<{len(self.dimensions)}Q", *self.dimensions)
        return (
            text(self.name)
            + struct.pack("<I", count)
            + sizes
            + struct.pack("<IQ", self.type_id, self.offset)
        )


def gguf_bytes(
    lines: Sequence[Line] = (Line(),),
    pairs: Pairs = (),
    data: int = 32,
    *,
    version: int = 3,
    tensors: int | None = None,
    keys: int | None = None,
    alignment: int = 32,
) -> bytes:
    """A file of `data` zero bytes of tensor data; counts may lie."""
    counts = (
        len(lines) if tensors is None else tensors,
        len(pairs) if keys is None else keys,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts)
    head += b"".join(text(key) + value for key, value in pairs)
    head += b"".join(line.bytes() for line in lines)
    return head + bytes(-len(head) % alignment) + bytes(data)
