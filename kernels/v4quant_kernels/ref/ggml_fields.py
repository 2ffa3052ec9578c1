"""Blocks of GGML types as integers and half-precision scales, and the bit fields they lie in.

`ggml_blocks` and `ggml_codebooks` have the layouts of the types.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Join = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Codebook:
    """Vectors of `vector` neighbouring weights that a type knows.

    grid: the class of `gguf.quants` that has their magnitudes, in the order of their indices.
    signs: "even" of a group of eight weights an even number is negative; "free" any are; "none"
    the grid has signs of its own. shift: weights that share an added +-1/8 (0: nothing is added).
    """

    grid: str
    vector: int
    signs: Literal["even", "free", "none"]
    shift: int = 0


@dataclass(frozen=True)
class BlockShape:
    """What an encoder must know of a type: ranges of the integers, the size of sub-blocks.

    unit: what `sc` counts, a power of two. odd_scales: `sc` takes odd numbers only. levels: the
    values of `q` in the order of their codes, where they are not all integers of the range.
    codebook: which vectors of `q` exist, where not all do.
    """

    block: int
    sub: int
    q: tuple[int, int]
    sc: tuple[int, int] | None = None
    has_minimum: bool = False
    unit: float = 1.0
    odd_scales: bool = False
    levels: tuple[int, ...] = ()
    codebook: Codebook | None = None

    @property
    def group(self) -> int:
        """Neighbouring weights whose codes are chosen together."""
        return 1 if self.codebook is None else 8

    @property
    def subs(self) -> int:
        """Sub-blocks a block."""
        return self.block // self.sub


@dataclass(frozen=True)
class Blocks:
    """B blocks of one type, taken apart.

    q: int8 `[B, block]`. d: float16 `[B]`. sc: int8 `[B, subs]`, None without sub-blocks.
    dmin: float16 `[B]`, None for symmetric types (q5_1: the minimum itself, which is added).
    m: int8 `[B, subs]`, None where `dmin` is not scaled. unit: as in `BlockShape`.
    """

    q: Tensor
    d: Tensor
    sc: Tensor | None = None
    dmin: Tensor | None = None
    m: Tensor | None = None
    unit: float = 1.0

    def step(self) -> Tensor:
        """float32 `[B, subs]`: the distance of neighbouring values (may be 0 or negative)."""
        d = self.d.float()[:, None]
        return d if self.sc is None else d * (self.sc.float() * self.unit)

    def offset(self) -> Tensor | None:
        """float32 `[B, subs]`: the value of q = 0; None where it is 0 by definition."""
        if self.dmin is None:
            return None
        dmin = self.dmin.float()[:, None]
        return dmin if self.m is None else -(dmin * self.m.float())

    def values(self) -> Tensor:
        """float32 `[B, block]`, rounded as the other decoders of the format round."""
        step, offset = self.step(), self.offset()
        q = self.q.float().view(*step.shape, -1)
        values = q.mul_(step[..., None])
        if offset is not None:
            values += offset[..., None]
        return values.view(self.q.shape)


def half_at(data: Tensor, at: int) -> Tensor:
    """float16 `[B]` from two bytes of each of uint8 `[B, bytes]`."""
    return data[:, at : at + 2].contiguous().view(torch.float16)[:, 0]


def half_bytes(half: Tensor) -> Tensor:
    """uint8 `[B, 2]` of float16 `[B]`."""
    return half.contiguous().view(torch.uint8).view(-1, 2)


def signed(x: Tensor, offset: int = 0) -> Tensor:
    """int8 of unsigned bytes, less an offset (wraps as two's complement does)."""
    return x.contiguous().view(torch.int8) - offset


def unsigned(x: Tensor, offset: int = 0) -> Tensor:
    """The inverse of `signed`."""
    return (x + offset).view(torch.uint8)


def join_fields(parts: Tensor, bits: int) -> Tensor:
    """Bytes `[..., width]` from uint8 `[..., 8/bits, width]` of `bits` each, the first lowest."""
    out = parts[..., 0, :].clone()
    for i in range(1, parts.shape[-2]):
        out |= parts[..., i, :] << (bits * i)
    return out


def split_fields(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `join_fields`: `[..., width]` to `[..., 8/bits, width]`."""
    shifts = range(0, 8, bits)
    mask = (1 << bits) - 1
    return torch.stack([(packed >> s) & mask for s in shifts], dim=-2)


Format = tuple[Callable[[Tensor], Blocks], Callable[[Blocks, Join], Tensor]]
"""From bytes to blocks, and back."""
