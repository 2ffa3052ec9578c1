"""Weights read as QTensors: rows of a matrix in any stored form that `weights.find_weight` tells.

Forms that are not schemes of ours (zero points, group indices, FP4 under float scales) are decoded
as they are read. Whatever is read is finite: NaN and infinity are refused by tensor and file.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4quant_formats.checkpoint import Checkpoint
from v4quant_formats.errors import ImplausibleScales, WrongDtype
from v4quant_formats.integer_packs import (
    IntegerPack,
    read_values,
)
from v4quant_formats.scale_sense import beyond_half, said_beyond
from v4quant_formats.spec import TensorSpec
from v4quant_formats.weights import PLAIN_SCHEMES, SCALE_PARTS, StoredWeight, find_weight, matrix_of
from v4quant_kernels.codec import dequantize, holds_nan
from v4quant_kernels.errors import NonFiniteWeight
from v4quant_kernels.ggml import unpack_mxfp4
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e2m1
from v4quant_kernels.scheme import MXFP4, SCHEMES

_CPU = torch.device("cpu")
Rows = tuple[int, int] | Tensor | None
"""Which rows of a matrix: start and stop, numbers (int64 `[n]`), or all."""


def read_weight(checkpoint: Checkpoint, stored: StoredWeight, rows: Rows = None) -> QTensor:
    """Read a coded matrix, or its rows: `start:stop` (start a multiple of the block's height), or
    those of some numbers, which then have a scale each.

    Forms that no scheme has come as float32 values (`PLAIN_SCHEMES`). Raises NonFiniteWeight for
    NaN codes or scales, WrongDtype for a group index that names no group.
    """
    scheme = stored.scheme
    assert scheme is not None, stored.module
    if stored.base is not None:
        return _read_merged(checkpoint, stored.base, rows)
    if stored.pack is not None:
        return _read_pack(checkpoint, stored, stored.pack, rows)
    if stored.parts.keys() == {"weight"}:
        return _read_blocks(checkpoint, stored, rows)
    height = scheme.block[0]
    assert not isinstance(rows, tuple) or rows[0] % height == 0, (stored.module, rows)
    if isinstance(rows, Tensor):
        scheme = replace(scheme, block=(1, scheme.block[1]))

    def read(part: str, height: int = 1) -> Tensor:
        value = _read_part(checkpoint, stored.parts[part], rows, height)
        check_finite(checkpoint, stored.parts[part], value)
        return value

    scale_name = next(p for p in SCALE_PARTS if p in stored.parts)
    scale = read(scale_name, height)
    if scheme.scale == "e8m0":
        if scale.dtype == torch.uint8:  # stored as plain bytes, which `check_finite` lets pass
            _refuse_nan_scale(checkpoint, stored.parts[scale_name], scale)
        scale = scale.view(torch.float8_e8m0fnu)
    elif scheme.scale == "f32":
        scale = scale.float()
    global_scale: Tensor | None = None
    if "weight_packed" in stored.parts:
        codes = read("weight_packed").view(torch.uint8)
    else:
        codes = read("weight")
        if scheme.element == "e2m1":
            codes = codes.view(torch.uint8)
    if scheme.has_global_scale:
        global_scale = _global_scale(checkpoint, stored)
    _refuse_inverted(checkpoint, stored, scale, global_scale)
    shape = (codes.shape[0], stored.shape[1])
    if scheme.element == "e2m1" and scheme.scale == "f32":
        groups = e2m1.decode_packed(codes).view(*scale.shape, scheme.group_size)
        return _plain_matrix(groups.mul_(scale.unsqueeze(-1)).view(shape))
    return QTensor(scheme, shape, codes, scale, global_scale)


def _refuse_inverted(
    checkpoint: Checkpoint, stored: StoredWeight, scale: Tensor, global_scale: Tensor | None
) -> None:
    """Refuse scales whose values no half-precision number could hold. Raises ImplausibleScales."""
    assert stored.scheme is not None
    largest = beyond_half(stored.scheme, scale, global_scale)
    if largest is not None:
        where = checkpoint.path / stored.first.file
        raise ImplausibleScales(f"{where}: {said_beyond(stored.module, largest)}")


def _read_part(checkpoint: Checkpoint, spec: TensorSpec, rows: Rows, height: int = 1) -> Tensor:
    """A part of a weight, of which a row stands for `height` rows of the matrix."""
    if rows is None:
        return checkpoint.read(spec.name)
    if isinstance(rows, Tensor):
        return checkpoint.read_rows_at(spec.name, (rows // height).tolist())
    return checkpoint.read_rows(spec.name, rows[0] // height, -(-rows[1] // height))


def read_matrix(
    checkpoint: Checkpoint, stored: StoredWeight, rows: tuple[int, int] | None = None
) -> QTensor:
    """As `read_weight`, also of a plain matrix, whose codes are then its values as stored.

    Raises WrongDtype for what is not a matrix of floats.
    """
    if stored.scheme is not None:
        return read_weight(checkpoint, stored, rows)
    spec = stored.first
    if not stored.is_plain_matrix:
        raise WrongDtype(f"{checkpoint.path / spec.file}: '{spec}' is not a matrix of floats")
    start, stop = rows or (0, spec.shape[0])
    value = checkpoint.read_rows(spec.name, start, stop)
    check_finite(checkpoint, spec, value)
    return QTensor(PLAIN_SCHEMES[spec.dtype], (stop - start, spec.shape[1]), value)


def _read_merged(checkpoint: Checkpoint, base: StoredWeight, rows: Rows) -> QTensor:
    """A matrix with an adapter's delta: added in float64, rounded once to float32."""
    assert checkpoint.deltas is not None
    if isinstance(rows, Tensor):
        delta = checkpoint.deltas.delta(base.module, rows)
        return _plain_matrix((_rows_at(checkpoint, base, rows).double() + delta).float())
    start, stop = rows or (0, base.shape[0])
    height = 1 if base.scheme is None else base.scheme.block[0]
    first, last = start // height * height, min(-(-stop // height) * height, base.shape[0])
    values = dequantize(read_matrix(checkpoint, base, (first, last))).double()
    delta = checkpoint.deltas.delta(base.module, slice(start, stop))
    return _plain_matrix((values[start - first : stop - first] + delta).float())


def _rows_at(
    checkpoint: Checkpoint, stored: StoredWeight, rows: Tensor, device: torch.device = _CPU
) -> Tensor:
    """float32 rows of a matrix by number."""
    if stored.scheme is not None:
        return dequantize(read_weight(checkpoint, stored, rows).to(device))
    value = _read_part(checkpoint, stored.first, rows)
    check_finite(checkpoint, stored.first, value)
    return value.to(device).float()


def _plain_matrix(values: Tensor) -> QTensor:
    return QTensor(PLAIN_SCHEMES["F32"], (values.shape[0], values.shape[1]), values)


def _read_pack(
    checkpoint: Checkpoint, stored: StoredWeight, pack: IntegerPack, rows: Rows
) -> QTensor:
    def read(part: str) -> Tensor | None:
        spec = stored.parts.get(part)
        if spec is None:
            return None
        value = checkpoint.read(spec.name)
        check_finite(checkpoint, spec, value)
        return value

    try:
        values = read_values(pack, read)
    except WrongDtype as error:
        where = checkpoint.path / stored.first.file
        raise WrongDtype(f"{where}: '{stored.module}': {error}") from None
    if rows is None:
        return _plain_matrix(values)
    return _plain_matrix(values[rows if isinstance(rows, Tensor) else slice(*rows)])


def _global_scale(checkpoint: Checkpoint, stored: StoredWeight) -> Tensor:
    """The multiplier of a whole matrix; compressed-tensors stores its reciprocal."""
    inverse = "weight_global_scale" in stored.parts
    second = stored.parts["weight_global_scale" if inverse else "weight_scale_2"]
    value = checkpoint.read(second.name).reshape(())
    check_finite(checkpoint, second, value)
    if inverse and not float(value) > 0:
        raise NonFiniteWeight(_not_finite(checkpoint, second))
    return value.reciprocal() if inverse else value


def _read_blocks(checkpoint: Checkpoint, stored: StoredWeight, rows: Rows) -> QTensor:
    assert stored.scheme is not None
    weight = stored.parts["weight"]
    codes = _read_part(checkpoint, weight, rows)
    shape = (codes.shape[0], stored.shape[1])
    if stored.scheme == MXFP4:
        # Byte 255 is NaN in the release and a number in llama.cpp: nobody may have meant it.
        nibbles, scale = unpack_mxfp4(codes)
        _refuse_nan_scale(checkpoint, weight, scale)
        return QTensor(stored.scheme, shape, nibbles, scale)
    q = QTensor(stored.scheme, shape, codes)
    check_finite(checkpoint, replace(weight, dtype="F32"), dequantize(q))
    return q


def check_finite(checkpoint: Checkpoint, spec: TensorSpec, value: Tensor) -> None:
    """Refuse NaN and infinity (and E4M3 and E8M0 NaN codes) in data read for `spec`.

    Raises NonFiniteWeight. Integers pass: their bytes cannot be non-finite.
    """
    if spec.dtype == "F8_E8M0":
        _refuse_nan_scale(checkpoint, spec, value)
        return
    if spec.dtype == "F8_E4M3":
        bad = holds_nan(value)
    elif value.is_floating_point():
        bad = not bool(torch.isfinite(value).all())
    else:
        bad = False
    if bad:
        raise NonFiniteWeight(_not_finite(checkpoint, spec))


def _refuse_nan_scale(checkpoint: Checkpoint, spec: TensorSpec, scale: Tensor) -> None:
    if scale.numel() and int(scale.view(torch.uint8).max()) == 255:
        raise NonFiniteWeight(_not_finite(checkpoint, spec))


def _not_finite(checkpoint: Checkpoint, spec: TensorSpec) -> str:
    return (
        f"{checkpoint.path / spec.file}: '{spec.name}' holds NaN or infinity; "
        "the file is damaged or was converted wrongly, download it again"
    )


def read_dense(checkpoint: Checkpoint, module: str, device: torch.device = _CPU) -> Tensor:
    """A module's values in float32 (integer tables as stored): what the forward pass computes with.

    They are decoded on `device`, so that codes and not values travel there. Exact for every stored
    format. Raises as `find_weight` and `read_weight` do.
    """
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return dequantize(read_weight(checkpoint, stored).to(device))
    value = checkpoint.read(stored.first.name)
    if not value.is_floating_point():
        return value.to(device)
    check_finite(checkpoint, stored.first, value)
    return value.to(device).float()


def read_coded(checkpoint: Checkpoint, module: str, device: torch.device = _CPU) -> QTensor:
    """A module's codes and scales, or its BF16 values, on `device`.

    Raises WrongDtype for a matrix of another kind, else as `find_weight` and `read_weight` do.
    """
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        return read_weight(checkpoint, stored).to(device)
    spec = stored.first
    if spec.dtype != "BF16":
        raise WrongDtype(f"{spec.file}: '{spec}' is neither quantized nor BF16")
    rows, columns = matrix_of(spec)
    value = checkpoint.read(spec.name)
    check_finite(checkpoint, spec, value)
    return QTensor(SCHEMES["bf16"], (rows, columns), value).to(device)


def read_dense_rows(
    checkpoint: Checkpoint, module: str, start: int, stop: int, device: torch.device = _CPU
) -> Tensor:
    """Rows start .. stop - 1 of `read_dense`; only they, and what shares a scale, are read."""
    stored = find_weight(checkpoint, module)
    if stored.scheme is not None:
        height = stored.scheme.block[0]
        first, last = start // height * height, min(-(-stop // height) * height, stored.shape[0])
        coded = read_weight(checkpoint, stored, (first, last)).to(device)
        return dequantize(coded)[start - first : stop - first]
    spec = stored.first
    value = checkpoint.read_rows(spec.name, start, stop)
    if not value.is_floating_point():
        return value.to(device)
    check_finite(checkpoint, spec, value)
    return value.to(device).float()


def read_dense_at(
    checkpoint: Checkpoint, module: str, rows: Tensor, device: torch.device = _CPU
) -> Tensor:
    """Rows of `read_dense` by number, `[n, K]`: of tables too large to read. Nothing else is read.

    rows: int64 `[n]`; sorted ones are read in the file's order. Raises IndexError for a row that
    is not there.
    """
    return _rows_at(checkpoint, find_weight(checkpoint, module), rows, device)
