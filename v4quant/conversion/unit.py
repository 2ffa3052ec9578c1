"""convert: one Unit. Reads slices, recodes or quantizes them, hands tensors to the writer."""

from __future__ import annotations

from typing import Protocol

from v4quant.conversion.dense import (
    change_scales,
    code_in_tiles,
    copy_tensors,
    recast,
    round_to_blocks,
    widen_to_bf16,
)
from v4quant.conversion.experts import convert_experts
from v4quant.conversion.fp8_rows import code_in_rows
from v4quant.conversion.plan import Plan
from v4quant.conversion.records import TensorRecord
from v4quant.conversion.units import Unit
from v4quant_calibration.solve.solution import Evidence
from v4quant_formats.shards import ShardWriter


class _Converter(Protocol):
    def __call__(
        self, plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
    ) -> list[TensorRecord]: ...


def convert_unit(
    plan: Plan, unit: Unit, writer: ShardWriter, stats: Evidence | None
) -> list[TensorRecord]:
    """Convert one unit and write its tensors. Returns one record per module.

    Raises NonFiniteWeight, WrongDtype, SourceChanged, InexactCast or OutputError.
    """
    return _CONVERTERS[unit.action](plan, unit, writer, stats)


_CONVERTERS: dict[str, _Converter] = {
    "copy": copy_tensors,
    "recast": recast,
    "blocks": round_to_blocks,
    "bf16": widen_to_bf16,
    "fp8": code_in_tiles,
    "mxfp8": code_in_rows,
    "f32_scale": change_scales,
    "e8m0_scale": change_scales,
    "experts": convert_experts,
}
