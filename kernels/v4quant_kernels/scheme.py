"""Schemes: how the numbers of one weight matrix are coded.

A scheme is one row that answers every question the rest of the program asks about a number format:
the element format, how many bits one element takes, which block of the matrix shares a scale, the
number format of that scale, which containers hold it, who solves it, what it can hold exactly.
Code outside the arithmetic itself asks these facts and never compares names. To add a number
format, add a row to `SCHEMES` (for a type of GGUF, to `ggml_types.GGML_TYPES`, whose block types
are schemes too) and its arithmetic: a module under `ref/` with `quantize` and `dequantize`, and a
line in `codec.py`.

Every matrix is `[out, in]` = `[N, K]`; blocks are `(rows, columns)` of it, and a matrix that is not
a multiple of a 1xG block is refused (128x128 tiles may be ragged at the edge, as in the release).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.ggml_types import GGML_TYPES, GgmlType, TextNeed, fitting_type
from v4quant_kernels.near_names import did_you_mean

Element = Literal["e2m1", "e4m3", "int", "bf16", "ggml"]
ScaleFormat = Literal["e8m0", "e4m3", "bf16", "f32", "none"]
CoderKind = Literal["", "integer", "block"]

ALL_OCTAVES = 255
"""More than lie between any two E8M0 scales: MXFP4 is held exactly, whatever its scales are."""


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is coded. `block` is (rows, columns) sharing one scale.

    formats: the containers that hold it, the one taken by default first; none for schemes that
    are only read, or only stand in for others.
    keeps_negative_zero: whether -0 stays -0.
    mxfp4_octaves: MXFP4 is recoded without a search, and every group of it exactly that lies at
    most so many octaves below the largest of its block (`cast.py` has the arithmetic); None for
    schemes that need a search.
    fits_mxfp4: a search finds MXFP4's very values where a block's scales allow it.
    coder: the kind of codes that error feedback can solve for; "" for schemes without a solver.
    wider: a scheme that holds exactly what this one cannot.
    text: whether a search wants statistics of a text, or is refused without ("needed").
    """

    name: str
    element: Element
    bits: int
    block: tuple[int, int]
    scale: ScaleFormat
    has_global_scale: bool = False
    block_bytes: int = 0  # block types: a block's bytes, which hold elements and scales together
    formats: tuple[str, ...] = ()
    keeps_negative_zero: bool = True
    mxfp4_octaves: int | None = None
    fits_mxfp4: bool = False
    coder: CoderKind = ""
    wider: str = ""
    text: TextNeed = ""

    @property
    def group_size(self) -> int:
        """Columns (input channels) sharing one scale."""
        return self.block[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included (one-off global scales excluded)."""
        if self.is_block_type:
            return 8 * self.block_bytes / self.block[1]
        scale_bits = {"e8m0": 8, "e4m3": 8, "bf16": 16, "f32": 32, "none": 0}[self.scale]
        return self.bits + scale_bits / (self.block[0] * self.block[1])

    @property
    def is_block_type(self) -> bool:
        """Whether codes and scales lie together in blocks of bytes, one tensor a matrix."""
        return self.block_bytes > 0

    @property
    def holds_mxfp4(self) -> bool:
        """Whether every MXFP4 matrix is held exactly, whatever its scales are."""
        return self.is_plain or self.mxfp4_octaves == ALL_OCTAVES

    @property
    def may_hold_mxfp4(self) -> bool:
        """Whether some MXFP4 matrices are held exactly: converting tells which."""
        return self.holds_mxfp4 or self.mxfp4_octaves is not None or self.fits_mxfp4

    @property
    def is_plain(self) -> bool:
        """Whether weights are stored as numbers, without scales."""
        return self.scale == "none" and not self.is_block_type

    @property
    def is_packed_integer(self) -> bool:
        """Whether codes are integers in a stream of bits, with a scale for each group."""
        return self.element == "int"

    def tiled(self, tile: tuple[int, int]) -> Scheme:
        """This scheme as a release with tiles of (rows, columns) has it; itself without tiles."""
        if self.block[0] == 1 or self.block == tile:
            return self
        return replace(self, name=f"{self.name}-{tile[0]}x{tile[1]}", block=tile)

    def fitting(self, columns: int) -> Scheme | None:
        """The scheme that rows of `columns` get where this one is asked for.

        Rows that do not divide into whole groups get what llama.cpp stores instead of a block type;
        None where there is nothing.
        """
        if self.block[0] > 1 or columns % self.group_size == 0:
            return self
        if not self.is_block_type:
            return None
        kind = GGML_TYPES[fitting_type(self.name, columns)]
        return SCHEMES[kind.name] if kind.is_block_type else None


def _integer(bits: int, group: int, mxfp4_octaves: int | None = None, wider: str = "") -> Scheme:
    return Scheme(
        f"int{bits}-g{group}", "int", bits, (1, group), "bf16", formats=("compressed-tensors",),
        keeps_negative_zero=False, mxfp4_octaves=mxfp4_octaves, coder="integer", wider=wider,
    )  # fmt: skip


def _blocks(kind: GgmlType) -> Scheme:
    """The scheme of a block type of GGUF."""
    return Scheme(
        kind.name, "ggml", kind.bits, (1, kind.block), "none", block_bytes=kind.block_bytes,
        formats=("gguf",) if kind.offered else (), keeps_negative_zero=False, coder=kind.coder,
        fits_mxfp4=kind.fits_mxfp4, text=kind.text,
    )  # fmt: skip


_MXFP4 = ("deepseek", "compressed-tensors", "gguf")
# How far below its block's top a group of MXFP4 may lie: E4M3 scales reach from 2^8 down to 2^-9;
# an E4M3 element holds 6 * 64 and its subnormals 14 octaves less; 6 * 16 = 96 is below 127 and
# leaves an 8-bit integer 3 octaves. With a scale for every 32 columns there is one group a block.
_NVFP4, _FP8, _INT8 = 17, 14, 3

SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("mxfp4", "e2m1", 4, (1, 32), "e8m0", formats=_MXFP4, mxfp4_octaves=ALL_OCTAVES),
        Scheme(
            "mxfp8", "e4m3", 8, (1, 32), "e8m0",
            formats=("compressed-tensors",), mxfp4_octaves=ALL_OCTAVES,
        ),
        Scheme(
            "nvfp4", "e2m1", 4, (1, 16), "e4m3",
            has_global_scale=True, formats=("modelopt",), mxfp4_octaves=_NVFP4,
        ),
        Scheme(
            "fp8", "e4m3", 8, (128, 128), "e8m0",
            formats=("deepseek",), mxfp4_octaves=_FP8, wider="mxfp8",
        ),
        _integer(8, 32, ALL_OCTAVES),
        _integer(8, 128, _INT8, wider="int8-g32"),
        _integer(4, 32),
        _integer(4, 64),
        _integer(4, 128),
        _integer(3, 64),
        _integer(3, 128),
        _integer(2, 64),
        _integer(2, 128),
        Scheme("bf16", "bf16", 16, (1, 1), "none", formats=("deepseek",)),
    )
}  # fmt: skip
for _kind in GGML_TYPES.values():
    if _kind.is_block_type:  # MXFP4, which is more than a type of GGUF, has its row above
        SCHEMES.setdefault(_kind.name, _blocks(_kind))

MXFP4 = SCHEMES["mxfp4"]
"""What the release's experts are stored in, and casts (`cast.py`) start from."""


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name. Raises UnsupportedScheme naming the ones that exist."""
    try:
        return SCHEMES[name]
    except KeyError:
        meant = did_you_mean(name, [s.name for s in SCHEMES.values() if s.formats])
        known = ", ".join(SCHEMES)
        raise UnsupportedScheme(f"unknown scheme '{name}'; {meant}choose one of: {known}") from None


def register(row: Scheme | GgmlType) -> Scheme:
    """Add a number format at run time; everything that lists or asks schemes knows it from then on.

    A row of GGUF's types becomes a scheme as well. Its arithmetic must exist (`codec.py`). Raises
    UnsupportedScheme for a name that is taken.
    """
    if row.name in SCHEMES or row.name in GGML_TYPES:
        raise UnsupportedScheme(f"there is a scheme '{row.name}' already; choose another name")
    if isinstance(row, GgmlType):
        GGML_TYPES[row.name] = row
        row = _blocks(row)
    SCHEMES[row.name] = row
    return row
