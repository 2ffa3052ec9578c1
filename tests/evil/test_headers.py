"""Hostile safetensors headers: each is refused by its own rule, quickly, in one line, in little
memory; beside each stands a benign twin that opens, so that the attack is what is refused."""

from __future__ import annotations

import json
import pickle
import struct
import time
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from tests.support.shard_bytes import entry, raw_shard
from v4quant_formats import errors
from v4quant_formats.safetensors_header import MAX_HEADER_BYTES, read_header
from v4quant_formats.system import peak_rss_bytes

Kind = type[errors.FormatError]
OK = entry("U8", [4], 0, 4)
NEXT = entry("U8", [4], 4, 8)
GOOD = raw_shard({"t": OK}, b"data")


def one(dtype: object = "U8", shape: object = (4,), begin: object = 0, end: object = 4) -> bytes:
    return raw_shard({"t": entry(dtype, shape, begin, end)}, b"data")


def text(header: str, data: bytes = b"data") -> bytes:
    return raw_shard(header.encode(), data)


def zip_file() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": 1}))
    return buffer.getvalue()


DEEP = '{"t":' + "[" * 100_000 + "]" * 100_000 + "}"
DEEP_FIELD = '{"t":{"dtype":%s,"shape":[4],"data_offsets":[0,4]}}'
TAIL = ',"shape":[4],"data_offsets":[0,4]}}'

# (name, evil bytes, error, benign twin)
HEADERS: list[tuple[str, bytes, Kind, bytes]] = [
    ("empty file", b"", errors.HeaderTruncated, raw_shard({})),
    ("seven bytes", GOOD[:7], errors.HeaderTruncated, GOOD),
    ("half a header", GOOD[:30], errors.HeaderTruncated, GOOD),
    ("length beyond the file", raw_shard({"t": OK}, b"data", 10_000), errors.HeaderTruncated, GOOD),
    ("length above the limit", raw_shard({"t": OK}, b"data", MAX_HEADER_BYTES + 1),
     errors.HeaderTooLarge, GOOD),
    ("length 2^64 - 1", raw_shard({"t": OK}, b"data", 2**64 - 1), errors.HeaderTooLarge, GOOD),
    ("length -8", raw_shard({"t": OK}, b"data", 2**64 - 8), errors.HeaderTooLarge, GOOD),
    ("length too small", raw_shard({"t": OK}, b"data", 20), errors.InvalidHeaderJson, GOOD),
    ("length zero", raw_shard({"t": OK}, b"data", 0), errors.InvalidHeaderJson, GOOD),
    ("leading space", text(' {"t":' + json.dumps(OK) + "}"), errors.InvalidHeaderJson,
     text('{"t":' + json.dumps(OK) + "}   ")),
    ("not an object", text("[1]"), errors.InvalidHeaderJson, GOOD),
    ("a second value", text(json.dumps({"t": OK}) + "{}"), errors.InvalidHeaderJson, GOOD),
    ("deep nesting", text(DEEP), errors.InvalidHeaderJson, GOOD),
    ("deep dtype", text(DEEP_FIELD % ("[" * 300 + "]" * 300)), errors.UnknownDtype, GOOD),
    ("not UTF-8", raw_shard(b'{"t\xff":{}}'), errors.InvalidHeaderJson,
     raw_shard({"t\xe9": OK}, b"data")),
    ("metadata not an object", raw_shard({"__metadata__": "x", "t": OK}, b"data"),
     errors.InvalidHeaderJson, raw_shard({"__metadata__": {}, "t": OK}, b"data")),
    ("metadata of numbers", raw_shard({"__metadata__": {"a": 1}, "t": OK}, b"data"),
     errors.InvalidHeaderJson, raw_shard({"__metadata__": {"a": "1"}, "t": OK}, b"data")),
    ("entry is a list", raw_shard({"t": [1]}), errors.InvalidHeaderJson, GOOD),
    ("entry lacks dtype", raw_shard({"t": {"shape": [4], "data_offsets": [0, 4]}}, b"data"),
     errors.InvalidHeaderJson, GOOD),
    ("entry has more", raw_shard({"t": {**OK, "strides": [1]}}, b"data"),
     errors.InvalidHeaderJson, GOOD),
    ("empty name", raw_shard({"": OK}, b"data"), errors.InvalidHeaderJson, GOOD),
    ("newline in a name", raw_shard({"a\nError: b": OK}, b"data"), errors.InvalidHeaderJson, GOOD),
    ("escape in a name", raw_shard({"\x1b[2J": OK}, b"data"), errors.InvalidHeaderJson, GOOD),
    ("NUL in a name", raw_shard({"a\0b": OK}, b"data"), errors.InvalidHeaderJson, GOOD),
    ("direction override", raw_shard({"a\u202eb": OK}, b"data"), errors.InvalidHeaderJson, GOOD),
    ("half a surrogate pair", text('{"\\ud800":' + json.dumps(OK) + "}"),
     errors.InvalidHeaderJson, GOOD),
    ("endless name", raw_shard({"n" * 2000: OK}, b"data"), errors.InvalidHeaderJson,
     raw_shard({"n" * 1000: OK}, b"data")),
    ("same name twice", text(f'{{"t":{json.dumps(OK)},"t":{json.dumps(NEXT)}}}', b"datadata"),
     errors.DuplicateTensor, raw_shard({"t": OK, "u": NEXT}, b"datadata")),
    ("same field twice", text('{"t":{"dtype":"U8","dtype":"I8"' + TAIL), errors.DuplicateTensor,
     text('{"t":{"dtype":"U8"' + TAIL)),
    ("unknown dtype", one("U7"), errors.UnknownDtype, one("I8")),
    ("dtype in small letters", one("u8"), errors.UnknownDtype, one("BOOL")),
    ("dtype is a number", one(8), errors.UnknownDtype, GOOD),
    ("dtype is a novel", one("U8" * 10_000), errors.UnknownDtype, GOOD),
    ("shape is a number", one(shape=4), errors.InvalidShape, one(shape=[4])),
    ("shape of floats", one(shape=[4.0]), errors.InvalidShape, one(shape=[2, 2])),
    ("shape of booleans", one(shape=[True, 4]), errors.InvalidShape, one(shape=[1, 4])),
    ("shape of strings", one(shape=["4"]), errors.InvalidShape, GOOD),
    ("negative size", one(shape=[-4]), errors.InvalidShape, GOOD),
    ("two negatives", one(shape=[-2, -2]), errors.InvalidShape, GOOD),
    ("product overflows", one(shape=[2**32, 2**32]), errors.InvalidShape, GOOD),
    ("product wraps to 4", one(shape=[2**40, 2**26]), errors.InvalidShape, GOOD),
    ("size beyond 64 bits", one(shape=[2**64 + 4]), errors.InvalidShape, GOOD),
    ("zero hides an overflow", one(shape=[2**47, 2**47, 0], end=0), errors.InvalidShape,
     raw_shard({"t": entry("U8", [2**20, 0], 0, 0)})),
    ("a size of 4,000 digits", text('{"t":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}'
                                    % ("9" * 4000)), errors.InvalidShape, GOOD),
    ("a size of 100,000 digits", text('{"t":{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}}'
                                      % ("9" * 100_000)), errors.InvalidHeaderJson, GOOD),
    ("too many dimensions", one(shape=[1] * 9 + [4]), errors.InvalidShape,
     one(shape=[1] * 7 + [4])),
    ("a million dimensions", one(shape=[1] * 1_000_000), errors.InvalidShape, GOOD),
    ("offsets are a number", raw_shard({"t": {**OK, "data_offsets": 4}}, b"data"),
     errors.InvalidOffsets, GOOD),
    ("one offset", raw_shard({"t": {**OK, "data_offsets": [4]}}, b"data"),
     errors.InvalidOffsets, GOOD),
    ("three offsets", raw_shard({"t": {**OK, "data_offsets": [0, 4, 4]}}, b"data"),
     errors.InvalidOffsets, GOOD),
    ("negative offset", one(begin=-4, end=0), errors.InvalidOffsets, GOOD),
    ("reversed offsets", one(begin=4, end=0), errors.InvalidOffsets, GOOD),
    ("float offsets", one(begin=0.0, end=4.0), errors.InvalidOffsets, GOOD),
    ("boolean offset", one(begin=False, end=4), errors.InvalidOffsets, GOOD),
    ("offset of infinity", text('{"t":{"dtype":"U8","shape":[4],"data_offsets":[0,1e999]}}'),
     errors.InvalidOffsets, GOOD),
    ("offset beyond 64 bits", one(begin=2**64, end=2**64 + 4), errors.InvalidOffsets, GOOD),
    ("span too long", one(shape=[3]), errors.SizeMismatch, GOOD),
    ("span too short", one(shape=[5]), errors.SizeMismatch, GOOD),
    ("half bytes that do not fill", one("F4", [7]), errors.SizeMismatch, one("F4", [8])),
    ("scalar of no bytes", one(shape=[], begin=0, end=0), errors.SizeMismatch,
     one("F32", shape=[])),
    ("overlap", raw_shard({"t": OK, "u": entry("U8", [4], 2, 6)}, b"datada"),
     errors.InvalidOffsets, raw_shard({"t": OK, "u": NEXT}, b"datadata")),
    ("same bytes twice", raw_shard({"t": OK, "u": OK}, b"data"), errors.InvalidOffsets, GOOD),
    ("inside another", raw_shard({"t": entry("U8", [8], 0, 8), "u": entry("U8", [2], 2, 4)},
                                 b"datadata"), errors.InvalidOffsets, GOOD),
    ("gap", raw_shard({"t": OK, "u": entry("U8", [4], 5, 9)}, b"datadatad"),
     errors.InvalidOffsets, raw_shard({"u": NEXT, "t": OK}, b"datadata")),
    ("gap at the start", one(begin=4, end=8), errors.InvalidOffsets, GOOD),
    ("ends beyond the file", raw_shard({"t": OK}, b"dat"), errors.InvalidOffsets, GOOD),
    ("trailing bytes", raw_shard({"t": OK}, b"data+"), errors.InvalidOffsets, GOOD),
    ("bytes and no tensor", raw_shard({}, b"data"), errors.InvalidOffsets, raw_shard({})),
    ("a pickle", pickle.dumps({"weight": [1, 2, 3]}), errors.NotSafetensors, GOOD),
    ("an old pickle", pickle.dumps({"weight": 1}, protocol=2), errors.NotSafetensors, GOOD),
    ("a zip", zip_file(), errors.NotSafetensors, GOOD),
    ("an LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
     errors.NotSafetensors, GOOD),
    ("a web page", b"<!DOCTYPE html><html>Not found</html>", errors.NotSafetensors, GOOD),
    ("a GGUF file", b"GGUF\x03\x00\x00\x00" + bytes(24), errors.NotSafetensors, GOOD),
]  # fmt: skip


@pytest.mark.parametrize(("name", "evil", "kind", "twin"), HEADERS, ids=[h[0] for h in HEADERS])
def test_refused_and_twin_opens(
    name: str, evil: bytes, kind: Kind, twin: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(evil)
    started, memory = time.perf_counter(), peak_rss_bytes()
    with pytest.raises(errors.FormatError) as caught:
        read_header(path)
    assert time.perf_counter() - started < 2
    assert peak_rss_bytes() - memory < 200 * 2**20
    message = str(caught.value)
    assert caught.type is kind, message
    assert str(path) in message
    assert message.isprintable() and len(message) < 700, message
    if b'{"t":{' in evil and kind in (errors.InvalidShape, errors.SizeMismatch):
        assert "'t'" in message
    path.write_bytes(twin)
    read_header(path)


def test_huge_file_with_a_tiny_header_is_not_read(tmp_path: Path) -> None:
    """A sparse terabyte: only the header may be touched."""
    path = tmp_path / "model.safetensors"
    size = 2**40
    header = raw_shard({"t": entry("U8", [size], 0, size)})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + size)
    started, memory = time.perf_counter(), peak_rss_bytes()
    assert read_header(path)["t"].nbytes == size
    assert time.perf_counter() - started < 1 and peak_rss_bytes() - memory < 2**25


def test_announced_header_is_not_allocated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES) + b"{}")
    memory = peak_rss_bytes()
    with pytest.raises(errors.HeaderTruncated):
        read_header(path)
    assert peak_rss_bytes() - memory < 2**24


@pytest.mark.parametrize("filler", [b"[],", b"{},", b"1,", b'"a",', b"[[]],"])
def test_header_that_would_grow_in_memory(filler: bytes, tmp_path: Path) -> None:
    """Thirty megabytes of empty lists would be a gigabyte of Python objects."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw_shard(b'{"a":[' + filler * (30_000_000 // len(filler)) + b"1]}"))
    started, memory = time.perf_counter(), peak_rss_bytes()
    with pytest.raises(errors.HeaderTooLarge, match="more than 4,000,000 values"):
        read_header(path)
    assert time.perf_counter() - started < 1 and peak_rss_bytes() - memory < 2**26


def test_header_of_many_tensors(tmp_path: Path) -> None:
    """Twenty thousand tensors, more than any release has in a shard, take a moment."""
    path = tmp_path / "model.safetensors"
    table = {f"layers.{i}.weight": entry("U8", [1, 1], i, i + 1) for i in range(20_000)}
    path.write_bytes(raw_shard(table, bytes(20_000)))
    assert len(read_header(path)) == 20_000


@pytest.mark.parametrize("length", [640, 896, 1152, 1408, 0x04034B50 & 0xFFFF])
def test_lengths_that_look_like_other_formats(length: int, tmp_path: Path) -> None:
    """640 is 80 02, the first bytes of a pickle; such a file is perfectly good."""
    path = tmp_path / "model.safetensors"
    text_ = json.dumps({"t": OK}).encode()
    path.write_bytes(raw_shard(text_.ljust(length), b"data"))
    assert list(read_header(path)) == ["t"]


def test_things_that_are_no_files(tmp_path: Path) -> None:
    import os

    (tmp_path / "folder.safetensors").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    for name in ("folder.safetensors", "pipe.safetensors"):
        with pytest.raises(errors.FormatError, match=name):
            read_header(tmp_path / name)
    with pytest.raises(errors.MissingShard, match=r"absent\.safetensors"):
        read_header(tmp_path / "absent.safetensors")


def test_every_truncation_and_every_flipped_byte_is_survived(tmp_path: Path) -> None:
    """Nothing but FormatError may come out of a damaged header."""
    path = tmp_path / "model.safetensors"
    table: dict[str, Any] = {"a": entry("BF16", [2, 2], 0, 8), "b": entry("F32", [1], 8, 12)}
    content = raw_shard(table, bytes(12))
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(errors.FormatError):
            read_header(path)
    for at in range(len(content) - 12):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[at] ^= flip
            path.write_bytes(damaged)
            try:
                read_header(path)
            except errors.FormatError as error:
                assert str(error).isprintable()
