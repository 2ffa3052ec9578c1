"""Schemes: how the numbers of one weight matrix are coded.

A scheme says four things: the element format, how many bits one element takes, which block of the
matrix shares a scale, and the number format of that scale. To add a number format, add a row to
`SCHEMES`, a module under `ref/` with `quantize` and `dequantize`, and a line in `ref/codec.py`.

Every matrix is `[out, in]` = `[N, K]`; blocks are `(rows, columns)` of it, and a matrix that is not
a multiple of a 1xG block is refused (128x128 tiles may be ragged at the edge, as in the release).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from v4quant_kernels.errors import UnsupportedScheme

Element = Literal["e2m1", "e4m3", "int", "bf16", "ggml"]
ScaleFormat = Literal["e8m0", "e4m3", "bf16", "f32", "none"]


@dataclass(frozen=True)
class Scheme:
    """How a weight matrix is coded. `block` is (rows, columns) sharing one scale."""

    name: str
    element: Element
    bits: int
    block: tuple[int, int]
    scale: ScaleFormat
    has_global_scale: bool = False
    block_bytes: int = 0  # ggml: a block's bytes, which hold elements and scales together

    @property
    def group_size(self) -> int:
        """Columns (input channels) sharing one scale."""
        return self.block[1]

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a weight costs, scales included (one-off global scales excluded)."""
        if self.block_bytes:
            return 8 * self.block_bytes / self.block[1]
        scale_bits = {"e8m0": 8, "e4m3": 8, "bf16": 16, "f32": 32, "none": 0}[self.scale]
        return self.bits + scale_bits / (self.block[0] * self.block[1])


def _integer(bits: int, group: int) -> Scheme:
    return Scheme(f"int{bits}-g{group}", "int", bits, (1, group), "bf16")


def _ggml(name: str, bits: int, block: int, block_bytes: int) -> Scheme:
    return Scheme(name, "ggml", bits, (1, block), "none", block_bytes=block_bytes)


SCHEMES: dict[str, Scheme] = {
    s.name: s
    for s in (
        Scheme("mxfp4", "e2m1", 4, (1, 32), "e8m0"),
        Scheme("mxfp8", "e4m3", 8, (1, 32), "e8m0"),
        Scheme("nvfp4", "e2m1", 4, (1, 16), "e4m3", has_global_scale=True),
        Scheme("fp8", "e4m3", 8, (128, 128), "e8m0"),
        _integer(8, 32),
        _integer(8, 128),
        _integer(4, 32),
        _integer(4, 64),
        _integer(4, 128),
        _integer(3, 64),
        _integer(3, 128),
        _integer(2, 64),
        _integer(2, 128),
        Scheme("bf16", "bf16", 16, (1, 1), "none"),
        _ggml("q8_0", 8, 32, 34),
        _ggml("q6_k", 6, 256, 210),
        _ggml("q5_k", 5, 256, 176),
        _ggml("q4_k", 4, 256, 144),
        _ggml("q3_k", 3, 256, 110),
        _ggml("q2_k", 2, 256, 84),
        _ggml("q5_1", 5, 32, 24),
        _ggml("q5_0", 5, 32, 22),
        _ggml("q4_0", 4, 32, 18),
    )
}


def get_scheme(name: str) -> Scheme:
    """Look a scheme up by name. Raises UnsupportedScheme naming the ones that exist."""
    try:
        return SCHEMES[name]
    except KeyError:
        known = ", ".join(SCHEMES)
        raise UnsupportedScheme(f"unknown scheme '{name}'; choose one of: {known}") from None
