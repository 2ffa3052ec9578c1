"""Ways to damage a file, as disks, downloads and people do."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, float("nan"), "", "x", "../x", "/etc/passwd",
    [], [0], [-1, 4], [2**62, 8], [[1]], {}, {"a": 1}, "F8_E4M3", "I8", "BF16", "F4", "\x00",
]  # fmt: skip


def flip_bytes(path: Path, rng: random.Random) -> None:
    """Overwrite a few bytes anywhere."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 2, 8, 64))):
        if data:
            data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)


def flip_front(path: Path, rng: random.Random) -> None:
    """Overwrite bytes of the header, where they hurt most."""
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 3, 10))):
        if data:
            data[rng.randrange(min(len(data), 4000))] = rng.randrange(256)
    path.write_bytes(data)


def cut(path: Path, rng: random.Random) -> None:
    """Truncate."""
    os.truncate(path, rng.randrange(path.stat().st_size + 1))


def grow(path: Path, rng: random.Random) -> None:
    """Append bytes."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.choice((1, 7, 4096))))


def remove(path: Path, rng: random.Random) -> None:
    """Delete, or replace by a folder, a link or nothing."""
    path.unlink()
    kind = rng.randrange(4)
    if kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to("/dev/zero")
    elif kind == 3:
        path.write_bytes(b"")


def swap(path: Path, rng: random.Random) -> None:
    """Give the file another file's content."""
    others = [p for p in path.parent.iterdir() if p.is_file() and p != path]
    if others:
        shutil.copyfile(rng.choice(sorted(others)), path)


def lie_in_json(path: Path, rng: random.Random) -> None:
    """Change, drop or duplicate an entry of a JSON file or of a shard's header."""
    data = path.read_bytes()
    shard = path.suffix == ".safetensors"
    length = struct.unpack("<Q", data[:8])[0] if shard and len(data) > 8 else 0
    try:
        text = data[8 : 8 + length] if shard else data
        table = json.loads(text)
    except ValueError:
        return
    _lie(table, rng)
    text = json.dumps(table).encode()
    if shard:
        data = struct.pack("<Q", len(text)) + text + data[8 + length :]
    path.write_bytes(data if shard else text)


def _lie(table: Any, rng: random.Random) -> None:
    """Walk to a random place and put a lie there."""
    for _ in range(rng.randrange(1, 5)):
        keys = list(table) if isinstance(table, dict) else list(range(len(table)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(table[key], dict | list) and rng.random() < 0.8:
            table = table[key]
            continue
        if rng.random() < 0.15 and isinstance(table, dict):
            table[rng.choice(("new", "layers.0.attn.wq_a.weight", "../x"))] = table.pop(key)
        elif isinstance(table[key], int) and rng.random() < 0.5:
            table[key] += rng.choice((-1, 1, 8, 2**40))
        else:
            table[key] = rng.choice(LIES)
        return


MUTATIONS: list[Callable[[Path, random.Random], None]] = [
    flip_bytes, flip_front, cut, grow, remove, swap, lie_in_json, lie_in_json, lie_in_json,
]  # fmt: skip
