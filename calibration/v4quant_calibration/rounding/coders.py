"""coders: what the solvers need of a number format, by the kind of its codes.

Every kind has a search that needs no more than the matrix, codes for GPTQ's pass, refinement, and a
way from and to coded matrices; how codes look inside (`gptq.Codes`, `block_codes.BlockCodes`) is
their own business. `CODERS` has one coder for each kind that a scheme may name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from v4quant_calibration.rounding import block_codes, refine
from v4quant_calibration.rounding.block_codes import BlockCodes
from v4quant_calibration.rounding.block_gptq import block_gptq
from v4quant_calibration.rounding.block_refine import block_refine
from v4quant_calibration.rounding.fieldwise import choose
from v4quant_calibration.rounding.gptq import Codes, Grid, gptq
from v4quant_calibration.rounding.measure import measured
from v4quant_kernels import codec
from v4quant_kernels.errors import UnsupportedScheme
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref.pack import pack_bits, unpack_bits
from v4quant_kernels.scale_search import (
    QuantizedMatrix,
    can_search,
    search_dense,
    search_mxfp4,
)
from v4quant_kernels.scheme import Scheme

C = TypeVar("C")


class Coder(Protocol[C]):
    """A number format with error feedback. Matrices `[B, K, N]`, moments `[B, K, K]`."""

    def search(self, matrix: QTensor | Tensor, importance: Tensor | None) -> QuantizedMatrix:
        """The best codes without error feedback of a coded matrix or float32 values `[N, K]`.

        importance: second moments of the inputs `[K]`, the weights of the columns' squared errors.
        """

    def gptq(self, target: Tensor, grams: Tensor) -> C:
        """Codes by one pass with error feedback."""

    def refine(self, target: Tensor, grams: Tensor, start: C, sweeps: int) -> C:
        """Better codes; the error of no row rises."""

    def values(self, codes: C) -> Tensor:
        """What codes stand for, `[B, K, N]`."""

    def scaled(self, codes: C, factor: Tensor) -> C:
        """Codes whose rows' scales are multiplied by a factor `[B, N]` and stored again."""

    def choose(self, mask: Tensor, codes: C, others: C) -> C:
        """`codes` in the rows where mask `[B, N]` holds, `others` elsewhere."""

    def read(self, batch: Sequence[Sequence[QTensor]], device: torch.device) -> C:
        """Codes of coded matrices, those of one member of the batch stacked."""

    def write(self, codes: C, index: int, heights: Sequence[int]) -> list[QTensor]:
        """Coded matrices of one member of the batch, cut at their heights."""


@dataclass(frozen=True)
class IntegerCoder:
    """Integers in groups with BF16 scales."""

    scheme: Scheme

    def search(self, matrix: QTensor | Tensor, importance: Tensor | None) -> QuantizedMatrix:
        """As the protocol says: exact for MXFP4 onto four bits and fewer, else a grid of scales."""
        if isinstance(matrix, Tensor):
            return search_dense(matrix, self.scheme, importance)
        if can_search(matrix, self.scheme):
            return search_mxfp4(matrix, self.scheme, importance)
        return search_dense(codec.dequantize(matrix), self.scheme, importance)

    @property
    def _grid(self) -> Grid:
        return Grid(self.scheme.bits, self.scheme.group_size)

    def gptq(self, target: Tensor, grams: Tensor) -> Codes:
        """As the protocol says."""
        return gptq(target, grams, self._grid)

    def refine(self, target: Tensor, grams: Tensor, start: Codes, sweeps: int) -> Codes:
        """As the protocol says."""
        return refine.refine(target, grams, start, self._grid, sweeps)

    def values(self, codes: Codes) -> Tensor:
        """As the protocol says."""
        return codes.values(self.scheme.group_size)

    def scaled(self, codes: Codes, factor: Tensor) -> Codes:
        """As the protocol says."""
        return codes.scaled(factor)

    def choose(self, mask: Tensor, codes: Codes, others: Codes) -> Codes:
        """As the protocol says."""
        return choose(mask, codes, others)

    def read(self, batch: Sequence[Sequence[QTensor]], device: torch.device) -> Codes:
        """As the protocol says."""
        integers, scales = [], []
        for matrices in batch:
            rows = [unpack_bits(q.codes, q.scheme.bits, q.shape[1]).float() for q in matrices]
            integers.append(torch.cat(rows).mT)
            scales.append(torch.cat([q.scale.float() for q in matrices if q.scale is not None]).mT)
        found = (torch.stack(parts).to(device).contiguous() for parts in (integers, scales))
        return Codes(*found)

    def write(self, codes: Codes, index: int, heights: Sequence[int]) -> list[QTensor]:
        """As the protocol says."""
        integers, scale = codes.integers[index].mT, codes.scale[index].mT
        result = []
        cut = list(heights)
        for part, factors in zip(integers.split(cut), scale.split(cut), strict=True):
            packed = pack_bits(part.to(torch.int8).contiguous(), self.scheme.bits)
            shape = (part.shape[0], part.shape[1])
            result.append(QTensor(self.scheme, shape, packed, factors.bfloat16().contiguous()))
        return result


@dataclass(frozen=True)
class BlockCoder:
    """GGUF's block types."""

    scheme: Scheme

    def search(self, matrix: QTensor | Tensor, importance: Tensor | None) -> QuantizedMatrix:
        """As the protocol says: the encoder's search, on the CPU."""
        values = matrix if isinstance(matrix, Tensor) else codec.dequantize(matrix)
        values = values.cpu()
        return measured(values, codec.quantize(values, self.scheme, importance=importance))

    def gptq(self, target: Tensor, grams: Tensor) -> BlockCodes:
        """As the protocol says."""
        return block_gptq(target, grams, self.scheme.name)

    def refine(self, target: Tensor, grams: Tensor, start: BlockCodes, sweeps: int) -> BlockCodes:
        """As the protocol says."""
        return block_refine(target, grams, start, self.scheme.name, sweeps)

    def values(self, codes: BlockCodes) -> Tensor:
        """As the protocol says."""
        return codes.values()

    def scaled(self, codes: BlockCodes, factor: Tensor) -> BlockCodes:
        """As the protocol says."""
        return codes.scaled(factor)

    def choose(self, mask: Tensor, codes: BlockCodes, others: BlockCodes) -> BlockCodes:
        """As the protocol says."""
        return choose(mask, codes, others)

    def read(self, batch: Sequence[Sequence[QTensor]], device: torch.device) -> BlockCodes:
        """As the protocol says."""
        return block_codes.join([block_codes.read_codes(matrices, device) for matrices in batch])

    def write(self, codes: BlockCodes, index: int, heights: Sequence[int]) -> list[QTensor]:
        """As the protocol says."""
        return block_codes.write_codes(codes, index, heights, self.scheme)


CODERS: dict[str, Callable[[Scheme], Coder[Any]]] = {"integer": IntegerCoder, "block": BlockCoder}
"""The coder of each kind of codes (`Scheme.coder`)."""


def coder_of(scheme: Scheme) -> Coder[Any]:
    """The coder of a scheme. Raises UnsupportedScheme for one that has none."""
    if scheme.coder not in CODERS:
        raise UnsupportedScheme(
            f"'{scheme.name}' cannot be solved: error feedback is for integers and GGUF's block "
            "types; FP4 and FP8 schemes are cast from MXFP4, most of them exactly"
        )
    return CODERS[scheme.coder](scheme)
