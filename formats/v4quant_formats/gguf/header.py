"""A GGUF file's header, read as the stranger's bytes it is.

Everything in it is a promise about lengths: so many pairs, a string of so many bytes, an array of
so many elements, a tensor of so many rows at such an offset. Each is checked against what the file
can hold before memory is taken for it, and tensors must lie inside the file, aligned, side by side.
The gguf package's reader maps the file and believes it, which is why it is not used here.

Layout: magic `GGUF`, version, tensor count, pair count; pairs (name, type, value); tensor table
(name, dimensions last first, type, offset from the data's start); data at the next multiple of
`general.alignment`. Numbers are little-endian.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from v4quant_formats.errors import (
    DuplicateTensor,
    FormatError,
    HeaderTooLarge,
    HeaderTruncated,
    InvalidOffsets,
    InvalidShape,
    MissingShard,
    NotGguf,
    UnknownDtype,
    WrongMetadata,
)
from v4quant_formats.safetensors_header import foreign_kind
from v4quant_formats.system import open_regular
from v4quant_kernels.ggml_types import BY_ID

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_PAIRS = 65_536
MAX_TENSORS = 262_144
MAX_HEADER_BYTES = 256 * 2**20  # V4's vocabulary and merges take 5 MB
MAX_ELEMENTS = 4_000_000  # of all arrays together; a byte becomes eight in memory
MAX_NAME = 1024
_DEFAULT_ALIGNMENT = 32
_MAX_DIMENSIONS = 4

_OLD_MAGIC = (b"lmgg", b"fmgg", b"tjgg")
# GGUF value type -> struct format; 8 is a string, 9 an array.
_SCALARS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: `shape` counts elements, rows first; `offset` from the file's start.

    `dtype` is llama.cpp's name of the type, upper-case.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufHeader:
    """Key-value pairs and tensors of one file, in file order.

    types: each pair's GGUF value type, and that of an array's elements.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    types: dict[str, tuple[int, int | None]] = field(default_factory=dict)


def read_gguf_header(path: Path) -> GgufHeader:
    """Read and check a file's header; no tensor data is read.

    Raises NotGguf, HeaderTruncated, HeaderTooLarge, WrongMetadata, DuplicateTensor, UnknownDtype,
    InvalidShape, InvalidOffsets, MissingShard or FormatError, naming the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise FormatError(f"{path}: is not a regular file")
        with open_regular(path) as file:
            return parse_gguf_header(path, file, os.fstat(file.fileno()).st_size)
    except FileNotFoundError:
        raise MissingShard(f"{path}: file is missing") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_gguf_header(path: Path, file: BinaryIO, size: int) -> GgufHeader:
    """The header of a file of `size` bytes that is read from elsewhere; raises as
    `read_gguf_header` does."""
    return _read(_Cursor(path, file, size))


class _Cursor:
    """Reads forward, never past the file's end or the header's limit."""

    def __init__(self, path: Path, file: BinaryIO, size: int) -> None:
        self.path, self.size, self.position = path, size, 0
        self.elements = 0
        self._file = file

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > self.size - self.position:
            raise HeaderTruncated(
                f"{self.path}: ends inside its header (wants {count:,} bytes at "
                f"{self.position:,} of {self.size:,}); the download is incomplete or damaged"
            )
        if self.position + count > MAX_HEADER_BYTES:
            raise HeaderTooLarge(f"{self.path}: header is above {MAX_HEADER_BYTES:,} bytes")
        data = self._file.read(count)
        if len(data) != count:
            raise HeaderTruncated(f"{self.path}: ends inside its header")
        self.position += count
        return data

    def number(self, form: str) -> Any:
        """One number by its struct format."""
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def peek_number(self) -> int:
        """The next number of 32 bits, which stays to be read."""
        value = int(self.number("I"))
        self.position -= 4
        self._file.seek(-4, os.SEEK_CUR)
        return value

    def text(self, limit: int = MAX_HEADER_BYTES) -> str:
        """A length-prefixed UTF-8 string."""
        length = self.number("Q")
        if length > limit:
            raise HeaderTooLarge(f"{self.path}: a name of {length:,} bytes in its header")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise WrongMetadata(f"{self.path}: a string in its header is not UTF-8") from None


def _read(cursor: _Cursor) -> GgufHeader:
    path = cursor.path
    magic = cursor.take(4) if cursor.size >= 4 else b""
    if magic != MAGIC:
        what = foreign_kind(magic + cursor.take(min(12, cursor.size - len(magic))))
        if what is not None:
            raise NotGguf(f"{path}: not a GGUF file but {what}")
        if magic in _OLD_MAGIC:
            raise NotGguf(f"{path}: is GGML from before GGUF, which no V4 model was written in")
        raise NotGguf(f"{path}: is not a GGUF file (begins with {magic!r})")
    version = cursor.number("I")
    if version not in VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "big-endian" if swapped in VERSIONS else f"version {version}"
        raise NotGguf(f"{path}: GGUF {kind} is not read (little-endian 2 and 3 are)")
    count, pairs = cursor.number("Q"), cursor.number("Q")
    if count > MAX_TENSORS or pairs > MAX_PAIRS:
        raise HeaderTooLarge(f"{path}: announces {count:,} tensors and {pairs:,} keys")
    metadata: dict[str, Any] = {}
    types: dict[str, tuple[int, int | None]] = {}
    for _ in range(pairs):
        key = cursor.text(MAX_NAME)
        if key in metadata:
            raise WrongMetadata(f"{path}: key {key[:80]!r} occurs twice")
        kind = cursor.number("I")
        element = cursor.peek_number() if kind == _ARRAY else None
        metadata[key], types[key] = _value(cursor, key, kind), (kind, element)
    table = [_tensor_line(cursor) for _ in range(count)]
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise WrongMetadata(
            f"{path}: general.alignment is {str(alignment)[:40]!r}, expected a power of two from 8"
        )
    return GgufHeader(metadata, _place(cursor, table, alignment), types)


def _value(cursor: _Cursor, key: str, kind: int) -> Any:
    if kind in _SCALARS:
        return cursor.number(_SCALARS[kind])
    if kind == _STRING:
        return cursor.text()
    if kind != _ARRAY:
        raise WrongMetadata(f"{cursor.path}: key {key[:80]!r} has the unknown type {kind}")
    element, length = cursor.number("I"), cursor.number("Q")
    cursor.elements += length
    if cursor.elements > MAX_ELEMENTS:
        raise HeaderTooLarge(f"{cursor.path}: key {key[:80]!r} announces {length:,} elements")
    if element == _STRING:
        return [cursor.text() for _ in range(length)]
    if element not in _SCALARS:
        raise WrongMetadata(f"{cursor.path}: key {key[:80]!r} is an array of type {element}")
    form = _SCALARS[element]
    data = cursor.take(length * struct.calcsize(form))
    return list(struct.unpack(f"<{length}{form}", data))


@dataclass(frozen=True)
class _Line:
    """One line of the tensor table."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset: int


def _tensor_line(cursor: _Cursor) -> _Line:
    name = cursor.text(MAX_NAME)
    dimensions = cursor.number("I")
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise InvalidShape(f"{cursor.path}: tensor {name[:80]!r} has {dimensions} dimensions")
    sizes = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions))
    return _Line(name, tuple(reversed(sizes)), cursor.number("I"), cursor.number("Q"))


def _place(cursor: _Cursor, table: list[_Line], alignment: int) -> dict[str, GgufTensor]:
    start = cursor.position + -cursor.position % alignment
    tensors: dict[str, GgufTensor] = {}
    for line in table:
        where = f"{cursor.path}: tensor {line.name[:80]!r}"
        if line.name in tensors:
            raise DuplicateTensor(f"{where} occurs twice")
        tensors[line.name] = _one(line, where, start, alignment, cursor.size)
    ordered = sorted(tensors.values(), key=lambda t: t.offset)
    for left, right in pairwise(ordered):
        if left.offset + left.nbytes > right.offset:
            raise InvalidOffsets(
                f"{cursor.path}: tensors {left.name[:80]!r} and {right.name[:80]!r} overlap"
            )
    return tensors


def _stored_type(type_id: int, where: str) -> tuple[str, int, int]:
    """Name of a type, elements and bytes of its blocks: ours, or one that the package knows."""
    ours = BY_ID.get(type_id)
    if ours is not None:
        return ours.dtype, ours.block, ours.block_bytes
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError:
        raise UnknownDtype(f"{where} has the unknown type {type_id}") from None
    return kind.name, *GGML_QUANT_SIZES[kind]


def _one(line: _Line, where: str, start: int, alignment: int, size: int) -> GgufTensor:
    dtype, block, block_bytes = _stored_type(line.type_id, where)
    elements = 1
    for length in line.shape:
        elements *= length
        if length == 0 or elements > 2**50:
            raise InvalidShape(f"{where} has the shape {list(line.shape)}")
    if line.shape[-1] % block:
        raise InvalidShape(
            f"{where} has rows of {line.shape[-1]} elements, no multiple of {dtype}'s {block}"
        )
    nbytes = elements // block * block_bytes
    if line.offset % alignment:
        raise InvalidOffsets(f"{where} begins at {line.offset}, not aligned to {alignment}")
    if start + line.offset + nbytes > size:
        raise InvalidOffsets(
            f"{where} ends at byte {start + line.offset + nbytes:,} of {size:,}; the download is "
            "incomplete or the header is wrong"
        )
    return GgufTensor(line.name, dtype, line.shape, start + line.offset, nbytes)
