"""Tensors outside the routed experts: copied, widened, rounded; always in bounded pieces."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from v4quant.conversion.calibrated import solved_codes
from v4quant.conversion.losses import Loss, UseLoss
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import (
    TensorRecord,
    lossy_record,
    make_record,
    refuse_inexact,
    refuse_overflow,
)
from v4quant.conversion.scale_hints import differing, hints_of, to_text, with_hints
from v4quant.conversion.units import Unit
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import optimal
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.errors import WrongDtype
from v4quant_formats.shards import ShardWriter
from v4quant_formats.spec import torch_dtype
from v4quant_formats.weight_reading import check_finite, read_matrix
from v4quant_formats.weights import StoredWeight, scale_part
from v4quant_kernels import codec
from v4quant_kernels.ggml_types import block_type
from v4quant_kernels.grids import find_fp8_tiles
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0, fp8_block
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import SCHEMES

_DENSE_ROWS = 512  # rows of an FP8 matrix dequantized at a time; a multiple of every tile height
_PIECE = 2**20  # elements, where rows are so short that more of them make one piece


def copy_tensors(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Byte for byte."""
    for stored in unit.sources:
        for spec in stored.parts.values():
            for first_byte, piece in plan.checkpoint.read_chunks(spec.name):
                check_finite(plan.checkpoint, spec, piece)
                writer.add_piece(spec.name, first_byte, piece)
    return [make_record(stored, "copied", stored.coding) for stored in unit.sources]


def recast(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """The same numbers in another dtype: wider floats, or expert numbers in 32 bits."""
    stored, wanted = unit.sources[0], unit.outputs[0]
    spec = stored.first
    dtype = torch_dtype(wanted.dtype)
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
    importance = stats.importance(stored.module) if stats else None
    squared, norm, largest = 0.0, 0.0, 0.0
    use = UseLoss.of(stats, stored.module)
    for start, values in dense_rows(plan, stored):
        if solved is None:
            found = optimal(values, scheme, importance)
        else:
            found = measured(values, solved.rows(start, start + len(values)))
        squared, norm = squared + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
        if use is not None:
            use.add(start, values, codec.dequantize(found.tensor))
        writer.add_piece(wanted.name, start * wanted.row_bytes, found.tensor.codes)
    whole = QuantizedMatrix(found.tensor, squared, norm, largest)
    record = lossy_record(stored, scheme, whole, "quantized", 0)
    return [record if use is None else replace(record, relative_rms_in_use=use.relative_rms)]


def dense_rows(plan: Plan, stored: StoredWeight) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) of a dense matrix, however it is stored."""
    for start, q in coded_rows(plan, stored):
        values = codec.dequantize(q)
        refuse_overflow(plan.checkpoint, stored, values)
        yield start, values


def coded_rows(plan: Plan, stored: StoredWeight) -> Iterator[tuple[int, QTensor]]:
    """(first row, rows) of a dense matrix."""
    step = _DENSE_ROWS * max(1, _PIECE // (_DENSE_ROWS * stored.shape[1]))
    for start in range(0, stored.shape[0], step):
        stop = min(start + step, stored.shape[0])
        yield start, read_matrix(plan.checkpoint, stored, (start, stop))


def widen_to_bf16(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Any matrix in BF16 (or float32): FP8 exactly but for scales near 2^-127, others rounded."""
    stored, wanted = unit.sources[0], unit.outputs[0]
    columns, dtype = stored.shape[1], torch_dtype(wanted.dtype)
    if dtype == torch.bfloat16 and _widens_exactly(plan, stored):
        hints: dict[int, int] = {}
        for start, q in coded_rows(plan, stored):
            wide = codec.widen(q)
            writer.add_piece(wanted.name, start * columns * 2, wide)
            if q.scheme.block[0] > 1 and q.scale is not None:
                first = start // q.scheme.block[0] * q.scale.shape[1]
                told = differing(find_fp8_tiles(wide, q.scheme), q)
                hints |= {first + index: byte for index, byte in told.items()}
        return [replace(make_record(stored, "cast", "bf16"), scales=to_text(hints))]
    loss = Loss()
    for start, values in dense_rows(plan, stored):
        rounded = values.to(dtype)
        refuse_overflow(plan.checkpoint, stored, rounded)
        loss.add(values, rounded)
        writer.add_piece(wanted.name, start * columns * dtype.itemsize, rounded)
    return [loss.record(plan, stored, wanted.dtype.lower())]


def _widens_exactly(plan: Plan, stored: StoredWeight) -> bool:
    scale, scheme = scale_part(stored), stored.scheme
    if scale is None or scheme is None or (scheme.element, scheme.scale) != ("e4m3", "e8m0"):
        return False
    pieces = plan.checkpoint.read_chunks(scale.name)  # an Engram's scales take gigabytes
    return all(fp8_block.widens_exactly(piece) for _, piece in pieces)


def code_in_tiles(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """A matrix in the release's FP8 tiles, scales powers of two: exactly where its values fit."""
    stored, (weight, scale) = unit.sources[0], unit.outputs
    scheme, loss = SCHEMES["fp8"].tiled(plan.config.fp8_tile), Loss()
    columns = stored.shape[1]
    across, hints = scale.shape[1], hints_of(plan.checkpoint, stored.module)
    size = 4 if scale.dtype == "F32" else 1
    for start, values in dense_rows(plan, stored):
        coded = find_fp8_tiles(values, scheme)
        if coded is None:
            coded = codec.quantize(values, scheme)
        else:
            coded = with_hints(coded, values, hints, start // scheme.block[0] * across)
        assert coded.scale is not None
        loss.add(values, codec.dequantize(coded))
        writer.add_piece(weight.name, start * columns, coded.codes)
        tiles = e8m0.decode(coded.scale) if scale.dtype == "F32" else coded.scale
        writer.add_piece(scale.name, start // scheme.block[0] * across * size, tiles)
    return [loss.record(plan, stored, "fp8")]


def change_scales(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """An FP8 matrix whose scales change dtype or name: E8M0 widened, or floats narrowed.

    Scales that are not powers of two cannot be narrowed; the matrix is then coded anew.
    """
    stored, (weight, wanted) = unit.sources[0], unit.outputs
    spec = scale_part(stored)
    assert spec is not None
    scale = plan.checkpoint.read(spec.name)
    check_finite(plan.checkpoint, spec, scale)
    values = scale.float() if scale.dtype.itemsize > 1 else e8m0.decode(scale)
    narrow = values.to(torch.float8_e8m0fnu)
    if wanted.dtype != "F32" and not torch.equal(e8m0.decode(narrow), values):
        return code_in_tiles(plan, unit, writer, stats)
    for first_byte, piece in plan.checkpoint.read_chunks(stored.parts["weight"].name):
        check_finite(plan.checkpoint, stored.parts["weight"], piece)
        writer.add_piece(weight.name, first_byte, piece)
    if wanted.dtype == "F32":
        writer.add(wanted.name, values)
        return [make_record(stored, "cast", "fp8 with float32 scales")]
    writer.add(wanted.name, narrow)
    return [make_record(stored, "cast", "fp8")]
