"""The routed experts: one Unit is an expert's w1, w3 and w2.

Three ways for a matrix, tried in this order: the codes already are what is wanted (copy); the
target holds MXFP4's values, so they are recoded exactly (kernels.ref.cast); otherwise a solver
finds codes (calibration.solvers), or has found them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from v4quant.conversion.calibrated import solved_codes
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import (
    TensorRecord,
    lossy_record,
    make_record,
    refuse_inexact,
    refuse_overflow,
)
from v4quant.conversion.scale_hints import ambiguous_groups, hints_of, to_text, with_hints
from v4quant.conversion.units import Unit
from v4quant.devices import CPU
from v4quant_calibration.rounding.measure import measured
from v4quant_calibration.rounding.solvers import SOLVERS, optimal
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.layouts.deepseek import DEEPSEEK
from v4quant_formats.shards import ShardWriter
from v4quant_formats.weight_reading import read_matrix
from v4quant_formats.weights import StoredWeight
from v4quant_kernels import codec
from v4quant_kernels.cast import can_cast, cast_mxfp4, top_exponent
from v4quant_kernels.grids import find_mxfp4
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.scale_search import QuantizedMatrix
from v4quant_kernels.scheme import MXFP4, Scheme

_ROWS = 512  # rows of a matrix searched for GGUF blocks at a time


def convert_experts(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Convert one expert's matrices and write what the layout makes of them."""
    records = []
    device = _device(plan)
    kept = _stage(unit.sources[0]) in plan.kept
    layout = DEEPSEEK if kept else plan.recipe.layout
    schemes = [_wanted(plan, stored, kept) for stored in unit.sources]
    matrices = [
        _read(plan, stored, scheme).to(device)
        for stored, scheme in zip(unit.sources, schemes, strict=True)
    ]
    tops = _nvfp4_tops(matrices) if schemes[0].has_global_scale else [_Top()] * len(matrices)
    for stored, q, scheme, top in zip(unit.sources, matrices, schemes, tops, strict=True):
        result, record = _convert_matrix(plan, stored, q, scheme, stats, top)
        if q.scheme == MXFP4 and record.source != MXFP4.name:
            record = replace(record, grid=MXFP4.name)
        amax = input_amax(plan, stored, stats) if layout.stores_input_scale else 0.0
        for suffix, tensor in layout.expert_tensors(result, amax).items():
            writer.add(f"{stored.module}.{suffix}", tensor.cpu())
        records.append(record)
    return records


def _stage(stored: StoredWeight) -> str:
    return stored.module.partition(".ffn.experts.")[0]


def _wanted(plan: Plan, stored: StoredWeight, kept: bool) -> Scheme:
    if kept:
        return MXFP4
    wanted = plan.recipe.scheme_for(_stage(stored), stored.module.rpartition(".")[2])
    fitting = wanted.tiled(plan.config.fp8_tile).fitting(stored.shape[1])
    assert fitting is not None, "refused when the conversion was planned"
    return fitting


def _read(plan: Plan, stored: StoredWeight, wanted: Scheme) -> QTensor:
    """A matrix of the source; in MXFP4 where its values are such numbers, however it is stored."""
    q = read_matrix(plan.checkpoint, stored)
    if stored.scheme is not None and stored.scheme.name in (MXFP4.name, wanted.name):
        return q
    values = codec.dequantize(q)
    refuse_overflow(plan.checkpoint, stored, values)
    found = find_mxfp4(values)
    if found is None:
        return q
    return with_hints(found, values.float(), hints_of(plan.checkpoint, stored.module))


def _device(plan: Plan) -> torch.device:
    """Solutions are read ready-made and GGUF's blocks are searched by compiled CPU loops."""
    blocks = any(scheme.is_block_type for scheme in plan.recipe.expert_schemes)
    here = plan.recipe.solver == "gptq" or blocks
    return CPU if here else plan.device


@dataclass(frozen=True)
class _Top:
    """What w1 and w3 must agree on for NVFP4: the top exponent (MXFP4) or the largest value.

    copies: both already are NVFP4 with one second-level scale.
    """

    exponent: int | None = None
    amax: float | None = None
    copies: bool = True


def _nvfp4_tops(matrices: list[QTensor]) -> list[_Top]:
    """Engines fuse w1 and w3 and keep one second-level scale, so both are built on the larger."""
    gate, up, down = matrices
    shared = _shared_top(gate, up)
    return [shared, shared, _shared_top(down)]


def _shared_top(*matrices: QTensor) -> _Top:
    if all(q.scheme == MXFP4 for q in matrices):
        return _Top(exponent=max(top_exponent(q) for q in matrices))
    scales = {None if q.global_scale is None else float(q.global_scale) for q in matrices}
    amax = max(float(codec.dequantize(q).abs().max()) for q in matrices)
    return _Top(amax=amax, copies=len(scales) == 1)


def _convert_matrix(
    plan: Plan,
    stored: StoredWeight,
    q: QTensor,
    scheme: Scheme,
    stats: Evidence | None,
    top: _Top,
) -> tuple[QTensor, TensorRecord]:
    if q.scheme.name == scheme.name and top.copies:
        same = stored.coding == scheme.name
        return q, make_record(stored, "copied" if same else "cast", scheme.name)
    if q.scheme == MXFP4 and can_cast(scheme) and top.amax is None:
        cast = cast_mxfp4(q, scheme, top.exponent)
        refuse_inexact(plan, stored, cast.altered, scheme.name)
        if not cast.altered:
            return cast.tensor, make_record(stored, "cast", scheme.name)
        loss = measured(codec.dequantize(q), cast.tensor)
        return cast.tensor, lossy_record(stored, scheme, loss, "cast", cast.altered)
    if scheme.is_plain:
        return _to_bf16(plan, stored, q)
    if scheme.is_block_type:
        return _to_blocks(plan, stored, q, scheme, stats)
    if scheme.coder:
        if q.scheme != MXFP4:
            refuse_overflow(plan.checkpoint, stored, codec.dequantize(q))
        found = _solve(plan, stored.module, q, scheme, stats)
    else:
        values = codec.dequantize(q)
        refuse_overflow(plan.checkpoint, stored, values)
        found = _quantize_floats(values, scheme, top)
        if not found.squared_error:
            return found.tensor, make_record(stored, "cast", scheme.name)
    return found.tensor, lossy_record(stored, scheme, found, "quantized", 0)


def _to_bf16(plan: Plan, stored: StoredWeight, q: QTensor) -> tuple[QTensor, TensorRecord]:
    """An expert matrix in bfloat16: exact, but for scales beyond bfloat16's normal numbers."""
    values = codec.dequantize(q)
    refuse_overflow(plan.checkpoint, stored, values)
    found = measured(values, codec.quantize(values, plan.scheme))
    altered = int((codec.dequantize(found.tensor) != values).sum())
    refuse_inexact(plan, stored, altered, "bf16")
    if not altered:
        record = make_record(stored, "cast", "bf16")
        if q.scheme == MXFP4 and record.source == MXFP4.name:
            record = replace(record, scales=to_text(ambiguous_groups(q)))
        return found.tensor, record
    return found.tensor, lossy_record(stored, plan.scheme, found, "cast", altered)


def _to_blocks(
    plan: Plan, stored: StoredWeight, q: QTensor, scheme: Scheme, stats: Evidence | None
) -> tuple[QTensor, TensorRecord]:
    """An expert matrix in GGUF's block type: the solution's codes where it has some, else searched
    in pieces of rows; FP4 values that fit are counted.
    """
    if (solved := solved_codes(plan.recipe, stats, stored.module, scheme, q.shape)) is not None:
        found = measured(codec.dequantize(q), solved)
        if not found.squared_error:
            return solved, make_record(stored, "cast", scheme.name)
        return solved, lossy_record(stored, scheme, found, "quantized", 0)
    importance = stats.importance(stored.module) if stats else None
    solver = SOLVERS.get(plan.recipe.solver, optimal)
    pieces, squared, norm, largest = [], 0.0, 0.0, 0.0
    for start in range(0, q.shape[0], _ROWS):
        values = codec.dequantize(q.rows(start, min(start + _ROWS, q.shape[0])))
        refuse_overflow(plan.checkpoint, stored, values)
        found = solver(values, scheme, importance)
        pieces.append(found.tensor)
        squared, norm = squared + found.squared_error, norm + found.squared_norm
        largest = max(largest, found.max_error)
    result = QTensor.stacked(pieces)
    if not squared:
        return result, make_record(stored, "cast", scheme.name)
    whole = QuantizedMatrix(result, squared, norm, largest)
    return result, lossy_record(stored, scheme, whole, "quantized", 0)


def _solve(
    plan: Plan, module: str, q: QTensor, scheme: Scheme, stats: Evidence | None
) -> QuantizedMatrix:
    """Integer codes: the solution's where it has some, else the recipe's plain solver's."""
    importance = stats.importance(module) if stats else None
    if plan.recipe.solver != "gptq":
        return SOLVERS[plan.recipe.solver](q, scheme, importance)
    solved = solved_codes(plan.recipe, stats, module, scheme, q.shape)
    if solved is None:
        return optimal(q, scheme, importance)
    return measured(codec.dequantize(q), solved)


def _quantize_floats(x: Tensor, scheme: Scheme, top: _Top) -> QuantizedMatrix:
    extra = {}
    if scheme.has_global_scale and top.amax is not None:
        extra["global_scale"] = torch.tensor(max(top.amax, 2.0**-100) / (6 * 448), device=x.device)
    return measured(x, codec.quantize(x, scheme, **extra))


def input_amax(plan: Plan, stored: StoredWeight, stats: Evidence | None) -> float:
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
    return plan.largest_norm(_stage(stored)) * math.sqrt(config.hidden_size)
