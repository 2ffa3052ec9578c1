"""Byte classes: which kind of tensor takes how much of a conversion, before and after.

The manifest carries this table, so that a model card can tell where the bytes are without opening
a shard.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from v4quant.conversion.plan import Plan
from v4quant_formats.deepseek_v4 import parse_name, role_of


@dataclass
class ByteClass:
    """Tensors of one role. `weights` counts logical elements, scales not among them."""

    role: str
    weights: int = 0
    bytes_in: int = 0
    bytes_out: int = 0


def byte_classes(plan: Plan) -> list[ByteClass]:
    """All units of a plan by role, the largest output first."""
    classes: dict[str, ByteClass] = {}
    for unit in plan.units:
        first = next(iter(unit.sources[0].parts.values()))
        role = role_of(parse_name(first.name))
        found = classes.setdefault(role, ByteClass(role))
        found.weights += sum(math.prod(s.shape) for s in unit.sources)
        found.bytes_in += unit.bytes_in
        found.bytes_out += unit.bytes_out
    return sorted(classes.values(), key=lambda c: (-c.bytes_out, c.role))
