"""What a seed of the fuzzer is: a good file, and who reads it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TEXT = "The same words again, and a few others. "


@dataclass(frozen=True)
class Reader:
    """make(folder) writes a good file and returns its path; read(path) reads it as a command does.

    Reading ends, or raises a V4QuantError.
    """

    name: str
    make: Callable[[Path], Path]
    read: Callable[[Path], object]


def written(name: str, content: str | bytes) -> Callable[[Path], Path]:
    """A maker of a file with this content."""

    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return make
