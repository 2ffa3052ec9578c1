"""Bit fields joined into bytes: what torch does in a pass a field, done in one."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from v4quant_kernels.native import compiled

U8 = NDArray[np.uint8]


def join(parts: Tensor, bits: int) -> Tensor:
    """Bytes `[..., width]` from uint8 `[..., 8 / bits, width]` of `bits` each, the first lowest."""
    out = torch.empty(*parts.shape[:-2], parts.shape[-1], dtype=torch.uint8)
    loop = {1: _join_bits, 2: _join_pairs, 4: _join_nibbles}[bits]
    width = parts.shape[-1]
    loop(parts.reshape(-1, 8 // bits * width).numpy(), width, out.view(-1, width).numpy())
    return out


@compiled
def _join_nibbles(x: U8, w: int, out: U8) -> None:
    for r in range(x.shape[0]):
        for j in range(w):
            out[r, j] = x[r, j] | (x[r, w + j] << 4)


@compiled
def _join_pairs(x: U8, w: int, out: U8) -> None:
    for r in range(x.shape[0]):
        for j in range(w):
            low = x[r, j] | (x[r, w + j] << 2)
            out[r, j] = low | (x[r, 2 * w + j] << 4) | (x[r, 3 * w + j] << 6)


@compiled
def _join_bits(x: U8, w: int, out: U8) -> None:
    for r in range(x.shape[0]):
        for j in range(w):
            low = x[r, j] | (x[r, w + j] << 1) | (x[r, 2 * w + j] << 2) | (x[r, 3 * w + j] << 3)
            high = x[r, 4 * w + j] | (x[r, 5 * w + j] << 1) | (x[r, 6 * w + j] << 2)
            out[r, j] = low | (high << 4) | (x[r, 7 * w + j] << 7)
