"""convert: one Unit's arithmetic. Reads slices, recodes or quantizes, hands tensors to the writer.

Three ways for an expert matrix, tried in this order: the codes already are what is wanted (copy);
the target holds MXFP4's values, so they are recoded exactly (kernels.ref.cast); otherwise a solver
finds codes (calibration.solvers), or has found them. Dense tensors are carried in bounded pieces.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from v4quant.devices import CPU
from v4quant.plan import Plan, expert_scheme
from v4quant.records import Disposition, TensorRecord
from v4quant.units import Unit
from v4quant_calibration.scale_search import QuantizedMatrix
from v4quant_calibration.solution import Evidence, Solution
from v4quant_calibration.solvers import SOLVERS, measured
from v4quant_formats.errors import WrongDtype
from v4quant_formats.shards import ShardWriter
from v4quant_formats.spec import BLOCK_DTYPES, TORCH_DTYPES
from v4quant_formats.weights import StoredWeight, check_finite, read_weight, scale_part
from v4quant_kernels.errors import NonFiniteWeight, V4QuantError
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import codec, e8m0, fp8_block
from v4quant_kernels.ref.cast import can_cast, cast_mxfp4, top_exponent
from v4quant_kernels.scheme import SCHEMES, Scheme

_DENSE_ROWS = 512  # rows of an FP8 matrix dequantized at a time; a multiple of every tile height


class InexactCast(V4QuantError):
    """A cast would change values and the recipe says to refuse."""


class ScaleNotPowerOfTwo(V4QuantError):
    """A float32 scale that E8M0 cannot hold."""


class _Converter(Protocol):
    def __call__(
        self, plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
    ) -> list[TensorRecord]: ...


def convert_unit(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Convert one unit and write its tensors. Returns one record per module.

    Raises NonFiniteWeight, WrongDtype, SourceChanged, InexactCast, ScaleNotPowerOfTwo or
    OutputError.
    """
    return _CONVERTERS[unit.action](plan, unit, writer, stats)


def _copy(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    for stored in unit.sources:
        for spec in stored.parts.values():
            for first_byte, piece in plan.checkpoint.read_chunks(spec.name):
                check_finite(plan.checkpoint, spec, piece)
                writer.add_piece(spec.name, first_byte, piece)
    return [_record(stored, "copied", _storage(stored)) for stored in unit.sources]


def _recast(
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
    _refuse_inexact(plan, stored, altered, wanted.dtype.lower())
    return [_record(stored, "cast", wanted.dtype.lower(), altered)]


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


def _blocks(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """A dense matrix in GGUF's block type, rounded in pieces of rows."""
    stored, wanted = unit.sources[0], unit.outputs[0]
    scheme = SCHEMES[BLOCK_DTYPES[wanted.dtype]]
    del stats  # calibration covers the routed experts only
    squared, norm, largest = 0.0, 0.0, 0.0
    for start, values in _dense_rows(plan, stored):
        found = measured(values, codec.quantize(values, scheme))
        squared, norm = squared + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
        writer.add_piece(wanted.name, start * wanted.row_bytes, found.tensor.codes)
    whole = QuantizedMatrix(found.tensor, squared, norm, largest)
    return [_lossy_record(stored, scheme, whole, "quantized", 0)]


def _dense_rows(plan: Plan, stored: StoredWeight) -> Iterator[tuple[int, Tensor]]:
    """(first row, float32 rows) of a dense matrix, coded or plain."""
    spec = next(iter(stored.parts.values()))
    for start in range(0, stored.shape[0], _DENSE_ROWS):
        stop = min(start + _DENSE_ROWS, stored.shape[0])
        if stored.scheme is None:
            values = plan.checkpoint.read_rows(spec.name, start, stop)
            check_finite(plan.checkpoint, spec, values)
            yield start, values.float()
        else:
            values = codec.dequantize(read_weight(plan.checkpoint, stored, (start, stop)))
            _refuse_overflow(plan, stored, values)
            yield start, values


def _bf16(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    stored, name = unit.sources[0], unit.outputs[0].name
    columns = stored.shape[1]
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
    _refuse_inexact(plan, stored, altered, "bf16")
    record = _record(stored, "cast", "bf16", altered)
    if altered:
        record = replace(record, relative_rms=math.sqrt(squared / norm), max_error=largest)
    return [record]


def _rescale(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """An FP8 matrix whose scales change dtype or name: E8M0 widened, or float32 narrowed."""
    stored, (_, wanted) = unit.sources[0], unit.outputs
    scale, spec = _copy_codes(plan, stored, writer), scale_part(stored)
    assert spec is not None
    values = fp8_block.decode_scale(scale)
    if wanted.dtype == "F32":
        writer.add(wanted.name, values)
        return [_record(stored, "cast", "fp8 with float32 scales")]
    narrow = values.to(torch.float8_e8m0fnu)
    if not torch.equal(e8m0.decode(narrow), values):
        raise ScaleNotPowerOfTwo(
            f"{plan.checkpoint.path / spec.file}: '{spec.name}' holds scales that are no powers of "
            f"two, which '{plan.scheme.name}' in format '{plan.recipe.format}' needs; use fp8 or a "
            "compressed-tensors scheme"
        )
    writer.add(wanted.name, narrow)
    return [_record(stored, "cast", "fp8")]


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


def _experts(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    records = []
    device = _device(plan)
    matrices = [read_weight(plan.checkpoint, stored).to(device) for stored in unit.sources]
    tops = _nvfp4_tops(plan, matrices)
    layout = plan.recipe.layout
    for stored, q, top in zip(unit.sources, matrices, tops, strict=True):
        result, record = _convert_matrix(plan, stored, q, stats, top)
        amax = _input_amax(plan, stored, stats) if layout.stores_input_scale else 0.0
        for suffix, tensor in layout.expert_tensors(result, amax).items():
            writer.add(f"{stored.module}.{suffix}", tensor.cpu())
        records.append(record)
    return records


def _device(plan: Plan) -> torch.device:
    """Solutions are read ready-made and GGUF's blocks are searched by compiled CPU loops."""
    blocks = any(scheme.element == "ggml" for scheme in plan.recipe.expert_schemes)
    here = plan.recipe.solver == "gptq" or blocks
    return CPU if here else plan.device


_CONVERTERS: dict[str, _Converter] = {
    "copy": _copy,
    "recast": _recast,
    "blocks": _blocks,
    "bf16": _bf16,
    "f32_scale": _rescale,
    "e8m0_scale": _rescale,
    "experts": _experts,
}


@dataclass(frozen=True)
class _Top:
    """What w1 and w3 must agree on for NVFP4: the top exponent (MXFP4) or the largest value."""

    exponent: int | None = None
    amax: float | None = None


def _nvfp4_tops(plan: Plan, matrices: list[QTensor]) -> list[_Top]:
    """Engines fuse w1 and w3 and keep one second-level scale, so both are built on the larger."""
    if plan.scheme.name != "nvfp4":
        return [_Top()] * len(matrices)
    own = []
    for q in matrices:
        if q.scheme.name == "mxfp4":
            own.append(_Top(exponent=top_exponent(q)))
        else:
            own.append(_Top(amax=float(codec.dequantize(q).abs().max())))
    gate, up, down = own
    if gate.exponent is not None and up.exponent is not None:
        shared = _Top(exponent=max(gate.exponent, up.exponent))
    else:
        shared = _Top(amax=max(gate.amax or 0.0, up.amax or 0.0))
    return [shared, shared, down]


def _convert_matrix(
    plan: Plan, stored: StoredWeight, q: QTensor, stats: Evidence | None, top: _Top
) -> tuple[QTensor, TensorRecord]:
    stage, _, place = stored.module.partition(".ffn.experts.")
    scheme = expert_scheme(plan.recipe.scheme_for(stage, place.rpartition(".")[2]), q.shape[1])
    if q.scheme.name == scheme.name:
        return q, _record(stored, "copied", scheme.name)
    if q.scheme.name == "mxfp4" and can_cast(scheme):
        cast = cast_mxfp4(q, scheme, top.exponent)
        _refuse_inexact(plan, stored, cast.altered, scheme.name)
        if not cast.altered:
            return cast.tensor, _record(stored, "cast", scheme.name)
        loss = measured(codec.dequantize(q), cast.tensor)
        return cast.tensor, _lossy_record(stored, scheme, loss, "cast", cast.altered)
    if scheme.name == "bf16":
        return _to_bf16(plan, stored, q)
    if scheme.element == "ggml":
        return _to_blocks(plan, stored, q, scheme, stats)
    if scheme.element == "int":
        if q.scheme.name != "mxfp4":
            _refuse_overflow(plan, stored, codec.dequantize(q))
        found = _solve(plan, stored.module, q, stats)
    else:
        values = codec.dequantize(q)
        _refuse_overflow(plan, stored, values)
        found = _quantize_floats(values, scheme, top)
    return found.tensor, _lossy_record(stored, scheme, found, "quantized", 0)


def _to_bf16(plan: Plan, stored: StoredWeight, q: QTensor) -> tuple[QTensor, TensorRecord]:
    """An expert matrix in bfloat16: exact, but for scales beyond bfloat16's normal numbers."""
    values = codec.dequantize(q)
    _refuse_overflow(plan, stored, values)
    found = measured(values, codec.quantize(values, plan.scheme))
    altered = int((codec.dequantize(found.tensor) != values).sum())
    _refuse_inexact(plan, stored, altered, "bf16")
    if not altered:
        return found.tensor, _record(stored, "cast", "bf16")
    return found.tensor, _lossy_record(stored, plan.scheme, found, "cast", altered)


def _to_blocks(
    plan: Plan, stored: StoredWeight, q: QTensor, scheme: Scheme, stats: Evidence | None
) -> tuple[QTensor, TensorRecord]:
    """An expert matrix in GGUF's block type, in pieces of rows; FP4 values that fit are counted."""
    importance = stats.importance(stored.module) if stats else None
    pieces, squared, norm, largest = [], 0.0, 0.0, 0.0
    for start in range(0, q.shape[0], _DENSE_ROWS):
        values = codec.dequantize(_rows_of(q, start, min(start + _DENSE_ROWS, q.shape[0])))
        _refuse_overflow(plan, stored, values)
        found = measured(values, codec.quantize(values, scheme, importance=importance))
        pieces.append(found.tensor.codes)
        squared, norm = squared + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
    result = QTensor(scheme, q.shape, torch.cat(pieces))
    if not squared:
        return result, _record(stored, "cast", scheme.name)
    whole = QuantizedMatrix(result, squared, norm, largest)
    return result, _lossy_record(stored, scheme, whole, "quantized", 0)


def _rows_of(q: QTensor, start: int, stop: int) -> QTensor:
    """Rows of a coded matrix; `start` is a multiple of its block's height."""
    assert q.scale is not None
    height = q.scheme.block[0]
    scale = q.scale[start // height : -(-stop // height)]
    return QTensor(q.scheme, (stop - start, q.shape[1]), q.codes[start:stop], scale)


def _solve(plan: Plan, module: str, q: QTensor, stats: Evidence | None) -> QuantizedMatrix:
    """Integer codes: the solution's where it has some, else the recipe's plain solver's."""
    if plan.recipe.solver != "gptq":
        importance = stats.importance(module) if stats else None
        return SOLVERS[plan.recipe.solver](q, plan.scheme, importance)
    assert isinstance(stats, Solution), "checked when the solution was read"
    solved = stats.solved(module, plan.scheme, q.shape)
    if solved is None:  # a draft stage that calibration cannot run
        return SOLVERS["optimal"](q, plan.scheme, stats.importance(module))
    return measured(codec.dequantize(q), solved)


def _quantize_floats(x: Tensor, scheme: Scheme, top: _Top) -> QuantizedMatrix:
    extra = {}
    if scheme.name == "nvfp4" and top.amax is not None:
        extra["global_scale"] = torch.tensor(max(top.amax, 2.0**-100) / (6 * 448), device=x.device)
    return measured(x, codec.quantize(x, scheme, **extra))


def _input_amax(plan: Plan, stored: StoredWeight, stats: Evidence | None) -> float:
    """Largest input magnitude an expert matrix must expect: measured, or a proven bound.

    w1 and w3 see an RMS-normalised row times the norm's weight, so |x_i| <= sqrt(d) * max|w|. w2
    sees routing weight * silu(gate) * up with gate <= limit and |up| <= limit, so
    <= routed_scaling_factor * limit^2.
    """
    seen = stats.input_amax(stored.module) if stats else None
    if seen:
        return seen
    config = plan.config
    if stored.module.endswith(".w2"):
        return config.routed_scaling_factor * config.swiglu_limit**2
    stage = stored.module.split(".ffn.", maxsplit=1)[0]
    norm = plan.checkpoint.read(f"{stage}.ffn_norm.weight").float().abs().max()
    return float(norm) * math.sqrt(config.hidden_size)


def _refuse_inexact(plan: Plan, stored: StoredWeight, altered: int, target: str) -> None:
    if altered and plan.recipe.on_inexact == "refuse":
        raise InexactCast(
            f"{plan.checkpoint.path}: '{stored.module}' does not fit {target} exactly: {altered} "
            "values would change; --on-inexact nearest takes the nearest and counts them"
        )


def _refuse_overflow(plan: Plan, stored: StoredWeight, values: Tensor) -> None:
    """Finite codes and finite scales may still multiply beyond float32."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteWeight(
            f"{plan.checkpoint.path}: '{stored.module}' holds values beyond float32's range; "
            "the file is damaged or was converted wrongly, download it again"
        )


def _storage(stored: StoredWeight) -> str:
    return stored.scheme.name if stored.scheme else next(iter(stored.parts.values())).dtype.lower()


def _record(
    stored: StoredWeight, disposition: Disposition, target: str, altered: int = 0
) -> TensorRecord:
    return TensorRecord(
        stored.module, disposition, _storage(stored), target, math.prod(stored.shape), altered
    )


def _lossy_record(
    stored: StoredWeight,
    scheme: Scheme,
    loss: QuantizedMatrix,
    disposition: Disposition,
    altered: int,
) -> TensorRecord:
    return TensorRecord(
        stored.module,
        disposition,
        _storage(stored),
        scheme.name,
        math.prod(stored.shape),
        altered,
        relative_rms=loss.relative_rms,
        max_error=loss.max_error,
    )
