"""The two factors of a delta, each a part of a tensor of the adapter's file.

A delta is s * (left @ right), left [out, r] and right [r, in]. Of a plain matrix they are lora_B
and lora_A; of an expert in a fused parameter, rows and columns of them (experts.py), turned where
PEFT counts them the other way round. Only those are kept, however large the tensor is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from v4quant_formats.shard_files import LocalShards
from v4quant_formats.spec import TensorSpec, torch_dtype
from v4quant_kernels.late import torch

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 32 * 2**20


@dataclass(frozen=True)
class Factor:
    """Rows and columns of a stored matrix, transposed where `turned`."""

    spec: TensorSpec
    rows: range
    columns: range
    turned: bool = False

    @classmethod
    def whole(cls, spec: TensorSpec, turned: bool = False) -> Factor:
        """All of a matrix."""
        return cls(spec, range(spec.shape[0]), range(spec.shape[1]), turned)

    @property
    def shape(self) -> tuple[int, int]:
        """Of what is read."""
        shape = len(self.rows), len(self.columns)
        return shape[::-1] if self.turned else shape

    def read(self, shards: LocalShards) -> Tensor:
        """float64, in pieces of whole rows of which the columns are kept."""
        spec, columns = self.spec, self.columns
        step = max(1, _PIECE // spec.row_bytes)
        kept: list[Tensor] = []
        for start in range(self.rows.start, self.rows.stop, step):
            count = min(step, self.rows.stop - start)
            data = torch.empty(count * spec.row_bytes, dtype=torch.uint8)
            buffer: Any = data.numpy()
            offset = spec.offset + start * spec.row_bytes
            shards.read_into(spec.file, memoryview(buffer), offset, spec.name)
            rows = data.view(torch_dtype(spec.dtype)).view(count, spec.shape[1])
            kept.append(rows[:, columns.start : columns.stop : columns.step].double())
        value = torch.cat(kept)
        return value.mT if self.turned else value


@dataclass(frozen=True)
class Product:
    """scaling * (left [out, r] @ right [r, in]): what is added to a matrix."""

    left: Factor
    right: Factor
    scaling: float

    @property
    def shape(self) -> tuple[int, int]:
        """[out, in]."""
        return self.left.shape[0], self.right.shape[1]

    def rows(self, shards: LocalShards, rows: slice | Tensor) -> Tensor:
        """float64: rows of the product."""
        return self.scaling * (self.left.read(shards)[rows] @ self.right.read(shards))

    def norm(self, shards: LocalShards) -> float:
        """Frobenius norm, from the small products left^T left and right right^T."""
        left, right = self.left.read(shards), self.right.read(shards)
        square = float(((left.mT @ left) * (right @ right.mT)).sum())
        return abs(self.scaling) * math.sqrt(max(square, 0.0))
