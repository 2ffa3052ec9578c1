"""QTensor: one weight matrix in coded form, independent of any file layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from v4quant_kernels.late import torch
from v4quant_kernels.scheme import Scheme

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class QTensor:
    """Codes and scales of one matrix `[N, K]`.

    codes
        e2m1: uint8 `[N, K/2]`, low nibble = even column.
        e4m3: float8_e4m3fn `[N, K]`.
        int:  uint8 `[N, K*bits/8]`, a little-endian bit stream along K of `q + 2^(bits-1)`
              (for 4 bits: low nibble = even column).
        bf16: bfloat16 `[N, K]`.
        ggml: uint8 `[N, K/block * block_bytes]`, blocks as GGUF stores them, scales inside.
    scale
        A multiplier in the scheme's own format, one per block, `[ceil(N/rows), ceil(K/columns)]`:
        float8_e8m0fnu, float8_e4m3fn, bfloat16 or float32; None for bf16
        and ggml.
        (`fp8` matrices of the Base releases hold float32 powers of two.)
    global_scale
        float32 scalar multiplier, or None. weight = element * scale * global_scale.
    """

    scheme: Scheme
    shape: tuple[int, int]
    codes: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales together."""
        parts = (self.codes, self.scale, self.global_scale)
        return sum(p.numel() * p.element_size() for p in parts if p is not None)

    def rows(self, start: int, stop: int) -> QTensor:
        """Rows start .. stop - 1; `start` is a multiple of the block's height."""
        height = self.scheme.block[0]
        assert start % height == 0, (start, height)
        scale = self.scale
        if scale is not None:
            scale = scale[start // height : -(-stop // height)]
        shape = (stop - start, self.shape[1])
        return replace(self, shape=shape, codes=self.codes[start:stop], scale=scale)

    @staticmethod
    def stacked(parts: Sequence[QTensor]) -> QTensor:
        """One matrix of parts that are rows of it, in turn."""
        first = parts[0]
        scales = [p.scale for p in parts if p.scale is not None]
        return replace(
            first,
            shape=(sum(p.shape[0] for p in parts), first.shape[1]),
            codes=torch.cat([p.codes for p in parts]),
            scale=torch.cat(scales) if scales else None,
        )

    def to(self, device: torch.device) -> QTensor:
        """The same matrix on another device."""
        scale = None if self.scale is None else self.scale.to(device)
        top = None if self.global_scale is None else self.global_scale.to(device)
        return replace(self, codes=self.codes.to(device), scale=scale, global_scale=top)
