"""The tensor types of GGUF files: one row says everything there is to know about a type.

llama.cpp stores a matrix as rows of blocks. Which blocks a row may use depends on its length: the
types of 256 columns need multiples of that, the others of 32 or 64; `fallback` names the type
llama.cpp takes instead when a row does not fit. The bits inside a block are arithmetic and have
modules of their own (`ref/ggml_blocks.py`, `ggml.py`); all other tables are comprehensions over
this one. To add a type, add a row here and its arithmetic there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.near_names import did_you_mean

BlockCoding = Literal["", "block"]
TextNeed = Literal["", "wanted", "needed"]


@dataclass(frozen=True)
class GgmlType:
    """A tensor type of GGUF: `block` elements of a row in `block_bytes` bytes.

    type_id: ggml's number of the type. bits: what one element takes without scales, rounded down.
    fallback: the type for rows that are not a multiple of `block`; None where there is none.
    file_type: llama.cpp's number (`general.file_type`) for a file most of whose experts have this
    type; None for types that only stand in for others or hold plain numbers.
    coder: the kind of codes (`calibration.rounding.coders.CODERS`) that a solver finds for it.
    offered: experts may be asked to have this type. dense: other matrices may.
    fits_mxfp4: some MXFP4 matrices come out exactly.
    codebook: weights come in vectors of a table, which makes the search for codes slow.
    text: whether statistics of a text are "needed" or "wanted". So few bits must go where they
    count: without a text searched codes have more than twice the KL divergence with one, and
    llama.cpp refuses all these types without an importance matrix.
    """

    name: str
    type_id: int
    block: int
    block_bytes: int
    bits: int
    fallback: str | None = None
    file_type: int | None = None
    coder: BlockCoding = ""
    offered: bool = True
    dense: bool = True
    fits_mxfp4: bool = False
    codebook: bool = False
    text: TextNeed = ""

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.block_bytes / self.block

    @property
    def is_block_type(self) -> bool:
        """Whether elements and scales lie together in blocks of bytes."""
        return self.block > 1

    @property
    def dtype(self) -> str:
        """How tensor tables name the type."""
        return self.name.upper()

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row. Raises UnsupportedScheme unless whole blocks fill it."""
        if columns % self.block:
            raise UnsupportedScheme(
                f"GGUF type '{self.name}' stores blocks of {self.block} columns and cannot hold "
                f"rows of {columns}; {self._advice()}"
            )
        return columns // self.block * self.block_bytes

    def _advice(self) -> str:
        return f"use '{self.fallback}'" if self.fallback else "use 'bf16'"


def _plain(name: str, type_id: int, nbytes: int) -> GgmlType:
    return GgmlType(name, type_id, 1, nbytes, 8 * nbytes, offered=False, dense=name == "bf16")


def _stand_in(name: str, type_id: int, block_bytes: int, bits: int) -> GgmlType:
    """A type of 32 columns, for rows that the type asked for cannot hold."""
    return GgmlType(
        name, type_id, 32, block_bytes, bits, "bf16", coder="block", offered=False, dense=False
    )


def _codebook(
    name: str, type_id: int, block_bytes: int, bits: int, file_type: int, text: TextNeed = ""
) -> GgmlType:
    """A type of 256 columns whose weights come in vectors of a table."""
    return GgmlType(
        name, type_id, 256, block_bytes, bits, "iq4_nl", file_type, "block", codebook=True,
        text=text,
    )  # fmt: skip


# Numbers as in llama.cpp's ggml.h (ggml_type) and llama.h (llama_ftype).
GGML_TYPES: dict[str, GgmlType] = {
    t.name: t
    for t in (
        _plain("f32", 0, 4),
        _plain("f16", 1, 2),
        _plain("bf16", 30, 2),
        GgmlType("mxfp4", 39, 32, 17, 4, file_type=38, dense=False),
        GgmlType("q8_0", 8, 32, 34, 8, "bf16", 7, "block", fits_mxfp4=True),
        GgmlType("q6_k", 14, 256, 210, 6, "q8_0", 18, "block", fits_mxfp4=True),
        GgmlType("q5_k", 13, 256, 176, 5, "q5_1", 16, "block", fits_mxfp4=True),
        GgmlType("q4_k", 12, 256, 144, 4, "q5_0", 14, "block"),
        GgmlType("q3_k", 11, 256, 110, 3, "q4_0", 11, "block"),
        GgmlType("q2_k", 10, 256, 84, 2, "q4_0", 10, "block"),
        GgmlType("q2_0", 42, 64, 18, 2, "q4_0", 41, "block"),
        # llama.cpp's file types IQ2_M and IQ3_S are those of the types IQ2_S and IQ3_S.
        GgmlType("iq4_xs", 23, 256, 136, 4, "iq4_nl", 30, "block"),
        _codebook("iq3_s", 21, 110, 3, 26),
        _codebook("iq3_xxs", 18, 98, 3, 23, "wanted"),
        _codebook("iq2_s", 22, 82, 2, 29, "wanted"),
        _codebook("iq2_xs", 17, 74, 2, 20, "wanted"),
        _codebook("iq2_xxs", 16, 66, 2, 19, "wanted"),
        _codebook("iq1_m", 29, 56, 1, 31, "needed"),
        _codebook("iq1_s", 19, 50, 1, 24, "needed"),
        GgmlType("iq4_nl", 20, 32, 18, 4, "bf16", 25, "block"),
        _stand_in("q5_1", 7, 24, 5),
        _stand_in("q5_0", 6, 22, 5),
        _stand_in("q4_0", 2, 18, 4),
    )
}

BY_ID = {kind.type_id: kind for kind in GGML_TYPES.values()}
"""The types by ggml's numbers."""


def get_type(name: str) -> GgmlType:
    """Look a type up by its lower-case name. Raises UnsupportedScheme naming those that exist."""
    try:
        return GGML_TYPES[name]
    except KeyError:
        meant, known = did_you_mean(name, GGML_TYPES), ", ".join(GGML_TYPES)
        raise UnsupportedScheme(
            f"unknown GGUF type '{name}'; {meant}choose one of: {known}"
        ) from None


def block_type(dtype: str) -> GgmlType | None:
    """The block type a tensor table names so ("Q4_K"), or None for everything else."""
    kind = GGML_TYPES.get(dtype.lower()) if dtype.isupper() else None
    return kind if kind is not None and kind.is_block_type else None


def has_codebook(name: str) -> bool:
    """Whether a scheme's weights are searched in a codebook."""
    return name in GGML_TYPES and GGML_TYPES[name].codebook


def fitting_type(name: str, columns: int) -> str:
    """The type for rows of `columns`: the wanted one, or what llama.cpp takes instead."""
    while columns % get_type(name).block:
        name = get_type(name).fallback or "bf16"
    return name
