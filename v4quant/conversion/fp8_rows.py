"""Matrices in MXFP8: E4M3 codes with a power-of-two scale for every row and 32 columns.

What vLLM's form of V4.1 wants of dense matrices, and every engine of the Engram's tables. An FP8
matrix keeps its codes, each tile's scale repeated for all of its rows. Other numbers get the best
scale of each group: the smallest under which nothing saturates, or half of it, where saturating
the largest value costs less than finer steps near zero gain. No other can be best, since between
them E4M3 has the same grid whatever the scale. Rows stream through in bounded pieces.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from v4quant.conversion.dense import coded_rows
from v4quant.conversion.losses import Loss, UseLoss
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord, refuse_overflow
from v4quant.conversion.units import Unit
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.shards import ShardWriter
from v4quant_formats.spec import torch_dtype
from v4quant_kernels import codec
from v4quant_kernels.qtensor import QTensor
from v4quant_kernels.ref import e8m0
from v4quant_kernels.scheme import SCHEMES

_MXFP8 = SCHEMES["mxfp8"]


def code_in_rows(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """A matrix in MXFP8, exactly where its values are FP8 numbers already."""
    stored, (weight, scale) = unit.sources[0], unit.outputs
    loss, use = Loss(), UseLoss.of(stats, stored.module)
    columns, groups = weight.shape[1], scale.shape[1]
    for start, q in coded_rows(plan, stored):
        values = codec.dequantize(q)
        refuse_overflow(plan.checkpoint, stored, values)
        coded = _spread(q) or best_rows(values)
        assert coded.scale is not None
        result = codec.dequantize(coded)
        loss.add(values, result)
        if use is not None:
            use.add(start, values, result)
        writer.add_piece(weight.name, start * columns, coded.codes)
        bytes_ = coded.scale.view(torch_dtype(scale.dtype))
        writer.add_piece(scale.name, start * groups, bytes_)
    record = loss.record(plan, stored, _MXFP8.name)
    if use is None or record.exact:
        return [record]
    return [replace(record, relative_rms_in_use=use.relative_rms)]


def best_rows(values: Tensor) -> QTensor:
    """Float [N, K] in MXFP8 with the scale of least squared error in every group."""
    plain = codec.quantize(values, _MXFP8)
    assert plain.scale is not None
    halved = e8m0.exponents(plain.scale).sub(1).clamp_min(e8m0.MIN_EXPONENT)
    finer = codec.quantize(values, _MXFP8, scale=e8m0.encode_exponent(halved))
    better = _errors(finer, values) < _errors(plain, values)
    if not bool(better.any()):
        return plain
    exponent = torch.where(better, halved, e8m0.exponents(plain.scale))
    return codec.quantize(values, _MXFP8, scale=e8m0.encode_exponent(exponent))


def _errors(q: QTensor, values: Tensor) -> Tensor:
    error = (codec.dequantize(q) - values.float()).double().square()
    return error.view(len(values), -1, _MXFP8.group_size).sum(-1)


def _spread(q: QTensor) -> QTensor | None:
    """The same FP8 codes under a scale for every row and 32 columns; None for other numbers."""
    if q.scheme.element != "e4m3" or q.scale is None or q.scheme.block[1] % _MXFP8.group_size:
        return None
    scale = q.scale
    if q.scheme.scale == "f32":
        narrow = scale.to(torch.float8_e8m0fnu)
        if not torch.equal(e8m0.decode(narrow), scale.float()):
            return None
        scale = narrow
    height, width = q.scheme.block
    wide = scale.view(torch.uint8).repeat_interleave(height, 0)[: q.shape[0]]
    wide = wide.repeat_interleave(width // _MXFP8.group_size, 1)
    wide = wide[:, : q.shape[1] // _MXFP8.group_size].contiguous()
    return QTensor(_MXFP8, q.shape, q.codes, wide.view(torch.float8_e8m0fnu))
