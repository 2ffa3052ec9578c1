"""llama.cpp's own quantizer, from a build of its library."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from v4quant_kernels.ggml_types import get_type

Encoder = Callable[[Tensor, str, Tensor | None], Tensor]
"""uint8 `[rows, bytes]` from float32 `[rows, K]`, a type's name and importance `[K]`."""


def quantizer(path: Path) -> Encoder:
    """`ggml_quantize_chunk` of a library (libggml-base.so; the Python package has it in lib/)."""
    # Lazily: a build of the quantizer alone leaves symbols open that are never called.
    library = ctypes.CDLL(str(path), mode=os.RTLD_LAZY)
    chunk = library.ggml_quantize_chunk
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    chunk.restype = ctypes.c_size_t

    def encode(x: Tensor, name: str, importance: Tensor | None) -> Tensor:
        kind = get_type(name)
        values = x.float().contiguous()
        weights = None if importance is None else importance.float().contiguous()
        out = torch.zeros(len(values), kind.row_bytes(values.shape[1]), dtype=torch.uint8)
        written = chunk(
            kind.type_id, values.data_ptr(), out.data_ptr(), 0, *values.shape,
            None if weights is None else weights.data_ptr(),
        )  # fmt: skip
        assert written == out.numel(), (name, written)
        return out

    return encode
