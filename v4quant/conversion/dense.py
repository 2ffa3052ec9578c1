"""Tensors outside the routed experts: copied, widened, rounded; always in bounded pieces."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from v4quant.conversion.calibrated import solved_codes
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import (
    ScaleNotPowerOfTwo,
    TensorRecord,
    lossy_record,
    make_record,
    refuse_inexact,
    refuse_overflow,
    storage_name,
)
from v4quant.conversion.units import Unit
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.errors import WrongDtype
from v4quant_formats.shards import ShardWriter
from v4quant_formats.spec import TORCH_DTYPES
from v4quant_formats.weights import StoredWeight, check_finite, read_weight, scale_part
from v4quant_kernels import codec
from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import SCHEMES

_DENSE_ROWS = 512  # rows of an FP8 matrix dequantized at a time; a multiple of every tile height


def copy_tensors(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Byte for byte."""
    for stored in unit.sources:
        for spec in stored.parts.values():
            for first_byte, piece in plan.checkpoint.read_chunks(spec.name):
                check_finite(plan.checkpoint, spec, piece)
                writer.add_piece(spec.name, first_byte, piece)
    return [make_record(stored, "copied", storage_name(stored)) for stored in unit.sources]


def recast(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """The same numbers in another dtype: wider floats, or expert numbers in 32 bits."""
    stored, wanted = unit.sources[0], unit.outputs[0]
    spec = next(iter(stored.parts.values()))
    dtype = TORCH_DTYPES[wanted.dtype]
    altered, position = 0, 0
    for _, piece in plan.checkpoint.read_chunks(spec.name):
        check_finite(plan.checkpoint, spec, piece)
        if dtype == torch.int32:
            _check_experts(plan, stored, piece)
        cast = piece.to(dtype)
        altered += int((cast.double() != piece.double()).sum())
        writer.add_piece(wanted.name, position, cast)
        position += cast.numel() * cast.element_size()
    refuse_inexact(plan, stored, altered, wanted.dtype.lower())
    return [make_record(stored, "cast", wanted.dtype.lower(), altered)]


def _check_experts(plan: Plan, stored: StoredWeight, piece: Tensor) -> None:
    """A routing table may name experts that exist only."""
    if (
        piece.numel()
        and not 0 <= int(piece.min()) <= int(piece.max()) < plan.config.n_routed_experts
    ):
        raise WrongDtype(
            f"{plan.checkpoint.path}: '{stored.module}' names experts {int(piece.min())} to "
            f"{int(piece.max())} of {plan.config.n_routed_experts}; the file is damaged"
        )


def round_to_blocks(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """A dense matrix in GGUF's block type: the solution's codes where it has some, else rounded, in
    pieces of rows.
    """
    stored, wanted = unit.sources[0], unit.outputs[0]
    kind = block_type(wanted.dtype)
    assert kind is not None, wanted
    scheme = SCHEMES[kind.name]
    shape = (stored.shape[0], stored.shape[1])
    solved = solved_codes(plan.recipe, stats, stored.module, scheme, shape)
    squared, norm, largest = 0.0, 0.0, 0.0
    for start, values in _dense_rows(plan, stored):
        if solved is None:
            coded = codec.quantize(values, scheme)
        else:
            part = solved.codes[start : start + len(values)]
            coded = QTensor(scheme, (len(values), shape[1]), part)
        found = measured(values, coded)
        squared, norm = squared + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
        writer.add_piece(wanted.name, start * wanted.row_bytes, found.tensor.codes)
    whole = QuantizedMatrix(found.tensor, squared, norm, largest)
    return [lossy_record(stored, scheme, whole, "quantized", 0)]


def _dense_rows(plan: Plan, stored: StoredWeight) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) of a dense matrix, coded or plain."""
    if stored.scheme is not None:
        for start, q in _coded_rows(plan, stored):
            values = codec.dequantize(q)
            refuse_overflow(plan.checkpoint, stored, values)
            yield start, values
        return
    spec = next(iter(stored.parts.values()))
    for start in range(0, stored.shape[0], _DENSE_ROWS):
        stop = min(start + _DENSE_ROWS, stored.shape[0])
        values = plan.checkpoint.read_rows(spec.name, start, stop)
        check_finite(plan.checkpoint, spec, values)
        yield start, values.float()


def _coded_rows(plan: Plan, stored: StoredWeight) -> Iterator[tuple[int, QTensor]]:
    """(first row, rows) of a coded dense matrix."""
    for start in range(0, stored.shape[0], _DENSE_ROWS):
        stop = min(start + _DENSE_ROWS, stored.shape[0])
        yield start, read_weight(plan.checkpoint, stored, (start, stop))


def widen_to_bf16(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """FP8 in BF16: exact, but for scales near 2^-127."""
    stored, name = unit.sources[0], unit.outputs[0].name
    columns, scale = stored.shape[1], scale_part(stored)
    assert scale is not None
    if fp8_block.widens_exactly(plan.checkpoint.read(scale.name)):
        for start, q in _coded_rows(plan, stored):
            writer.add_piece(name, start * columns * 2, codec.widen(q))
        return [make_record(stored, "cast", "bf16")]
    altered, squared, norm, largest = 0, 0.0, 0.0, 0.0
    for start, values in _dense_rows(plan, stored):
        rounded = values.bfloat16()
        error = rounded.float().sub_(values)
        # Only scales near 2^-127 reach bfloat16's subnormals; all else is exact.
        norm += float(values.double().square().sum())
        if changed := int(error.count_nonzero()):
            altered, squared = altered + changed, squared + float(error.double().square().sum())
            largest = max(largest, float(error.abs().max()))
        writer.add_piece(name, start * columns * 2, rounded)
    refuse_inexact(plan, stored, altered, "bf16")
    record = make_record(stored, "cast", "bf16", altered)
    if altered:
        record = replace(record, relative_rms=math.sqrt(squared / norm), max_error=largest)
    return [record]


def change_scales(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """An FP8 matrix whose scales change dtype or name: E8M0 widened, or float32 narrowed."""
    stored, (_, wanted) = unit.sources[0], unit.outputs
    scale, spec = _copy_codes(plan, stored, writer), scale_part(stored)
    assert spec is not None
    values = fp8_block.decode_scale(scale)
    if wanted.dtype == "F32":
        writer.add(wanted.name, values)
        return [make_record(stored, "cast", "fp8 with float32 scales")]
    narrow = values.to(torch.float8_e8m0fnu)
    if not torch.equal(e8m0.decode(narrow), values):
        raise ScaleNotPowerOfTwo(
            f"{plan.checkpoint.path / spec.file}: '{spec.name}' holds scales that are no powers of "
            f"two, which '{plan.scheme.name}' in format '{plan.recipe.format}' needs; use fp8 or a "
            "compressed-tensors scheme"
        )
    writer.add(wanted.name, narrow)
    return [make_record(stored, "cast", "fp8")]


def _copy_codes(plan: Plan, stored: StoredWeight, writer: ShardWriter) -> Tensor:
    """Copy an FP8 matrix's elements as they are; its scale, read and checked, for the caller."""
    weight, scale = stored.parts["weight"], scale_part(stored)
    assert scale is not None
    for first_byte, piece in plan.checkpoint.read_chunks(weight.name):
        check_finite(plan.checkpoint, weight, piece)
        writer.add_piece(weight.name, first_byte, piece)
    value = plan.checkpoint.read(scale.name)
    check_finite(plan.checkpoint, scale, value)
    return value
