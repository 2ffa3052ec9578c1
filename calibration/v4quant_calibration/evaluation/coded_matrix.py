"""coded_matrix: one matrix of a candidate beside its reference's.

Both are read some rows at a time and measured; and the reference's is coded again as the candidate
codes it, by plain rounding, which tells what an error or a gain would be without any defect.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from v4quant_calibration.evaluation.weight_defects import ratio, squares
from v4quant_calibration.evaluation.weight_gains import Gain, GainSums
from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.deepseek_v4 import TensorName, expert_module, parse_name
from v4quant_formats.spec import torch_dtype
from v4quant_formats.weight_reading import read_dense, read_dense_rows, read_weight
from v4quant_formats.weights import StoredWeight, find_weight
from v4quant_kernels import codec
from v4quant_kernels.cast import can_cast, cast_mxfp4, top_exponent
from v4quant_kernels.errors import UnsupportedScheme, V4QuantError
from v4quant_kernels.scheme import MXFP4

# Differences below this are no damage: float32 rounding of two ways to decode the same value.
NEGLIGIBLE = 1e-6
# Larger matrices (the embedding of Flash has 2^29 weights) are compared so many weights at a time,
# in whole tiles of 128 rows. No expert is larger, so what its scales share is seen whole.
_PIECE = 2**25
_TILE_ROWS = 128


class WeightShapeError(V4QuantError):
    """Two checkpoints whose matrices of one name differ in shape."""


@dataclass(frozen=True)
class MatrixError:
    """Relative error and gain of one matrix; `scheme` is how the candidate stores it."""

    name: TensorName
    scheme: str
    relative_error: float
    gain: Gain


def measure(
    reference: Checkpoint, candidates: Sequence[Checkpoint], name: TensorName
) -> list[MatrixError]:
    """The error and the gain of one matrix in every candidate. Raises WeightShapeError."""
    shape = find_weight(reference, name.module).shape
    stored = [find_weight(candidate, name.module) for candidate in candidates]
    for candidate, weight in zip(candidates, stored, strict=True):
        if weight.shape != shape:
            raise WeightShapeError(
                f"{candidate.path}: '{name.module}' is {list(weight.shape)}, the reference's is "
                f"{list(shape)}; these are not conversions of one model"
            )
    sums = [(0.0, 0.0) for _ in candidates]
    gains = [GainSums() for _ in candidates]
    for piece in pieces(shape):
        dense = read_piece(reference, name.module, piece)
        for i, candidate in enumerate(candidates):
            mine = read_piece(candidate, name.module, piece)
            error, norm = squares(mine, dense)
            sums[i] = (sums[i][0] + error, sums[i][1] + norm)
            gains[i].add(mine, dense)
    return [
        MatrixError(name, weight.coding, ratio(*total), gain.result())
        for weight, total, gain in zip(stored, sums, gains, strict=True)
    ]


def pieces(shape: tuple[int, ...]) -> Iterator[slice | None]:
    """Rows of a large matrix, in order; None for all of a small one."""
    rows, columns = shape
    if rows * columns <= _PIECE:
        yield None
        return
    step = max(1, _PIECE // columns // _TILE_ROWS) * _TILE_ROWS
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def read_piece(checkpoint: Checkpoint, module: str, piece: slice | None) -> Tensor:
    """These rows of a matrix, all without a piece: `[N, K]` float32."""
    if piece is None:
        return read_dense(checkpoint, module)
    return read_dense_rows(checkpoint, module, piece.start, piece.stop)


def expected_error(reference: Checkpoint, module: str, target: StoredWeight) -> float | None:
    """Relative error of coding the reference's matrix as `target` codes it, by plain rounding.

    None when the scheme cannot be computed here.
    """
    error = norm = 0.0
    try:
        for piece in pieces(find_weight(reference, module).shape):
            dense = read_piece(reference, module, piece)
            more, own = squares(coded_as(reference, module, target, dense, piece), dense)
            error, norm = error + more, norm + own
    except UnsupportedScheme:
        return None
    return ratio(error, norm)


def coded_as(
    reference: Checkpoint, module: str, target: StoredWeight, dense: Tensor, piece: slice | None
) -> Tensor:
    """`dense`, these rows of the reference's matrix, as they come back from `target`'s coding."""
    if target.scheme is None:
        dtype = torch_dtype(target.first.dtype)
        return dense.to(dtype).float()
    stored = find_weight(reference, module)
    if stored.scheme == MXFP4 and can_cast(target.scheme):
        q = read_weight(reference, stored, None if piece is None else (piece.start, piece.stop))
        top = _fused_top(reference, module) if target.scheme.has_global_scale else None
        return codec.dequantize(cast_mxfp4(q, target.scheme, top).tensor)
    return codec.dequantize(codec.quantize(dense, target.scheme))


def _fused_top(reference: Checkpoint, module: str) -> int:
    """Top exponent an NVFP4 global scale is built on: w1 and w3 share one where engines fuse."""
    name = parse_name(f"{module}.weight")
    tops = [top_exponent(read_weight(reference, find_weight(reference, module)))]
    if name is not None and name.expert is not None and name.projection in ("w1", "w3"):
        partner = expert_module(name.stage, name.expert, "w3" if name.projection == "w1" else "w1")
        stored = find_weight(reference, partner)
        if stored.scheme == MXFP4:
            tops.append(top_exponent(read_weight(reference, stored)))
    return max(tops)
