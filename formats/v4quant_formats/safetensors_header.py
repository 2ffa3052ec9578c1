"""Strict reader of the safetensors header.

A file is 8 bytes of little-endian header length n, n bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}}` (plus `__metadata__`), then the data;
offsets count from byte 8 + n. Files are bytes from strangers, so nothing is believed before it is
checked: lengths against the file, spans against shape times dtype, and all spans together must tile
the data without gap or overlap. Each broken rule has its own exception (errors.py).
"""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from v4quant_formats.errors import (
    DuplicateTensor,
    FormatError,
    HeaderTooLarge,
    HeaderTruncated,
    InvalidHeaderJson,
    InvalidOffsets,
    InvalidShape,
    MissingShard,
    NotSafetensors,
    SizeMismatch,
    UnknownDtype,
)
from v4quant_formats.json_limits import MAX_JSON_VALUES, has_too_many_values
from v4quant_formats.spec import DTYPE_BITS, TensorSpec
from v4quant_formats.system import bytes_at, open_regular

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 8
MAX_ELEMENTS = 2**48
MAX_NAME_LENGTH = 1024
_FIELDS = frozenset(("dtype", "shape", "data_offsets"))

_FOREIGN_MAGIC = {
    b"PK\x03\x04": "a zip file (a PyTorch pickle archive?)",
    b"version ": "a Git LFS pointer; download the real file",
    b"<!DOCTYPE": "a web page; the download went wrong",
    b"<html": "a web page; the download went wrong",
    b"GGUF": "a GGUF file",
}


def read_header(path: Path) -> dict[str, TensorSpec]:
    """Read and check one shard's header.

    Returns tensors by name, in file order; `offset` counts from the start of the file. Raises the
    FormatError subclass of the first rule broken; never reads tensor data.
    """
    try:
        if path.exists() and not path.is_file():
            raise FormatError(f"{path}: is not a regular file; a shard must be one")
        with open_regular(path) as file:
            handle = file.fileno()
            return parse_header(
                path, os.fstat(handle).st_size, lambda start, count: bytes_at(handle, count, start)
            )
    except FileNotFoundError:
        raise MissingShard(f"{path}: shard is missing; download it or fix the index") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from None


def parse_header(path: Path, size: int, read: Callable[[int, int], bytes]) -> dict[str, TensorSpec]:
    """Check the header of a shard of `size` bytes, wherever it lies; `path` is for its name.

    read(start, count) -> those bytes, fewer at the end of the file. Raises as `read_header`.
    """
    length = _header_length(path, read(0, 16), size)
    text = read(8, length)
    if len(text) != length:
        raise HeaderTruncated(f"{path}: header ends after {len(text)} of {length} bytes")
    with _collector_paused():
        return _parse(path, text, data_start=8 + length, file_size=size)


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Half the time of a header of thousands of entries is the search for cycles it cannot have."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def _header_length(path: Path, prefix: bytes, size: int) -> int:
    # A header's length may begin like another format (640 bytes is 80 02, as pickles begin), but
    # only a safetensors file has its brace here.
    if prefix[8:9] != b"{":
        _refuse_foreign(path, prefix)
    if len(prefix) < 8:
        raise HeaderTruncated(f"{path}: {size} bytes is too short for a safetensors file")
    length: int = struct.unpack("<Q", prefix[:8])[0]
    if length > MAX_HEADER_BYTES:
        raise HeaderTooLarge(
            f"{path}: header length {length:,} is above the limit of {MAX_HEADER_BYTES:,} bytes; "
            "not a safetensors file, or damaged"
        )
    if length > size - 8:
        raise HeaderTruncated(
            f"{path}: header of {length:,} bytes does not fit the file of {size:,} bytes; "
            "truncated, download it again"
        )
    return length


def foreign_kind(prefix: bytes) -> str | None:
    """What a file is that begins so, where it is something that is taken for a model."""
    return next((what for magic, what in _FOREIGN_MAGIC.items() if prefix.startswith(magic)), None)


def _refuse_foreign(path: Path, prefix: bytes) -> None:
    if (what := foreign_kind(prefix)) is not None:
        raise NotSafetensors(f"{path}: not a safetensors file but {what}")
    if prefix[:1] == b"\x80" and len(prefix) > 1 and prefix[1] in range(2, 6):
        raise NotSafetensors(f"{path}: not a safetensors file but a Python pickle; refused")


def _parse(path: Path, text: bytes, data_start: int, file_size: int) -> dict[str, TensorSpec]:
    if has_too_many_values(text):
        raise HeaderTooLarge(
            f"{path}: header of {len(text):,} bytes holds more than {MAX_JSON_VALUES:,} values"
        )
    if not text.startswith(b"{"):
        raise InvalidHeaderJson(f"{path}: header does not start with '{{'")

    def refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise DuplicateTensor(f"{path}: name {twice[:200]!r} occurs twice in the header")
        return table

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=refuse_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InvalidHeaderJson(f"{path}: header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise InvalidHeaderJson(f"{path}: header is not a JSON object")
    _check_metadata(path, header.pop("__metadata__", {}))
    specs = [_tensor(path, name, entry, data_start) for name, entry in header.items()]
    specs.sort(key=lambda s: (s.offset, s.nbytes))
    _check_tiling(path, specs, data_start, file_size)
    return {s.name: s for s in specs}


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise InvalidHeaderJson(f"{path}: __metadata__ must map strings to strings")


def _tensor(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    def fail(kind: type[FormatError], text: str) -> NoReturn:
        raise kind(f"{path}: tensor {name[:200]!r}: {text}")

    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable():
        fail(InvalidHeaderJson, "name is empty, too long or not printable")
    if not isinstance(entry, dict) or entry.keys() != _FIELDS:
        fail(InvalidHeaderJson, "entry must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        fail(UnknownDtype, f"dtype {_short(dtype)} is not one the format defines")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_size, shape)):
        fail(InvalidShape, f"shape {_short(shape)} is not a list of non-negative integers")
    elements = 1
    for size in shape:
        elements *= size
        if elements > MAX_ELEMENTS:
            fail(InvalidShape, f"shape {_short(shape)} has too many elements")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        fail(InvalidOffsets, f"data_offsets {_short(offsets)} are not two non-negative integers")
    begin, end = offsets
    if end < begin:
        fail(InvalidOffsets, f"data_offsets end ({end}) before they begin ({begin})")
    if elements * DTYPE_BITS[dtype] != (end - begin) * 8:
        fail(SizeMismatch, f"{dtype} {shape} does not fill the {end - begin:,} bytes it spans")
    return TensorSpec(name, dtype, tuple(shape), path.name, data_start + begin)


def _short(value: Any) -> str:
    """A value for a message: short whatever it is, and never a walk down a deep nesting."""
    if isinstance(value, list):
        items = [x if isinstance(x, int | float | None) else type(x).__name__ for x in value[:8]]
        return f"{items}"[:80] + (" ..." if len(value) > 8 else "")
    if isinstance(value, dict):
        return "an object"
    return repr(value[:40] if isinstance(value, str) else value)[:80]


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_ELEMENTS * 8


def _check_tiling(path: Path, specs: list[TensorSpec], data_start: int, file_size: int) -> None:
    position = data_start
    for spec in specs:
        if spec.offset != position:
            what = "overlaps the tensor before it" if spec.offset < position else "follows a gap"
            raise InvalidOffsets(f"{path}: tensor '{spec.name}' {what} (byte {spec.offset:,})")
        position += spec.nbytes
    if position > file_size:
        last = next(s for s in specs if s.offset + s.nbytes > file_size)
        raise InvalidOffsets(
            f"{path}: tensor '{last.name}' ends beyond the file ({file_size:,} of {position:,} "
            "bytes are there); truncated, download it again"
        )
    if position < file_size:
        raise InvalidOffsets(f"{path}: {file_size - position:,} bytes after the last tensor")
