"""The older form of importance matrices, `imatrix.dat`, which many repositories still hold.

Little-endian: a number of entries; for each the length of its tensor's name, the name, over how
many calls it was taken, a number of values, and the values, float32: means of squares times calls.
What follows the entries (the last chunk, the data set's name) is not needed. Stacks of experts are
one run of values, and an expert without tokens has the same value everywhere. (Source:
save_imatrix_legacy in llama.cpp's tools/imatrix/imatrix.cpp.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from v4quant_formats.errors import FormatError
from v4quant_formats.system import open_regular
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

_MOST_ENTRIES = 1 << 20
_LONGEST_NAME = 256
_INT = struct.Struct("<i")


def looks_like_dat(path: Path) -> bool:
    """Whether a file begins with a plausible number of entries and a tensor's name."""
    try:
        with open_regular(path) as file:
            return 0 < _integer(file) <= _MOST_ENTRIES and _name(file).endswith(".weight")
    except (OSError, ValueError):
        return False


def read_dat(path: Path) -> Iterator[tuple[str, Tensor, int]]:
    """(tensor's name, sums float32 `[values]`, calls), an entry at a time, as stored.

    Raises FormatError for a file that ends early or holds impossible lengths.
    """
    try:
        size = path.stat().st_size
        with open_regular(path) as file:
            for _ in range(_integer(file)):
                name, calls, count = _name(file), _integer(file), _integer(file)
                if calls < 0 or not 0 < count <= (size - file.tell()) // 4:
                    raise ValueError(
                        f"'{name}' is said to have {count} values, not so many are left"
                    )
                yield (
                    name,
                    torch.frombuffer(bytearray(file.read(4 * count)), dtype=torch.float32),
                    calls,
                )
    except (OSError, ValueError) as error:
        raise FormatError(
            f"{path}: cannot be read as an importance matrix ({error}); get the file again"
        ) from None


def _integer(file: BinaryIO) -> int:
    data = file.read(_INT.size)
    if len(data) < _INT.size:
        raise ValueError("it ends early")
    return int(_INT.unpack(data)[0])


def _name(file: BinaryIO) -> str:
    length = _integer(file)
    if not 0 < length <= _LONGEST_NAME:
        raise ValueError(f"a name of {length} bytes")
    return file.read(length).decode("utf-8")
