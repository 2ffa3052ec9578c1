"""TensorSpec: one tensor's facts without its data, and the dtype tables of the containers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.late import torch

# Bits per element of every dtype the safetensors format defines.
DTYPE_BITS: dict[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
}  # fmt: skip

# What torch calls those that it can hold.
TORCH_NAMES: dict[str, str] = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U16": "uint16", "U32": "uint32", "U64": "uint64", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_STORED = {v: k for k, v in TORCH_NAMES.items()}


def torch_dtype(dtype: str) -> torch.dtype:
    """What a tensor of a stored dtype is read as. Raises KeyError.

    A matrix [N, K] in a block type of GGUF is bytes [N, bytes of a row], whose meaning the type
    says. No safetensors file may use such a dtype.
    """
    found = getattr(torch, "uint8" if block_type(dtype) else TORCH_NAMES[dtype])
    assert isinstance(found, torch.dtype), dtype
    return found


def stored_dtype(dtype: torch.dtype) -> str:
    """What a tensor of a dtype is stored as. Raises KeyError."""
    return _STORED[str(dtype).removeprefix("torch.")]


@dataclass(frozen=True)
class TensorSpec:
    """Name, safetensors dtype and shape of a tensor, and where its bytes are.

    `file` is the shard's name inside the checkpoint folder; `offset` counts from the start of that
    file. Both are empty (`""`, 0) for a tensor that is planned and not yet written.
    `is_f4`: the file calls these bytes pairs of safetensors' F4.
    `stride`: bytes from one row to the next where something else lies between them; 0 for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0
    stride: int = 0
    is_f4: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (of the first dimension) of a non-empty tensor."""
        return self.nbytes // self.shape[0]

    @property
    def numel(self) -> int:
        """Number of elements (1 for a scalar)."""
        return math.prod(self.shape)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of data."""
        return self.numel * DTYPE_BITS.get(self.dtype, 8) // 8

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} {list(self.shape)}"
